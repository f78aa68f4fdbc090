"""Values for inputs that are no images: what comes out of each kind of file, and of damaged ones."""

import io
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from quantize.data.values import ENDLESS, MAX_IN_MEMORY, Values, open_values
from quantize.errors import InputError

SHAPE = (2, 3)
COUNT = 5
KEY = "data.calibration.inputs.target"
Write = Callable[[Path, npt.NDArray[np.generic]], Path]


def expected(kind: str = "f4") -> npt.NDArray[np.generic]:
    return (np.random.default_rng(0).normal(size=(COUNT, *SHAPE)) * 100).astype(kind)


def rows(values: Values, stop: int = COUNT) -> np.ndarray:
    return np.concatenate([batch for batch, _ in values.batches(2, 0, stop)])


def folder(path: Path, array: npt.NDArray[np.generic]) -> Path:
    place = path / "values"
    (place / "sub").mkdir(parents=True)
    names = ["0.npy", "1.npy", "10.npy", "sub/2.npy", "z.npy"]  # sorted as texts, as images are
    for name, value in zip(names, array, strict=True):
        np.save(place / name, value)
    (place / ".hidden.npy").write_bytes(b"")
    (place / "notes.txt").write_text("")
    return place


def folder_of_blobs(path: Path, array: npt.NDArray[np.generic]) -> Path:
    return folder(path, np.asfortranarray(array[:, None]))


def npy(path: Path, array: npt.NDArray[np.generic]) -> Path:
    np.save(path / "values.npy", array)
    return path / "values.npy"


def npz(path: Path, array: npt.NDArray[np.generic]) -> Path:
    np.savez_compressed(path / "values.npz", target=array, other=np.zeros(3))
    return path / "values.npz"


def npz_of_one(path: Path, array: npt.NDArray[np.generic]) -> Path:
    np.savez(path / "values.npz", array)
    return path / "values.npz"


def hdf5(path: Path, array: npt.NDArray[np.generic], name: str = "target", **options: object) -> Path:
    h5py = pytest.importorskip("h5py")
    with h5py.File(path / "values.h5", "w") as file:
        file.create_dataset("other", data=np.zeros(3))
        file.create_dataset(name, data=array, **options)
    return path / "values.h5"


@pytest.mark.parametrize("write", [folder, folder_of_blobs, npy, npz, npz_of_one, hdf5])
@pytest.mark.parametrize("kind", ["f4", ">f8", "f2", "i8", "u1", "?"])
def test_what_was_written_comes_out(write: Write, kind: str, tmp_path: Path) -> None:
    array = expected(kind)
    values = open_values(write(tmp_path, array), "target", SHAPE, KEY)
    assert (values.shape, len(values)) == (SHAPE, COUNT)
    found = rows(values)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, array.astype(np.float32))
    batches = [batch for batch, labels in values.batches(2, 1, 4) if labels is None]
    assert [len(batch) for batch in batches] == [2, 1]
    np.testing.assert_array_equal(np.concatenate(batches), array[1:4].astype(np.float32))
    few = values.subset([4, 0]).subset([1, 0])
    assert len(few) == 2
    np.testing.assert_array_equal(rows(few, 2), array[[0, 4]].astype(np.float32))


def test_rows_of_one_number(tmp_path: Path) -> None:
    values = open_values(npy(tmp_path, np.arange(4)), "target", (), KEY)
    np.testing.assert_array_equal(rows(values, 4), np.arange(4, dtype=np.float32))


@pytest.mark.parametrize("write", [folder, npy, npz, hdf5])
def test_without_a_declared_shape_it_is_that_of_the_file(write: Write, tmp_path: Path) -> None:
    assert open_values(write(tmp_path, expected()), "target", None, KEY).shape == SHAPE


@pytest.mark.parametrize(
    ("given", "shape", "value"),
    [
        (2, SHAPE, np.full(SHAPE, 2)),
        (0.5, (), np.array(0.5)),
        ([600, 800, 1.5], (3,), np.array([600, 800, 1.5])),
        ([600, 800, 1.5], None, np.array([600, 800, 1.5])),
        ([[1, 2, 3], [4, 5, 6]], SHAPE, np.arange(1, 7).reshape(SHAPE)),
    ],
)
def test_a_constant_is_the_same_for_all(
    given: object, shape: tuple[int, ...] | None, value: np.ndarray
) -> None:
    values = open_values(given, "info", shape, KEY)  # type: ignore[arg-type]
    assert len(values) == ENDLESS
    assert values.shape == value.shape
    for one in (values, values.subset([3])):
        np.testing.assert_array_equal(rows(one, 3), np.stack([value] * 3).astype(np.float32))


@pytest.mark.parametrize(
    ("given", "shape", "reason"),
    [
        ([1, 2], (3,), r"has the shape 2 but input 'target' takes 3; save it so"),
        ([[1, 2], [3]], None, "lists of numbers of one length"),
        ([1, "a"], None, "lists of numbers"),
        ([1, {}], None, "lists of numbers"),
        ([], None, "at least one number"),
        ([1, float("nan")], None, "only finite ones"),
        ([1, None], None, "only finite ones"),
        ([10**400], None, "lists of numbers"),
        (3, None, "data.input_shape"),
    ],
)
def test_constants_that_cannot_be(given: object, shape: tuple[int, ...] | None, reason: str) -> None:
    with pytest.raises(InputError, match=f"^{KEY}: .*{reason}"):
        open_values(given, "target", shape, KEY)  # type: ignore[arg-type]


@pytest.mark.parametrize("write", [folder, npy, npz, hdf5])
def test_another_shape_than_the_input_s(write: Write, tmp_path: Path) -> None:
    path = write(tmp_path, expected())
    with pytest.raises(
        InputError, match=r"value for each image has the shape 2x3 but input 'target' takes 3x2"
    ):
        open_values(path, "target", (3, 2), KEY)


@pytest.mark.parametrize("write", [folder, npy, npz, hdf5])
@pytest.mark.parametrize("bad", [np.nan, -np.inf, 1e300])
def test_a_value_that_is_not_finite_is_named(write: Write, bad: float, tmp_path: Path) -> None:
    array = expected("f8")
    array[3, 1, 1] = bad  # type: ignore[index]
    values = open_values(write(tmp_path, array), "target", SHAPE, KEY)
    np.testing.assert_array_equal(rows(values, 3), array[:3].astype(np.float32))
    name = "sub/2.npy" if write is folder else "row 3"
    with pytest.raises(InputError, match=rf"^{KEY}: .*: {name} holds a NaN, an infinity or a number beyond"):
        rows(values)
    with pytest.raises(InputError, match=name):
        rows(values.subset([0, 3]), 2)


@pytest.mark.parametrize("write", [folder, npy, npz, hdf5])
@pytest.mark.parametrize(
    "array", [np.array([["a"] * 3] * COUNT), np.zeros((COUNT, 2), "c8"), np.zeros(COUNT, [("x", "f4")])]
)
def test_what_is_no_number(write: Write, array: npt.NDArray[np.generic], tmp_path: Path) -> None:
    array = array.astype("S1") if write is hdf5 and array.dtype.kind == "U" else array
    path = write(tmp_path, array)
    with pytest.raises(InputError, match=r"not numbers|no array of numbers|no array"):
        open_values(path, "target", None, KEY)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Spoken:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "unpickled",))

    array = np.array([Spoken()] * COUNT)
    for write in (folder, npy, npz):
        (tmp_path / write.__name__).mkdir()
        path = write(tmp_path / write.__name__, array)
        with pytest.raises(InputError, match="holds object, not numbers"):
            open_values(path, "target", None, KEY)
    assert not (tmp_path / "unpickled").exists()


def header(shape: str, kind: str = "'<f4'", version: bytes = b"\x01\x00") -> bytes:
    text = f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-(10 + len(text) + 1) % 64) + b"\n"
    return b"\x93NUMPY" + version + len(text).to_bytes(2 if version == b"\x01\x00" else 4, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        b"\x93NUMPY\x01\x00\xff\xff",
        b"PK\x03\x04",
        header("(2, 3)") + bytes(23),
        header("(2, 3)") + bytes(25),
        header("(9223372036854775807, 3)") + bytes(24),
        header("(4294967296, 4294967296, 4294967296)") + bytes(24),
        header("(-1, 3)") + bytes(24),
        header("(0, 3)"),
        header("(2.0, 3)") + bytes(24),
        header("None"),
        header("(" * 90 + ")" * 90),
        header("(2, 3)", "'O'") + bytes(48),
        header("(2, 3)", "[('a', 'O')]") + bytes(48),
        header("(2, 3)", "'nonsense'") + bytes(24),
        header("(2, 3)", version=b"\x03\x00") + bytes(24),
        header("(2, 3)", version=b"\x09\x00") + bytes(24),
        header("__import__('os').abort()") + bytes(24),
    ],
)
def test_damaged_npy_files(content: bytes, tmp_path: Path) -> None:
    """Sizes are checked before memory is taken: some of these claim more than there is in the world."""
    (tmp_path / "a.npy").write_bytes(content)
    place = tmp_path / "folder"
    place.mkdir()
    (place / "a.npy").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("target.npy", content)
    for path in (tmp_path / "a.npy", place, tmp_path / "a.npz"):
        with pytest.raises(InputError, match=f"^{KEY}: ") as caught:
            open_values(path, "target", None, KEY)
        assert "\n" not in str(caught.value)


def flipped(whole: bytes, step: int) -> Iterator[bytes]:
    """A file with one byte changed, here and there."""
    for place in range(0, len(whole), step):
        yield whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :]


def outcome(content: bytes, path: Path) -> str:
    """What is said about a damaged file; nothing where the damage does not show."""
    path.write_bytes(content)
    try:
        rows(open_values(path, "target", SHAPE, KEY))
    except InputError as error:
        return str(error)
    return ""


def test_damaged_npz_files(tmp_path: Path) -> None:
    path = npz(tmp_path, expected())
    whole = path.read_bytes()
    reasons = [outcome(damaged, tmp_path / "b.npz") for damaged in flipped(whole, 3)]
    assert sum(reason.startswith(KEY) for reason in reasons) > 20
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"not a \.npz, or a damaged one"):
        open_values(path, "target", SHAPE, KEY)


def test_an_npz_that_would_take_all_memory(tmp_path: Path) -> None:
    """A small file can hold zeros without end; what it claims is looked at first."""
    size = MAX_IN_MEMORY // 4 + 1
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("target.npy", header(f"({size},)"))
    raw = content.getvalue().replace(  # the size when unpacked
        len(header(f"({size},)")).to_bytes(4, "little"),
        (len(header(f"({size},)")) + 4 * size).to_bytes(4, "little"),
    )
    (tmp_path / "bomb.npz").write_bytes(raw)
    with pytest.raises(InputError, match=r"too large to be unpacked; save it as \.npy"):
        open_values(tmp_path / "bomb.npz", "target", (), KEY)


def test_a_file_that_changes_while_it_is_used(tmp_path: Path) -> None:
    path = npy(tmp_path, expected())
    values = open_values(path, "target", SHAPE, KEY)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError, match=r"values\.npy: row 3: .*write it again"):
        rows(values)
    path.unlink()
    with pytest.raises(InputError, match=r"values\.npy: row 0"):
        rows(values)


def test_missing_and_strange_files(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.csv").write_text("1,2\n")
    (tmp_path / "dir.npy").mkdir()
    np.save(tmp_path / "one.npy", np.float32(3))
    np.save(tmp_path / "columns.npy", np.asfortranarray(expected()))
    np.savez(tmp_path / "two.npz", a=expected(), b=expected())
    for name, reason in {
        "missing": "no such folder or file; check the path",
        "empty": r"holds no \.npy files",
        "dir.npy": r"holds no \.npy files",
        "a.csv": r"give a folder of \.npy files",
        "one.npy": "holds a single number",
        "columns.npy": "ascontiguousarray",
        "two.npz": "has no array 'target'; it has a, b: name one as the input",
    }.items():
        with pytest.raises(InputError, match=rf"^{KEY}: .*{name}: .*{reason}"):
            open_values(tmp_path / name, "target", None, KEY)


def test_a_folder_of_several_shapes(tmp_path: Path) -> None:
    path = folder(tmp_path, expected())
    np.save(path / "1.npy", np.zeros((3, 2)))
    with pytest.raises(InputError, match=r"1\.npy is 3x2 and 0\.npy is 2x3; all must have one shape"):
        open_values(path, "target", SHAPE, KEY)


def test_hdf5_without_h5py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(InputError, match=r"needs h5py: pip install 'labelfree\[hdf5\]'"):
        open_values(tmp_path / "a.h5", "target", None, KEY)


def test_damaged_hdf5_files(tmp_path: Path) -> None:
    path = hdf5(tmp_path, expected(), chunks=(2, *SHAPE), compression="gzip")
    whole = path.read_bytes()
    np.testing.assert_array_equal(rows(open_values(path, "target", SHAPE, KEY)), expected())
    reasons = [outcome(damaged, tmp_path / "b.h5") for damaged in flipped(whole, 97)]
    assert any(reason.startswith(KEY) for reason in reasons)
    for content in (b"", b"\x89HDF\r\n\x1a\n", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(InputError, match="not an HDF5 file, or a damaged one"):
            open_values(path, "target", SHAPE, KEY)


def test_hdf5_files_that_reach_elsewhere(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    (tmp_path / "secret").write_bytes(bytes(4 * COUNT))
    other = hdf5(tmp_path, np.zeros(COUNT, "f4"))
    with h5py.File(tmp_path / "links.h5", "w") as file:
        file["external"] = h5py.ExternalLink(str(other), "target")
        file.create_dataset("stored", (COUNT,), "f4", external=[(str(tmp_path / "secret"), 0, 4 * COUNT)])
        layout = h5py.VirtualLayout((COUNT,), "f4")
        layout[:] = h5py.VirtualSource(str(other), "target", (COUNT,))
        file.create_virtual_dataset("virtual", layout)
        file.create_dataset("vast", (COUNT, 1 << 29), "f8", chunks=(1, 3 << 27))
        file.create_group("group")
    for name in ("external", "stored", "virtual"):
        with pytest.raises(InputError, match="are in another file"):
            open_values(tmp_path / "links.h5", name, None, KEY)
    with pytest.raises(InputError, match="the chunks of /vast"):
        open_values(tmp_path / "links.h5", "vast", None, KEY)
    with pytest.raises(InputError, match="group is no array"):
        open_values(tmp_path / "links.h5", "group", None, KEY)
