"""An unpickler for untrusted data sets: it builds arrays, numbers, strings, lists and dicts only."""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from utils.errors import UserError, one_line
from utils.paths import require_file

NOT_NUMBERS = "has an array that is not of numbers"
OPERATIONS = 6_000_000  # of a pickle; a record of BackdoorBench has 25 for each image
DEPTH = 100  # how deeply values may be nested; a record of BackdoorBench has 10 levels
STORES, FETCHES = ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"), ("BINGET", "LONG_BINGET", "GET")
GROWS = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")  # change what is already on the stack
# Of each operation: how many values it takes from the stack, how many it makes, whether the first of them only grows, and
# whether it takes all down to the last mark.
SHAPES = {
    code.name: (len(code.stack_before), len(code.stack_after), code.name in GROWS, pickletools.markobject in code.stack_before)
    for code in pickletools.opcodes
}


class Maker:
    """What a name in the pickle stands for: it can be called, and the pickle cannot change it."""

    __slots__ = ("make",)
    make: Callable[..., Any]

    def __init__(self, make: Callable[..., Any]) -> None:
        object.__setattr__(self, "make", make)

    def __call__(self, *arguments: Any) -> Any:
        return self.make(*arguments)

    def __setattr__(self, name: str, value: Any) -> None:
        raise TypeError("a function has no state")

    def __setstate__(self, state: Any) -> None:
        raise TypeError("a function has no state")


class NumberType:
    """A type of numbers, as numpy.dtype pickles it.

    The state of a real dtype may declare fields that hold objects; the array's bytes would then be taken for their addresses.
    """

    __slots__ = ("dtype",)
    KNOWN = ("b1", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8")

    def __init__(self, name: Any, *_: Any) -> None:
        if name not in self.KNOWN:
            raise ValueError(NOT_NUMBERS)
        self.dtype = np.dtype(name)

    def __setstate__(self, state: Any) -> None:
        self.dtype = self.dtype.newbyteorder(state[1] if state[1] in ("<", ">") else "=")


class NumberArray(np.ndarray):
    """An array whose pickled state has a `NumberType`."""

    def __setstate__(self, state: Any) -> None:
        version, shape, kind, fortran, contents = state
        if not isinstance(kind, NumberType):
            raise ValueError(NOT_NUMBERS)
        super().__setstate__((version, shape, kind.dtype, fortran, contents))


def make_bytes(text: str, encoding: str) -> bytes:
    """Return the bytes that protocol 2 of Python 3 writes as text."""
    if encoding != "latin1":
        raise ValueError("has bytes in another encoding than latin1")
    return text.encode("latin1")


# All globals that a pickled numpy array of numbers needs, under the module names of old and new numpy.
ALLOWED: Mapping[tuple[str, str], Any] = {
    ("numpy", "ndarray"): None,  # only handed over; it cannot be called
    ("numpy", "dtype"): Maker(NumberType),
    ("numpy.core.multiarray", "_reconstruct"): Maker(lambda *_: NumberArray(0, np.uint8)),
    ("numpy._core.multiarray", "_reconstruct"): Maker(lambda *_: NumberArray(0, np.uint8)),
    ("_codecs", "encode"): Maker(make_bytes),
}


class ArrayUnpickler(pickle.Unpickler):
    """Raises UserError for every global that is not in `allowed`, before anything is called."""

    allowed: ClassVar[Mapping[tuple[str, str], Any]] = ALLOWED

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            wanted = ascii(f"{module}.{name}")[:80]  # the file decides this text: no line breaks, no control characters
            raise UserError(f"asks for {wanted}, which no data set needs: the file may be malicious; do not use it")
        return self.allowed[module, name]


def read_pickle(path: Path) -> Any:
    """Read a pickle of arrays and plain values, written by Python 2 or 3; nothing in it can run code.

    Raises:
        UserError: the file is missing, truncated or not a pickle, or asks for any other global.
    """
    try:
        require_file(path)
        contents = path.read_bytes()
        check_structure(contents)
        return ArrayUnpickler(io.BytesIO(contents), encoding="latin1").load()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise UserError(f"{path}: the file is missing: unpack the data set again") from None
    except (
        pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError,
        ImportError, OSError, OverflowError, MemoryError, struct.error,
    ) as error:  # fmt: skip
        raise UserError(f"{path}: truncated or not a pickle ({one_line(error)}): unpack the data set again") from None


def check_structure(contents: bytes) -> None:
    """Refuse a pickle that would crash the unpickler or fill the memory, without building anything.

    CPython hashes tuples recursively without a depth limit: a tuple nested 100,000 levels deep, used as a dictionary key,
    crashes the process. A large memo index makes the unpickler allocate a table of that size.

    Raises:
        ValueError: it is such a pickle, or none.
    """
    depths: list[int] = []  # of what is on the unpickler's stack
    marks: list[int] = []  # how much was on it at each mark
    memo: dict[int, int] = {}
    for count, (code, argument, _) in enumerate(pickletools.genops(contents)):
        takes, makes, grows, marked = SHAPES[code.name]
        if code.name in STORES:
            number = len(memo) if argument is None else int(argument)
            if number > count:
                raise ValueError("a memo number is out of range")
            memo[number] = depths[-1]
        elif code.name in FETCHES:
            depths.append(memo[int(str(argument))])
        elif code.name == "MARK":
            marks.append(len(depths))
        elif code.name == "POP" and marks and marks[-1] == len(depths):
            marks.pop()
        elif code.name == "DUP":
            depths.append(depths[-1])
        elif takes or marked:
            at = marks.pop() - grows if marked else len(depths) - takes
            if at < 0:
                raise ValueError("takes more than there is")
            taken = depths[at:]
            depth = max(1 + max(taken[grows:], default=-1), taken[0] if grows else 0)
            depths[at:] = [depth] * makes
            if depth > DEPTH:
                raise ValueError(f"values are nested more than {DEPTH} levels deep")
        else:
            depths += [0] * makes
        if count > OPERATIONS:
            raise ValueError(f"more than {OPERATIONS:,} operations")
