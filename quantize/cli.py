"""The command line: parse, call, print. Everything heavy is imported where it is used."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from quantize import __version__
from quantize.errors import LabelfreeError

if TYPE_CHECKING:
    from quantize.progress import Progress
    from quantize.record import StageName
    from quantize.settings import Config

Command = TypeVar("Command", bound=Callable[..., Any])
INTERRUPTED = 130
PATH = click.Path(path_type=Path)
QUALITIES = {"fast": "optimal", "best": "data_aware"}
"""weights.solver by --quality."""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="labelfree")
@click.option("--quiet", "-q", is_flag=True, help="No progress, only results and errors.")
@click.option("--verbose", "-v", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def cli(context: click.Context, quiet: bool, verbose: bool) -> None:
    """Compress a trained Caffe network to 4-bit weights and 8-bit activations without labels.

    \b
    The usual way:
      labelfree quantize --config resnet18.yaml
      labelfree evaluate --config resnet18.yaml
    or without a configuration file:
      labelfree quantize --prototxt net.prototxt --weights net.caffemodel \\
                         --calibration photos/ --output out/
    """
    context.obj = {"quiet": quiet, "verbose": verbose}


def parse_shapes(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> Any:
    """``3,224,224``, or several such as ``im_info=3``, as the key data.input_shape."""
    from quantize.settings import parse_shape

    found: dict[str, list[int]] = {}
    for value in values:
        name, _equals, text = value.rpartition("=")
        try:
            found[name] = parse_shape(text)
        except ValueError as error:
            raise click.BadParameter(f"{value}: {error}") from None
    if "" in found and len(found) > 1:
        raise click.BadParameter("name the input of each, as in --shape data=3,224,224 --shape im_info=3")
    return found.get("", found or None)


SHAPE = click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="[INPUT=]C,H,W",
    callback=parse_shapes,
    help="Of one image in an input, where the prototxt does not say it (data.input_shape).",
)
STATE = (
    click.option("--stage", "stages", multiple=True, help="A stage that rules name (model.stages)."),
    click.option("--level", type=int, default=0, help="For rules with levels (model.level)."),
)


def config_options(command: Command) -> Command:
    """The options that every command with a configuration has."""
    options = [
        click.option("--config", "-c", "path", type=PATH, help="The YAML file."),
        click.option("--prototxt", help="The network's layers (model.prototxt)."),
        click.option("--weights", help="The network's blobs, a caffemodel (model.weights)."),
        click.option("--calibration", help="LMDB, image folder or list file (data.calibration.source)."),
        click.option("--validation", help="The same with labels (data.validation.source)."),
        click.option("--output", "-o", help="Folder for the results."),
        SHAPE,
        click.option("--engine", type=click.Choice(["auto", "onnx", "caffe"]), help="What runs the network."),
        click.option("--threads", type=click.IntRange(1), help="Default: what this process may use."),
        click.option(
            "--quality",
            type=click.Choice(list(QUALITIES)),
            help="fast: weights.solver optimal, no images; best: data_aware.",
        ),
        click.option(
            "--set", "assignments", multiple=True, metavar="KEY=VALUE", help="As in --set weights.bits=3."
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def read_config(given: dict[str, Any]) -> Config:
    """The configuration from the options of `config_options`."""
    from quantize.commands.config import load

    keys = {
        "prototxt": "model.prototxt",
        "weights": "model.weights",
        "calibration": "data.calibration.source",
        "validation": "data.validation.source",
        "output": "output",
        "engine": "engine",
        "threads": "threads",
    }
    options = {key: given[name] for name, key in keys.items()}
    options["data.input_shape"] = given["shapes"]
    options["weights.solver"] = QUALITIES.get(given["quality"])
    return load(given["path"], options, given["assignments"])


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
    from quantize.commands.terminal import Bars, Lines
    from quantize.progress import Progress

    if click.get_current_context().obj["quiet"]:
        yield Progress()
        return
    lines = Bars() if sys.stderr.isatty() else Lines()
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

    print_summary(record, config)


def parse_stages(_: click.Context, __: click.Parameter, value: str) -> tuple[StageName, ...]:
    """``--stages renorm,activations`` as names of stages."""
    known: tuple[StageName, ...] = ("weights", "renorm", "activations")
    names = tuple(name.strip() for name in value.split(","))
    for name in names:
        if name not in known:
            raise click.BadParameter(f"{name!r} is not a stage; these are: {', '.join(known)}")
    return tuple(stage for stage in known if stage in names)


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
    help="Which stages to run, separated by commas.",
)
@RESUME
@FORCE
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: the content of report.json.")
def quantize(stages: tuple[StageName, ...], resume: bool, force: bool, as_json: bool, **given: Any) -> None:
    """Run the stages: weights_quan -> renorm -> activations_quan.

    Writes NAME_quantized.caffemodel, NAME_renorm.caffemodel (the final weights), NAME_val.prototxt (for
    `caffe test`), NAME_deploy.prototxt, report.json and report.html into the output folder.
    """
    run_stages(given, stages, resume, force, as_json)


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
    """Stage 2: BatchNorm statistics measured again over the calibration images."""
    run_stages(given, ("renorm",), resume, force)


@cli.command("activations-quan")
@config_options
@RESUME
@FORCE
def activations_quan(resume: bool, force: bool, **given: Any) -> None:
    """Stage 3: a step and codes for every activation that a quantized layer reads (ActQuantize layers)."""
    run_stages(given, ("activations",), resume, force)


@cli.command()
@config_options
@click.option("--images", type=click.IntRange(1), help="Use the first so many images (default: all).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate(images: int | None, as_json: bool, **given: Any) -> None:
    """Measure full precision and quantized: top-1, top-5 (with labels), agreement, divergence.

    Without validation images these are calibration images that no stage has used, where there are any. The
    result is added to report.json and report.html.
    """
    config = read_config_of_results(given)
    from quantize.commands.summary import evaluation_table
    from quantize.job.evaluation import evaluate_run

    with showing_progress() as progress:
        found = evaluate_run(config, images, progress)
    if as_json:
        accuracy = {name: asdict(each) for name, each in found.accuracy.items()}
        click.echo(json.dumps({"images": found.images, **accuracy, "agreement": found.agreement}))
    else:
        click.echo(evaluation_table(found))


@cli.command()
@config_options
@click.option("--evaluate", "evaluating", is_flag=True, help="Evaluate first, also without renorm.")
@click.option("--images", type=click.IntRange(1), help="For --evaluate: the first so many (default: all).")
def report(evaluating: bool, images: int | None, **given: Any) -> None:
    """Write report.html again from what is in the output folder."""
    config = read_config_of_results(given)
    from quantize.job.evaluation import evaluate_run, report_run

    if evaluating:
        from quantize.commands.summary import evaluation_table

        with showing_progress() as progress:
            found = evaluate_run(config, images, progress, without_renorm=True)
        click.echo(evaluation_table(found))
    click.echo(f"wrote {report_run(config)}")


@cli.command()
@click.argument("prototxt", type=PATH)
@click.argument("weights", type=PATH, required=False)
@SHAPE
@CAFFE_PROTO
@STATE[0]
@STATE[1]
@click.option("--plan", "show_plan", is_flag=True, help="Show how renorm would go through the net.")
@click.option("--images", type=click.IntRange(1), default=1000, show_default=True, help="For --plan.")
@click.option("--memory", default="2GiB", show_default=True, help="For --plan: renorm.memory.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inspect(
    prototxt: Path,
    weights: Path | None,
    shapes: Any,
    caffe_proto: Path | None,
    stages: tuple[str, ...],
    level: int,
    show_plan: bool,
    images: int,
    memory: str,
    as_json: bool,
) -> None:
    """Show layers, shapes, parameters, multiply-accumulates and what would be quantized."""
    from quantize.commands import inspect as inspection

    found = inspection.Inspection.of(prototxt, weights, shapes, caffe_proto, stages, level)
    for note in found.notes:
        click.echo(f"note: {note}", err=True)
    if show_plan:
        click.echo(inspection.plan_text(found, images, memory, as_json))
    else:
        click.echo(inspection.layers_text(found, as_json))


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
    shapes: Any,
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
    written, guesses = write_initial(model, calibration, path, force, shapes)
    for guess in guesses:
        click.echo(f"guessed: {guess}")
    click.echo(f"wrote {written}; next: labelfree quantize --config {written}")


@cli.command("make-lmdb")
@click.argument("images", type=PATH)
@click.argument("lmdb", type=PATH)
@click.option("--resize-short", type=click.IntRange(1), help="Resize the shorter side to this.")
@click.option("--limit", type=click.IntRange(1), help="At most so many images.")
@click.option("--shuffle", is_flag=True, help="In random order (before --limit).")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the order.")
@click.option("--jpeg-quality", type=click.IntRange(1, 100), help="Store JPEGs instead of raw pixels.")
@click.option("--threads", type=click.IntRange(1), help="Default: what this process may use.")
@click.option("--force", is_flag=True, help="Replace an LMDB that is there.")
def make_lmdb_command(images: Path, lmdb: Path, threads: int | None, **options: Any) -> None:
    """Make an LMDB of Datums from an image folder or a list file; Caffe reads it too."""
    from quantize.data.make_lmdb import make_lmdb
    from quantize.host import available_threads

    with showing_progress() as progress:
        report = make_lmdb(
            images,
            lmdb,
            threads=threads or available_threads(),
            on_unreadable=lambda image: progress.note(f"left out: {image.reason}"),
            **options,
        )
    click.echo(f"wrote {report.written} images to {lmdb}, {len(report.unreadable)} unreadable")


@cli.command()
@config_options
def doctor(**given: Any) -> None:
    """Check what works here: libraries, engines, and with a configuration its files; exit code 0 or 1."""
    asked = any(value for value in given.values())
    config = read_config(given) if asked else None
    from quantize.commands.doctor import examine

    process = config.caffe if config is not None and config.engine == "caffe" else None
    well = True
    for check in examine(config, process, given["path"] is None):
        well = well and check.state != "FAIL"
        click.echo(f"{check.state:<4}  {check.what:<24} {check.seen}")
    if not well:
        sys.exit(1)


def main() -> None:
    """Run a command; every way it can end is an exit code and at most one line."""
    verbose = any(argument in ("-v", "--verbose") for argument in sys.argv[1:])
    if not verbose and not sys.warnoptions:
        warnings.simplefilter("ignore")  # they are for programmers; what matters to users is checked and said
    try:
        cli.main(standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except LabelfreeError as error:
        if verbose:
            raise
        fail(str(error), error.exit_code)
    except MemoryError:
        if verbose:
            raise
        fail("out of memory; lower renorm.memory or use a machine with more", 1)
    except OSError as error:  # files that vanished after they were checked, failing disks
        if verbose:
            raise
        fail(f"{error.filename or 'a file'}: {error.strerror or error}", 1)
    except Exception as error:
        if verbose:
            raise
        fail(f"unexpected {type(error).__name__}: {error}; run again with --verbose and report it", 1)


def fail(message: str, code: int) -> None:
    """Print one line, in which names from files cannot steer the terminal, and leave."""
    line = " ".join(message.split())
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    click.echo(f"labelfree: {shown}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
