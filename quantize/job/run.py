"""weights_quan -> renorm -> activations_quan: what a run reads, writes and skips.

Every stage leaves whole files behind, so that a later run can go on from any of them:

- weights: ``NAME_quantized.caffemodel``
- renorm: ``NAME_renorm.caffemodel``
- activations: nothing but the prototxts

and every stage rewrites ``NAME_val.prototxt``, ``NAME_deploy.prototxt`` and ``report.json``. When the last
stage asked for is over, ``report.html`` is made from the latter.
A stage that is done again makes the results of the stages behind it obsolete; they are removed.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from quantize import __version__
from quantize.caffenet import (
    InferenceNet,
    NetParameter,
    Weights,
    check_weights,
    format_prototxt,
    infer_shapes,
    known_part,
    load_schema,
    read_prototxt,
)
from quantize.data.feed import Feed
from quantize.engines import engine_opener
from quantize.errors import InputError, LabelfreeError
from quantize.host import available_threads, peak_memory, reset_peak_memory, using_threads
from quantize.job.feeds import calibration_feed, evaluation_images, image_shape, validation_feed
from quantize.job.labels import with_labels_that_fit
from quantize.job.output import Files, OutputFolder
from quantize.job.prototxts import deploy_prototxt, validation_prototxt
from quantize.job.store import PAGE, REPORT, previous_report, read_report, show_page, write_page, write_report
from quantize.measure.evaluate import Candidate, Evaluation, evaluate
from quantize.measure.sqnr import Version, images_to_measure, output_sqnr
from quantize.progress import SILENT, Progress
from quantize.settings import Config
from quantize.stages.activations import QuantizedActivation, activations_quan, plain_relus, with_act_quantize
from quantize.stages.budget import keep_budget
from quantize.stages.data_aware import Calibration
from quantize.stages.renorm import renorm
from quantize.stages.weights import (
    ALPHA_SUFFIX,
    QUANTIZED_TYPES,
    check_kernels,
    choices,
    weights_quan,
    with_alpha_terms,
)

STAGES = ("weights", "renorm", "activations")
LIBRARIES = (
    *("numpy", "protobuf", "onnx", "onnxruntime", "opencv-python-headless", "lmdb", "threadpoolctl"),
    *("matplotlib", "jinja2"),
)
READ_BLOCK = 1 << 20


class Run:
    """One run of some stages in one output folder.

    Args:
        config: the settings.
        progress: what hears how far it is.
    """

    def __init__(self, config: Config, progress: Progress = SILENT) -> None:
        self.config = config
        self.progress = progress
        self.files = Files.of(config.name)
        self.open_engine = engine_opener(config.engine, config.caffe, config.threads)
        self.net = read_model_prototxt(config)
        self.inputs: dict[str, str] = {"prototxt": sha256(config.model.prototxt)}
        self.report: dict[str, Any] = {}

    def quantize(
        self, stages: Sequence[str] = STAGES, resume: bool = False, force: bool = False
    ) -> dict[str, Any]:
        """Run stages in order and write their files.

        Args:
            stages: of `STAGES`.
            resume: skip a stage whose files were made from the same inputs, with the same settings, by the
                same version.
            force: do every stage even so.

        Returns:
            The report, as written to report.json.

        Raises:
            InputError: bad input, or a stage before the first one asked for has not been run.
            LabelfreeError: the work failed.
        """
        works: dict[str, Callable[[], dict[str, Any]]] = {
            "weights": self._weights,
            "renorm": self._renorm,
            "activations": self._activations,
        }
        self._check_before_work(stages)
        with (
            using_threads(self.config.threads),
            closing(OutputFolder(self.config.output)) as self.folder,
        ):
            self.report = previous_report(self.config.output, self.config.name, self.progress)
            for stage in (s for s in STAGES if s in stages):
                key = self._key(stage)
                if resume and not force and self._is_done(stage, key):
                    self.progress.note(f"{stage}: skipped, its results fit the inputs and settings")
                    continue
                reset_peak_memory()
                start = time.monotonic()
                record = works[stage]()
                record |= {
                    "key": key,
                    "seconds": time.monotonic() - start,
                    "peak_memory_bytes": peak_memory(),
                }
                self._finish(stage, record)
            if not (self.config.output / PAGE).exists():
                self._measure_outputs()
                show_page(self.folder, self.config, self.net, self.report, self.progress)
        return self.report

    def _check_before_work(self, stages: Sequence[str]) -> None:
        """Find what is wrong with the inputs of later stages before an earlier stage takes its time."""
        if "weights" in stages:
            choices(InferenceNet.of(self.net).net, self.config.weights)
        if "renorm" in stages or "activations" in stages:
            calibration_feed(self.config, self.net, 1)
        if "weights" in stages:
            self._solver_calibration()
            if self.config.weights.budget is not None:
                self._renorm_feed()
        if "renorm" in stages:
            self._renorm_feed()
        if "activations" in stages:
            self._activations_feed()

    def _weights(self) -> dict[str, Any]:
        weights = Weights.read(self.config.model.weights)
        test = InferenceNet.of(self.net)
        self._check(weights)
        settings = self.config.weights
        chosen = choices(test.net, settings)
        check_kernels(test.net, weights, chosen)
        record: dict[str, Any] = {}
        if settings.budget is not None:
            calibration = self._calibration(self._renorm_feed())
            chosen, found = keep_budget(weights, settings, calibration, test.scores, self.progress)
            record["budget"] = asdict(found)
        _, quantized, layers = weights_quan(
            self.net, weights, chosen, settings.solver, self.progress, self._solver_calibration()
        )
        self._write_weights(self.files.quantized, quantized)
        skipped = [
            layer.name
            for layer in test.net.layer
            if layer.type in QUANTIZED_TYPES and layer.name not in chosen
        ]
        return {"layers": [asdict(layer) for layer in layers], "skipped": skipped, **record}

    def _renorm(self) -> dict[str, Any]:
        weights = self._read_result(self.files.quantized, "weights")
        net = InferenceNet.of(with_alpha_terms(self.net, weights)).net
        feed = self._renorm_feed()
        weights, shifts = renorm(
            net, weights, feed, self.open_engine, self.config.renorm.memory, self.progress
        )
        if not shifts:
            self.progress.note("renorm: the net has no BatchNorm layer; its weights are passed through")
        self._write_weights(self.files.renorm, weights)
        return {"images": len(feed.images), "layers": [asdict(shift) for shift in shifts]}

    def _activations(self) -> dict[str, Any]:
        weights = self._read_result(self.files.renorm, "renorm")
        net = InferenceNet.of(with_alpha_terms(self.net, weights)).net
        feed = self._activations_feed()
        found = activations_quan(net, weights, feed, self.config.activations, self.open_engine, self.progress)
        kept = [layer.name for layer in net.layer if layer.type == "ReLU"]
        for name in sorted(set(kept) - set(plain_relus(net))):
            self.progress.note(f"activations: {name} is left alone: it has a negative slope")
        if not found:
            self.progress.note("activations: the net has no plain ReLU layer; nothing to quantize")
        for activation in (a for a in found if a.dead):
            self.progress.note(f"activations: {activation.name} is dead: 0 on every calibration image")
        return {"images": len(feed.images), "layers": [asdict(activation) for activation in found]}

    def _measure_outputs(self) -> None:
        """Add the output SQNR per layer to the report, where there are images to measure it on."""
        layers = [layer["name"] for layer in self.report["stages"]["weights"]["layers"]]
        if self.config.data.calibration is None or not layers:
            return
        try:
            enough = images_to_measure(self.config.renorm.images + self.config.activations.images)
            present = len(calibration_feed(self.config, self.net, 1).images.source)
            images = calibration_feed(self.config, self.net, min(enough, present)).images
            candidates = _candidates(self.config, self.net)
            versions = {name: Version(c.net, c.weights, c.blob) for name, c in candidates.items()}
            full = versions.pop("fp32")
            found = output_sqnr(full, versions, layers, images, self.open_engine, self.progress)
        except LabelfreeError as error:
            self.progress.note(f"output SQNR is not measured: {error}")
            return
        self.report["output_sqnr"] = {"images": len(images), "layers": [asdict(layer) for layer in found]}
        write_report(self.folder, self.report)

    def _solver_calibration(self) -> Calibration | None:
        """What the data-aware solver needs; None with the other solvers, which need no images."""
        settings = self.config.weights
        if settings.solver != "data_aware":
            return None
        return self._calibration(calibration_feed(self.config, self.net, settings.images, self.progress))

    def _calibration(self, feed: Feed) -> Calibration:
        return Calibration(InferenceNet.of(self.net).net, feed, self.open_engine, self.config.renorm.memory)

    def _renorm_feed(self) -> Feed:
        return calibration_feed(self.config, self.net, self.config.renorm.images, self.progress)

    def _activations_feed(self) -> Feed:
        return calibration_feed(self.config, self.net, self.config.activations.images, self.progress)

    def _check(self, weights: Weights) -> None:
        """Check the blobs against the layers, as far as the shapes of images and layers are known."""
        shape = image_shape(self.config, self.net)
        if shape is not None:
            test = InferenceNet.of(self.net)
            known = known_part(test.net, [test.blob])
            check_weights(known, weights, infer_shapes(known, {test.blob: (1, *shape)}))

    def _write_weights(self, name: str, weights: Weights) -> None:
        with self.folder.writing(name) as file:
            weights.write(file)

    def _read_result(self, name: str, stage: str) -> Weights:
        """Blobs that an earlier stage wrote.

        Raises:
            InputError: it has not been run, or with another model.
        """
        path = self.config.output / name
        record = self.report["stages"].get(stage)
        if record is None or not path.exists():
            raise InputError(
                f"{path}: the result of the stage before this one is not there; run `labelfree quantize`, "
                f"or with `--stages {stage},...`"
            )
        if self.report["inputs"] != self._hash_inputs():
            raise InputError(
                f"{path}: made from another model.prototxt or model.weights; run the weights stage again"
            )
        weights = Weights.read(path)
        self._check(weights)
        return weights

    def _hash_inputs(self) -> dict[str, str]:
        if "weights" not in self.inputs:
            self.inputs["weights"] = sha256(self.config.model.weights)
        return self.inputs

    def _key(self, stage: str) -> str:
        """What a stage's result depends on, as one hash."""
        config = self.config
        parts: dict[str, Any] = {"version": __version__, "prototxt": self.inputs["prototxt"]}
        if stage == "weights":
            parts |= {"weights": self._hash_inputs()["weights"], "settings": dump(config.weights)}
            if config.weights.solver == "data_aware" or config.weights.budget is not None:
                parts |= self._image_key()
            if config.weights.budget is not None:
                parts |= {"renorm_images": config.renorm.images}
        else:
            before = self.files.quantized if stage == "renorm" else self.files.renorm
            path = config.output / before
            settings = config.renorm if stage == "renorm" else config.activations
            parts |= {
                "before": sha256(path) if path.exists() else None,
                "settings": dump(settings),
                **self._image_key(),
            }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _image_key(self) -> dict[str, Any]:
        """What the result of running the calibration images through a net depends on."""
        return {
            "augment": self.config.renorm.augment,
            "data": dump(self.config.data),
            "calibration": fingerprint(self.config),
            "engine": self.config.engine,
            "threads": available_threads(),
        }

    def _is_done(self, stage: str, key: str) -> bool:
        record = self.report["stages"].get(stage)
        return (
            record is not None
            and record["key"] == key
            and all(
                (self.config.output / name).exists() and sha256(self.config.output / name) == digest
                for name, digest in record["outputs"].items()
            )
        )

    def _finish(self, stage: str, record: dict[str, Any]) -> None:
        """Write the prototxts and the report for what there is now; drop what is behind the stage."""
        results = {"weights": [self.files.quantized], "renorm": [self.files.renorm], "activations": []}
        stages = {s: r for s, r in self.report["stages"].items() if STAGES.index(s) < STAGES.index(stage)}
        for later in STAGES[STAGES.index(stage) + 1 :]:
            for name in results[later]:
                self.folder.remove(name)
        self.folder.remove(PAGE)  # lest a run that is killed from here on leaves a page about other results
        stages[stage] = record
        names = [*results[stage], *self._write_prototxts(stages)]
        record["outputs"] = {name: sha256(self.config.output / name) for name in names}
        for earlier in stages.values():
            # The prototxts are the last stage's from now on.
            earlier["outputs"] = {
                n: d for n, d in earlier["outputs"].items() if n not in names or earlier is record
            }
        self.report = {
            "tool": f"labelfree {__version__}",
            "name": self.config.name,
            "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
            "settings": dump(self.config),
            "inputs": self._hash_inputs(),
            "stages": stages,
            "sizes": self._sizes(stages),
        }
        write_report(self.folder, self.report)

    def _write_prototxts(self, stages: dict[str, Any]) -> list[str]:
        weights = Weights.read(self.config.output / self._latest(stages))
        net = with_alpha_terms(self.net, weights)
        if "activations" in stages:
            found = [QuantizedActivation(**layer) for layer in stages["activations"]["layers"]]
            net = with_act_quantize(net, found)
        shape = image_shape(self.config, self.net)
        written = {self.files.val: validation_prototxt(net, self.config, shape)}
        if shape is not None:
            written[self.files.deploy] = deploy_prototxt(net, shape)
        for name, content in written.items():
            with self.folder.writing(name) as file:
                file.write(format_prototxt(content).encode())
        return list(written)

    def _latest(self, stages: dict[str, Any]) -> str:
        return self.files.renorm if "renorm" in stages else self.files.quantized

    def _sizes(self, stages: dict[str, Any]) -> dict[str, int]:
        """Bytes of the model: as given, as written, and packed at the bits chosen."""
        written = self.config.output / self._latest(stages)
        weights = Weights.read(written)
        values = sum(blob.size for layer in weights.layers() for blob in weights[layer])
        packed = 4 * values
        for layer in stages["weights"]["layers"]:
            packed += -(-layer["weights"] * layer["bits"] // 8) - 4 * layer["weights"]
            if f"{layer['name']}{ALPHA_SUFFIX}" in weights and len(weights[layer["name"]]) > 1:
                packed -= (
                    4 * layer["kernels"]
                )  # the second blob of the alpha term follows from alpha and bias
        return {
            "model": self.config.model.weights.stat().st_size,
            "written": written.stat().st_size,
            "packed": packed,
        }


def evaluate_run(
    config: Config, images: int | None = None, progress: Progress = SILENT, without_renorm: bool = False
) -> Evaluation:
    """Compare the full-precision net with the quantized one in the output folder.

    What is found is added to report.json and report.html.

    Args:
        images: the first so many; None: all.
        without_renorm: evaluate the quantized weights before renorm too.

    Raises:
        InputError: nothing has been quantized yet, or no images.
    """
    net = read_model_prototxt(config)
    feed = with_labels_that_fit(validation_feed(config, net, images, progress), net, progress)
    candidates = _candidates(config, net)
    if not without_renorm:
        candidates.pop("without_renorm", None)
    before = read_report(config.output)
    open_engine = engine_opener(config.engine, config.caffe, config.threads)
    with using_threads(config.threads):
        found = evaluate(candidates, feed.images, open_engine, progress)
    try:
        with closing(OutputFolder(config.output)) as folder:
            report = read_report(config.output)
            if report["stages"] == before["stages"]:
                report["evaluation"] = {**asdict(found), "images_from": evaluation_images(config)}
                write_report(folder, report)
                show_page(folder, config, net, report, progress)
    except LabelfreeError as error:
        progress.note(f"not added to {REPORT}: {error}")
    return found


def report_run(config: Config) -> Path:
    """Make report.html again from what is in the output folder.

    Returns:
        Where it is.

    Raises:
        InputError: nothing has been quantized yet.
    """
    net = read_model_prototxt(config)
    report = read_report(config.output)
    with closing(OutputFolder(config.output)) as folder:
        write_page(folder, config, net, report)
    return config.output / PAGE


def _candidates(config: Config, net: NetParameter) -> dict[str, Candidate]:
    """Full precision, quantized weights before renorm where renorm has run, and the final net, in that order.

    Raises:
        InputError: nothing has been quantized yet.
    """
    files = Files.of(config.name)
    quantized, renormed = config.output / files.quantized, config.output / files.renorm
    prototxt = config.output / files.val
    if not quantized.exists() or not prototxt.exists():
        raise InputError(f"{config.output}: nothing quantized here yet; run `labelfree quantize` first")
    full = InferenceNet.of(net)
    found = {"fp32": Candidate(full.net, Weights.read(config.model.weights), full.blob, full.scores)}
    weights = Weights.read(quantized)
    if renormed.exists():
        unrepaired = InferenceNet.of(with_alpha_terms(net, weights))
        found["without_renorm"] = Candidate(unrepaired.net, weights, unrepaired.blob, unrepaired.scores)
        weights = Weights.read(renormed)
    final = InferenceNet.of(read_prototxt(prototxt))
    found["quantized"] = Candidate(final.net, weights, final.blob, final.scores)
    return found


def read_model_prototxt(config: Config) -> NetParameter:
    """The network to quantize, with all its phases."""
    if config.model.caffe_proto is None:
        return read_prototxt(config.model.prototxt)
    return read_prototxt(config.model.prototxt, load_schema(config.model.caffe_proto))


def dump(section: BaseModel) -> dict[str, Any]:
    """A part of the configuration as JSON values."""
    return section.model_dump(mode="json")


def sha256(path: Path) -> str:
    """The hash of a file's content.

    Raises:
        InputError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(READ_BLOCK):
                digest.update(block)
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror}; check the path") from error
    return digest.hexdigest()


def fingerprint(config: Config) -> str | None:
    """A hash of what identifies the calibration images: names, sizes and times of their files."""
    if config.data.calibration is None:
        return None
    source = config.data.calibration.source
    files = sorted(source.rglob("*")) if source.is_dir() else [source]
    entries = [(str(f), s.st_size, s.st_mtime_ns) for f in files if f.name != "lock.mdb" and (s := f.stat())]
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()
