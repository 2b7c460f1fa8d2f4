"""An unpickler for untrusted data sets: it builds arrays, numbers, strings, lists and dicts only."""

from __future__ import annotations

import codecs
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from utils.errors import UserError
from utils.paths import require_file

RECONSTRUCT = np.zeros(0).__reduce__()[0]  # the function that rebuilds arrays, in whichever module this numpy has it
# All globals that a pickled numpy array of numbers needs, under the module names of old and new numpy.
ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): RECONSTRUCT,
    ("_codecs", "encode"): codecs.encode,  # bytes in protocol 2 pickles of Python 3
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
        with open(path, "rb") as file:
            return ArrayUnpickler(file, encoding="latin1").load()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise UserError(f"{path}: the file is missing: unpack the data set again") from None
    except (
        pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError,
        ImportError, OSError, OverflowError, MemoryError, struct.error,
    ) as error:  # fmt: skip
        what = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: truncated or not a pickle ({what}): unpack the data set again") from None
