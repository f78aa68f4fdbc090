"""The output folder: what is in it besides our files is the user's."""

from contextlib import closing
from pathlib import Path

import pytest

from quantize.files import PART_SUFFIX
from quantize.job.output import OutputFolder
from tests.conftest import Job

USERS = (".notes.part", ".film.mkv.part", ".probe.part", ".part", "x.labelfree-part", ".hidden")


def users_files(folder: Path) -> dict[str, str]:
    """Names that a program of the user's may have given its unfinished files."""
    for name in USERS:
        (folder / name).write_text(f"the user's {name}")
    return contents(folder)


def contents(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in USERS if (folder / name).exists()}


def test_the_users_files_stay_and_what_a_killed_run_left_goes(tmp_path: Path) -> None:
    before = users_files(tmp_path)
    killed = tmp_path / f".net_renorm.caffemodel{PART_SUFFIX}"
    killed.write_text("half of it")
    with closing(OutputFolder(tmp_path)) as folder:
        assert not killed.exists()
        folder.write("report.json", b"{}")
    assert contents(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*USERS, "report.json"])


@pytest.mark.parametrize("command", ["init", "quantize"])
def test_a_command_that_writes_where_the_user_works(
    job: Job, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    from quantize.commands.init import write_initial
    from quantize.job.run import Run
    from quantize.settings import ModelFiles

    before = users_files(job.folder)
    monkeypatch.chdir(job.folder)
    if command == "init":
        model = ModelFiles(prototxt=Path("net.prototxt"), weights=Path("net.caffemodel"))
        write_initial(model, Path("train_lmdb"), path=None, force=False)
        assert Path("residual.yaml").exists()
    else:
        Run(job.config("output=.")).quantize(("weights",))
        assert Path("residual_quantized.caffemodel").exists()
    assert contents(job.folder) == before
