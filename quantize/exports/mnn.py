"""NAME_mnn.json, by which MNN's converter makes int8 of the plain pair, and NAME.mnn if MNN is installed.

The file is MNN's ``Compression.Pipeline`` as JSON. A convolution and the ReLU behind it are one layer, named
after what comes out; it runs in integers if what goes in and what comes out are on codes. Weights go by the
scale of each output channel and are ours exactly. Codes go to 127 at most: those of a full byte would need
zero points, with which MNN's sums and poolings come out wrong (3.6.1).

The converter is MNN's extension module, in a process of its own: MNN's command line, and what it imports,
would install packages and send its log away.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

from quantize.caffenet import LayerParameter, NetParameter, format_prototxt
from quantize.caffenet.quantized import Quantizer
from quantize.caffenet.strings import to_bytes
from quantize.errors import InputError, LabelfreeError
from quantize.exports.caffe import caffemodel, plain_net
from quantize.exports.integers import IntegerLayer, IntegerNet, whole_codes
from quantize.exports.target import Exported

INSTALL = "pip install 'labelfree[mnn]'"
LONGEST_CONVERSION = 600
_LOWEST, _HIGHEST = -128, 127
_CONVERT = "import sys, _tools; sys.exit(0 if _tools.mnnconvert(['mnnconvert', *sys.argv[1:]]) else 1)"
_OPTIONS = ("-f", "CAFFE", "--MNNModel", "net.mnn", "--bizCode", "labelfree")
_CONVERTED = ("Convolution", "InnerProduct")


def export_mnn(net: IntegerNet, name: str) -> Exported:
    """Make NAME_mnn.json, the plain pair that it is for, and NAME.mnn if MNN is installed.

    Args:
        net: the net.
        name: of the files.

    Raises:
        InputError: MNN has no such codes, or its converter refuses the net.
        LabelfreeError: the converter does not come to an end.
    """
    plain, quantizers = plain_net(net)
    for blob, quantizer in quantizers.items():
        if quantizer.highest > _HIGHEST:
            raise InputError(
                f"blob {blob!r}: codes {quantizer.lowest} to {quantizer.highest}; for MNN they go to 127: "
                "quantize with activations.levels: 127, or export to onnx"
            )
    floats = dict(net.floats)
    layers = []
    for layer in plain.layer:
        if layer.name in net.layers and layer.name not in floats:
            found = whole_codes(net.layers[layer.name])
            why = _why_float(layer, found, _output(plain, layer), quantizers)
            if why is not None:
                floats[layer.name] = why
                continue
            layers.append(_parameters(layer, found, _output(plain, layer), quantizers))
    parameters = {"roundMode": "ROUND_AWAY_FROM_ZERO", "layer": layers}
    pipeline = {"version": "0.0.0", "algo": [{"type": "QUANTIZE", "quantParams": parameters}]}
    files = {
        f"{name}_plain.prototxt": to_bytes(format_prototxt(plain)),
        f"{name}_plain.caffemodel": caffemodel(net.weights),
        f"{name}_mnn.json": (json.dumps(pipeline, indent=1) + "\n").encode(),
    }
    if find_spec("_tools") is None or find_spec("MNN") is None:
        note = f"MNN is not installed, so there is no {name}.mnn: {INSTALL}"
        return Exported(files, floats, (note,))
    return Exported({**files, f"{name}.mnn": _converted(files)}, floats)


def _output(plain: NetParameter, layer: LayerParameter) -> str:
    """What comes out of a layer for MNN: of the ReLU behind it, if that alone reads it."""
    readers = [each for each in plain.layer if layer.top[0] in each.bottom]
    is_relu = len(readers) == 1 and readers[0].type == "ReLU" and not readers[0].relu_param.negative_slope
    return readers[0].top[0] if is_relu else layer.top[0]


def _why_float(
    layer: LayerParameter, whole: IntegerLayer, output: str, quantizers: Mapping[str, Quantizer]
) -> str | None:
    if layer.type not in _CONVERTED:
        return f"MNN has no {layer.type} in integers"
    if not _LOWEST <= whole.codes.min() <= whole.codes.max() <= _HIGHEST:
        return f"its weights reach {abs(whole.codes).max():.0f}, int8 ends at 127"
    if output not in quantizers:
        return "what it makes is not on codes (activations.sums, for branches of sums)"
    return None


def _parameters(
    layer: LayerParameter, whole: IntegerLayer, output: str, quantizers: Mapping[str, Quantizer]
) -> dict[str, object]:
    """A LayerQuantizeParams."""
    scales = [float(scale) or 1.0 for scale in whole.scale]  # of both signs, so that -128 need not turn
    weight = {"name": layer.name, "bits": 8, "scales": scales, "clampMin": _LOWEST, "clampMax": _HIGHEST}
    return {
        "input": [_tensor(layer.bottom[0], quantizers[layer.bottom[0]])],
        "weight": [weight],
        "output": [_tensor(output, quantizers[output])],
        "method": "QAT",
    }


def _tensor(blob: str, quantizer: Quantizer) -> dict[str, object]:
    """An ActivationParams: x = scale * q."""
    limits = {"clampMin": quantizer.lowest, "clampMax": quantizer.highest}
    return {"name": blob, "bits": 8, "scales": [quantizer.step], "zeroPoint": 0, **limits}


def _converted(files: Mapping[str, bytes]) -> bytes:
    """What MNN's converter makes of prototxt, caffemodel and parameters.

    Raises:
        InputError: it refuses the net.
        LabelfreeError: it does not come to an end.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = dict(zip(("--prototxt", "--modelFile", "--compressionParamsFile"), files, strict=True))
        for file, content in files.items():
            (folder / file).write_bytes(content)
        options = [word for pair in given.items() for word in pair]
        command = [sys.executable, "-c", _CONVERT, *_OPTIONS, *options]
        try:
            done = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=LONGEST_CONVERSION, check=False
            )
        except subprocess.TimeoutExpired:
            raise LabelfreeError(f"MNN's converter took more than {LONGEST_CONVERSION} seconds") from None
        if done.returncode or not (folder / "net.mnn").is_file():
            said = "; ".join(_complaints(done.stdout + done.stderr)) or f"exit code {done.returncode}"
            raise InputError(f"MNN's converter cannot convert this net: {said}; export to onnx or ncnn")
        return (folder / "net.mnn").read_bytes()


def _complaints(output: str) -> Iterator[str]:
    """The last lines that the converter has printed, but for those that are no complaint."""
    for line in output.splitlines()[-5:]:
        if line.strip() and not line.startswith(("Start to", "The device")):
            yield line.strip()
