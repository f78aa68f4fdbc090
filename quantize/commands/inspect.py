"""`labelfree inspect`: what is in a network, what would be done to it and why not, the plan of the sweep."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from quantize.arrays import Shape
from quantize.caffenet import (
    TEST,
    BlobId,
    InferenceNet,
    NetParameter,
    Shapes,
    Weights,
    check_weights,
    data_layer,
    doubtful_norms,
    infer_shapes,
    known_part,
    load_weights,
    owners,
    read_net,
)
from quantize.caffenet.bvlc import LayerForms
from quantize.caffenet.model import Model
from quantize.caffenet.norms import norm_places
from quantize.caffenet.quantizers import with_quantizers
from quantize.caffenet.shape_rules import has_rule
from quantize.caffenet.traits import Trait, traits_of
from quantize.caffenet.weights import raw_types_text
from quantize.commands.summary import coverage_text, size_text, table
from quantize.data.transform import shape_text
from quantize.errors import InputError
from quantize.host import using_threads
from quantize.job.feeds import input_shapes
from quantize.job.given import Given
from quantize.job.inputs import GivenShapes, is_placeholder, placeholder_text, shapes_of_inputs
from quantize.job.run import Run
from quantize.job.sizes import packed_bytes, packed_layers
from quantize.progress import SILENT, Progress
from quantize.record import Budget, Coverage, QuantizerLayer
from quantize.settings import (
    DEFAULT_MEMORY,
    ActivationSettings,
    Config,
    GridChoice,
    RenormSettings,
    WeightSettings,
    parse_size,
)
from quantize.stages.coverage import coverage
from quantize.stages.renorm import Tour
from quantize.stages.sites import Site, find_sites
from quantize.stages.weights import choices, to_be_quantized, unquantizable, weight_users
from quantize.sweep.plan import Costs, Route, Step, plan

COLOR_CHANNELS = 3


@dataclass(frozen=True)
class LayerRow:
    """One layer: its first top's shape without the batch, its parameters (those that it shares with layers
    before it aside) and multiply-accumulates per image, and what the tool would do with it. Behind a layer of
    an unknown type the three are None.
    """

    name: str
    type: str
    shape: Shape | None
    parameters: int | None
    macs: int | None
    plan: str


def inspect_net(
    net: NetParameter, inputs: Mapping[str, Shape], chosen: Mapping[str, GridChoice], config: Config | None
) -> list[LayerRow]:
    """The layers of a net as they run in the TEST phase.

    Args:
        net: the net with all its phases.
        inputs: by input the shape of one image's values.
        chosen: the grids of the layers to quantize.
        config: what the stages would be run with; None: not known.
    """
    test = InferenceNet.of(net)
    shapes = shapes_of(test.net, inputs)
    first_user = {user: name for name, users in weight_users(test.net).items() for user in users}
    left_out = unquantizable(test.net)
    shared = owners(test.net)
    sites = {site.behind: site for site in planned_sites(test, config)}
    rows = []
    for layer in test.whole.layer:
        first = first_user.get(layer.name, layer.name)
        if first in chosen:
            same = "" if first == layer.name else f", those of {first}"
            what = f"weights: {chosen[first].bits} bits {chosen[first].grid}{same}"
        elif layer.name in left_out:
            what = f"kept: {left_out[layer.name]}"
        elif Trait.KERNELS in traits_of(layer):
            what = "kept: weights.layers says skip"
        elif norm_places(layer) is not None:
            what = _renorm(config)
        elif layer.name in test.trailing:
            what = "carried over: not run, and nothing that is quantized needs it"
        elif not has_rule(layer.type):
            what = f"kept: type {layer.type} is unknown here, engine: caffe may run it"
        elif shapes.params.get(layer.name):
            what = f"kept: weights of type {layer.type} are not quantized"
        else:
            what = ""
        if site := sites.get(layer.name):
            then = "becomes ActQuantize" if not site.readers else f"then ActQuantize {site.name}"
            what = f"{what}; {then}" if what else then
        known = layer.name in shapes.params
        blobs = enumerate(shapes.params.get(layer.name, ()))
        own = [math.prod(blob) for index, blob in blobs if BlobId(layer.name, index) not in shared]
        rows.append(
            LayerRow(
                layer.name,
                layer.type,
                tuple(shapes.blobs[layer.top[0]][1:]) if known else None,
                sum(own) if known else None,
                shapes.macs.get(layer.name, 0) if known else None,
                what,
            )
        )
    return rows


def _settings(config: Config | None) -> tuple[WeightSettings, ActivationSettings]:
    """Those of a configuration, or the defaults."""
    if config is None:
        return WeightSettings(), ActivationSettings()
    return config.weights, config.activations


def planned_sites(test: InferenceNet, config: Config | None) -> list[Site]:
    """Where activations would be quantized."""
    weights, activations = _settings(config)
    return find_sites(test.net, test.inputs, to_be_quantized(test.net, weights), activations)


def planned_coverage(inspected: Inspection) -> Coverage:
    """How much of the net's work would be quantized."""
    test, config = (
        InferenceNet.of(inspected.net),
        inspected.configured.config if inspected.configured else None,
    )
    planned = [
        QuantizerLayer(site.name, 1.0, 1, False, list(site.readers)) for site in planned_sites(test, config)
    ]
    return coverage(
        InferenceNet.of(with_quantizers(inspected.net, planned)).net,
        test.inputs,
        to_be_quantized(test.net, _settings(config)[0]),
        shapes_of(test.net, inspected.inputs).macs,
    )


def _renorm(config: Config | None) -> str:
    return "renorm" if config is None else f"renorm: {config.renorm.statistics} statistics"


def shapes_of(net: NetParameter, inputs: Mapping[str, Shape]) -> Shapes:
    """What the layers of known types imply, and that have only such layers before them."""
    one = {blob: (1, *shape) for blob, shape in inputs.items()}
    return infer_shapes(known_part(net, one), one)


@dataclass(frozen=True)
class Configured:
    """What a configuration would do to a net.

    Attributes:
        config: the settings.
        budget: how it would be spent, if any.
        model: bytes of the caffemodel.
        packed: bytes with the bits that the layers would have.
        mean_bits: per quantized weight.
    """

    config: Config
    budget: Budget | None
    model: int
    packed: int
    mean_bits: float


@dataclass(frozen=True)
class Inspection:
    """A network to look at: its prototxt and, by input, the shape of one image's values.

    Attributes:
        net: the network.
        inputs: the shapes.
        notes: what should be said about them.
        chosen: the grids of the layers to quantize.
        configured: what a configuration would do, where there is one.
    """

    net: NetParameter
    inputs: dict[str, Shape]
    notes: list[str]
    chosen: dict[str, GridChoice]
    configured: Configured | None = None

    @classmethod
    def of(
        cls,
        prototxt: Path,
        weights: Path | None,
        shapes: GivenShapes,
        caffe_proto: Path | None = None,
        stages: Sequence[str] = (),
        level: int = 0,
        write: LayerForms = "as_read",
    ) -> Inspection:
        """Read a network; with ``weights`` check them against it.

        Raises:
            InputError: bad files, weights that do not fit, or a shape that is not known.
        """
        net = read_net(prototxt, caffe_proto, stages, level, write)
        test = InferenceNet.of(net)
        inputs = shapes_of_inputs(net, shapes, "--shape")
        cropped = _cropped(net)
        if test.blob not in inputs and cropped is not None:
            inputs[test.blob] = cropped
        for name in test.inputs:
            if name not in inputs:
                example = "3,224,224" if len(test.inputs) == 1 else f"{name}=3,224,224"
                raise InputError(
                    f"{prototxt}: the shape of its input {name!r} is not in it; give --shape, as in --shape "
                    f"{example}"
                )
        notes = [
            placeholder_text(name, shape, "--shape, data.input_shape")
            for name, shape in inputs.items()
            if shapes is None and is_placeholder(shape)
        ]
        if weights is not None:
            one = {blob: (1, *shape) for blob, shape in inputs.items()}
            known = known_part(test.net, one)
            given = load_weights(weights, net)
            check_weights(known, given, infer_shapes(known, one))
            notes += doubtful_norms(test.net, given)
            notes += [raw_types_text(given)] if given.raw_types else []
        return cls(net, inputs, notes, choices(test.net, WeightSettings()))

    @classmethod
    def of_config(cls, config: Config) -> Inspection:
        """Read the network of a configuration.

        Raises:
            InputError: as `of`, or images of unknown shape.
        """
        model = config.model
        with closing(Given(config)) as job:
            given = {name: list(shape) for name, shape in input_shapes(job).items()}
        return cls.of(
            model.prototxt, model.weights, given, model.caffe_proto, model.stages, model.level, model.write
        )

    def configured_by(self, config: Config, progress: Progress = SILENT) -> Inspection:
        """With what a configuration would do; the bits within a budget are measured.

        Raises:
            InputError: what the weights stage would refuse.
        """
        run = Run(config, progress)
        with using_threads(config.threads):
            chosen, budget = run.grids()
        layers = packed_layers(run.given.model, chosen)
        count = sum(layer.weights for layer in layers)
        configured = Configured(
            config,
            budget,
            config.model.weights.stat().st_size,
            packed_bytes(run.given.model, layers),
            sum(layer.weights * layer.bits for layer in layers) / count if count else 0.0,
        )
        return replace(self, chosen=chosen, configured=configured)


def _cropped(net: NetParameter) -> Shape | None:
    layer = data_layer(net, TEST)
    if layer is None or not layer.transform_param.crop_size:
        return None
    means = len(layer.transform_param.mean_value)
    channels = 1 if layer.transform_param.force_gray else means if means > 1 else COLOR_CHANNELS
    return channels, layer.transform_param.crop_size, layer.transform_param.crop_size


def layers_text(inspected: Inspection, as_json: bool) -> str:
    """The layers as a table or as JSON."""
    configured = inspected.configured
    rows = inspect_net(
        inspected.net, inspected.inputs, inspected.chosen, configured.config if configured else None
    )
    parameters, macs = sum(row.parameters or 0 for row in rows), sum(row.macs or 0 for row in rows)
    planned = planned_coverage(inspected)
    if as_json:
        layers = [asdict(row) for row in rows]
        would = {} if configured is None else _configured_json(configured)
        return json.dumps(
            {
                "layers": layers,
                "parameters": parameters,
                "macs": macs,
                "coverage": asdict(planned),
                "notes": inspected.notes,
                **would,
            }
        )
    cells = [("layer", "type", "shape", "parameters", "MMACs", "plan")]
    cells += [(row.name, row.type, *_sizes(row), row.plan) for row in rows]
    unknown = sum(row.shape is None for row in rows)
    lacking = f", without {unknown} layers of unknown size" if unknown else ""
    total = f"total: {parameters:,} parameters, {macs / 1e6:,.1f} million multiply-accumulates{lacking}"
    lines = _configured_lines(configured) if configured else ()
    return "\n".join([table(cells), "", total, coverage_text(planned), *lines])


def _configured_lines(configured: Configured) -> list[str]:
    """What a configuration would do, in sentences."""
    config, weights = configured.config, configured.config.weights
    activations = config.activations
    budget = f", within the budget of {weights.budget:g}, measured now" if configured.budget else ""
    images = f", on {weights.images:,} images" if weights.solver == "data_aware" else ""
    return [
        f"weights: {configured.mean_bits:.2f} bits on average{budget}; solver {weights.solver}{images}",
        f"renorm: {config.renorm.statistics} statistics of {config.renorm.images:,} images",
        f"activations: codes up to {activations.largest_code} from {activations.images:,} images",
        f"size: {size_text(configured.model)} as given, {size_text(configured.packed)} packed "
        f"({configured.model / configured.packed:.1f}x smaller)",
    ]


def _configured_json(configured: Configured) -> dict[str, Any]:
    budget = asdict(configured.budget) if configured.budget is not None else None
    sizes = {"model": configured.model, "packed": configured.packed}
    return {"mean_bits": configured.mean_bits, "budget": budget, "sizes": sizes}


def _sizes(row: LayerRow) -> tuple[str, str, str]:
    if row.shape is None or row.parameters is None or row.macs is None:
        return "?", "?", "?"
    return shape_text(row.shape), f"{row.parameters:,}", f"{row.macs / 1e6:,.1f}"


def plan_text(
    inspected: Inspection, config: Config | None, images: int | None, memory: str | None, as_json: bool
) -> str:
    """The plan of renorm's sweep: per step what is kept, bytes and recomputed work.

    Args:
        inspected: the net.
        config: says how many images and how much memory, where these are not given.
        images: how many, if given.
        memory: the bound, if given.
        as_json: as JSON.
    """
    images = images or (RenormSettings() if config is None else config.renorm).images
    bound = DEFAULT_MEMORY if config is None else config.memory
    try:
        bound = bound if memory is None else parse_size(memory)
    except ValueError as error:
        raise InputError(f"--memory {memory}: {error}") from error
    test = InferenceNet.of(inspected.net)
    if not any(map(norm_places, test.net.layer)):
        raise InputError("the net has no BatchNorm layer: renorm has nothing to do")
    tour = Tour.of(Model(inspected.net, Weights()))
    net, steps = tour.net, tour.steps
    one = {blob: (1, *shape) for blob, shape in inspected.inputs.items()}
    costs = Costs.of(net, infer_shapes(net, one), list(one), (), steps)
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
