"""`labelfree layers`: the layer's sources, into a Caffe source tree and out again, or into a new folder."""

import os
import resource
import shutil
import subprocess
import sys
import zipfile
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
    command = [sys.executable, "-m", "quantize", "layers", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


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
    assert f"not a Caffe source tree: it has no {missing}" in done.stderr
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
    assert done.stderr.startswith("labelfree: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_folder_of_its_own_gets_a_makefile_too(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "layer"
    names = (*PLACES, "Makefile")
    done = install(folder)
    assert done.returncode == 0, done.stderr
    assert files(folder) == {name: (ROOT / "caffe_layers" / name).read_bytes() for name in names}
    assert f"make -C {folder} plugin" in done.stdout
    (folder / "build").mkdir()
    assert install(folder).stdout.count("already there") == len(names)
    (folder / "Makefile").write_text("mine")
    assert install(folder).returncode == 2
    assert (folder / "Makefile").read_text() == "mine"
    assert install(folder, "--remove", "--force").returncode == 0
    assert os.listdir(folder) == ["build"]


def test_a_folder_of_somebody_elses_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    done = install(tmp_path)
    assert done.returncode == 2
    assert "neither a Caffe source tree" in done.stderr
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_all_files_or_none(caffe: Path) -> None:
    """Where the last of them, which is the largest, cannot be written."""
    before = files(caffe)
    sizes = sorted((ROOT / "caffe_layers" / name).stat().st_size for name in PLACES)
    most = sizes[-1] - 1
    assert most > sizes[-2]
    command = [sys.executable, "-B", "-m", "quantize", "layers", str(caffe)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "cannot write: File too large; nothing was installed" in done.stderr
    assert files(caffe) == before


def test_the_wheel_brings_the_sources_along(caffe: Path, tmp_path: Path) -> None:
    """What `pip install` gives is all there is: no checkout beside it."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("quantize", "caffe_layers"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True)
    build = [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", "dist"]
    subprocess.run(build, cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    for name in ("quantize", "caffe_layers"):
        shutil.rmtree(tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-m", "quantize", "layers", str(caffe)],
        cwd=tmp_path / "site",
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert ours().items() <= files(caffe).items()
    (metadata,) = (tmp_path / "site").glob("*.dist-info/METADATA")
    fields = {line.partition(":")[0] for line in metadata.read_text().split("\n\n")[0].splitlines()}
    wanted = {
        "Name",
        "Version",
        "Summary",
        "Author",
        "Keywords",
        "Classifier",
        "Project-URL",
        "Requires-Python",
    }
    assert wanted <= fields
