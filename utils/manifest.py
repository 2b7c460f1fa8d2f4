"""The manifest of a run's data, which identifies them by content, not by location. A CSV with one row per image:

    part,name,class,digest
    train,cat/000.png,cat,1f0c2a...      name: the number of an image without a name; digest: of its pixels
    test,bee/004.png,bee,77ab10...
    input,backdoor.badnets.trigger_path,,9ac3...   contents of the file that a setting names, of `poison_idx.npy`, ...

It is stored with the run (`data.csv`) and in every checkpoint. A run can be resumed with equal data from another folder; with
other data it is refused, in one line that names the difference.
"""

from __future__ import annotations

import contextlib
import csv
import io
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from utils.errors import UserError, printable
from utils.files import write_atomically

FILE = "data.csv"
HEAD = ("part", "name", "class", "digest")
TRAIN, TEST, INPUT = "train", "test", "input"
ATTACKER = "backdoor."  # prefix of the settings of the attack
ASSETS = "assets/"  # prefix of what an attack was made with: stems of files, or names; earlier versions do not list them


class Row(NamedTuple):
    """One image or one other input of the run."""

    part: str  # train, test or input
    name: str
    label: str  # class name; empty for other inputs
    digest: str


def to_text(rows: Iterable[Row]) -> str:
    """Return the text of a manifest."""
    text = io.StringIO()
    writer = csv.writer(text)  # CRLF line ends (RFC 4180): line breaks of both kinds in names are quoted
    writer.writerow(HEAD)
    writer.writerows(rows)
    return text.getvalue()


def rows_of(text: str) -> list[Row]:
    """Return the rows of a manifest.

    Raises:
        ValueError: the text is not a manifest.
    """
    try:
        head, *rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    except csv.Error as error:
        raise ValueError(f"the manifest of the data is damaged ({error})") from None
    if tuple(head) != HEAD or any(len(row) != len(HEAD) for row in rows):
        raise ValueError("the manifest of the data is damaged")
    return [Row(*row) for row in rows]


def with_input(text: str, name: str, digest: str) -> str:
    """Return the manifest with one more input."""
    return text + to_text([Row(INPUT, name, "", digest)]).removeprefix(to_text([]))


def assets_of(text: str) -> dict[str, str]:
    """Return the digests of the attack's assets; none if the text is not a manifest."""
    with contextlib.suppress(ValueError):
        return {row.name.removeprefix(ASSETS): row.digest for row in rows_of(text) if row.name.startswith(ASSETS)}
    return {}


def kept(folder: Path) -> str | None:
    """Return the manifest that a run's folder has; None if there is none.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return (folder / FILE).read_bytes().decode("utf-8", "surrogateescape")
    except FileNotFoundError:  # a new run, or a run of an earlier version
        return None
    except OSError as error:
        raise UserError(f"{folder / FILE}: cannot be read ({error.strerror}): make it readable") from None


# -- Stored with the run -----------------------------------------------------------------------------------------------


def check(folder: Path, text: str) -> None:
    """Refuse data that differ from those of the run in `folder`; inputs that only one of the two has are not compared.

    Raises:
        UserError: the data differ.
    """
    then = kept(folder)
    if then is None or then.startswith(text):  # later inputs are appended
        return
    changed = differences(then, text, whole=False)
    if changed:
        raise other_data(str(folder), "the run was begun", changed)


def keep(folder: Path, text: str) -> None:
    """Write the manifest into the run's folder, unless the folder has it already."""
    data = text.encode("utf-8", "surrogateescape")
    path = folder / FILE
    if not path.is_file() or path.read_bytes() != data:
        write_atomically(path, lambda file: file.write(data))


def other_data(where: str, what: str, changed: Sequence[str]) -> UserError:
    """Return the error for resuming a run with other data."""
    return UserError(
        f"{where}: {what} with other data: {'; '.join(changed)}: restore the data, or start a new run: --resume False, or "
        "--set run=NAME without --resume"
    )


# -- What differs ------------------------------------------------------------------------------------------------------


def differences(then: str, now: str, whole: bool = True) -> list[str]:
    """Return the differences between two manifests, one phrase for each kind of change.

    Args:
        whole: report inputs that only one of them has as well, except assets.
    """
    if then == now:
        return []
    try:
        return row_differences(rows_of(then), rows_of(now), whole)
    except ValueError as error:
        return [str(error)]


def other_trigger(then: str, now: str, from_training_images: bool) -> list[str]:
    """Return the differences between the inputs that the triggers of two manifests are made from.

    Args:
        from_training_images: whether the training images are such an input, beside the files that settings of the attack name.
    """
    parts = (TRAIN,) if from_training_images else ()
    try:
        rows = [[row for row in rows_of(text) if row.part in parts or row.name.startswith(ATTACKER)] for text in (then, now)]
    except ValueError as error:
        return [str(error)]
    return row_differences(rows[0], rows[1])


def row_differences(old: list[Row], new: list[Row], whole: bool = True) -> list[str]:
    """Return the differences between the rows of two manifests; the arguments are those of `differences`."""
    found = []
    for part, kind in ((TRAIN, "training"), (TEST, "test")):
        before, after = ([row for row in rows if row.part == part] for rows in (old, new))
        if before != after:
            found.append(f"of the {kind} images {', '.join(image_changes(before, after))}")
    before_, after_ = ({row.name: row.digest for row in rows if row.part == INPUT} for rows in (old, new))
    for name in sorted(before_.keys() | after_.keys()):
        both = name in before_ and name in after_
        if (both or (whole and not name.startswith(ASSETS))) and before_.get(name) != after_.get(name):
            found.append(f"{name} has other contents" if both else f"{name} was {'' if name in before_ else 'not '}given")
    return found


def image_changes(then: list[Row], now: list[Row]) -> list[str]:
    """Return how the images of one part differ; images are matched by name, the remaining ones by their pixels."""
    old, new = {row.name: row for row in then}, {row.name: row for row in now}
    numbered = not any("/" in row.name for row in (*then, *now))
    if numbered and len(then) != len(now):  # a missing image shifts all later numbers
        old, new = {}, {}
    pairs = [(old[row.name], row) for row in now if row.name in old and row.name in new]
    gone, added = ([row for row in rows if not (row.name in old and row.name in new)] for rows in (then, now))
    left = defaultdict(list)
    for row in reversed(gone):
        left[row.digest].append(row)
    pairs += [(left[row.digest].pop(), row) for row in added if left[row.digest]]
    matched = {id(row) for pair in pairs for row in pair}
    gone, added = ([row for row in rows if id(row) not in matched] for rows in (gone, added))

    altered = [b for a, b in pairs if a.digest != b.digest]
    moved = [(a, b) for a, b in pairs if a.label != b.label and a.digest == b.digest]
    renamed = [(a, b) for a, b in pairs if a.label == b.label and a.name != b.name]

    def count(rows: list[Row], one: str, many: str) -> str:
        return f"{len(rows)} {one if len(rows) == 1 else many} ({first(rows)}{printable(rows[0].name)})"

    found = []
    if moved:
        ways = {(a.label, b.label) for a, b in moved}
        a, b = moved[0]
        way = f"from class {printable(a.label)} to {printable(b.label)}" if len(ways) == 1 else "to another class"
        found.append(f"{len(moved)} moved {way} ({first(moved)}{printable(a.name)}, now {printable(b.name)})")
    if gone:
        found.append(count(gone, "is gone", "are gone"))
    if added:
        found.append(count(added, "was added", "were added"))
    if altered:
        found.append(count(altered, "has other pixels", "have other pixels"))
    if renamed and not (numbered and found):
        a, b = renamed[0]
        found.append(f"{len(renamed)} renamed ({first(renamed)}{printable(a.name)}, now {printable(b.name)})")
    return found or ["all are in another order"]


def first(items: Sequence[object]) -> str:
    """Return the prefix of an example that stands for several items."""
    return "first: " if len(items) > 1 else ""
