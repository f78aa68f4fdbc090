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
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from quantize import __version__
from quantize.caffenet import (
    TEST,
    BlobId,
    InferenceNet,
    NetParameter,
    Weights,
    check_weights,
    doubtful_norms,
    filter_net,
    format_prototxt,
    infer_shapes,
    known_part,
    load_weights,
    owners,
    read_net,
    read_prototxt,
    schema_of,
)
from quantize.caffenet.strings import to_bytes
from quantize.data.feed import Feed
from quantize.engines import engine_opener
from quantize.errors import InputError, LabelfreeError
from quantize.files import open_file
from quantize.host import available_threads, peak_memory, reset_peak_memory, using_threads
from quantize.job.checks import Checks
from quantize.job.feeds import (
    calibration_feed,
    calibration_images,
    evaluation_images,
    input_shapes,
    stage_feed,
    validation_feed,
)
from quantize.job.labels import with_labels_that_fit
from quantize.job.output import Files, OutputFolder
from quantize.job.prototxts import deploy_prototxt, validation_prototxt
from quantize.job.store import PAGE, REPORT, previous_report, read_report, show_page, write_page, write_report
from quantize.job.transforms import says_transform, transform_check, with_chosen_transform
from quantize.measure.evaluate import Candidate, Evaluation, evaluate
from quantize.measure.sqnr import Version, images_to_measure, output_sqnr
from quantize.measure.transform_check import TransformCheck
from quantize.progress import SILENT, Progress
from quantize.settings import Config
from quantize.stages.activations import QuantizedActivation, activations_quan, plain_relus, with_act_quantize
from quantize.stages.budget import keep_budget
from quantize.stages.data_aware import Calibration
from quantize.stages.renorm import FullPrecision, renorm
from quantize.stages.weights import (
    QUANTIZED_TYPES,
    check_kernels,
    choices,
    correctable,
    unquantizable,
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
        choose_transform: where neither they nor the prototxt say what happens to the values of pixels, take
            the transform that fits the net's statistics of training.
    """

    def __init__(self, config: Config, progress: Progress = SILENT, choose_transform: bool = False) -> None:
        self.config = config
        self.progress = progress
        self.files = Files.of(config.name)
        self.open_engine = engine_opener(config.engine, config.caffe, config.threads)
        self.net = read_model_prototxt(config)
        self.may_choose = choose_transform
        self.chosen: str | None = None
        self.inputs: dict[str, str] = {"prototxt": sha256(config.model.prototxt)}
        if config.model.stages or config.model.level:
            self.inputs["state"] = json.dumps([sorted(config.model.stages), config.model.level])
        self.report: dict[str, Any] = {}
        self.transform: dict[str, Any] | None = None

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
        with using_threads(self.config.threads):
            for _, look in self.checks(stages):
                look()
            self.choose_transform()
            with closing(OutputFolder(self.config.output)) as self.folder:
                self._run([s for s in STAGES if s in stages], resume and not force)
        return self.report

    def _run(self, stages: Sequence[str], resume: bool) -> None:
        """Run stages in their order, but for those whose results are there."""
        works: dict[str, Callable[[], dict[str, Any]]] = {
            "weights": self._weights,
            "renorm": self._renorm,
            "activations": self._activations,
        }
        self.report = previous_report(self.config.output, self.config.name, self.progress)
        for stage in stages:
            key = self._key(stage)
            if resume and self._is_done(stage, key):
                self.progress.note(f"{stage}: skipped, its results fit the inputs and settings")
                continue
            if self.transform is None:
                self.transform = self._transform_record()
            if stage == "activations":
                self.__dict__.pop("model_weights", None)  # no longer needed: room for the stage
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

    def checks(self, stages: Sequence[str] = STAGES) -> Checks:
        """What must be right before some stages begin."""
        weights = lambda: self.model_weights  # noqa: E731 - read when it is looked at
        return Checks(self.config, self.net, weights, self.open_engine, self.progress, stages)

    @cached_property
    def model_weights(self) -> Weights:
        """The blobs of the given net.

        Raises:
            InputError: the file cannot be read or is damaged.
        """
        return load_weights(self.config.model.weights, self.net)

    def choose_transform(self) -> None:
        """Take the transform that fits, where nobody has said one and the run may choose."""
        calibration = self.config.data.calibration
        fed = calibration is not None and calibration.source is not None
        if self.may_choose and fed and not self.chosen and not says_transform(self.config, self.net):
            self.config, self.chosen = with_chosen_transform(self.config, self.net, self.model_weights)
            self.progress.note(f"data.transform: {self.chosen}")

    def transform_check(self) -> TransformCheck | None:
        """How the transform fits the net's statistics of training; None where there are no images."""
        return transform_check(self.config, self.net, self.model_weights)

    def _transform_record(self) -> dict[str, Any]:
        """`transform_check` for the report; what it finds is said."""
        check = self.transform_check()
        if check is None:
            return {}
        if check.doubtful:
            self.progress.warn(f"{check.finding}; {check.remedy}")
        elif check.given is None:
            self.progress.note(check.finding)
        return {"chosen": self.chosen, **check.record}

    def _weights(self) -> dict[str, Any]:
        weights = self.model_weights
        test = InferenceNet.of(self.net)
        self._check(weights)
        settings = self.config.weights
        chosen = choices(test.net, settings)
        if not chosen:
            self.progress.note("weights: weights.layers skips every layer; no weights are quantized")
        check_kernels(filter_net(self.net, TEST), weights, chosen)
        kept = unquantizable(test.net)
        doubtful = doubtful_norms(test.net, weights)
        for line in (*doubtful, *(f"{name} is not quantized: {reason}" for name, reason in kept.items())):
            self.progress.note(f"weights: {line}")
        record: dict[str, Any] = {"kept": kept, "doubtful": doubtful}
        calibration = self._calibration()
        if settings.budget is not None and calibration is not None:
            chosen, found = keep_budget(weights, settings, calibration, test.scores, self.progress)
            record["budget"] = asdict(found)
        _, quantized, layers = weights_quan(
            self.net, weights, chosen, settings.solver, self.progress, calibration
        )
        self._write_weights(self.files.quantized, quantized)
        done = {name for layer in layers for name in (layer.name, *layer.shared_by)} | kept.keys()
        skipped = [
            layer.name for layer in test.net.layer if layer.type in QUANTIZED_TYPES and layer.name not in done
        ]
        return {"layers": [asdict(layer) for layer in layers], "skipped": skipped, **record}

    def _renorm(self) -> dict[str, Any]:
        weights = self._read_result(self.files.quantized, "weights")
        net = InferenceNet.of(with_alpha_terms(self.net, weights)).net
        feed = self._renorm_feed()
        settings = self.config.renorm
        full = self._full_precision() if settings.statistics == "paired" else None
        biases = self._biases(net)
        weights, shifts = renorm(
            net, weights, feed, self.open_engine, settings.memory, self.progress, full, biases
        )
        if not shifts and not biases:
            self.progress.note("renorm: the net has no BatchNorm layer; its weights are passed through")
        self._write_weights(self.files.renorm, weights)
        return {
            "statistics": settings.statistics,
            "images": len(feed),
            "layers": [asdict(shift) for shift in shifts],
        }

    def _biases(self, net: NetParameter) -> dict[str, str]:
        """The layers whose biases are to be corrected (see `correctable`)."""
        settings = self.config.renorm
        asked = settings.bias_correction and settings.statistics == "paired"
        return correctable(net) if asked and self.config.weights.solver != "data_aware" else {}

    def _full_precision(self) -> FullPrecision:
        test = InferenceNet.of(self.net)
        return FullPrecision(test.net, self.model_weights)

    def _activations(self) -> dict[str, Any]:
        weights = self._read_result(self.files.renorm, "renorm")
        net = InferenceNet.of(with_alpha_terms(self.net, weights)).net
        feed = self._activations_feed()
        found = activations_quan(net, weights, feed, self.config.activations, self.open_engine, self.progress)
        kept = [layer.name for layer in net.layer if layer.type == "ReLU"]
        for name in sorted(set(kept) - set(plain_relus(net))):
            self.progress.note(
                f"activations: {name} is left alone: it has a negative slope or a field of a fork"
            )
        if not found:
            self.progress.note("activations: the net has no plain ReLU layer; nothing to quantize")
        for activation in (a for a in found if a.dead):
            self.progress.note(f"activations: {activation.name} is dead: 0 on every calibration image")
        return {"images": len(feed), "layers": [asdict(activation) for activation in found]}

    def _measure_outputs(self) -> None:
        """Add the output SQNR per layer to the report, where there are images to measure it on."""
        records = self.report["stages"]["weights"]["layers"]
        quantized = {name for layer in records for name in (layer["name"], *layer["shared_by"])}
        layers = [layer.name for layer in InferenceNet.of(self.net).net.layer if layer.name in quantized]
        if self.config.data.calibration is None or not layers:
            return
        try:
            enough = images_to_measure(self.config.renorm.images + self.config.activations.images)
            feed = calibration_feed(self.config, self.net, min(enough, calibration_images(self.config)))
            candidates = _candidates(self.config, self.net)
            versions = {name: Version(c.net, c.weights) for name, c in candidates.items()}
            full = versions.pop("fp32")
            found = output_sqnr(full, versions, layers, feed, self.open_engine, self.progress)
        except LabelfreeError as error:
            self.progress.note(f"output SQNR is not measured: {error}")
            return
        self.report["output_sqnr"] = {"images": len(feed), "layers": [asdict(layer) for layer in found]}
        write_report(self.folder, self.report)

    def _calibration(self) -> Calibration | None:
        """What the data-aware solver and a budget need; None without them, as nothing else needs images."""
        weights, settings = self.config.weights, self.config.renorm
        if weights.solver != "data_aware" and weights.budget is None:
            return None
        feed = stage_feed(self.config, self.net, "weights", self.progress)
        net = InferenceNet.of(self.net).net
        return Calibration(net, feed, self.open_engine, settings.memory, settings.statistics)

    def _renorm_feed(self) -> Feed:
        return stage_feed(self.config, self.net, "renorm", self.progress)

    def _activations_feed(self) -> Feed:
        return stage_feed(self.config, self.net, "activations", self.progress)

    def _check(self, weights: Weights) -> None:
        """Check the blobs against the layers, as far as the shapes of inputs and layers are known."""
        one = {blob: (1, *shape) for blob, shape in input_shapes(self.config, self.net).items()}
        known = known_part(InferenceNet.of(self.net).net, one)
        check_weights(known, weights, infer_shapes(known, one))

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
        net = {name: digest for name, digest in self.inputs.items() if name != "weights"}
        parts: dict[str, Any] = {"version": __version__, **net}
        if stage == "weights":
            parts |= {"weights": self._hash_inputs()["weights"], "settings": dump(config.weights)}
            if config.weights.solver == "data_aware" or config.weights.budget is not None:
                parts |= self._image_key()
            if config.weights.solver == "data_aware":
                parts |= {"statistics": config.renorm.statistics}
        else:
            before = self.files.quantized if stage == "renorm" else self.files.renorm
            path = config.output / before
            settings = config.renorm if stage == "renorm" else config.activations
            parts |= {
                "before": sha256(path) if path.exists() else None,
                "settings": dump(settings),
                **self._image_key(),
            }
            if stage == "renorm" and config.renorm.statistics == "paired":
                parts |= {"weights": self._hash_inputs()["weights"], "solver": config.weights.solver}
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
            "transform": self.transform,
            "stages": stages,
            "sizes": self._sizes(stages),
        }
        write_report(self.folder, self.report)

    def _write_prototxts(self, stages: dict[str, Any]) -> list[str]:
        net = with_alpha_terms(self.net, Weights.names(self.config.output / self._latest(stages)))
        if "activations" in stages:
            found = [QuantizedActivation(**layer) for layer in stages["activations"]["layers"]]
            net = with_act_quantize(net, found)
        shapes = input_shapes(self.config, self.net)
        written = {self.files.val: validation_prototxt(net, self.config, shapes)}
        if shapes.keys() >= set(InferenceNet.of(net).inputs):
            written[self.files.deploy] = deploy_prototxt(net, shapes)
        else:
            self.progress.note(f"{self.files.deploy} needs the images' shape: give data.input_shape")
        for name, content in written.items():
            with self.folder.writing(name) as file:
                file.write(to_bytes(format_prototxt(content)))
        return list(written)

    def _latest(self, stages: dict[str, Any]) -> str:
        return self.files.renorm if "renorm" in stages else self.files.quantized

    def _sizes(self, stages: dict[str, Any]) -> dict[str, int]:
        """Bytes of the model: as given, as written, and packed at the bits chosen.

        Packed is what layers share once, and nothing that follows from the rest: the second blob of an alpha
        term does from alpha and bias.
        """
        written = self.config.output / self._latest(stages)
        weights = Weights.read(written)
        net = with_alpha_terms(self.net, weights)
        shared = owners(filter_net(net, TEST))
        alphas = {layer.name for layer in net.layer} - {layer.name for layer in self.net.layer}
        packed = 4 * sum(
            blob.size
            for layer in weights.layers()
            for index, blob in enumerate(weights[layer])
            if BlobId(layer, index) not in shared and not (index and layer in alphas)
        )
        for layer in stages["weights"]["layers"]:
            packed += -(-layer["weights"] * layer["bits"] // 8) - 4 * layer["weights"]
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
        found = evaluate(candidates, feed, open_engine, progress)
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
    given = load_weights(config.model.weights, net)
    found = {"fp32": Candidate(full.net, given, full.scores)}
    weights = Weights.read(quantized)
    if renormed.exists():
        unrepaired = InferenceNet.of(with_alpha_terms(net, weights))
        found["without_renorm"] = Candidate(unrepaired.net, weights, unrepaired.scores)
        weights = Weights.read(renormed)
    final = InferenceNet.of(read_prototxt(prototxt, schema_of(net)))
    found["quantized"] = Candidate(final.net, weights, final.scores)
    return found


def read_model_prototxt(config: Config) -> NetParameter:
    """The network to quantize, with all its phases."""
    model = config.model
    return read_net(model.prototxt, model.caffe_proto, model.stages, model.level)


def dump(section: BaseModel) -> dict[str, Any]:
    """A part of the configuration as JSON values."""
    return section.model_dump(mode="json")


def sha256(path: Path) -> str:
    """The hash of a file's content.

    Raises:
        InputError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with open_file(path, "file") as file:
        while block := file.read(READ_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(config: Config) -> str | None:
    """A hash of what identifies the calibration images: names, sizes and times of their files."""
    if config.data.calibration is None:
        return None
    calibration = config.data.calibration
    paths = [path for path in (calibration.source, *calibration.inputs.values()) if isinstance(path, Path)]
    files = [f for path in paths for f in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    entries = [(str(f), s.st_size, s.st_mtime_ns) for f in files if f.name != "lock.mdb" and (s := f.stat())]
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()
