"""Reading CIFAR-10 and CIFAR-100 from untrusted files, the built-in shapes, and `load_raw`."""

from __future__ import annotations

import os
import pickle
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision
from conftest import REPOSITORY
from PIL import Image

from data.datasets import cifar10, cifar100, shapes
from data.loading import load_data, load_raw
from data.sets import RawData
from utils import config
from utils.errors import UserError

FOLDER = "cifar-10-batches-py"
NAMES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
LENGTHS = [7, 3, 5, 1, 6, 9]  # different for all batches, none 10,000


def batch(count: int, seed: int) -> dict[str, Any]:
    """A batch in the authors' layout."""
    rng = np.random.default_rng(seed)
    return {
        "batch_label": f"batch {seed}",
        "labels": [int(x) for x in rng.integers(0, 10, count)],
        "data": rng.integers(0, 256, (count, 3072), dtype=np.uint8),
        "filenames": [f"image_{i}.png" for i in range(count)],
    }


def python2(value: Any) -> bytes:
    """Return a value as pickled by Python 2 with protocol 2: texts as byte strings, arrays under numpy's old module names."""

    def put(x: Any) -> bytes:
        if isinstance(x, str):
            return b"U" + struct.pack("<B", len(x)) + x.encode("latin1")
        if isinstance(x, int):
            return b"K" + struct.pack("<B", x)
        if isinstance(x, list):
            return b"](" + b"".join(map(put, x)) + b"e"
        if isinstance(x, dict):
            return b"}(" + b"".join(put(k) + put(v) for k, v in x.items()) + b"u"
        raw = x.tobytes()
        new = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + put("b") + b"\x87R"
        kind = (
            b"cnumpy\ndtype\n"
            + put("u1")
            + b"K\x00K\x01\x87R(K\x03"
            + put("|")
            + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        )
        shape = b"M" + struct.pack("<H", x.shape[0]) + b"M" + struct.pack("<H", x.shape[1]) + b"\x86"
        return new + b"(K\x01" + shape + kind + b"\x89T" + struct.pack("<i", len(raw)) + raw + b"tb"

    return b"\x80\x02" + put(value) + b"."


def dumps(value: Any) -> bytes:
    """Return a value as pickled by most releases of Python 3."""
    return pickle.dumps(value, protocol=4)


def write(folder: Path, dump: Callable[[Any], bytes] = dumps) -> list[dict[str, Any]]:
    """Write all six batches into a folder; return their contents."""
    folder.mkdir(parents=True, exist_ok=True)
    batches = [batch(count, seed) for seed, count in enumerate(LENGTHS)]
    for name, content in zip(NAMES, batches, strict=True):
        (folder / name).write_bytes(dump(content))
    return batches


def load(folder: Path, download: bool = False) -> RawData:
    """Load as a run does."""
    return cifar10.load(cifar10.Settings(), str(folder), download)


def refused(folder: Path, name: str) -> str:
    """The one-line error that names the file."""
    with pytest.raises(UserError) as caught:
        load(folder)
    text = str(caught.value)
    assert text.startswith(f"{folder / name}: ")
    assert "\n" not in text
    assert len(text) < 500
    return text


def assert_same(raw: RawData, batches: list[dict[str, Any]]) -> None:
    """Compare all pixels with the layout: the first 1024 numbers of a row are red, row by row, then green, then blue."""
    for images, labels, parts in (
        (raw.train_images, raw.train_labels, batches[:5]),
        (raw.test_images, raw.test_labels, batches[5:]),
    ):
        assert images.dtype == np.uint8 and labels.dtype == np.int64
        rows = [row for part in parts for row in part["data"]]
        assert images.shape == (len(rows), 32, 32, 3)
        assert labels.tolist() == [label for part in parts for label in part["labels"]]
        for image, row in zip(images, rows, strict=True):
            for channel in range(3):
                for y in range(32):
                    start = 1024 * channel + 32 * y
                    assert image[y, :, channel].tolist() == row[start : start + 32].tolist()


@pytest.mark.parametrize(
    "dump",
    [python2, *(lambda value, p=p: pickle.dumps(value, protocol=p) for p in range(5))],
    ids=["python 2", *(f"protocol {p}" for p in range(5))],
)
def test_batches_of_any_length_and_pickle_are_read(tmp_path: Path, dump: Callable[[Any], bytes]) -> None:
    """The five training batches, of any length and written by Python 2 or 3, are concatenated in order."""
    batches = write(tmp_path / FOLDER, dump)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        raw = load(tmp_path / FOLDER)
    assert_same(raw, batches)
    assert " ".join(raw.class_names) == "airplane automobile bird cat deer dog frog horse ship truck"  # as in batches.meta


def test_the_folder_or_its_parent_may_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """dataset_dir may be cifar-10-batches-py, its parent folder, a renamed copy, or a path that begins with ~."""
    batches = write(tmp_path / FOLDER)
    write(tmp_path / "renamed")
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in (tmp_path / FOLDER, tmp_path, tmp_path / "renamed", Path("~") / FOLDER):
        assert_same(load(folder), batches)


def test_labels_may_be_an_array(tmp_path: Path) -> None:
    """Batches with labels as a numpy array are read as well."""
    batches = write(tmp_path)
    (tmp_path / "test_batch").write_bytes(dumps(batches[5] | {"labels": np.array(batches[5]["labels"], np.uint8)}))
    assert_same(load(tmp_path), batches)


# -- Invalid files -----------------------------------------------------------------------------------------------------


class Bait:
    """An object whose pickle creates a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", ["data_batch_1", "data_batch_4", "test_batch"])
def test_a_malicious_batch_runs_no_code(tmp_path: Path, name: str, protocol: int) -> None:
    """A batch that would run code when unpickled is refused, the error names the function, and the code does not run."""
    folder, trace = tmp_path / FOLDER, tmp_path / "code ran"
    write(folder)
    content = pickle.dumps(batch(4, 0) | {"batch_label": Bait(trace)}, protocol=protocol)  # the bait is loaded first
    (folder / name).write_bytes(content)
    text = refused(folder, name)
    assert ".mkdir" in text and "malicious" in text
    assert not trace.exists()
    pickle.loads(content)
    assert trace.exists()  # the bait works where pickles are trusted


@pytest.mark.parametrize(
    "wanted",
    [
        "os system", "posix system", "nt system", "subprocess Popen", "builtins eval", "builtins exec", "builtins getattr",
        "__builtin__ eval", "__builtin__ __import__", "importlib import_module", "pickle loads", "_pickle loads",
        "numpy load", "numpy fromfile", "numpy.lib.npyio load", "numpy.core.multiarray scalar", "codecs decode",
        "_codecs decode", "_codecs register", "torch load", "numpy ndarray.tofile", "numpy dtype.__reduce__", "sys exit",
    ],
)  # fmt: skip
@pytest.mark.parametrize("stacked", [False, True])
def test_only_globals_of_arrays_are_allowed(tmp_path: Path, wanted: str, stacked: bool) -> None:
    """A batch may name the few globals that arrays are made of; every other global is refused before it is looked up."""
    write(tmp_path)
    module, name = wanted.split()
    if stacked:  # protocol 4 resolves dotted names
        ask = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(x)]) + x.encode() for x in (module, name)) + b"\x93."
    else:
        ask = f"c{module}\n{name}\n.".encode()
    (tmp_path / "data_batch_2").write_bytes(ask)
    assert f"asks for '{module}.{name}'" in refused(tmp_path, "data_batch_2")


def test_a_malicious_name_cannot_forge_the_error_message(tmp_path: Path) -> None:
    """The name of a refused global is quoted, so that it cannot add lines or terminal codes to the message."""
    write(tmp_path)
    name = "x\n\x1b[2Jall is well" + "y" * 200
    ask = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(x)]) + x.encode() for x in ("os", name)) + b"\x93."
    (tmp_path / "data_batch_1").write_bytes(ask)
    assert refused(tmp_path, "data_batch_1").isprintable()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a pickle",
        b"<html>404 not found</html>",
        b"\x89PNG\r\n\x1a\n",
        b"\x80\x63.",
        b".",
        b"0.",
        b"Pname\n.",
        b"\x82\x01.",
        b"h\x05.",
        b"c_codecs\nencode\n(Va\nVno such codec\ntR.",
        b"c_codecs\nencode\n(I1\nVlatin1\ntR.",
        b"cnumpy\ndtype\n(Vnonsense\ntR.",
        b"cnumpy\nndarray\n((I1000000000000000000\ntVu1\ntR.",
        b"cnumpy\nndarray\n((I-1\ntVu1\ntR.",
        b"cnumpy\nndarray\n}Va\nI1\nsb.",
        b"c_codecs\nencode\n}Va\nI1\nsb.",
        b"cnumpy\ndtype\n(Vu1\ntRI5\nb.",
        b"}(" + b"(" * 200_000 + b"t" * 200_000 + b"I1\nu.",  # a key whose hash would end the process
        b"I1\nr\xff\xff\xff\x7f.",  # a memo of two billion places
    ],
)
def test_an_invalid_pickle_is_one_line(tmp_path: Path, content: bytes) -> None:
    """Empty files, other formats and nonsensical pickles are one line with the file's name, whatever the unpickler raises."""
    write(tmp_path)
    (tmp_path / "data_batch_3").write_bytes(content)
    assert "unpack the data set again" in refused(tmp_path, "data_batch_3")


class Pickled:
    """What is pickled as a call with a state."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def addresses(name: str, count: int) -> Pickled:
    """An array whose type, by its state, has a field of objects: numpy takes its bytes for their addresses (here 0)."""
    kind = Pickled(np.dtype, (name, False, True), (3, "|", None, ("f0",), {"f0": (np.dtype("O"), 0)}, 8, 1, 0))
    rebuild = np.zeros(0).__reduce__()[0]
    return Pickled(rebuild, (np.ndarray, (0,), b"b"), (1, (count,), kind, False, bytes(8 * count)))


@pytest.mark.parametrize("name", ["V8", "u8"])
@pytest.mark.parametrize("protocol", range(5))
def test_a_file_cannot_make_numpy_read_at_an_address(tmp_path: Path, name: str, protocol: int) -> None:
    """An array whose type is declared to hold objects is refused while the file is read, before it is used, in both CIFAR
    sets."""
    write(tmp_path / "10")
    write100(tmp_path / "100")
    for folder, file, key, load_it in (
        (tmp_path / "10", "data_batch_1", "labels", load),
        (tmp_path / "100", "train", "fine_labels", load100),
    ):
        (folder / file).write_bytes(pickle.dumps({"data": DATA, key: addresses(name, 4)}, protocol))
        with pytest.raises(UserError, match=f"{file}: .*an array that is not of numbers.*unpack"):
            load_it(folder)


@pytest.mark.parametrize("kind", ["<u2", ">u2", ">i4", "<i8", "uint64"])
@pytest.mark.parametrize("protocol", range(5))
def test_labels_are_read_from_arrays_of_any_integers(tmp_path: Path, kind: str, protocol: int) -> None:
    """Size, sign and byte order of the labels' type do not matter."""
    batches = write(tmp_path)
    labels = np.array(batches[0]["labels"], kind)
    (tmp_path / NAMES[0]).write_bytes(pickle.dumps(batches[0] | {"labels": labels}, protocol))
    assert load(tmp_path).train_labels[: len(labels)].tolist() == batches[0]["labels"]


@pytest.mark.parametrize("dump", [python2, dumps], ids=["python 2", "python 3"])
def test_a_truncated_batch_is_refused(tmp_path: Path, dump: Callable[[Any], bytes]) -> None:
    """A file truncated at any byte is an error that names it, never a smaller data set."""
    write(tmp_path, dump)
    whole = (tmp_path / "test_batch").read_bytes()
    for length in [*range(120), *range(120, len(whole), 911), *range(len(whole) - 120, len(whole))]:
        (tmp_path / "test_batch").write_bytes(whole[:length])
        assert "truncated or not a pickle" in refused(tmp_path, "test_batch")


DATA, TEN = np.zeros((4, 3072), np.uint8), [0, 1, 2, 9]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ([1, 2, 3], "not a CIFAR-10 batch"),
        ({}, "not a CIFAR-10 batch"),
        ({"data": DATA}, "not a CIFAR-10 batch"),
        ({"data": DATA, "fine_labels": TEN}, "not a CIFAR-10 batch"),  # CIFAR-100
        ({"data": DATA[:, :3071], "labels": TEN}, "uint8 (4, 3071)"),
        ({"data": DATA.reshape(4, 3, 32, 32), "labels": TEN}, "uint8 (4, 3, 32, 32)"),
        ({"data": DATA.reshape(-1), "labels": TEN}, "uint8 (12288,)"),
        ({"data": DATA.astype(np.int64), "labels": TEN}, "int64 (4, 3072)"),
        ({"data": DATA.astype(np.float32), "labels": TEN}, "float32 (4, 3072)"),
        ({"data": DATA.view(np.int8), "labels": TEN}, "int8 (4, 3072)"),
        ({"data": DATA.tolist(), "labels": TEN}, "data is list"),
        ({"data": "pixels", "labels": TEN}, "data is str"),
        ({"data": DATA[:0], "labels": []}, "contains no images"),
        ({"data": DATA, "labels": TEN[:3]}, "3 labels for 4 images"),
        ({"data": DATA, "labels": [*TEN, 0]}, "5 labels for 4 images"),
        ({"data": DATA, "labels": []}, "0 labels for 4 images"),
        ({"data": DATA, "labels": None}, "no labels for 4 images"),
        ({"data": DATA, "labels": "0123"}, "no labels for 4 images"),
        ({"data": DATA, "labels": np.array(3)}, "no labels for 4 images"),
        ({"data": DATA, "labels": [0, 1, 2, 10]}, "label 10 is not in 0..9"),
        ({"data": DATA, "labels": [0, -1, 2, 3]}, "label -1 is not in 0..9"),
        ({"data": DATA, "labels": [0, 1, 2.5, 3]}, "label 2.5 is not in 0..9"),
        ({"data": DATA, "labels": [0, 1, "2", 3]}, "label '2' is not in 0..9"),
        ({"data": DATA, "labels": [0, 1, None, 3]}, "label None is not in 0..9"),
        ({"data": DATA, "labels": [0, 1, 2**70, 3]}, "is not in 0..9"),
        ({"data": DATA, "labels": ["x" * 9999, 1, 2, 3]}, "is not in 0..9"),
        ({"data": DATA, "labels": np.array([0.0, 1, 2, 3])}, "labels is float64 instead of integers"),
        ({"data": DATA, "labels": np.array([True, False, True, True])}, "labels is bool instead of integers"),
        ({"data": DATA, "labels": np.zeros((4, 10, 10), int)}, "no labels for 4 images"),
    ],
)
@pytest.mark.parametrize("name", ["data_batch_5", "test_batch"])
def test_a_batch_with_wrong_contents_is_refused(tmp_path: Path, name: str, content: Any, complaint: str) -> None:
    """A wrong shape, type, number or range of labels is one line with the file, its contents and the remedy."""
    write(tmp_path)
    (tmp_path / name).write_bytes(dumps(content))
    text = refused(tmp_path, name)
    assert complaint in text
    assert "unpack the data set again" in text


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_batch_is_named(tmp_path: Path, name: str) -> None:
    """If one of the six files is missing, the error names it."""
    write(tmp_path)
    (tmp_path / name).unlink()
    assert "missing" in refused(tmp_path, name)


def test_a_batch_that_is_a_folder_is_named(tmp_path: Path) -> None:
    """A folder in the place of a batch is an error like any other."""
    write(tmp_path)
    (tmp_path / "data_batch_2").unlink()
    (tmp_path / "data_batch_2").mkdir()
    refused(tmp_path, "data_batch_2")


# -- A missing data set ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["nowhere", "empty"])
def test_the_error_for_a_missing_set_names_its_source(tmp_path: Path, folder: str) -> None:
    """Without files the error names the folder, the download address and the setting that downloads the set."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        load(tmp_path / folder)
    text = str(caught.value)
    assert text.startswith(f"dataset_dir: {tmp_path / folder}: ")
    assert "https://www.cs.toronto.edu/~kriz/cifar.html" in text and "download: true" in text
    assert "\n" not in text


@pytest.mark.parametrize("named", [FOLDER, "."])
def test_only_a_missing_set_is_downloaded(tmp_path: Path, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `download: true` torchvision unpacks the set where dataset_dir points to; an existing set is not downloaded."""
    calls: list[tuple[Path, bool]] = []

    def fake(root: str, download: bool) -> None:
        calls.append((Path(root).resolve(), download))
        write(Path(root) / FOLDER)

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fake)
    folder = tmp_path / "sets" / named
    first = load(folder, download=True)
    assert calls == [((tmp_path / "sets").resolve(), True)]
    assert np.array_equal(load(folder, download=True).train_images, first.train_images)
    assert len(calls) == 1


def test_a_failed_download_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network the error names the folder and the remedy."""

    def fails(root: str, download: bool) -> None:
        raise RuntimeError("no route\nto host")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fails)
    with pytest.raises(UserError, match=r"dataset_dir: .*the download failed.*no route") as caught:
        load(tmp_path / FOLDER, download=True)
    assert "\n" not in str(caught.value)


def test_cifar10_needs_a_folder() -> None:
    """`dataset: cifar10` without dataset_dir names the missing key."""
    with pytest.raises(UserError, match="dataset_dir: missing"):
        cifar10.load(cifar10.Settings(), None, False)


# -- CIFAR-100 ---------------------------------------------------------------------------------------------------------


def write100(folder: Path) -> dict[str, dict[str, Any]]:
    """Write a small CIFAR-100 in its authors' layout; return its contents."""
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, dict[str, Any]] = {}
    for name, count in (("train", 7), ("test", 4)):
        fine = [int(x) for x in np.random.default_rng(count).integers(0, 100, count)]
        content[name] = {"data": batch(count, count)["data"], "fine_labels": fine, "coarse_labels": [x // 5 for x in fine]}
    content["meta"] = {"fine_label_names": [f"kind {i}" for i in range(100)], "coarse_label_names": ["any"] * 20}
    for name, value in content.items():
        (folder / name).write_bytes(dumps(value))
    return content


def load100(folder: Path, download: bool = False) -> RawData:
    """Load as a run does."""
    return cifar100.load(cifar100.Settings(), str(folder), download)


def test_cifar100_has_the_fine_labels_and_their_names(tmp_path: Path) -> None:
    """Images, fine labels and class names are those of the authors' files, read from the folder or from its parent."""
    content = write100(tmp_path / "cifar-100-python")
    for folder in (tmp_path, tmp_path / "cifar-100-python"):
        raw = load100(folder)
        assert raw.class_names == tuple(f"kind {i}" for i in range(100))
        for images, labels, name in ((raw.train_images, raw.train_labels, "train"), (raw.test_images, raw.test_labels, "test")):
            assert labels.tolist() == content[name]["fine_labels"] and labels.dtype == np.int64
            for image, row in zip(images, content[name]["data"], strict=True):
                assert np.array_equal(image, row.reshape(3, 32, 32).transpose(1, 2, 0))


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        ("train", {"fine_labels": [100] * 7}, "label 100 is not in 0..99"),
        ("test", {"fine_labels": [0, 1, 2, -1]}, "label -1 is not in 0..99"),
        ("test", {"fine_labels": None}, "no labels for 4 images"),
        ("meta", {"fine_label_names": ["a"] * 100}, "names 1 classes instead of 100"),
        ("meta", {"fine_label_names": "abc"}, "no names"),
        ("meta", {"fine_label_names": ["a\nb"] * 100}, "no names"),
    ],
)
def test_invalid_cifar100_files_are_named(tmp_path: Path, name: str, change: dict[str, Any], complaint: str) -> None:
    """A file with invalid contents is refused in one line with its name."""
    (tmp_path / name).write_bytes(dumps(write100(tmp_path)[name] | change))
    with pytest.raises(UserError) as caught:
        load100(tmp_path)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / name}: ") and complaint in text and "unpack" in text and "\n" not in text


def test_cifar10_is_not_taken_for_cifar100(tmp_path: Path) -> None:
    """A batch with CIFAR-10's labels in the place of CIFAR-100's is refused, and so is a folder without CIFAR-100's files."""
    write100(tmp_path)
    (tmp_path / "train").write_bytes(dumps(batch(5, 1)))
    with pytest.raises(UserError, match="not a CIFAR-100 batch"):
        load100(tmp_path)
    with pytest.raises(UserError, match=r"does not contain CIFAR-100.*download: true"):
        load100(tmp_path / "nowhere")
    with pytest.raises(UserError, match="dataset_dir: missing"):
        cifar100.load(cifar100.Settings(), None, False)


def test_cifar100_is_downloaded_by_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `download: true` torchvision downloads the set; a failure is one line."""
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", lambda root, download: write100(Path(root) / "cifar-100-python"))
    assert len(load100(tmp_path / "new", download=True).train_images) == 7

    def fails(root: str, download: bool) -> None:
        raise RuntimeError("no route\nto host")

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", fails)
    with pytest.raises(UserError, match=r"the download failed \(no route to host\)"):
        load100(tmp_path / "other", download=True)


# -- The built-in shapes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("train", "test"), [(10, 10), (57, 23), (400, 101)])
def test_shapes_have_the_wanted_sizes_and_balanced_classes(train: int, test: int) -> None:
    """There are as many uint8 RGB images of 32 x 32 as configured, and equally many of each of the ten classes, up to one."""
    raw = shapes.load(shapes.Settings(train_size=train, test_size=test), None, False)
    assert len(raw.class_names) == len(set(raw.class_names)) == 10
    for images, labels, count in ((raw.train_images, raw.train_labels, train), (raw.test_images, raw.test_labels, test)):
        assert images.shape == (count, 32, 32, 3) and images.dtype == np.uint8
        assert labels.shape == (count,) and labels.dtype == np.int64
        per_class = [labels.tolist().count(c) for c in range(10)]
        assert sum(per_class) == count and max(per_class) - min(per_class) <= 1


def test_shapes_are_large_enough_to_be_recognized() -> None:
    """Discs, the first class, are 12 to 20 pixels wide and high and completely inside the image."""
    masks = shapes.shape_masks(np.zeros(300, np.int64), np.random.default_rng(0)) > 0.5
    for axis in (1, 2):
        inside = masks.any(axis)  # (300, 32) columns or rows
        width = inside.sum(1)
        assert not inside[:, 0].any() and not inside[:, -1].any()
        assert 11 <= width.min() <= 13 and 19 <= width.max() <= 21 and abs(width.mean() - 16) < 0.5


def test_shapes_are_the_same_on_every_call_and_differ_by_seed() -> None:
    """The same settings give the same pixels, whatever was drawn before; another seed gives other pixels."""
    first = shapes.load(shapes.Settings(60, 40), None, False)
    np.random.seed(5)  # noqa: NPY002
    again = shapes.load(shapes.Settings(60, 40), None, False)
    other = shapes.load(shapes.Settings(60, 40, seed=1), None, False)
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
        assert not np.array_equal(getattr(first, name), getattr(other, name))


def test_shapes_repeat_no_image_and_come_in_random_order() -> None:
    """Training and test set share no image, and the classes are mixed, so that a limit on the number keeps all classes."""
    raw = shapes.load(shapes.Settings(300, 300), None, False)
    pixels = [image.tobytes() for image in np.concatenate([raw.train_images, raw.test_images])]
    assert len(set(pixels)) == 600
    assert set(raw.train_labels[:60].tolist()) == set(range(10))
    assert np.any(np.diff(raw.train_labels) < 0) and raw.train_labels[:10].tolist() != list(range(10))


def test_shapes_cannot_be_classified_by_average_colors() -> None:
    """Comparison with the mean image of each class gives a low accuracy: the data set requires training."""
    raw = shapes.load(shapes.Settings(400, 200), None, False)
    flat, test = raw.train_images.reshape(400, -1).astype(float), raw.test_images.reshape(200, -1).astype(float)
    means = np.stack([flat[raw.train_labels == c].mean(0) for c in range(10)])
    distance = (test**2).sum(1)[:, None] - 2 * test @ means.T + (means**2).sum(1)
    assert np.mean(distance.argmin(1) == raw.test_labels) < 0.4


# -- load_raw ----------------------------------------------------------------------------------------------------------


def read(tiny: Path, *overrides: str) -> RawData:
    """Load the data of the tiny run with some changed settings."""
    return load_raw(config.load(tiny, overrides))


def test_the_data_set_is_recognized_by_the_name_of_its_folder(tiny: Path, tmp_path: Path) -> None:
    """The authors' YAML names no data set: a folder with cifar in its path is CIFAR-10."""
    batches = write(tmp_path / "my-CIFAR")
    assert_same(read(tiny, "dataset=null", f"dataset_dir={tmp_path / 'my-CIFAR'}"), batches)
    assert_same(read(tiny, "dataset=cifar10", f"dataset_dir={tmp_path / 'my-CIFAR'}"), batches)


def test_a_folder_of_unknown_name_is_refused(tiny: Path) -> None:
    """If the data set cannot be recognized by the path, the error names the folder and the missing key."""
    with pytest.raises(
        UserError, match=r"dataset_dir: images: .*add `dataset: NAME`, one of backdoorbench_record, cifar10, "
    ) as caught:
        read(tiny, "dataset=null", "dataset_dir=/somewhere/images")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("classes", "label"), [(9, 9), (4, 9)])
def test_more_labels_than_num_classes_are_refused(tiny: Path, classes: int, label: int) -> None:
    """A num_classes smaller than the data set's is an error with both numbers, not an index error later."""
    with pytest.raises(UserError, match=rf"num_classes: {classes}: the train set has the label {label}"):
        read(tiny, f"num_classes={classes}")


def test_num_classes_is_checked_on_the_test_set_too(tiny: Path, tmp_path: Path) -> None:
    """A label that only the test set has is detected before training as well."""
    for name, labels in zip(NAMES, [[0, 1, 2, 4]] * 5 + [[0, 7, 1, 2]], strict=True):
        (tmp_path / name).write_bytes(dumps({"data": DATA, "labels": labels}))
    with pytest.raises(UserError, match="num_classes: 5: the test set has the label 7"):
        read(tiny, "dataset=cifar10", f"dataset_dir={tmp_path}", "num_classes=5")


def test_limits_keep_the_first_images(tiny: Path) -> None:
    """data.train_limit and data.test_limit keep that many images; a limit larger than the set keeps all."""
    whole = read(tiny)
    assert len(whole.train_images) == 200 and len(whole.test_images) == 43
    cut = read(tiny, "data.train_limit=31", "data.test_limit=12")
    assert np.array_equal(cut.train_images, whole.train_images[:31])
    assert np.array_equal(cut.train_labels, whole.train_labels[:31])
    assert np.array_equal(cut.test_images, whole.test_images[:12])
    assert np.array_equal(cut.test_labels, whole.test_labels[:12])
    assert len(read(tiny, "data.train_limit=9999").train_labels) == 200
    assert len(read(tiny, "data.train_limit=31").test_labels) == 43


def test_pre_transforms_are_applied_to_all_images_when_loading(tiny: Path) -> None:
    """transform.pre resizes and crops training and test images with exactly the pixels of Pillow."""
    whole = read(tiny)
    small = read(tiny, "transform.pre={resize: {size: 20}, center_crop: {size: 16}}")
    for before, after in ((whole.train_images, small.train_images), (whole.test_images, small.test_images)):
        assert after.shape == (len(before), 16, 16, 3) and after.dtype == np.uint8
        for image, changed in zip(before, after, strict=True):
            on_pil = np.asarray(Image.fromarray(image).resize((20, 20), Image.Resampling.BILINEAR))[2:18, 2:18]
            assert np.array_equal(on_pil, changed)
    assert small.train_labels.tolist() == whole.train_labels.tolist()


def test_pre_crop_alone_cuts_the_middle_exactly(tiny: Path) -> None:
    """A center crop when loading changes no pixel value, and transforms are applied in the order of the YAML."""
    whole = read(tiny)
    cropped = read(tiny, "transform.pre={center_crop: {size: [20, 24]}}")
    assert np.array_equal(cropped.train_images, whole.train_images[:, 6:26, 4:28])
    assert np.array_equal(cropped.test_images, whole.test_images[:, 6:26, 4:28])
    resized_last = read(tiny, "transform.pre={center_crop: {size: 16}, resize: {size: 20}}")
    assert resized_last.train_images.shape == (200, 20, 20, 3)


def test_many_images_are_transformed_in_parts_in_order(tiny: Path) -> None:
    """If there are more images than are transformed at a time, all of them are returned, in order."""
    whole = read(tiny, "dataset={shapes: {train_size: 1100, test_size: 10}}")
    cut = read(tiny, "dataset={shapes: {train_size: 1100, test_size: 10}}", "transform.pre={center_crop: {size: 8}}")
    assert np.array_equal(cut.train_images, whole.train_images[:, 12:20, 12:20])


IMAGES, LABELS = np.zeros((4, 6, 5, 3), np.uint8), np.array([0, 1, 1, 0])
GOOD = {"train_images": IMAGES, "train_labels": LABELS, "test_images": IMAGES[:2], "test_labels": LABELS[:2]}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"train_images": IMAGES / 255}, r"train_images: float64 \(4, 6, 5, 3\): must be a uint8 array \(n, H, W, 3\)"),
        ({"train_images": IMAGES[..., 0]}, r"train_images: uint8 \(4, 6, 5\): must be"),
        ({"test_images": IMAGES.transpose(0, 3, 1, 2)[:2]}, r"test_images: uint8 \(2, 3, 6, 5\): must be"),
        ({"train_images": IMAGES.tolist()}, "train_images: list: must be"),
        ({"train_labels": LABELS.astype(float)}, r"train_labels: float64 \(4,\) for 4 images: must be an integer array"),
        ({"train_labels": LABELS[:, None]}, r"train_labels: int64 \(4, 1\) for 4 images"),
        ({"train_labels": LABELS.tolist()}, "train_labels: list for 4 images"),
        ({"test_labels": LABELS[:2] - 1}, "test_labels: .* of labels from 0 on"),
        ({"train_labels": LABELS[:3]}, r"train_labels: int64 \(3,\) for 4 images"),
        ({"names": ("a", "b")}, "names: 2 for 4 images: give one each"),
        (None, "returned NoneType: return RawData or Listing"),
    ],
)
def test_what_a_data_set_returns_is_checked(monkeypatch: pytest.MonkeyPatch, change: dict[str, Any] | None, line: str) -> None:
    """Arrays of another kind are refused by name, in one line: images in 0..1, for example, would be almost black."""
    settings = config.load(str(REPOSITORY / "config/demo.yaml"), [])
    wrong: Any = None if change is None else RawData(**(GOOD | {"class_names": ("a", "b")} | change))
    monkeypatch.setattr(shapes, "load", lambda *_: wrong)
    with pytest.raises(UserError, match=rf"data/datasets/shapes\.py: load: .*{line}") as error:
        load_data(settings)
    assert "\n" not in str(error.value)


def test_a_data_set_may_have_no_test_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the labels of the test images are an empty array, of any kind."""
    good: Any = GOOD | {"class_names": ("a", "b"), "test_images": IMAGES[:0], "test_labels": np.array([])}
    monkeypatch.setattr(shapes, "load", lambda *_: RawData(**good))
    raw, _ = load_data(config.load(str(REPOSITORY / "config/demo.yaml"), []))
    assert len(raw.train_images) == 4 and len(raw.test_images) == 0
