"""scripts/install_layers: puts the layer into a Caffe source tree and takes it out again."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLACES = {
    "act_quantize.hpp": "include/caffe/layers/act_quantize.hpp",
    "act_quantize.cpp": "src/caffe/layers/act_quantize.cpp",
    "act_quantize.cu": "src/caffe/layers/act_quantize.cu",
    "test_act_quantize_layer.cpp": "src/caffe/test/test_act_quantize_layer.cpp",
}


@pytest.fixture
def caffe(tmp_path: Path) -> Path:
    """A tree that has what Caffe's has, in a folder with a space in its name."""
    tree = tmp_path / "my caffe"
    for name, content in {
        "Makefile": "all:\n",
        "include/caffe/layer_factory.hpp": "",
        "include/caffe/layers/relu_layer.hpp": "",
        "src/caffe/layers/relu_layer.cpp": "REGISTER_LAYER_CLASS(ReLU);\n",
        "src/caffe/test/test_neuron_layer.cpp": "",
        "src/caffe/proto/caffe.proto": "",
    }.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(content)
    return tree


def install(*args: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([ROOT / "scripts" / "install_layers", *args], capture_output=True, text=True)


def files(tree: Path) -> dict[str, bytes]:
    return {str(path.relative_to(tree)): path.read_bytes() for path in tree.rglob("*") if path.is_file()}


def ours() -> dict[str, bytes]:
    return {place: (ROOT / "caffe_layers" / name).read_bytes() for name, place in PLACES.items()}


def test_installs_every_file_and_removes_it_again(caffe: Path) -> None:
    before = files(caffe)
    done = install(caffe)
    assert done.returncode == 0, done.stderr
    assert files(caffe) == before | ours()
    assert all(f"installed {caffe / place}" in done.stdout for place in PLACES.values())

    again = install(caffe)
    assert again.returncode == 0
    assert again.stdout.count("already there") == len(PLACES)

    for _ in range(2):
        removed = install(caffe, "--remove")
        assert removed.returncode == 0, removed.stderr
        assert files(caffe) == before


@pytest.mark.parametrize("option", [[], ["--remove"]])
def test_a_different_file_stays_without_force(option: list[str], caffe: Path) -> None:
    place = caffe / PLACES["act_quantize.cu"]
    place.write_text("somebody's own\n")
    before = files(caffe)

    done = install(caffe, *option)

    assert done.returncode == 2
    assert str(place) in done.stderr
    assert "--force" in done.stderr
    assert files(caffe) == before


def test_force_replaces_a_different_file(caffe: Path) -> None:
    (caffe / PLACES["act_quantize.cu"]).write_text("an old version\n")
    assert install(caffe, "--force").returncode == 0
    assert ours().items() <= files(caffe).items()


def test_force_removes_a_different_file(caffe: Path) -> None:
    before = files(caffe)
    (caffe / PLACES["act_quantize.cu"]).write_text("an old version\n")
    assert install("--remove", caffe, "--force").returncode == 0
    assert files(caffe) == before


def test_force_replaces_a_link_and_not_what_it_points_to(caffe: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious\n")
    (caffe / PLACES["act_quantize.cpp"]).symlink_to(tmp_path / "precious")
    assert install(caffe, "--force").returncode == 0
    assert (tmp_path / "precious").read_text() == "precious\n"
    assert ours().items() <= files(caffe).items()


@pytest.mark.parametrize("missing", ["include/caffe/layer_factory.hpp", "src/caffe/proto/caffe.proto"])
def test_a_tree_that_is_none(missing: str, caffe: Path) -> None:
    (caffe / missing).unlink()
    before = files(caffe)
    done = install(caffe, "--force")
    assert done.returncode == 2
    assert f"is not a Caffe source tree: it has no {missing}" in done.stderr
    assert files(caffe) == before


@pytest.mark.parametrize(
    "line", ["REGISTER_LAYER_CLASS(Quant);", "REGISTER_LAYER_CREATOR(ActQuantize, GetActQuantizeLayer);"]
)
def test_a_tree_that_has_the_type_already(line: str, caffe: Path) -> None:
    (caffe / "src/caffe/layers/quant_layer.cpp").write_text(f"{line}\n")
    before = files(caffe)
    done = install(caffe, "--force")
    assert done.returncode == 2
    assert "quant_layer.cpp" in done.stderr
    assert files(caffe) == before
    assert install(caffe, "--remove").returncode == 0


@pytest.mark.parametrize("args", [[], ["--what", "."], [".", ".."]])
def test_wrong_use(args: list[str]) -> None:
    done = install(*args)
    assert done.returncode == 2
    assert done.stderr.startswith("install_layers: ")
