"""A quantized net and its full-precision net on the same images: accuracy, and how close all outputs are."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace

import numpy as np

from quantize.arrays import FLOAT_BYTES, FloatArray, Shape
from quantize.caffenet.model import Model
from quantize.data.feed import Feed
from quantize.engines.base import Engine, OpenEngine, Range
from quantize.engines.exported import ExportedFile
from quantize.errors import InputError, LabelfreeError
from quantize.measure.accuracy import Rights, right_top_k
from quantize.measure.closeness import Sums, scores_by_place
from quantize.measure.outputs import Output, tapped
from quantize.measure.significance import mcnemar, wilson
from quantize.progress import SILENT, Progress
from quantize.record import Accuracy, Evaluation, OutputCloseness, Paired
from quantize.sweep.plan import Costs, micro_batch_size

TOP_K = (1, 5)
FULL = "fp32"
"""The candidate that the others are compared with."""


def evaluate(
    candidates: Mapping[str, Model],
    outputs: Sequence[Output],
    feed: Feed,
    open_engine: OpenEngine,
    progress: Progress = SILENT,
    exported: Mapping[str, ExportedFile] | None = None,
) -> Evaluation:
    """Run models over the same images.

    Accuracy is counted where the main output has one score per class of an image and all images have labels.

    Args:
        candidates: the models by name; full precision is called ``fp32``.
        outputs: of full precision (`measure.outputs.net_outputs`).
        feed: images transformed for the TEST phase.
        open_engine: opens a net for running.
        exported: by name files made from the nets, opened with an output for each of ``outputs``.

    Raises:
        InputError: a label does not fit the number of classes, or the nets' outputs do not fit each other.
        LabelfreeError: an output is not finite.
    """
    with ExitStack() as stack:
        opened = {
            name: _Opened.of(candidate, outputs, feed, open_engine, stack)
            for name, candidate in candidates.items()
        }
        for name, file in (exported or {}).items():
            opened[name] = replace(opened[FULL], runner=file, names=list(file.outputs))
        return _Comparison.of(opened, outputs).over(feed, progress)


@dataclass(frozen=True)
class _Opened:
    """A candidate that is ready to run.

    Attributes:
        runner: gives its outputs.
        names: of the outputs, in the runner's results.
        shapes: of the outputs, for a batch of 1.
        widest: bytes that an image needs at a time.
    """

    runner: Range
    names: list[str]
    shapes: list[Shape]
    widest: int

    @classmethod
    def of(
        cls,
        candidate: Model,
        outputs: Sequence[Output],
        feed: Feed,
        open_engine: OpenEngine,
        stack: ExitStack,
    ) -> _Opened:
        net, names = tapped(candidate.inference.net, outputs)
        for name in names:
            if not any(name in layer.top for layer in net.layer):
                raise InputError(f"the net has no output {name!r} any more; quantize again")
        engine: Engine = stack.enter_context(closing(open_engine(net, candidate.weights, feed.shapes)))
        shapes = [engine.shapes.blobs[name] for name in names]
        held = FLOAT_BYTES * sum(int(np.prod(shape)) for shape in shapes)
        widest = Costs.of(net, engine.shapes, list(engine.inputs), ()).widest + held
        return cls(engine.compile(0, len(net.layer), list(dict.fromkeys(names))), names, shapes, widest)

    def run(self, feeds: Mapping[str, FloatArray]) -> list[FloatArray]:
        """The outputs."""
        blobs = self.runner.run(feeds).blobs
        return [blobs[name] for name in self.names]


@dataclass
class _Comparison:
    """What is added up over the images.

    Attributes:
        opened: the candidates.
        outputs: what is compared.
        axes: the class axis of each output, where it has one.
        main: the number of the main output; None where there is none.
        sums: by candidate but for full precision, of each output.
        rights: by candidate, where its top k are right, by k and micro-batch.
    """

    opened: dict[str, _Opened]
    outputs: Sequence[Output]
    axes: list[int | None]
    main: int | None
    sums: dict[str, list[Sums]] = field(default_factory=dict)
    rights: dict[str, dict[int, list[Rights]]] = field(default_factory=dict)

    @classmethod
    def of(cls, opened: dict[str, _Opened], outputs: Sequence[Output]) -> _Comparison:
        shapes = opened[FULL].shapes
        for name, candidate in opened.items():
            for output, shape, own in zip(outputs, shapes, candidate.shapes, strict=True):
                if shape != own:
                    raise InputError(
                        f"{name}: output {output.blob} has the shape {own} but {shape} in full precision; "
                        "quantize again"
                    )
        axes = [output.axis_of(shape) for output, shape in zip(outputs, shapes, strict=True)]
        mains = (i for i, output in enumerate(outputs) if output.is_main and axes[i] is not None)
        others = [name for name in opened if name != FULL]
        return cls(
            opened,
            outputs,
            axes,
            next(mains, None),
            {name: [Sums(axis) for axis in axes] for name in others},
            {name: {k: [] for k in TOP_K} for name in opened},
        )

    def over(self, feed: Feed, progress: Progress) -> Evaluation:
        """Run all candidates over all images."""
        batch = micro_batch_size(max(each.widest for each in self.opened.values()), len(feed), None)
        labels: list[int | None] = []
        progress.start("evaluate", len(feed))
        for images in feed.batches(batch):
            labels += images.labels
            full = self._outputs(FULL, images.feeds)
            self._count(FULL, full, images.labels)
            for name, sums in self.sums.items():
                own = self._outputs(name, images.feeds)
                self._count(name, own, images.labels)
                for each, wide, narrow in zip(sums, full, own, strict=True):
                    each.update(wide, narrow)
            progress.advance(len(images))
        labeled = sum(label is not None for label in labels)
        if self.main is not None and labeled and not self._of_images:
            progress.note(
                f"output {self.outputs[self.main].blob} has class scores at many places of an image: labels "
                "by place are not read, so no accuracy is counted"
            )
        elif self._of_images and 0 < labeled < len(feed):
            progress.note(f"accuracy is that of the {labeled} of {len(feed)} images that have a label")
        return self._evaluation(len(feed), labels if self._of_images and labeled else [])

    @property
    def _of_images(self) -> bool:
        """Whether the main output has one score per class of an image."""
        if self.main is None:
            return False
        shape, axis = self.opened[FULL].shapes[self.main], self.axes[self.main]
        return axis is not None and int(np.prod(shape)) == shape[axis]

    def _outputs(self, name: str, feeds: Mapping[str, FloatArray]) -> list[FloatArray]:
        blobs = self.opened[name].run(feeds)
        for output, blob in zip(self.outputs, blobs, strict=True):
            if not np.isfinite(blob).all():
                raise LabelfreeError(f"{name}: blob {output.blob} is not finite; layers before it overflow")
        return blobs

    def _count(self, name: str, blobs: Sequence[FloatArray], labels: Sequence[int | None]) -> None:
        """Note on which of the labeled images a candidate is right."""
        if self.main is None or not self._of_images:
            return
        rows = [row for row, label in enumerate(labels) if label is not None]
        axis = self.axes[self.main]
        assert axis is not None
        scores = scores_by_place(blobs[self.main], axis)[rows]
        for k in TOP_K:
            right = right_top_k(scores, np.array([labels[row] for row in rows], np.int64), k)
            self.rights[name][k].append(right)

    def _evaluation(self, images: int, labels: Sequence[int | None]) -> Evaluation:
        """What has been found.

        Args:
            images: how many.
            labels: theirs, where accuracy was counted; else empty.
        """
        labeled = sum(label is not None for label in labels)
        outputs = []
        for number, (output, axis) in enumerate(zip(self.outputs, self.axes, strict=True)):
            own = {name: sums[number] for name, sums in self.sums.items()}
            shape = self.opened[FULL].shapes[number]
            classes = None if axis is None else shape[axis]
            at = int(np.prod(shape)) // classes if classes else None
            close = {name: sums.closeness for name, sums in own.items()}
            presumed = output.presumed and axis is not None
            outputs.append(OutputCloseness(output.blob, classes, at, presumed, close))
        top1 = {name: np.concatenate(by_k[1]) for name, by_k in self.rights.items()} if labeled else {}
        return Evaluation(
            images,
            labeled,
            {name: self._accuracy(name, labeled) for name in self.opened},
            outputs,
            None if self.main is None else self.outputs[self.main].blob,
            {name: _paired(top1[FULL], right) for name, right in top1.items() if name != FULL},
            labels_hash=hashlib.sha256(json.dumps(labels).encode()).hexdigest() if labeled else None,
        )

    def _accuracy(self, name: str, labeled: int) -> Accuracy:
        if not labeled:
            return Accuracy(None, None)
        rights = [np.concatenate(self.rights[name][k]) for k in TOP_K]
        top1, top5 = (int(right.sum()) for right in rights)
        bits = base64.b64encode(np.packbits(rights[0]).tobytes()).decode()
        return Accuracy(100 * top1 / labeled, 100 * top5 / labeled, wilson(top1, labeled), bits)


def _paired(full: Rights, own: Rights) -> Paired:
    full_only, own_only = int((full & ~own).sum()), int((own & ~full).sum())
    return Paired(full_only, own_only, mcnemar(full_only, own_only))
