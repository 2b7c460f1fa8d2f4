"""`attack_result.pt` of a BackdoorBench record: a zip file of torch.save, whose pickle is untrusted input.

No code from the file is executed. Each allowed global in the pickle is mapped to a small function of this module that builds
numbers, numeric arrays or nothing; every other global is rejected. Weights are skipped.
"""

from __future__ import annotations

import io
import lzma
import pickle
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from data.io.unpickle import ALLOWED, NOT_NUMBERS, ArrayUnpickler, Maker, NumberType, check_structure
from utils.errors import UserError, one_line
from utils.paths import require_file

MEMBER = "data.pkl"
LIMIT = 64 << 20  # bytes of the pickle; 100,000 images with long paths take a third of it
ENDINGS = ("Storage",)  # of torch's classes that hold weights
BROKEN = (
    pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, ValueError, TypeError,
    LookupError, AttributeError, ImportError, OSError, OverflowError, MemoryError, RuntimeError,
)  # fmt: skip


class Ignored(dict[Any, Any]):
    """A dictionary of weights."""

    def __setstate__(self, state: Any) -> None:
        pass


def make_scalar(kind: NumberType, contents: bytes) -> int | float:
    """Return the number that numpy pickles as its type and bytes."""
    (value,) = np.frombuffer(contents, kind.dtype)
    number: int | float = value.item()
    return number


def make_array(items: list[int | float], name: str) -> np.ndarray:
    """Return the array of a call of numpy.array, as `data/poisoned_sets/record_write.py` has it."""
    if not all(type(item) in (int, float) for item in items):
        raise ValueError(NOT_NUMBERS)
    kinds = {"int64": np.int64, "float64": np.float64}
    return np.array(items, kinds[name])


def nothing(*_: Any) -> None:
    """Stand for what is not read."""


class RecordUnpickler(ArrayUnpickler):
    """Builds plain values, numbers and arrays of numbers; tensors become None."""

    allowed: ClassVar[Mapping[tuple[str, str], Any]] = {
        **ALLOWED,
        ("numpy", "array"): Maker(make_array),
        ("numpy.core.multiarray", "scalar"): Maker(make_scalar),
        ("numpy._core.multiarray", "scalar"): Maker(make_scalar),
        ("collections", "OrderedDict"): Maker(lambda *_: Ignored()),
        ("torch._utils", "_rebuild_tensor_v2"): Maker(nothing),
        ("torch._utils", "_rebuild_parameter"): Maker(nothing),
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        """Return what a name stands for; torch has a class of storage for each type of number."""
        if module in ("torch", "torch.storage") and name.endswith(ENDINGS) and name.isidentifier():
            return None
        if module.partition(".")[0] == "PIL":
            raise UserError("holds pickled images: a record of BackdoorBench's first version, which is not supported")
        return super().find_class(module, name)

    def persistent_load(self, identifier: Any) -> None:
        """Leave out the numbers of a tensor."""


def read_attack_result(path: Path) -> Any:
    """Return the contents of `attack_result.pt`: numpy scalars as numbers, tensors as None.

    Raises:
        UserError: missing, not a zip file of torch.save, too large, or one that asks for anything but numbers.
    """
    try:
        require_file(path)
        contents = read_member(path)
        check_structure(contents)
        return RecordUnpickler(io.BytesIO(contents), encoding="latin1").load()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except BROKEN as error:
        raise UserError(f"{path}: cannot be read as an attack result of BackdoorBench ({one_line(error)})") from None


def read_member(path: Path) -> bytes:
    """Return the pickle inside the zip file, whatever the file claims its size to be."""
    with zipfile.ZipFile(path) as archive:
        found = [info for info in archive.infolist() if info.filename.rpartition("/")[2] == MEMBER]
        if len(found) != 1:
            raise ValueError(f"{len(found)} members {MEMBER} where one is expected")
        with archive.open(found[0]) as file:
            contents = file.read(LIMIT + 1)
    if len(contents) > LIMIT:
        raise ValueError(f"{MEMBER} has more than {LIMIT >> 20} MB")
    return contents
