"""``NAME_scales.json``: the neutral form as a file, for those who write a target of their own."""

from __future__ import annotations

import json

from quantize.exports.integers import IntegerNet


def scales_json(net: IntegerNet) -> str:
    """The text of ``NAME_scales.json``.

    ``tensors`` has by blob the step and the lowest and highest code: x = step * q. ``layers`` has what is on
    codes by layer: y = s * (Q . q) + bias, one s (it may be negative) and one bias per output channel; where
    the layer reads no codes, q is what it reads. ``float`` has the layers that cannot run in integers, and
    why.
    """
    layers = {}
    for layer in net.net.layer:
        if layer.name in net.layers:
            found, read = net.layers[layer.name], net.quantizers.get(layer.bottom[0])
            layers[layer.name] = {
                "type": layer.type,
                "reads": layer.bottom[0],
                "makes": layer.top[0],
                "bits": found.bits,
                "grid": found.grid,
                "s": [float(s) for s in found.scale * (1.0 if read is None else read.step)],
                "bias": [float(b) for b in found.bias],
            }
    tree = {
        "name": net.name,
        "inputs": {blob: list(shape) for blob, shape in net.inputs.items()},
        "outputs": list(net.outputs),
        "tensors": {
            blob: {"step": code.step, "lowest": code.lowest, "highest": code.highest}
            for blob, code in net.quantizers.items()
        },
        "layers": layers,
        "float": dict(net.floats),
    }
    return json.dumps(tree, indent=1) + "\n"
