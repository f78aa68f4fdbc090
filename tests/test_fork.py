"""A net with a field that only a fork of Caffe knows, through every command."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Job

CAFFE_PROTO = Path(__file__).parents[1] / "quantize" / "caffenet" / "caffe.proto"
OURS = "message ConvolutionParameter {\n"
FIELD = 'conv_algos_override: "1, 1, 1"'
"""Without effect on the results."""
CHANGING = "sparse_ratio: 0.5"
"""What it does to them nobody knows."""


@pytest.fixture
def fork_job(job: Job) -> Job:
    schema = CAFFE_PROTO.read_text()
    assert schema.count(OURS) == 1
    (job.folder / "fork.proto").write_text(
        schema.replace(
            OURS,
            OURS + "  optional string conv_algos_override = 9000;\n  optional float sparse_ratio = 9001;\n",
        )
    )
    net = job.folder / "net.prototxt"
    net.write_text(net.read_text().replace("num_output: 6", f"num_output: 6 {FIELD}"))
    return job


def labelfree(job: Job, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "quantize.cli", *arguments]
    return subprocess.run(command, cwd=job.folder, capture_output=True, text=True, check=False)


def test_what_has_no_effect_needs_no_schema(fork_job: Job) -> None:
    done = labelfree(fork_job, "quantize", "--config", "config.yaml")
    assert done.returncode == 0, done.stderr
    assert all(FIELD in path.read_text() for path in (fork_job.folder / "out").glob("*.prototxt"))


def test_without_the_schema_the_error_names_field_line_and_remedy(fork_job: Job) -> None:
    net = fork_job.folder / "net.prototxt"
    net.write_text(net.read_text().replace(FIELD, CHANGING))
    for command in (["quantize", "--config", "config.yaml"], ["inspect", "net.prototxt"]):
        done = labelfree(fork_job, *command)
        assert done.returncode == 2
        assert "net.prototxt: line 10, column" in done.stderr
        assert "sparse_ratio" in done.stderr
        assert "model.caffe_proto" in done.stderr


def test_with_the_schema_the_field_is_kept(fork_job: Job) -> None:
    files = ["--prototxt", "net.prototxt", "--weights", "net.caffemodel", "--calibration", "train_lmdb"]
    done = labelfree(fork_job, "init", *files, "--caffe-proto", "fork.proto", "--config", "new.yaml")
    assert done.returncode == 0, done.stderr
    done = labelfree(fork_job, "quantize", "--config", "new.yaml", "--validation", "test_lmdb", "-o", "out")
    assert done.returncode == 0, done.stderr
    written = sorted((fork_job.folder / "out").glob("*.prototxt"))
    assert len(written) == 2
    for path in written:
        assert FIELD in path.read_text()
    done = labelfree(fork_job, "evaluate", "--config", "new.yaml", "-o", "out")
    assert done.returncode == 0, done.stderr
    shown = labelfree(fork_job, "inspect", "net.prototxt", "--caffe-proto", "fork.proto")
    assert shown.returncode == 0, shown.stderr


def test_a_field_that_may_change_the_results_stops_every_command(fork_job: Job) -> None:
    net = fork_job.folder / "net.prototxt"
    net.write_text(net.read_text().replace(FIELD, CHANGING))
    where = "(Convolution): convolution_param.sparse_ratio is a field of a fork of Caffe"
    config = fork_job.yaml.read_text().replace("net.caffemodel}", "net.caffemodel, caffe_proto: fork.proto}")
    fork_job.yaml.write_text(config)
    skip = ["--set", "weights.layers.conv1.skip=true"]
    for command in (
        ["quantize", "--config", "config.yaml"],
        ["quantize", "--config", "config.yaml", *skip],
        ["inspect", "net.prototxt", "--caffe-proto", "fork.proto"],
    ):
        done = labelfree(fork_job, *command)
        assert done.returncode == 2, done.stdout
        assert done.stderr.splitlines()[-1].startswith("labelfree: layer 'conv1")
        assert where in done.stderr
