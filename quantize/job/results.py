"""The models that the stages have made, and what follows from them: prototxts, sizes, coverage."""

from __future__ import annotations

from dataclasses import replace

from quantize.caffenet import InferenceNet, Weights, format_prototxt, infer_shapes, known_part
from quantize.caffenet.model import Model
from quantize.caffenet.quantized import alpha_terms, with_alpha_terms
from quantize.caffenet.quantizers import with_quantizers
from quantize.caffenet.strings import to_bytes
from quantize.errors import InputError
from quantize.job.feeds import input_shapes
from quantize.job.given import Given
from quantize.job.output import Files
from quantize.job.prototxts import deploy_prototxt, image_scores, validation_prototxt
from quantize.job.sizes import Packed, packed_bytes
from quantize.progress import Progress
from quantize.record import AnyStageRecord, Coverage, Sizes, StageName, Stages
from quantize.stages.coverage import coverage


class Results:
    """The results of the stages that have run, by this process or by one before it.

    A model that this process has made is handed on; another is read from the output folder, once.

    Attributes:
        given: what the job started from.
        stages: those that have run.
    """

    def __init__(self, given: Given, stages: Stages) -> None:
        self.given = given
        self.stages = stages
        self._models: dict[StageName, Model] = {}

    def then(self, stage: StageName, record: AnyStageRecord, model: Model) -> Results:
        """The results when a stage has run, too; what was behind it is obsolete."""
        following = Results(self.given, self.stages.then(stage, record))
        before = {name: made for name, made in self._models.items() if name in following.stages.done}
        following._models = {**before, stage: model}
        return following

    def after(self, stage: StageName) -> Model:
        """The model as a stage has left it.

        Raises:
            InputError: its file is not there, cannot be read or is damaged.
        """
        if stage not in self._models:
            self._models[stage] = self._read(stage)
        return self._models[stage]

    @property
    def final(self) -> Model:
        """The model as the last stage has left it."""
        return self.after(list(self.stages.done)[-1])

    def _read(self, stage: StageName) -> Model:
        config, net = self.given.config, self.given.net
        name = Files.of(config.name).of_stage.get(stage)
        if name is not None:
            path = config.output / name
            if not path.exists():
                raise InputError(
                    f"{path}: the result of the {stage} stage is not there; run `labelfree quantize`"
                )
            weights = Weights.read(path)
            return Model(with_alpha_terms(net, weights), weights, config.model.prototxt)
        before = self.after("weights" if self.stages.renorm is None else "renorm")
        layers = self.stages.activations.layers if self.stages.activations is not None else []
        return replace(before, net=with_quantizers(before.net, layers))

    def prototxts(self, progress: Progress) -> dict[str, bytes]:
        """The texts of the prototxts by name."""
        given, net, files = self.given, self.final.net, Files.of(self.given.config.name)
        shapes = input_shapes(given)
        nets = {files.val: validation_prototxt(net, given, image_scores(given.net, shapes))}
        if shapes.keys() >= set(InferenceNet.of(net).inputs):
            nets[files.deploy] = deploy_prototxt(net, shapes)
        else:
            progress.note(f"{files.deploy} needs the images' shape: give data.input_shape")
        return {name: to_bytes(format_prototxt(content)) for name, content in nets.items()}

    def sizes(self) -> Sizes:
        """Bytes of the model: as given, as written, and packed at the bits chosen."""
        config, done = self.given.config, self.stages
        layers = done.weights.layers if done.weights is not None else []
        packed = [Packed(layer.weights, layer.bits, layer.kernels) for layer in layers]
        written = Files.of(config.name).of_stage["weights" if done.renorm is None else "renorm"]
        return Sizes(
            model=config.model.weights.stat().st_size,
            written=(config.output / written).stat().st_size,
            packed=packed_bytes(self.final, packed),
        )

    def coverage(self) -> Coverage | None:
        """How much of the net's work is quantized; None where the shapes of inputs are not known."""
        shapes, test = input_shapes(self.given), self.final.inference
        if not shapes.keys() >= set(test.inputs):
            return None
        one = {blob: (1, *shape) for blob, shape in shapes.items()}
        macs = infer_shapes(known_part(test.net, one), one).macs
        return coverage(test.net, test.inputs, alpha_terms(test.net), macs)
