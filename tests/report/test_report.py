"""The report and the terminal: what a person sees, in a real browser where it matters."""

import html
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantize import cli
from quantize.caffenet import InferenceNet, Weights, read_prototxt
from quantize.caffenet.model import Model
from quantize.caffenet.quantized import with_alpha_terms
from quantize.commands.config import load
from quantize.commands.terminal import Lines, rate_text
from quantize.job.evaluation import evaluate_run, report_run
from quantize.job.run import Run
from quantize.measure.closeness import log_softmax
from quantize.measure.sqnr import images_to_measure
from quantize.record import (
    Accuracy,
    ActivationsRecord,
    BatchNormShift,
    CaffeTest,
    Closeness,
    Coverage,
    Evaluation,
    Export,
    FileComparison,
    Kernels,
    LayerSqnr,
    OutputCloseness,
    OutputSqnr,
    QuantizedActivation,
    QuantizedLayer,
    RenormRecord,
    RunRecord,
    Sizes,
    Stages,
    WeightsRecord,
)
from quantize.report import plots
from quantize.report.advice import advise
from quantize.report.facts import NormPlot, Row, rows_of
from quantize.report.page import render
from tests.conftest import Job
from tests.heard import Heard
from tests.nets import RESIDUAL, model_of, parse

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = """</text></svg><img src=x onerror=alert(1)>$\\alpha_{$&quot;'</script>{{7*7}}"""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr", "--v=0"),
    "--window-size=500,900",  # the narrowest that it makes
)


@pytest.fixture(scope="session")
def done_template(job_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job that has been quantized and evaluated."""
    job = Job(Path(shutil.copytree(job_template, tmp_path_factory.mktemp("done") / "job")))
    Run(job.config()).quantize()
    evaluate_run(job.config(), without_renorm=True)
    return job.folder


@pytest.fixture
def done(done_template: Path, tmp_path: Path) -> Job:
    return Job(Path(shutil.copytree(done_template, tmp_path / "job")))


def report_of(job: Job) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((job.out / "report.json").read_text())
    return report


def page_of(job: Job) -> str:
    return (job.out / "report.html").read_text(encoding="utf-8")


def test_quantize_writes_what_the_user_wants_to_know(done: Job) -> None:
    page, report = page_of(done), report_of(done)
    sizes = report["sizes"]
    assert f"<b>{sizes['model'] / sizes['packed']:.1f}×</b>" in page
    for layer in report["stages"]["weights"]["layers"]:
        assert f'<td title="{layer["name"]}">' in page
        assert f">{layer['sqnr_db']:.1f}</td>" in page
    agreement = report["evaluation"]["outputs"][0]["closeness"]["quantized"]["agreement"]
    assert f"{agreement:.2f} %" in page
    assert "quantized weights, no renorm" in page
    assert page.count("<svg") == 1 + 6 + 2 + 4  # the depth, layers, scatters, ReLUs
    assert "onnxruntime" in page


def test_the_page_needs_nothing_from_outside(done: Job) -> None:
    page = page_of(done)
    assert "default-src 'none'" in page
    assert not re.search(r"(src|href)\s*=\s*([\"'](?!#)|[^\"'\s])|@import|url\((?!#)", page)


def test_output_sqnr_is_what_numpy_says(done: Job) -> None:
    """The last layer has no BatchNorm behind it: its output is the scores."""
    report = report_of(done)
    assert report["output_sqnr"]["images"] == images_to_measure(20 + 12) == 16
    layers = report["output_sqnr"]["layers"]
    assert [layer["name"] for layer in layers] == [
        layer["name"] for layer in report["stages"]["weights"]["layers"]
    ]
    record = Run(done.config("data.augment=test")).quantize()
    found = evaluate_run(done.config("data.validation=null", "data.augment=test"), 16)
    assert record.output_sqnr is not None
    last = record.output_sqnr.layers[-1].sqnr_db["quantized"]
    assert last == pytest.approx(found.closeness["quantized"].sqnr_db, abs=1e-3)


def test_hostile_names_stay_text(job: Job, browse: Callable[[Path], tuple[str, str]]) -> None:
    """Layer names come from files."""
    prototxt, weights = job.folder / "net.prototxt", job.folder / "net.caffemodel"
    quoted = HOSTILE.replace("\\", "\\\\").replace("'", "\\'")
    prototxt.write_text(
        prototxt.read_text()
        .replace('name: "left"', f"name: '{quoted}'")
        .replace('name: "relu_sum"', f"name: 'relu{quoted}'")
        .replace('name: "bn_left"', f"name: 'bn{quoted}'")
    )
    old, new = Weights.read(weights), Weights()
    net = InferenceNet.of(read_prototxt(prototxt)).net
    renamed = {HOSTILE: "left", f"bn{HOSTILE}": "bn_left"}
    for layer in net.layer:
        before = renamed.get(layer.name, layer.name)
        if before in old:
            new.add(layer, old[before])
    with open(weights, "wb") as file:
        new.write(file)
    heard = Heard()
    Run(job.config(), heard).quantize()
    assert not any("report.html" in note for note in heard.notes), heard.notes
    page = page_of(job)
    assert "<img" not in page
    assert "{{7*7}}" in page
    assert f'<td title="{html.escape(HOSTILE, quote=False)[:20]}' in page
    assert page.count("</script>") == 1
    assert page.count("<svg") == page.count("</svg>")
    document, log = browse(job.out / "report.html")
    assert "CONSOLE" not in log
    assert "<img" not in document


def test_a_page_that_fails_is_said_and_undoes_nothing(done: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> str:
        raise RuntimeError("no fonts here")

    monkeypatch.setattr(plots, "depth_plot", broken)
    heard = Heard()
    Run(done.config(), heard).quantize(("activations",))
    assert any("report.html could not be made (RuntimeError: no fonts here)" in note for note in heard.notes)
    assert not (done.out / "report.html").exists()  # the old one showed other numbers
    assert (done.out / "residual_deploy.prototxt").exists()
    with pytest.raises(RuntimeError, match="no fonts"):
        report_run(done.config())


def test_redoing_a_stage_forgets_the_evaluation(done: Job) -> None:
    assert "evaluation" in report_of(done)
    Run(done.config()).quantize(("activations",))
    assert "evaluation" not in report_of(done)
    assert "not measured" in page_of(done)
    assert "labelfree report --evaluate" in page_of(done)


def test_resuming_a_finished_run_keeps_everything(done: Job) -> None:
    Run(done.config()).quantize()
    evaluate_run(done.config())
    before = page_of(done)
    record = Run(done.config()).quantize(resume=True)
    assert json.loads(record.to_json()) == report_of(done)
    assert page_of(done) == before


def test_the_first_stage_alone_has_a_page_that_says_so(job: Job) -> None:
    heard = Heard()
    Run(job.config(), heard).quantize(("weights",))
    assert heard.notes == []
    page = page_of(job)
    assert "Not run yet: renorm and activations" in page
    assert "BatchNorm before and after" not in page


def test_a_network_that_is_left_as_it_is_has_a_page(job: Job) -> None:
    layers = ("conv1", "left", "right_a", "right_b", "fc1", "fc2")
    skipping = ", ".join(f"{name}: {{skip: true}}" for name in layers)
    heard = Heard()
    Run(job.config(f"weights.layers={{{skipping}}}"), heard).quantize()
    assert not any("report.html" in note for note in heard.notes), heard.notes
    assert "fc2 keeps full precision" in page_of(job)


@pytest.mark.parametrize(
    ("factors", "words"), [((1, 1, 0), "the third blob is 0"), ((0, 0, 1), "the stored variance is 0")]
)
def test_norms_without_statistics_have_a_page_that_says_so(
    job: Job, factors: tuple[int, int, int], words: str
) -> None:
    path = job.folder / "net.caffemodel"
    weights = Weights.read(path)
    norms = [layer.name for layer in parse(RESIDUAL).layer if layer.type == "BatchNorm"]
    for name in norms:
        weights.replace(name, [blob * factor for blob, factor in zip(weights[name], factors, strict=True)])
    with open(path, "wb") as file:
        weights.write(file)
    heard = Heard()
    Run(job.config(), heard).quantize()
    said = [note for note in heard.notes if words in note]
    assert len(said) == 1
    assert said[0].startswith(f"weights: BatchNorm {', '.join(norms[:5])}")
    assert not any("report.html" in note for note in heard.notes), heard.notes
    assert words in page_of(job)
    assert "BatchNorm before and after" not in page_of(job)
    report_run(job.config())


def test_without_calibration_images_the_page_has_no_output_sqnr(job: Job) -> None:
    Run(job.config("data.calibration=null")).quantize(("weights",))
    assert "output_sqnr" not in report_of(job)
    assert "Along the depth" in page_of(job)


def test_report_command(
    done: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (done.out / "report.html").unlink()

    def labelfree(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["labelfree", *arguments])
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    assert labelfree("report", "--config", str(done.yaml), "--evaluate", "--images", "6") == 0
    assert report_of(done)["evaluation"]["images"] == 6
    assert "without renorm" in capsys.readouterr().out
    assert (done.out / "report.html").exists()
    (done.out / "report.json").write_text("[]")
    assert labelfree("report", "--config", str(done.yaml)) == 2
    assert "not a report of labelfree" in capsys.readouterr().err
    shutil.rmtree(done.out)
    assert labelfree("report", "--config", str(done.yaml)) == 2
    assert "run `labelfree quantize` first" in capsys.readouterr().err


# ---- Evaluation without labels ----


def test_held_out_images_are_those_behind_the_used_ones(done: Job) -> None:
    heard = Heard()
    unlabeled = ("data.validation=null", "renorm.images=13", "activations.images=12")
    found = evaluate_run(done.config(*unlabeled), progress=heard)
    assert found.images == 7
    assert any("from number 13 on" in note for note in heard.notes)
    assert report_of(done)["evaluation"]["images_from"] == "held_out"
    close = found.closeness["quantized"]
    assert 0 < close.divergence < 10
    assert close.sqnr_db is not None
    capped = ("data.validation=null", "data.calibration.images=4")
    assert evaluate_run(done.config(*capped)).images == 16


def test_softmax_of_large_scores() -> None:
    scores = np.array([[1000.0, 1000.0, -1000.0], [0.0, 1.0, 2.0]])
    found = np.exp(log_softmax(scores))
    np.testing.assert_allclose(found[0], [0.5, 0.5, 0])
    np.testing.assert_allclose(found[1], np.exp([0, 1, 2]) / np.exp([0, 1, 2]).sum())


# ---- What it costs ----


def test_plots_are_only_imported_to_plot() -> None:
    code = "import sys, quantize.job.run; print([m for m in ('matplotlib', 'jinja2') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"


def test_a_large_network_has_a_small_page() -> None:
    """ResNet-50: 54 layers with weights, 53 BatchNorms, 26,560 channels."""
    rng = np.random.default_rng(0)
    given = read_prototxt(ROOT / "configs/models/resnet50.prototxt")
    net = InferenceNet.of(given).net
    layers = [layer for layer in net.layer if layer.type in ("Convolution", "InnerProduct")]
    norms = [layer for layer in net.layer if layer.type == "BatchNorm"]
    relus = [layer for layer in net.layer if layer.type == "ReLU"]
    full, quantized, after = Weights(), Weights(), Weights()
    weights = []
    for place, layer in enumerate(layers):
        few = 64  # inputs per kernel; the page reads the weights of the worst layers only
        outputs = layer.convolution_param.num_output or layer.inner_product_param.num_output
        full.add(layer, [rng.normal(size=(outputs, few)).astype(np.float32)])
        quantized.add(layer, [rng.choice([-64, -8, 0, 8, 64], size=(outputs, few)).astype(np.float32)])
        alpha = parse(f'layer {{ name: "{layer.name}_alpha_term" type: "Scale" }}').layer[0]
        quantized.add(alpha, [rng.uniform(0.01, 0.02, outputs).astype(np.float32)])
        sqnr = 15 + place / 10
        weights.append(
            QuantizedLayer(layer.name, 4, "power_of_two", outputs, outputs * few, loss=1.0, sqnr_db=sqnr)
        )
    for norm, layer in zip(norms, layers, strict=False):
        channels = layer.convolution_param.num_output
        for model in (quantized, after):
            mean, variance = rng.normal(size=channels), rng.uniform(0.5, 2, channels)
            model.add(norm, [mean.astype(np.float32), variance.astype(np.float32), np.ones(1, np.float32)])
    shifts = [BatchNormShift(norm.name, 64, 10**6, 0.1, 0.9) for norm in norms]
    bars = list(range(48, 0, -1))
    steps = [
        QuantizedActivation(r.name, 0.1, 127, False, [], r.name, 0.0, 0.0, 14.0, 40.0, False, bars)
        for r in relus
    ]
    record = a_record(
        None,
        weights=WeightsRecord(**RAN, layers=weights, skipped=[], kept={}, doubtful=[]),
        renorm=RenormRecord(**RAN, statistics="measured", images=1000, layers=shifts),
        activations=ActivationsRecord(**RAN, images=1000, layers=steps),
    ).model_copy(
        update={"output_sqnr": OutputSqnr(32, [LayerSqnr(w.name, {"quantized": 20.0}) for w in weights])}
    )
    began = time.monotonic()
    page = render(record, *(Model(with_alpha_terms(given, each), each) for each in (full, quantized, after)))
    assert len(page) < 3e6
    assert time.monotonic() - began < 30
    assert len(rows_of(record, net)) == len(layers) + 16  # a ReLU behind each sum


# ---- Advice ----


def a_record(
    agreement: float | None = 99.0,
    *settings: str,
    weights: WeightsRecord | None = None,
    renorm: RenormRecord | None = None,
    activations: ActivationsRecord | None = None,
) -> RunRecord:
    close = OutputCloseness("fc", 10, 1, False, {"quantized": Closeness(agreement, 0.01, 20.0)})
    accuracy = dict.fromkeys(("fp32", "quantized"), Accuracy(None, None))
    return RunRecord(
        **{"tool": "labelfree", "name": "n", "versions": {}, "inputs": {}, "prototxts": {}},
        settings=load(None, {"model.prototxt": "p", "model.weights": "w", "output": "o"}, settings),
        stages=Stages(weights=weights or NO_WEIGHTS, renorm=renorm, activations=activations),
        sizes=Sizes(model=10**8, written=10**8, packed=14 * 10**6),
        caffe_test=CaffeTest(8),
        evaluation=None if agreement is None else Evaluation(100, 0, accuracy, [close], "fc"),
    )


RAN: Any = {"depends_on": {}, "seconds": 1.0, "peak_memory_bytes": 10**9, "outputs": {}}
NO_WEIGHTS = WeightsRecord(**RAN, layers=[], skipped=[], kept={}, doubtful=[])


def renormed(images: int = 1000, values: int = 10**5, ratio: float = 1.1) -> RenormRecord:
    return RenormRecord(
        **RAN, statistics="measured", images=images, layers=[BatchNormShift("bn", 8, values, 0.1, ratio)]
    )


def paired(images: int) -> RenormRecord:
    return renormed(images).model_copy(update={"statistics": "paired"})


def stepped(clipped: float = 1e-4, dead: bool = False) -> ActivationsRecord:
    relu = QuantizedActivation("relu", 0.1, 127, False, [], "relu", clipped, 0.0, 14.0, 40.0, dead)
    return ActivationsRecord(**RAN, images=400, layers=[relu])


def findings(record: RunRecord, rows: list[Row] | None = None, *norms: NormPlot) -> str:
    return " | ".join(
        f"{advice.level}: {advice.finding} {advice.code}" for advice in advise(record, rows or [], norms)
    )


def row(name: str, sqnr: float, bits: int = 4) -> Row:
    weights = QuantizedLayer(name, bits, "power_of_two", 8, 8000, 1.0, sqnr)
    return Row(name, weights, {"quantized": sqnr + 5})


def test_advice_where_all_is_well() -> None:
    text = findings(a_record(renorm=renormed(), activations=stepped()), [row("a", 15), row("b", 15.5)])
    assert "good: Nothing needs attention" in text
    assert "next: Use n_deploy.prototxt" in text
    assert "warning" not in text


@pytest.mark.parametrize(
    ("record", "rows", "expected"),
    [
        (a_record(), [row("a", 15), row("b", 15), row("c", 11)], 'c is furthest.*{"c": {"bits": 8'),
        (a_record(), [], "warning: Not run yet: renorm and activations"),
        (a_record(renorm=renormed(images=100)), [], "note: Renorm saw 100 images.*=1000"),
        (a_record(renorm=paired(images=8)), [], "note: Renorm saw 8 images.*renorm.images=64"),
        (
            a_record(renorm=renormed(images=600, values=600)),
            [],
            "warning: Renorm saw 600 images: 600 values per channel at bn",
        ),
        (
            a_record(renorm=RenormRecord(**RAN, statistics="measured", images=9, layers=[])),
            [],
            "warning: The network has no BatchNorm",
        ),
        (a_record(renorm=renormed(ratio=0.2)), [], "At bn the variance is 0.20 times"),
        (a_record(activations=stepped(dead=True)), [], "relu is dead"),
        (a_record(activations=stepped(clipped=0.05)), [], "relu clips 5.00 %.*activations.levels=255"),
        (a_record(None), [], "labelfree report --evaluate"),
        (a_record(80.0), [], "warning: .*only 80.00 %.*--quality best"),
        (a_record(80.0, "weights.solver=data_aware"), [], "warning: .*only 80.00 %.*weights.bits=5"),
    ],
)
def test_advice(record: RunRecord, rows: list[Row], expected: str) -> None:
    assert re.search(expected, findings(record, rows))


def test_advice_names_channels_that_renorm_found_dead() -> None:
    renorm = renormed().model_copy(update={"layers": [BatchNormShift("bn", 8, 10**5, 0.1, 1.1, dead=3)]})
    assert "Dead channels, the same value for every image: bn (3)." in findings(a_record(renorm=renorm))


def test_advice_counts_dead_channels() -> None:
    ones = np.ones(3)
    norm = NormPlot("bn7", ones, ones, ones, np.array([1.0, 0.0, 2.0]))
    assert "Dead channels, the same value for every image: bn7 (1)." in findings(
        a_record(renorm=renormed()), [], norm
    )


# ---- The terminal ----


@pytest.mark.parametrize(
    ("title", "rate", "text"),
    [
        ("activations", 812.4, "812 images/s"),
        ("weights", 1.25e6, "1.25 Mweights/s"),
        ("renorm", 5e15, "5e+03 TMAC/s"),
        ("renorm", None, ""),
        ("something else", 5.0, ""),
    ],
)
def test_rates(title: str, rate: float | None, text: str) -> None:
    assert rate_text(title, rate) == text


def test_lines_say_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 5.0, 20.0, 25.0, 30.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    lines = Lines()
    lines.start("activations", 100)
    for amount in (10, 30, 10):
        lines.advance(amount)
        lines.note("a guess")
    lines.stop()
    assert capsys.readouterr().err.splitlines() == [
        "activations ...",
        "note: a guess",
        "activations: 40 %, 2 images/s, 30 s left",
        "activations: 30.0 s, 1.67 images/s",
    ]


def on_terminal(arguments: list[str], **environment: str) -> str:
    """What a command prints where standard output is a terminal."""
    leader, follower = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", **environment}
    command = [sys.executable, "-m", "quantize.cli", "--quiet", *arguments]
    with subprocess.Popen(command, stdout=follower, stderr=subprocess.PIPE, env=env, cwd=ROOT) as process:
        os.close(follower)
        seen = b""
        while True:
            try:
                block = os.read(leader, 1 << 16)
            except OSError:  # Linux ends a terminal so
                break
            if not block:
                break
            seen += block
        os.close(leader)
        assert process.stderr is not None
        error = process.stderr.read().decode()
    assert process.returncode == 0, error
    return seen.decode()


def test_a_terminal_gets_a_table_and_no_color_gets_none(done: Job) -> None:
    arguments = ["quantize", "--config", str(done.yaml), "--resume"]
    colored = on_terminal(arguments)
    plain = on_terminal(arguments, NO_COLOR="1")
    assert "│" in colored
    assert "median SQNR" in plain
    assert "report.html" in plain
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", plain)


def test_quantize_prints_json_for_programs(done: Job) -> None:
    command = [
        sys.executable,
        "-m",
        "quantize.cli",
        "quantize",
        "--config",
        str(done.yaml),
        "--resume",
        "--json",
    ]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert json.loads(printed) == report_of(done)


# ---- In a browser ----


@pytest.fixture(scope="session")
def browser() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        reason = f"none of {', '.join(BROWSERS)} is installed (Debian: apt-get install chromium)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@pytest.fixture
def browse(browser: str, tmp_path: Path) -> Callable[[Path], tuple[str, str]]:
    """Opens a page and returns its document afterwards and what the browser logged."""

    def open_page(page: Path) -> tuple[str, str]:
        command = [browser, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert shown.returncode == 0, shown.stderr
        return shown.stdout, shown.stderr

    return open_page


def test_it_renders_without_a_complaint(done: Job, browse: Callable[[Path], tuple[str, str]]) -> None:
    document, log = browse(done.out / "report.html")
    assert "CONSOLE" not in log
    assert "What to do next" in document


def test_the_browser_would_complain(done: Job, browse: Callable[[Path], tuple[str, str]]) -> None:
    """What the test above looks for does appear: the policy of the page forbids another script and images."""
    spoiled = done.out / "spoiled.html"
    extra = "<script>document.title = 'run'</script><img src='https://example.invalid/x.png'></main>"
    spoiled.write_text(page_of(done).replace("</main>", extra))
    document, log = browse(spoiled)
    assert log.count("Content Security Policy") >= 2
    assert "<title>run</title>" not in document


CLICKS = """
<script>
const place = (text) => [...document.querySelectorAll("#layers thead th")].findIndex(
  (th) => th.textContent.trim() === text);
const column = (text) => [...document.querySelectorAll("#layers tbody tr")].map(
  (tr) => tr.children[place(text)].textContent.trim());
const click = (text) => document.querySelectorAll("#layers thead th")[place(text)].firstElementChild.click();
const seen = {};
seen.network = column("layer");
click("weight SQNR"); seen.rising = column("weight SQNR");
click("weight SQNR"); seen.falling = column("weight SQNR");
seen.sorted = document.querySelectorAll("#layers th[aria-sort]").length;
click("layer"); seen.names = column("layer");
click("no."); seen.back = column("layer");
seen.requests = performance.getEntriesByType("resource").map((entry) => entry.name);
seen.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
const result = document.createElement("pre");
result.id = "result"; result.textContent = JSON.stringify(seen);
document.body.append(result);
</script></body>"""


def test_it_sorts_and_requests_nothing(done: Job, browse: Callable[[Path], tuple[str, str]]) -> None:
    clicked = done.out / "clicked.html"
    page = re.sub(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", "", page_of(done))
    clicked.write_text(page.replace("</body>", CLICKS))
    document, log = browse(clicked)
    assert "CONSOLE" not in log
    result = re.search(r'<pre id="result">(.*?)</pre>', document)
    assert result is not None
    seen = json.loads(html.unescape(result[1]))
    numbers = [float(text) for text in seen["rising"] if text != "–"]
    assert numbers == sorted(numbers)
    assert len(numbers) == 6
    assert seen["rising"][-1] == "–"
    assert [float(text) for text in seen["falling"] if text != "–"] == numbers[::-1]
    assert seen["falling"][-1] == "–"
    assert seen["sorted"] == 1
    assert seen["names"] == sorted(seen["network"])
    assert seen["back"] == seen["network"]
    assert seen["requests"] == []
    assert seen["overflow"] == 0


def test_the_page_says_what_is_in_float() -> None:
    coverage = Coverage(10**6, 1.0, 0.725, 0.7, {"stem": "reads the net's input <data>"})
    record = a_record().model_copy(update={"coverage": coverage})
    net = parse('layer { name: "x" type: "ReLU" bottom: "d" top: "x" }')
    model = model_of(net, Weights())
    page = render(record, model, model, None)
    assert "70.0 %" in page
    assert "inputs on codes 72.5 %" in page
    assert "reads the net&#39;s input &lt;data&gt;" in page


def test_the_page_says_which_files_there_are() -> None:
    compared = FileComparison(64, 41.26, 99.5, 0.001, 0.002, Kernels(5, 1))
    folder, why = Path(os.fsdecode(b"/o/<b>\xff")), "reads the input <data>"
    files = {"n.param": 1200, "n.bin": 98_800}
    record = a_record()
    record = record.with_export(
        Export("ncnn", "ncnn", folder, files, 100_000, 400_000, {"a": why, "<b>": why}, (), compared)
    )
    record = record.with_export(Export("ranges", None, folder, {"n.txt": 5}, None, None, {}, ("a note",)))
    model = model_of(parse('layer { name: "x" type: "ReLU" bottom: "d" top: "x" }'), Weights())
    page = render(record, model, model, None)
    page.encode()
    assert "<b>\U0010feff" not in page
    table = re.search(r"<h2>Files</h2>(.*?)<h2>", page, re.DOTALL)
    assert table is not None
    rows = [re.sub(r"<[^>]*>", " ", row).split() for row in table[1].split("<tr>")[2:]]
    assert rows[0] == ["ncnn", "n.param", "1.2", "kB", "400.0", "kB", "4.0×", "99.50", "41.3"]
    assert rows[1] == ["n.bin", "98.8", "kB"]
    assert rows[2][:8] == ["ranges", "n.txt", "0.0", "kB", "–", "–", "–", "–"]
    assert "<dt>ncnn</dt>\n<dd>In float: a, &lt;b&gt;: reads the input &lt;data&gt;</dd>" in page
    assert "<dt>ranges</dt>\n<dd>A note</dd>" in page
