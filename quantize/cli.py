"""The command line: parse, call, print. Everything heavy is imported where it is used."""

from __future__ import annotations

import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from quantize import __version__
from quantize.errors import InputError, LabelfreeError

if TYPE_CHECKING:
    from quantize.progress import Progress
    from quantize.record import StageName
    from quantize.settings import Config

Command = TypeVar("Command", bound=Callable[..., Any])
INTERRUPTED = 130
PATH = click.Path(path_type=Path)
FILE = click.Path()
"""A path as text: the configuration expands and checks it. The type has the shell complete it."""
QUALITIES = {"fast": "optimal", "best": "data_aware"}
"""weights.solver by --quality."""
STAGE_COMMANDS: dict[StageName, str] = {
    "weights": "weights-quan",
    "renorm": "renorm",
    "activations": "activations-quan",
}
LONGEST_SUMMARY = 1000


@dataclass
class Loudness:
    """What -q and -v say, wherever on the command line they stand."""

    quiet: bool = False
    verbose: bool = False


def be_quiet(context: click.Context, _: click.Parameter, value: bool) -> None:
    """``-q``."""
    context.obj.quiet |= value


def be_verbose(context: click.Context, _: click.Parameter, value: bool) -> None:
    """``-v``: warnings, which are for programmers, are shown too."""
    context.obj.verbose |= value
    if value and not sys.warnoptions:
        warnings.simplefilter("default")


def loudness_options() -> list[click.Option]:
    """Options that the group and every command have."""
    quiet, verbose = ("--quiet", "-q"), ("--verbose", "-v")
    common: dict[str, Any] = {"is_flag": True, "is_eager": True, "expose_value": False}
    return [
        click.Option(quiet, callback=be_quiet, help="No progress, only results and errors.", **common),
        click.Option(verbose, callback=be_verbose, help="Show the traceback of an error.", **common),
    ]


class Commands(click.Group):
    """Commands in the order in which they are written down here, with whole summaries."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.params += loudness_options()

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Add a command; it gets the options that all have."""
        cmd.params += loudness_options()
        super().add_command(cmd, name)

    def list_commands(self, _: click.Context) -> list[str]:
        """The names in the order of their definition, which is that of their use."""
        return list(self.commands)

    def format_commands(self, _: click.Context, formatter: click.HelpFormatter) -> None:
        """The commands' first sentences, wrapped and not cut."""
        with formatter.section("Commands"):
            formatter.write_dl(
                [
                    (name, command.get_short_help_str(LONGEST_SUMMARY))
                    for name, command in self.commands.items()
                ]
            )


@click.group(
    cls=Commands, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(__version__, prog_name="labelfree")
@click.pass_context
def cli(context: click.Context) -> None:
    """Compress a trained Caffe network to 4-bit weights and 8-bit activations without labels.

    \b
    The usual way:
      labelfree quantize --config resnet18.yaml
      labelfree evaluate --config resnet18.yaml
    or without a configuration file:
      labelfree quantize --prototxt net.prototxt --weights net.caffemodel \\
                         --calibration photos/ --output out/
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


THREADS = click.option(
    "--threads", "-j", type=click.IntRange(1), help="Processors to use; default: what this process may use."
)


def complete_key(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The keys of the configuration, for the shell."""
    from quantize.commands.config import keys

    return [CompletionItem(f"{key}=") for key in keys() if key.startswith(incomplete)]


def complete_stages(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of stages behind those that stand there, separated by commas, for the shell."""
    *given, last = incomplete.split(",")
    left = [stage for stage in STAGE_COMMANDS if stage not in given and stage.startswith(last)]
    return [CompletionItem(",".join([*given, stage])) for stage in left]


def parse_shapes(values: tuple[str, ...]) -> Any:
    """``3,224,224``, or several such as ``im_info=3``, as the key data.input_shape."""
    from quantize.settings import parse_shape

    shapes: dict[str, list[int]] = {}
    for value in values:
        name, _equals, text = value.rpartition("=")
        try:
            shapes[name] = parse_shape(text)
        except ValueError as error:
            raise click.BadParameter(f"{value}: {error}", param_hint="'--shape'") from None
    if "" in shapes and len(shapes) > 1:
        several = "name the input of each, as in --shape data=3,224,224 --shape im_info=3"
        raise click.BadParameter(several, param_hint="'--shape'")
    return shapes.get("", shapes or None)


SHAPE = click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="[INPUT=]C,H,W",
    help="Of one image in an input, where the prototxt does not say it (data.input_shape).",
)
STATE = (
    click.option("--stage", "stages", multiple=True, help="A stage that rules name (model.stages)."),
    click.option("--level", type=int, default=0, help="For rules with levels (model.level)."),
)


SET = click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="KEY=VALUE",
    shell_complete=complete_key,
    help="As in --set weights.bits=3.",
)


def config_options(command: Command) -> Command:
    """The options that every command with a configuration has."""
    options = [
        click.option("--config", "-c", "path", type=PATH, help="The YAML file."),
        click.option("--prototxt", type=FILE, help="The network's layers (model.prototxt)."),
        click.option("--weights", type=FILE, help="The network's blobs, a caffemodel (model.weights)."),
        click.option(
            "--calibration", type=FILE, help="LMDB, image folder or list file (data.calibration.source)."
        ),
        click.option("--validation", type=FILE, help="The same with labels (data.validation.source)."),
        click.option("--output", "-o", type=FILE, help="Folder for the results."),
        SHAPE,
        click.option("--engine", type=click.Choice(["auto", "onnx", "caffe"]), help="What runs the network."),
        THREADS,
        click.option(
            "--quality",
            type=click.Choice(list(QUALITIES)),
            help="fast: weights.solver optimal, no images; best: data_aware.",
        ),
        SET,
    ]
    for option in reversed(options):
        command = option(command)
    return command


def read_config(given: dict[str, Any]) -> Config:
    """The configuration from the options of `config_options`."""
    from quantize.commands.config import OPTIONS, load

    if not any(given.values()):
        raise InputError(
            "what is to be done? give --config FILE, or --prototxt, --weights, --calibration and --output"
        )
    options = {key: given[option.removeprefix("--")] for key, option in OPTIONS.items()}
    options["data.input_shape"] = parse_shapes(given["shapes"])
    options["weights.solver"] = QUALITIES.get(given["quality"])
    return load(given["path"], options, given["assignments"])


def command_line(command: str, given: dict[str, Any]) -> str:
    """A command with the options of `config_options` that the present one was given."""
    words = ["labelfree", command]
    for parameter in click.get_current_context().command.params:
        value = given.get(str(parameter.name))
        for part in value if isinstance(value, tuple) else [value]:
            if part is not None:
                words += [parameter.opts[0], str(part)]
    return shlex.join(words)


def read_config_of_results(given: dict[str, Any]) -> Config:
    """`read_config`; without a YAML file the transform is the one that `quantize` chose."""
    config = read_config(given)
    if given["path"] is not None:
        return config
    from quantize.job.transforms import with_reported_transform

    return with_reported_transform(config)


@contextmanager
def showing_progress() -> Iterator[Progress]:
    """Bars on a terminal, lines elsewhere, nothing with --quiet."""
    from quantize.commands.terminal import Bars, Lines, is_wide
    from quantize.progress import Progress

    if click.get_current_context().obj.quiet:
        yield Progress()
        return
    lines = Bars() if is_wide(sys.stderr) else Lines()
    try:
        yield lines
    finally:
        lines.stop()


def run_stages(
    given: dict[str, Any], stages: tuple[StageName, ...], resume: bool, force: bool, as_json: bool = False
) -> None:
    """Run stages and print the summary, or with --json the content of report.json."""
    config = read_config(given)
    from quantize.job.run import Run

    with showing_progress() as progress:
        record = Run(config, progress, given["path"] is None).quantize(stages, resume, force)
    if as_json:
        click.echo(record.to_json())
        return
    from quantize.commands.summary import print_summary

    left = [command for stage, command in STAGE_COMMANDS.items() if stage not in record.stages.done]
    following = command_line(left[0] if left else "evaluate", given)
    if not left and config.data.calibration is None and config.data.validation is None:
        following += " --validation IMAGES"
    print_summary(record, config, following)


def parse_stages(_: click.Context, __: click.Parameter, value: str) -> tuple[StageName, ...]:
    """``--stages renorm,activations`` as names of stages."""
    names = tuple(name.strip() for name in value.split(","))
    for name in names:
        if name not in STAGE_COMMANDS:
            raise click.BadParameter(f"{name!r} is not a stage; these are: {', '.join(STAGE_COMMANDS)}")
    return tuple(stage for stage in STAGE_COMMANDS if stage in names)


def parse_size(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """``--resize 256x320`` as height and width."""
    sides = re.fullmatch(r"(\d{1,9})[xX](\d{1,9})", value or "")
    if value is not None and sides is None:
        raise click.BadParameter(f"{value!r} is not HEIGHTxWIDTH, as in 256x256")
    return (int(sides[1]), int(sides[2])) if sides else None


RESUME = click.option("--resume", is_flag=True, help="Skip stages whose results fit inputs and settings.")
CAFFE_PROTO = click.option("--caffe-proto", type=PATH, help="A fork's caffe.proto (model.caffe_proto).")
FORCE = click.option("--force", is_flag=True, help="Do every stage again, also with --resume.")


@cli.command()
@config_options
@click.option(
    "--stages",
    default="weights,renorm,activations",
    show_default=True,
    callback=parse_stages,
    shell_complete=complete_stages,
    help="Which stages to run, separated by commas.",
)
@RESUME
@FORCE
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: the content of report.json.")
def quantize(stages: tuple[StageName, ...], resume: bool, force: bool, as_json: bool, **given: Any) -> None:
    """Quantize a network: its weights, its BatchNorm statistics (renorm) and its activations.

    Writes NAME_quantized.caffemodel, NAME_renorm.caffemodel (the final weights), NAME_val.prototxt (for
    `caffe test`), NAME_deploy.prototxt, report.json and report.html into the output folder.
    """
    run_stages(given, stages, resume, force, as_json)


@cli.command()
@config_options
@click.option("--images", type=click.IntRange(1), help="Use the first so many images (default: all).")
@click.option(
    "--runtime",
    type=click.Choice(["onnx", "openvino", "ncnn"]),
    help="Also an exported file, in this runtime.",
)
@click.option("--file", type=PATH, help="That file, where `export` has written it elsewhere.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate(images: int | None, runtime: str | None, file: Path | None, as_json: bool, **given: Any) -> None:
    """Measure full precision and quantized: top-1, top-5 (with labels), agreement, divergence.

    Without validation images these are calibration images that no stage has used, where there are any. The
    result is added to report.json and report.html, but for that of an exported file.
    """
    if file is not None and runtime is None:
        raise click.UsageError("--file needs --runtime, which says what opens it")
    config = read_config_of_results(given)
    from quantize.commands.evaluation import evaluation_json, evaluation_text
    from quantize.job.evaluation import evaluate_run
    from quantize.job.export import evaluate_exported

    with showing_progress() as progress:
        if runtime is None:
            found = evaluate_run(config, images, progress)
        else:
            found = evaluate_exported(config, runtime, file, images, progress)
    if as_json:
        click.echo(evaluation_json(found))
    else:
        click.echo(evaluation_text(found))


OPTIONS_OF_TARGETS = {"runtime": "onnx", "taken": "onnx", "codes": "onnx", "keep_layers": "caffe"}


def check_options_of_target(target: str) -> None:
    """Refuse an option of `export` that is for another target."""
    context = click.get_current_context()
    for parameter in context.command.params:
        owner = OPTIONS_OF_TARGETS.get(str(parameter.name), target)
        source = context.get_parameter_source(str(parameter.name))
        if owner != target and source is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{parameter.opts[0]} is for --to {owner}")


@cli.command()
@config_options
@click.option(
    "--to",
    "target",
    type=click.Choice(["onnx", "caffe", "ncnn", "mnn", "ranges"]),
    required=True,
    help="The kind of files; ranges: tables for clients that quantize the plain Caffe pair themselves.",
)
@click.option(
    "--runtime",
    type=click.Choice(["ort", "openvino"]),
    default="ort",
    show_default=True,
    help="The one that an ONNX file is to be fast in: onnxruntime or OpenVINO.",
)
@click.option(
    "--input",
    "taken",
    type=click.Choice(["float", "pixels"]),
    default="float",
    show_default=True,
    help="What the file takes: transformed images, or pixels of 8 bits, so that the first layer runs in "
    "integers too.",
)
@click.option(
    "--codes",
    type=click.Choice(["packed", "int8"]),
    default="packed",
    show_default=True,
    help="Weights of 4 bits two in a byte, or each in one, for onnxruntime before 1.23.",
)
@click.option(
    "--keep-layers", is_flag=True, help="A plain Caffe pair keeps alpha, BatchNorm and Scale as layers."
)
@click.option("--images", type=click.IntRange(1), default=64, show_default=True, help="Compare on so many.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def export(
    target: str,
    runtime: Any,
    taken: str,
    codes: Any,
    keep_layers: bool,
    images: int,
    as_json: bool,
    **given: Any,
) -> None:
    """Write the result as files that are small and run in integers.

    With --config, --output is the folder of the files (default: that of the results); without, it is the
    folder of the results and of the files. Ends with how small, how close and how fast the file is, and which
    layers stay in float; report.json and report.html of the results say it from then on, too.
    """
    check_options_of_target(target)
    folder = given.pop("output") if given["path"] is not None else None
    config = read_config_of_results({**given, "output": None} if given["path"] is not None else given)
    from quantize.commands.export import export_json, export_text
    from quantize.exports.onnx import OnnxOptions
    from quantize.job.export import export_run

    options = OnnxOptions(runtime, codes)
    folder = None if folder is None else Path(folder)
    with showing_progress() as progress:
        outcome = export_run(
            *(config, target, folder, options),
            takes_pixels=taken == "pixels",
            fold=not keep_layers,
            images=images,
            progress=progress,
        )
    click.echo(export_json(outcome) if as_json else export_text(outcome))


@cli.command()
@click.argument("outputs", nargs=-1, type=PATH, metavar="OUT1 OUT2 ...")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def compare(outputs: tuple[Path, ...], as_json: bool) -> None:
    """Show several results side by side: size, accuracy, agreement, and the settings that differ.

    OUT1, OUT2 and so on are output folders of `labelfree quantize`, best after `labelfree evaluate`. On the
    same images, differences of accuracy are tested against chance (McNemar).
    """
    from quantize.commands.compare import compare_json, compare_text, read_results

    results = read_results(outputs)
    click.echo(compare_json(results) if as_json else compare_text(results))


@cli.command()
@config_options
@click.option("--evaluate", "evaluating", is_flag=True, help="Evaluate first, also without renorm.")
@click.option("--images", type=click.IntRange(1), help="For --evaluate: the first so many (default: all).")
def report(evaluating: bool, images: int | None, **given: Any) -> None:
    """Write report.html again from what is in the output folder."""
    config = read_config_of_results(given)
    from quantize.job.evaluation import evaluate_run, report_run

    if evaluating:
        from quantize.commands.evaluation import evaluation_text

        with showing_progress() as progress:
            found = evaluate_run(config, images, progress, without_renorm=True)
        click.echo(evaluation_text(found))
    click.echo(f"wrote {report_run(config)}")


@cli.command()
@click.option("--prototxt", type=PATH, required=True, help="The network's layers.")
@click.option("--weights", type=PATH, required=True, help="The network's blobs (caffemodel).")
@click.option("--calibration", type=PATH, required=True, help="LMDB, image folder or list file.")
@SHAPE
@CAFFE_PROTO
@STATE[0]
@STATE[1]
@click.option("--config", "-c", "path", type=PATH, help="The YAML file to write (default: NAME.yaml).")
@click.option("--force", is_flag=True, help="Overwrite it.")
def init(
    prototxt: Path,
    weights: Path,
    calibration: Path,
    shapes: tuple[str, ...],
    caffe_proto: Path | None,
    stages: tuple[str, ...],
    level: int,
    path: Path | None,
    force: bool,
) -> None:
    """Write a commented configuration for a network; guesses are said, nothing is asked."""
    from quantize.commands.init import write_initial
    from quantize.settings import ModelFiles

    model = ModelFiles(
        prototxt=prototxt, weights=weights, caffe_proto=caffe_proto, stages=list(stages), level=level
    )
    written, guesses = write_initial(model, calibration, path, force, parse_shapes(shapes))
    for guess in guesses:
        click.echo(f"guessed: {guess}")
    click.echo(f"wrote {written}; next: labelfree quantize --config {written}")


@cli.command()
@config_options
def doctor(**given: Any) -> None:
    """Check what works here, and with a configuration its files; exit code 0 or 1."""
    config = read_config(given) if any(given.values()) else None
    from quantize.commands.doctor import examine

    process = config.caffe if config is not None and config.engine == "caffe" else None
    well = True
    for check in examine(config, process, given["path"] is None):
        well = well and check.state != "FAIL"
        click.echo(f"{check.state:<4}  {check.what:<24} {check.seen}")
    if not well:
        sys.exit(1)


@cli.command()
@click.argument("prototxt", type=PATH, required=False)
@click.argument("weights", type=PATH, required=False)
@click.option("--config", "-c", "path", type=PATH, help="Show what this YAML file would do, budget included.")
@SET
@SHAPE
@CAFFE_PROTO
@STATE[0]
@STATE[1]
@click.option("--plan", "show_plan", is_flag=True, help="Show how renorm would go through the net.")
@click.option("--images", type=click.IntRange(1), help="For --plan (default: renorm.images).")
@click.option("--memory", help="For --plan (default: memory).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inspect(
    prototxt: Path | None,
    weights: Path | None,
    path: Path | None,
    assignments: tuple[str, ...],
    shapes: tuple[str, ...],
    caffe_proto: Path | None,
    stages: tuple[str, ...],
    level: int,
    show_plan: bool,
    images: int | None,
    memory: str | None,
    as_json: bool,
) -> None:
    """Show layers, shapes, parameters, multiply-accumulates and what would be quantized.

    With a PROTOTXT that is what `quantize` does by default; with --config what that file says, and the size.
    Bits within a weights.budget are measured, on the calibration images.
    """
    from quantize.commands import inspect as inspection

    config = None
    if (prototxt is None) == (path is None):
        raise click.UsageError("give either a prototxt or --config FILE")
    if path is not None:
        from quantize.commands.config import load

        config = load(path, {"data.input_shape": parse_shapes(shapes)}, assignments)
        inspected = inspection.Inspection.of_config(config)
        if not show_plan:
            with showing_progress() as progress:
                inspected = inspected.configured_by(config, progress)
    elif prototxt is not None:
        inspected = inspection.Inspection.of(
            prototxt, weights, parse_shapes(shapes), caffe_proto, stages, level
        )
    for note in inspected.notes:
        click.echo(f"note: {note}", err=True)
    if show_plan:
        click.echo(inspection.plan_text(inspected, config, images, memory, as_json))
    else:
        click.echo(inspection.layers_text(inspected, as_json))


@cli.command("make-lmdb")
@click.argument("images", type=PATH)
@click.argument("lmdb", type=PATH)
@click.option("--resize", metavar="HxW", callback=parse_size, help="Resize to this height and width.")
@click.option("--resize-short", type=click.IntRange(1), help="Resize the shorter side to this.")
@click.option("--limit", type=click.IntRange(1), help="At most so many images.")
@click.option("--shuffle", is_flag=True, help="In random order (before --limit).")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the order.")
@click.option("--jpeg-quality", type=click.IntRange(1, 100), help="Store JPEGs instead of raw pixels.")
@THREADS
@click.option("--force", is_flag=True, help="Replace an LMDB that is there.")
def make_lmdb_command(images: Path, lmdb: Path, **options: Any) -> None:
    """Make an LMDB of Datums from an image folder or a list file; Caffe reads it too.

    Labels are those of the list, or a folder's subfolders.
    """
    from quantize.data.make_lmdb import make_lmdb

    with showing_progress() as progress:
        report = make_lmdb(images, lmdb, progress=progress, **options)
    click.echo(
        f"wrote {report.written} images, {report.labeled} of them labeled, to {lmdb}; "
        f"{len(report.unreadable)} unreadable"
    )


@cli.command()
@click.argument("file", metavar="NAME.lfq", type=PATH)
@click.option("--output", "-o", type=PATH, default=Path(), help="Folder for the two (default: this one).")
@click.option("--force", is_flag=True, help="Replace files that are there.")
def unpack(file: Path, output: Path, force: bool) -> None:
    """Turn a packed net back into NAME.prototxt and NAME.caffemodel, byte for byte what was packed."""
    from quantize.exports.packed import unpack as unpacked

    for path in unpacked(file, output, force):
        click.echo(f"wrote {path}")


@cli.command()
@click.argument("folder", metavar="DIR", type=PATH)
@click.option("--remove", is_flag=True, help="Take the files out again.")
@click.option("--force", is_flag=True, help="Replace or remove files that differ from ours, too.")
def layers(folder: Path, remove: bool, force: bool) -> None:
    """Put the ActQuantize layer's sources into a Caffe source tree, or write them to a new folder.

    In a source tree Caffe's own build takes them up; a folder gets a Makefile that builds a plug-in for an
    installed Caffe.
    """
    from quantize.commands.layers import put_layers, remove_layers

    for line in (remove_layers if remove else put_layers)(folder, force):
        click.echo(line)


@cli.command("weights-quan")
@config_options
@RESUME
@FORCE
def weights_quan(resume: bool, force: bool, **given: Any) -> None:
    """Stage 1: weights onto a grid of few levels, one alpha per kernel."""
    run_stages(given, ("weights",), resume, force)


@cli.command()
@config_options
@RESUME
@FORCE
def renorm(resume: bool, force: bool, **given: Any) -> None:
    """Stage 2: BatchNorm statistics that fit the quantized weights, from the calibration images."""
    run_stages(given, ("renorm",), resume, force)


@cli.command("activations-quan")
@config_options
@RESUME
@FORCE
def activations_quan(resume: bool, force: bool, **given: Any) -> None:
    """Stage 3: a step and codes for every activation that a quantized layer reads (ActQuantize layers)."""
    run_stages(given, ("activations",), resume, force)


def main() -> None:
    """Run a command; every way it can end is an exit code and at most one line."""
    loudness = Loudness()
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # they are for programmers; what matters to users is checked and said
    try:
        cli.main(prog_name="labelfree", standalone_mode=False, obj=loudness)
        sys.stdout.flush()
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        fail(usage_text(error), 2)
    except (KeyboardInterrupt, click.Abort):
        fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except LabelfreeError as error:
        if loudness.verbose:
            raise
        fail(str(error), error.exit_code)
    except MemoryError:
        if loudness.verbose:
            raise
        fail("out of memory; lower `memory` or use a machine with more", 1)
    except OSError as error:  # files that vanished after they were checked, failing disks
        if loudness.verbose:
            raise
        fail(f"{error.filename or 'a file'}: {error.strerror or error}", 1)
    except Exception as error:
        if loudness.verbose:
            raise
        fail(f"unexpected {type(error).__name__}: {error}; run again with --verbose and report it", 1)


def usage_text(error: click.ClickException) -> str:
    """Click's words as one of our lines."""
    message = error.format_message().rstrip(".")
    context = error.ctx if isinstance(error, click.UsageError) else None
    where = context.command_path if context is not None else "labelfree"
    return f"{message[:1].lower()}{message[1:]}; see `{where} --help`"


def fail(message: str, code: int) -> None:
    """Print one line, in which names from files cannot steer the terminal, and leave."""
    line = " ".join(message.split())
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    click.echo(f"labelfree: {shown}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
