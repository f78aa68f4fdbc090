"""`labelfree inspect`: what is in a network, what would be done to it and why not, the plan of the sweep."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from quantize.caffenet import (
    TEST,
    BlobId,
    InferenceNet,
    NetParameter,
    Weights,
    check_weights,
    data_layer,
    declared_shape,
    doubtful_norms,
    infer_shapes,
    load_schema,
    load_weights,
    owners,
    read_prototxt,
)
from quantize.commands.summary import table
from quantize.data.transform import shape_text
from quantize.errors import InputError
from quantize.settings import WeightSettings, parse_size
from quantize.stages.activations import plain_relus
from quantize.stages.renorm import Tour
from quantize.stages.weights import QUANTIZED_TYPES, choices, unquantizable, weight_users
from quantize.sweep.plan import Costs, Route, Step, plan

COLOR_CHANNELS = 3


@dataclass(frozen=True)
class LayerRow:
    """One layer: its first top's shape without the batch, its parameters (those that it shares with layers
    before it aside) and multiply-accumulates per image, and what the tool would do with it.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    parameters: int
    macs: int
    plan: str


def inspect_net(net: NetParameter, shape: Sequence[int], settings: WeightSettings) -> list[LayerRow]:
    """The layers of a net as they run in the TEST phase on images of ``shape``."""
    test = InferenceNet.of(net)
    shapes = infer_shapes(test.net, {test.blob: (1, *shape)})
    chosen = choices(test.net, settings)
    first_user = {user: name for name, users in weight_users(test.net).items() for user in users}
    left_out = unquantizable(test.net)
    shared = owners(test.net)
    relus = plain_relus(test.net)
    rows = []
    for layer in test.net.layer:
        first = first_user.get(layer.name, layer.name)
        if first in chosen:
            same = "" if first == layer.name else f", those of {first}"
            what = f"weights: {chosen[first].bits} bits {chosen[first].grid}{same}"
        elif layer.name in left_out:
            what = f"kept: {left_out[layer.name]}"
        elif layer.type in QUANTIZED_TYPES:
            what = "kept: weights.layers says skip"
        elif layer.type == "BatchNorm":
            what = "renorm"
        elif layer.name in relus:
            what = "becomes ActQuantize"
        elif layer.type == "ReLU":
            what = "kept: it has a negative slope"
        elif shapes.params[layer.name]:
            what = f"kept: weights of type {layer.type} are not quantized"
        else:
            what = ""
        rows.append(
            LayerRow(
                layer.name,
                layer.type,
                tuple(shapes.blobs[layer.top[0]][1:]),
                sum(
                    math.prod(blob)
                    for index, blob in enumerate(shapes.params[layer.name])
                    if BlobId(layer.name, index) not in shared
                ),
                shapes.macs.get(layer.name, 0),
                what,
            )
        )
    return rows


@dataclass(frozen=True)
class Inspection:
    """A network to look at.

    Attributes:
        net: its prototxt.
        shape: (channels, height, width) of its images.
        notes: lines about its weights.
    """

    net: NetParameter
    shape: tuple[int, ...]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, prototxt: Path, weights: Path | None, shape: str | None, caffe_proto: Path | None = None
    ) -> Inspection:
        """Read a network; with ``weights`` check them against it.

        Raises:
            InputError: bad files, weights that do not fit, or a shape that is not known.
        """
        net = read_prototxt(prototxt, load_schema(caffe_proto) if caffe_proto else None)
        test = InferenceNet.of(net)
        found = parse_shape(shape) if shape is not None else declared_shape(net, test.blob) or _cropped(net)
        if found is None:
            raise InputError(
                f"{prototxt}: the shape of the images is not in it; give --shape, as in --shape 3,224,224"
            )
        if weights is None:
            return cls(net, found)
        given = load_weights(weights, net)
        check_weights(test.net, given, infer_shapes(test.net, {test.blob: (1, *found)}))
        return cls(net, found, tuple(doubtful_norms(test.net, given)))


def parse_shape(text: str) -> tuple[int, ...]:
    """``3,224,224`` as numbers.

    Raises:
        InputError: not numbers above zero.
    """
    parts = text.replace("x", ",").split(",")
    if not all(part.strip().isdecimal() and 0 < int(part) < 1 << 20 for part in parts):
        raise InputError(f"--shape {text}: expected channels, height and width, as in 3,224,224")
    return tuple(int(part) for part in parts)


def _cropped(net: NetParameter) -> tuple[int, ...] | None:
    layer = data_layer(net, TEST)
    if layer is None or not layer.transform_param.crop_size:
        return None
    means = len(layer.transform_param.mean_value)
    channels = 1 if layer.transform_param.force_gray else means if means > 1 else COLOR_CHANNELS
    return channels, layer.transform_param.crop_size, layer.transform_param.crop_size


def layers_text(found: Inspection, as_json: bool) -> str:
    """The layers as a table or as JSON."""
    rows = inspect_net(found.net, found.shape, WeightSettings())
    parameters, macs = sum(row.parameters for row in rows), sum(row.macs for row in rows)
    if as_json:
        layers = [asdict(row) for row in rows]
        return json.dumps({"layers": layers, "parameters": parameters, "macs": macs, "notes": found.notes})
    cells = [("layer", "type", "shape", "parameters", "MMACs", "plan")]
    cells += [
        (r.name, r.type, shape_text(r.shape), f"{r.parameters:,}", f"{r.macs / 1e6:,.1f}", r.plan)
        for r in rows
    ]
    total = f"total: {parameters:,} parameters, {macs / 1e6:,.1f} million multiply-accumulates"
    return "\n".join([table(cells), "", total, *(f"note: {note}" for note in found.notes)])


def plan_text(found: Inspection, images: int, memory: str, as_json: bool) -> str:
    """The plan of renorm's sweep: per step what is kept, bytes and recomputed work."""
    try:
        bound = parse_size(memory)
    except ValueError as error:
        raise InputError(f"--memory {memory}: {error}") from error
    test = InferenceNet.of(found.net)
    if not any(layer.type == "BatchNorm" for layer in test.net.layer):
        raise InputError("the net has no BatchNorm layer: renorm has nothing to do")
    tour = Tour.of(test.net, Weights())
    net, steps = tour.net, tour.steps
    shapes = infer_shapes(net, {test.blob: (1, *found.shape)})
    costs = Costs.of(net, shapes, [test.blob], (), steps)
    chosen = plan(costs, steps, images, bound)
    if as_json:
        return json.dumps({**asdict(chosen), "kept_bytes": chosen.kept_bytes, "work": chosen.work})
    texts = [_route_text(route, net, steps, costs) for route in chosen.routes]
    total = (
        f"{images} images, micro-batches of {chosen.micro_batch}: keeps {chosen.kept_bytes >> 20:,} MiB, "
        f"does {chosen.work / chosen.plain_work:.2f} times the work of one plain pass"
    )
    return "\n\n".join([*texts, total])


def _route_text(route: Route, net: NetParameter, steps: Sequence[Step], costs: Costs) -> str:
    cells = [("step", "measures before", "starts from", "then keeps", "MB per image", "recomputed MMACs")]
    done = 0
    for number, (step, origin, keep) in enumerate(zip(steps, route.origin, route.keep, strict=True)):
        again = costs.work[min(done, step.stop)] - costs.work[origin or 0]
        held = keep if keep is not None else origin
        cells.append(
            (
                str(number + 1),
                net.layer[step.stop].name if step.stop < len(net.layer) else "the last BatchNorm",
                "the images" if origin is None else f"behind {net.layer[origin - 1].name}",
                "as before" if keep is None else f"behind {net.layer[keep - 1].name}",
                f"{(costs.live[held] if held else 0) / 1e6:.2f}",
                f"{again / 1e6:,.1f}",
            )
        )
        done = step.stop
    return f"{route.images} images go this way:\n{table(cells)}"
