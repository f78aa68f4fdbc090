"""A model: a net, its blobs, and what is known of how they are quantized."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from quantize.arrays import FloatArray, Shape
from quantize.caffenet.bvlc import LayerForms
from quantize.caffenet.norms import with_stored_statistics
from quantize.caffenet.phases import InferenceNet, declared_shape
from quantize.caffenet.prototxt import format_prototxt, read_net
from quantize.caffenet.quantized import (
    QuantizedWeights,
    Quantizer,
    alpha_terms,
    check_alpha_terms,
    read_quantized,
    read_quantizer,
    same_weights,
    with_alpha_terms,
)
from quantize.caffenet.schema import NetParameter
from quantize.caffenet.shapes import check_weights, in_shape, infer_shapes, known_part
from quantize.caffenet.sharing import load_weights
from quantize.caffenet.strings import from_path, to_bytes, to_path
from quantize.caffenet.weights import Weights
from quantize.errors import InputError
from quantize.files import Digest, made_folder, whole_file
from quantize.settings import GridChoice

NAME = re.compile(r"\w[\w.+-]*")
"""What the name of files may be."""


@dataclass(frozen=True)
class Layer:
    """One layer of a model, as it runs in the TEST phase.

    Attributes:
        name: its name.
        type: its type in Caffe.
        shape: of its weights (blob 0); None where it has none.
        weights: its quantized weights; None where they are in full precision.
        quantizer: what it does, where it is an ActQuantize layer.
    """

    name: str
    type: str
    shape: Shape | None
    weights: QuantizedWeights | None
    quantizer: Quantizer | None

    @property
    def bits(self) -> int | None:
        """Per weight; None where the weights are in full precision."""
        return None if self.weights is None else self.weights.bits

    @property
    def grid(self) -> str | None:
        """The name of the grid of the weights."""
        return None if self.weights is None else self.weights.grid

    @property
    def codes(self) -> FloatArray | None:
        """Q (n kernels, k weights): the weights are alpha * Q."""
        return None if self.weights is None else self.weights.codes

    @property
    def alpha(self) -> FloatArray | None:
        """The scale of each kernel, (n,)."""
        return None if self.weights is None else self.weights.alpha


@dataclass(frozen=True)
class Model:
    """A net and its blobs, in full precision or quantized.

    Attributes:
        net: with all its phases, and with the layers that quantization has added (see `quantized`).
        weights: the blobs.
        prototxt: the file that the net comes from; relative paths in it begin in its folder.
        grids: the grids of quantized weights, where they are known (files do not tell), by one of the layers
            that have these weights.
        solver: what has quantized the weights; None: nothing, or it is not known.
        full: the model from before anything was quantized; None where it is this one, or is not known.

    Raises:
        InputError: the blobs hold quantized weights but the net lacks what belongs to them.
    """

    net: NetParameter = field(repr=False)
    weights: Weights = field(repr=False)
    prototxt: Path | None = None
    grids: Mapping[str, GridChoice] = field(default_factory=dict, repr=False)
    solver: str | None = None
    full: Model | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Check that net and blobs belong together as far as quantized weights go."""
        check_alpha_terms(self.net, self.weights)

    @classmethod
    def load(
        cls,
        prototxt: str | Path,
        caffemodel: str | Path,
        caffe_proto: str | Path | None = None,
        stages: Sequence[str] = (),
        level: int = 0,
        write: LayerForms = "as_read",
    ) -> Model:
        """Read a model from Caffe's files.

        >>> import quantize
        >>> model = quantize.Model.load("digits.prototxt", "digits.caffemodel")
        >>> model.inference.inputs, model.inference.scores
        (('data',), 'fc')
        >>> [layer.name for layer in model.layers if layer.type == "InnerProduct"]
        ['fc']

        Args:
            prototxt: the net's layers.
            caffemodel: its blobs.
            caffe_proto: the schema of the fork of Caffe that it is for, if any.
            stages: the stages that are set, for include and exclude rules that name them.
            level: the level, for rules with min_level and max_level.
            write: the forms of a fork's layers that are run and written: its own, or ``bvlc``, those of Caffe
                1.0 where they say the same.

        Raises:
            InputError: a file cannot be read or is damaged, or the two do not fit each other.
        """
        model = cls.of(read_net(prototxt, caffe_proto, stages, level, write), caffemodel, Path(prototxt))
        return model.checked(model.declared_shapes)

    @classmethod
    def of(
        cls,
        net: NetParameter,
        caffemodel: str | Path,
        prototxt: Path | None = None,
        digest: Digest | None = None,
    ) -> Model:
        """A net with the blobs of a caffemodel, as Caffe loads them into it; `checked` compares the two.

        Args:
            net: with all its phases.
            caffemodel: the file.
            prototxt: the file that the net comes from.
            digest: hears the bytes of the caffemodel.

        Raises:
            InputError: the file cannot be read or is damaged, or holds quantized weights that the net does
                not provide for.
        """
        weights = load_weights(caffemodel, net, digest)
        try:
            return cls(net, weights, prototxt)
        except InputError as error:
            raise InputError(f"{caffemodel}: {error}") from error

    def holding(self, weights: Weights) -> Model:
        """What this model, in full precision, becomes with blobs that were made of its own.

        Args:
            weights: the blobs, quantized or not: the net gets the Scale layers that they need.
        """
        return replace(self, net=with_alpha_terms(self.net, weights), weights=weights, full=self.full or self)

    @cached_property
    def inference(self) -> InferenceNet:
        """The net as it runs in the TEST phase, its inputs, and the blob with its scores."""
        return InferenceNet.of(self.net)

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """What it is made of, in network order; the Scale layers that carry alphas count as their layer's.

        Raises:
            InputError: a caffemodel is damaged: quantized weights are on no grid.
        """
        terms, users = alpha_terms(self.net), same_weights(self.net)
        carriers = {name for names in terms.values() for name in names}
        found = []
        for layer in self.inference.net.layer:
            if layer.name in carriers:
                continue
            shape = quantized = None
            if layer.name in self.weights:
                shape = next((blob.shape for blob in self.weights[layer.name]), None)
            if shape is not None and layer.name in terms:
                told = (self.grids[user] for user in users[layer.name] if user in self.grids)
                quantized = read_quantized(layer, self.weights, next(told, None))
            found.append(Layer(layer.name, layer.type, shape, quantized, self.quantizers.get(layer.name)))
        return tuple(found)

    @property
    def is_quantized(self) -> bool:
        """Whether any weights or activations are."""
        return bool(alpha_terms(self.net)) or bool(self.quantizers)

    @cached_property
    def quantizers(self) -> dict[str, Quantizer]:
        """The ActQuantize layers, and what they do."""
        found = {layer.name: read_quantizer(layer) for layer in self.inference.net.layer}
        return {name: quantizer for name, quantizer in found.items() if quantizer is not None}

    @property
    def declared_shapes(self) -> dict[str, Shape]:
        """By input the shape of one image's values, where the net says it."""
        shapes = {name: declared_shape(self.net, name) for name in self.inference.inputs}
        return {name: shape for name, shape in shapes.items() if shape is not None}

    def checked(self, shapes: Mapping[str, Shape]) -> Model:
        """The model, its blobs checked against the layers as far as shapes of inputs and layers are known.

        Blobs of old files, whose shapes are always four numbers, are in the shapes that the layers need.

        Args:
            shapes: by input the shape of one image's values.

        Raises:
            InputError: a layer has no blobs, or they have other shapes than the net implies.
        """
        one = {blob: (1, *shape) for blob, shape in shapes.items()}
        known = known_part(self.inference.net, one)
        needed = infer_shapes(known, one)
        check_weights(known, self.weights, needed)
        weights = in_shape(self.weights, needed)
        return self if weights is self.weights else replace(self, weights=weights)

    def save(self, folder: str | Path, name: str | None = None) -> tuple[Path, Path]:
        """Write ``NAME.caffemodel`` and ``NAME.prototxt``; `load` of the two gives an equal model.

        BatchNorms in the prototxt use what they have stored, whatever the given net says. Each file appears
        under its name when it is whole.

        >>> import quantize
        >>> model = quantize.Model.load("digits.prototxt", "digits.caffemodel")
        >>> prototxt, caffemodel = model.save("out", name="copy")
        >>> quantize.Model.load(prototxt, caffemodel).layers[0].name == model.layers[0].name
        True

        Args:
            folder: made where it is not there.
            name: of the files; None: the net's name.

        Returns:
            The paths of prototxt and caffemodel.

        Raises:
            InputError: no such name, or the folder cannot be made.
            LabelfreeError: a file could not be written.
        """
        name = (self.net.name or "model") if name is None else name
        if not NAME.fullmatch(name):
            raise InputError(f"{name!r} cannot be a file's name: use letters, digits and . + - _")
        folder = made_folder(folder)
        prototxt, caffemodel = folder / f"{name}.prototxt", folder / f"{name}.caffemodel"
        with whole_file(caffemodel) as file:
            self.weights.write(file)
        with whole_file(prototxt) as file:
            file.write(to_bytes(format_prototxt(self._written_net())))
        return prototxt, caffemodel

    def _written_net(self) -> NetParameter:
        """The net for a file in any folder."""
        net = with_stored_statistics(self.net)
        base = Path() if self.prototxt is None else self.prototxt.parent
        for layer in net.layer:
            if layer.transform_param.HasField("mean_file"):
                mean = base / to_path(layer.transform_param.mean_file)
                layer.transform_param.mean_file = from_path(mean.absolute())
        return net
