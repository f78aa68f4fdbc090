"""Folders of images and lists of them: which files, which labels, and what is said about them."""

from __future__ import annotations

from pathlib import Path

import cv2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pictures import photograph

from quantize.data.files import FolderLabels, files_in_folder, files_in_list
from quantize.data.sources import open_source
from quantize.errors import InputError


def make(folder: Path, *names: str) -> Path:
    """Image files by their paths below a folder; a name that ends with / is a folder without any."""
    for name in names:
        path = folder / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            assert cv2.imwrite(str(path), photograph(0, 4, 5))
    return folder


def labeled(folder: Path) -> list[tuple[str, int | None]]:
    found, _ = files_in_folder(folder)
    return [(str(Path(file.path).relative_to(folder)), file.label) for file in found]


def said(folder: Path) -> FolderLabels:
    _, folders = files_in_folder(folder)
    assert folders is not None
    return folders


def test_subfolders_are_the_classes_and_their_first_images_come_first(tmp_path):
    make(tmp_path, "cat/1.png", "cat/2.png", "cat/3.png", "ant/x.png", "Bee/b.png", "Bee/a.png")
    (tmp_path / "notes.txt").touch()
    (tmp_path / "ant" / "notes.txt").touch()
    make(tmp_path, ".thumbnails/small.png")
    assert labeled(tmp_path) == [
        ("Bee/a.png", 0),
        ("ant/x.png", 1),
        ("cat/1.png", 2),
        ("Bee/b.png", 0),
        ("cat/2.png", 2),
        ("cat/3.png", 2),
    ]
    assert said(tmp_path) == FolderLabels("3 folders taken as 3 classes: Bee is 0, cat is 2", range(3))
    source = open_source(tmp_path)
    assert source.folders == said(tmp_path)
    assert [source.read(i).label for i in range(len(source))] == [0, 1, 2, 0, 2, 2]


def test_folders_that_are_numbers_are_the_classes_themselves(tmp_path):
    """In the order of their names 10 would be class 1."""
    make(tmp_path, *(f"{number}/a.png" for number in (0, 1, 2, 10)))
    assert labeled(tmp_path) == [("0/a.png", 0), ("1/a.png", 1), ("10/a.png", 10), ("2/a.png", 2)]
    assert said(tmp_path).named
    assert "4 folders taken as classes, the numbers that are their names" in said(tmp_path).text


def test_the_same_number_twice_is_no_number(tmp_path):
    make(tmp_path, "1/a.png", "01/a.png")
    assert labeled(tmp_path) == [("01/a.png", 0), ("1/a.png", 1)]


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["a/1.png", "b/1.png", "z.png"], "z.png lies beside the subfolders"),
        (["train/a/1.png", "train/b/1.png"], "train/a is a folder within a subfolder"),
        (["a/1.png", "b/1.png", "b/c/1.png"], "b/c is a folder within a subfolder"),
        (["a/1.png", "b/1.png", "c/"], "the subfolder c holds no images"),
        (["a/1.png", "a/2.png"], "they lie in a single subfolder"),
    ],
)
def test_folders_that_are_no_classes(tmp_path, names, reason):
    make(tmp_path, *names)
    images = sorted(name for name in names if not name.endswith("/"))
    assert sorted(labeled(tmp_path)) == [(name, None) for name in images]
    assert said(tmp_path).text.startswith(f"its images are read as unlabeled, for {reason}")
    assert not said(tmp_path).classes


def test_the_first_images_are_of_all_folders_even_if_these_are_no_classes(tmp_path):
    """The first hundred of a thousand airplanes, and no bird, make BatchNorm statistics of airplanes."""
    make(tmp_path, *(f"train/{kind}/{i}.png" for kind in ("airplane", "bird", "cat") for i in range(3)))
    assert [name for name, _ in labeled(tmp_path)[:4]] == [
        "train/airplane/0.png",
        "train/bird/0.png",
        "train/cat/0.png",
        "train/airplane/1.png",
    ]


def test_a_flat_folder_has_nothing_to_be_said(tmp_path):
    make(tmp_path, "b.png", "a.png", "empty/")
    assert files_in_folder(tmp_path)[1] is None
    assert labeled(tmp_path) == [("a.png", None), ("b.png", None)]


@pytest.mark.parametrize("suffix", [".webp", ".tif", ".tiff"])
def test_a_folder_of_other_formats(tmp_path, suffix):
    make(tmp_path, f"a{suffix}", f"b{suffix.upper()}")
    source = open_source(tmp_path)
    assert [source.read(i).pixels.shape for i in range(len(source))] == [(3, 4, 5), (3, 4, 5)]


def test_a_folder_of_images_that_are_not_read_names_them_and_the_remedy(tmp_path):
    for name in ("1.heic", "2.HEIC", "readme.txt"):
        (tmp_path / name).touch()
    with pytest.raises(
        InputError, match=r"no images .*, but 2 \.heic, 1 \.txt; convert them to JPEG or PNG, with"
    ):
        open_source(tmp_path)
    for name in ("1.heic", "2.HEIC"):
        (tmp_path / name).unlink()
    with pytest.raises(InputError, match=r"no images .*, but 1 \.txt$"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("line", "path", "label"),
    [
        ("a.jpg", "a.jpg", None),
        ("a.jpg 3", "a.jpg", 3),
        ("a.jpg\t-4", "a.jpg", -4),
        ("a.jpg,1", "a.jpg", 1),
        ("a.jpg, 1", "a.jpg", 1),
        ("a.jpg , +1", "a.jpg", 1),
        ("a, b 7.jpg,12", "a, b 7.jpg", 12),
        ("  a b.jpg   07  ", "a b.jpg", 7),
        ("a.jpg,cat", "a.jpg,cat", None),
        ("img7", "img7", None),
        ("img-7", "img-7", None),
        ("7", "7", None),
        (",7", ",7", None),
        ("a 1.5", "a 1.5", None),
        ("a#b.jpg 3", "a#b.jpg", 3),
        ("a.jpg 12345678901234567890", "a.jpg 12345678901234567890", None),
    ],
)
def test_the_grammar_of_a_line(tmp_path, line, path, label):
    (tmp_path / "list").write_text(f"# images of mine, 7\n\n {line}\n   # another comment\n")
    (file,) = files_in_list(tmp_path / "list")
    assert (file.path, file.label) == (str(tmp_path / path), label)
    assert file.origin == f"{tmp_path / 'list'}, line 3: "


@given(st.text(alphabet="ab1,+- \t#.", max_size=12))
def test_what_is_parted_from_a_path_is_a_number_behind_a_blank_or_a_comma(tmp_path_factory, line):
    path = tmp_path_factory.getbasetemp() / "grammar"
    path.write_text(f"first\n{line}\n")
    _, *rest = files_in_list(path)
    if not line.strip() or line.strip().startswith("#"):
        assert not rest
        return
    (file,) = rest
    name = file.path.removeprefix(f"{path.parent}/")
    parted = line.strip().removeprefix(name)
    if file.label is None:
        assert parted == ""
    else:
        assert name
        assert parted.lstrip(" \t,") == parted.strip(" \t,")
        assert int(parted.strip(" \t,")) == file.label
        assert parted[0] in " \t,"
        assert parted.count(",") <= 1


def test_a_list_of_comments_names_no_images(tmp_path):
    (tmp_path / "list").write_text("# a.jpg 1\n#\n")
    with pytest.raises(InputError, match=r"the list names no images; a line is `path \[label\]`"):
        open_source(tmp_path / "list")


def test_a_line_that_is_misunderstood_tells_the_grammar(tmp_path):
    make(tmp_path, "a.png")
    (tmp_path / "list").write_text("a.png,cat\n")
    with pytest.raises(InputError, match=r"line 1: .*a.png,cat: no such file; a line is `path \[label\]`"):
        open_source(tmp_path / "list").check(range(1))
