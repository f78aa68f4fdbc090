"""What follows from the findings of the stages that have run: the net they make, its prototxts, its size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quantize.caffenet import InferenceNet, NetParameter, Weights, format_prototxt, infer_shapes, known_part
from quantize.caffenet.model import Model
from quantize.caffenet.quantized import alpha_terms, with_alpha_terms
from quantize.caffenet.quantizers import with_quantizers
from quantize.caffenet.strings import to_bytes
from quantize.job.feeds import input_shapes
from quantize.job.output import Files
from quantize.job.prototxts import deploy_prototxt, image_scores, validation_prototxt
from quantize.job.sizes import Packed, packed_bytes
from quantize.progress import Progress
from quantize.record import Coverage, Sizes, Stages
from quantize.settings import Config
from quantize.stages.coverage import coverage


@dataclass(frozen=True)
class Results:
    """Results in an output folder.

    Attributes:
        config: the settings.
        net: the net before it was quantized, with all its phases.
        stages: those that have run.
    """

    config: Config
    net: NetParameter
    stages: Stages

    @property
    def caffemodel(self) -> Path:
        """What the last stage that writes weights has written."""
        files = Files.of(self.config.name)
        return self.config.output / (files.renorm if self.stages.renorm is not None else files.quantized)

    def quantized_net(self) -> NetParameter:
        """The net with all its phases and with what the stages have found."""
        net = with_alpha_terms(self.net, Weights.names(self.caffemodel))
        if self.stages.activations is not None:
            net = with_quantizers(net, self.stages.activations.layers)
        return net

    def prototxts(self, progress: Progress) -> dict[str, bytes]:
        """The texts of the prototxts by name."""
        net, files = self.quantized_net(), Files.of(self.config.name)
        shapes = input_shapes(self.config, self.net)
        nets = {files.val: validation_prototxt(net, self.config, image_scores(self.net, shapes))}
        if shapes.keys() >= set(InferenceNet.of(net).inputs):
            nets[files.deploy] = deploy_prototxt(net, shapes)
        else:
            progress.note(f"{files.deploy} needs the images' shape: give data.input_shape")
        return {name: to_bytes(format_prototxt(content)) for name, content in nets.items()}

    def sizes(self) -> Sizes:
        """Bytes of the model: as given, as written, and packed at the bits chosen."""
        layers = self.stages.weights.layers if self.stages.weights is not None else []
        packed = [Packed(layer.weights, layer.bits, layer.kernels) for layer in layers]
        return Sizes(
            model=self.config.model.weights.stat().st_size,
            written=self.caffemodel.stat().st_size,
            packed=packed_bytes(self._model(), packed),
        )

    def _model(self) -> Model:
        weights = Weights.read(self.caffemodel)
        return Model(with_alpha_terms(self.net, weights), weights)

    def coverage(self) -> Coverage | None:
        """How much of the net's work is quantized; None where the shapes of inputs are not known."""
        shapes = input_shapes(self.config, self.net)
        test = InferenceNet.of(self.quantized_net())
        if not shapes.keys() >= set(test.inputs):
            return None
        one = {blob: (1, *shape) for blob, shape in shapes.items()}
        macs = infer_shapes(known_part(test.net, one), one).macs
        return coverage(test.net, test.inputs, alpha_terms(test.net), macs)
