"""The seed samples: drawn with the ground truth where it is known, given by the user (`seed_samples`) where it is not."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.digests import short
from data.pools import draw_seed_samples
from data.sets import PoisonedData
from utils.config import Config
from utils.errors import UserError
from utils.files import write_atomically
from utils.manifest import with_input
from utils.names import Names, class_text
from utils.paths import is_dir, require_file, user_path, visible

KEPT = "seed_samples.txt"  # in the run's folder: the given ones
MARKS = {  # what a text may begin with, and its encoding; UTF-32's first, for it begins with UTF-16's
    codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip


def choose_seed_samples(config: Config, data: PoisonedData, folder: Path) -> Tensor:
    """Return the images that the defender knows to be clean, (S,) int64.

    Args:
        folder: the run's, where given seed samples are kept: it goes on with the same ones or not at all.
    """
    if not config.defense.settings.needs_clean:
        return torch.zeros(0, dtype=torch.int64)
    labels = data.train.labels
    if config.seed_samples is None:
        assert data.ground_truth is not None  # where nobody knows the truth, utils/config.py demands the key
        return draw_seed_samples(labels, data.ground_truth, config.num_classes, config.global_.seed_num, config.seed.seed)
    source = user_path(config.seed_samples, "seed_samples")
    names = data.names or tuple(map(str, range(len(labels))))
    seeds = read_seed_samples(source, names, labels.cpu().numpy(), data.class_names, config.num_classes)
    keep_with_run(folder / KEPT, [names[i] for i in seeds])
    return torch.from_numpy(seeds)


def complete_manifest(config: Config, data: PoisonedData, seeds: Tensor) -> str:
    """Return the manifest of all that a run is given: its data, and the seed samples where the user has chosen them.

    Args:
        seeds: (S,) int64, what `choose_seed_samples` returned.
    """
    if config.seed_samples is None or not config.defense.settings.needs_clean:
        return data.manifest
    return with_input(data.manifest, "seed_samples", short(seeds.numpy().tobytes()))


def read_seed_samples(
    source: Path, names: Sequence[str], labels: np.ndarray, class_names: tuple[str, ...], num_classes: int
) -> np.ndarray:
    """Return the images that a list or a folder names, (S,) int64, sorted.

    Args:
        source: a text file (UTF-8, or UTF-16 with a byte order mark), an image's name a line, or a folder with a sub-folder
            for each class, whose files are named as training images of that class.
        names: (N,) of the training images; where they are numbers, a file `17.png` means image 17.
        labels: (N,) int64.
    Raises:
        UserError: one line: it cannot be read, an unknown name, one named twice, a class without any.
    """
    number, known = {name: i for i, name in enumerate(names)}, Names(names)
    seen: dict[int, str] = {}
    folder = is_dir(source, "seed_samples")
    entries = from_folder(source, known, number, labels, class_names) if folder else from_list(source, known)
    for place, given in entries:
        name = known.find(given)
        if name is None:
            raise UserError(f"{place}: {shown(given)}: the training set has no image of that name; {hint(given, names)}")
        at = number[name]
        if at in seen:
            raise UserError(f"{place}: {shown(name)}: is named twice, before in {seen[at]}: keep one")
        seen[at] = place
    seeds = np.sort(np.fromiter(seen, np.int64))
    for label, count in enumerate(np.bincount(labels[seeds], minlength=num_classes)):
        if not (labels == label).any():
            raise UserError(f"num_classes: {num_classes}: the training set has no image of class {label}: lower it")
        if count == 0:
            raise UserError(
                f"seed_samples: {source}: names no image of class {class_text(label, class_names)}: name at least one that "
                "you know to be clean, better ten"
            )
    return seeds


def from_list(source: Path, known: Names) -> Iterator[tuple[str, str]]:
    """Yield (place, name) of every line that is neither blank nor a comment.

    A line is the name itself where there is an image of it, spaces and all; else `./`, Windows' backslashes and spaces at
    the ends are taken for what programs add. A line that begins with # is a comment, unless it names a class folder.
    """
    folders = Names({name.rpartition("/")[0] for name in known.names} - {""})
    for i, line in enumerate(io.StringIO(read_text(source), newline=None), 1):
        exact = line.removesuffix("\n")
        spellings = [exact, *(text.replace("\\", "/").removeprefix("./") for text in (exact, exact.strip()))]
        name = next((text for text in spellings if known.find(text) is not None), spellings[-1])
        if name and not (name.startswith("#") and folders.find(name.rpartition("/")[0]) is None):
            yield f"{source}: line {i}", name


def read_text(source: Path) -> str:
    """Return a list's text; bytes that are no UTF-8 are kept as surrogates, for file names need not be UTF-8.

    Raises:
        UserError: it is no text file that can be read.
    """
    try:
        require_file(source)
        raw = source.read_bytes()
        encoding = next((name for mark, name in MARKS.items() if raw.startswith(mark)), "utf-8")
        text = raw.decode(encoding, "surrogateescape" if encoding.startswith("utf-8") else "strict")
    except OSError as error:
        raise UserError(
            f"seed_samples: {source}: cannot be read ({error.strerror}): give a text file of image names, or a folder"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"seed_samples: {source}: no {encoding.upper()} text ({error.reason}): save it as UTF-8") from None
    if "\0" in text:
        raise UserError(f"seed_samples: {source}: holds zero bytes, as UTF-16 without a byte order mark does: save it as UTF-8")
    return text


def from_folder(
    source: Path, known: Names, number: dict[str, int], labels: np.ndarray, class_names: tuple[str, ...]
) -> Iterator[tuple[str, str]]:
    """Yield (place, name) of every file of the class folders; a file's class must be that of the image it names."""
    for entry in visible(source):
        if not is_dir(Path(entry.path), "seed_samples"):
            raise UserError(f"{entry.path}: lies in no class folder: move it into {source}/<class>/")
        for file in visible(Path(entry.path)):
            name, stem = f"{entry.name}/{file.name}", Path(file.name).stem
            if known.find(name) is None and stem in number:
                label = int(labels[number[stem]])
                if Names([str(label), *class_names[label : label + 1]]).find(entry.name) is None:
                    raise UserError(
                        f"{file.path}: image {stem} is of class {class_text(label, class_names)}: move it into the folder of "
                        "that class"
                    )
                name = stem
            yield file.path, name


def hint(name: str, names: Sequence[str]) -> str:
    """Return the remedy for an unknown name: the nearest known one."""
    if not is_utf8(name) and all(map(is_utf8, names)):
        return "the line is not UTF-8: save the list as UTF-8"
    if names[-1] == str(len(names) - 1):
        return f"its images have no file names: give their numbers, 0 to {len(names) - 1}"
    same_file = [known for known in names if known.rpartition("/")[2] == name.rpartition("/")[2]]
    close = get_close_matches(name, same_file or names, n=1, cutoff=0.0 if same_file else 0.5)
    return f"did you mean {shown(close[0])}?" if close else f"names are like {shown(names[0])}"


def is_utf8(name: str) -> bool:
    """Return whether a name has no bytes that are no UTF-8 (they are kept as surrogates)."""
    return not any("\udc80" <= letter <= "\udcff" for letter in name)


def shown(text: str) -> str:
    """Return a name as a line may show it: short, without control characters."""
    return text if text.isprintable() and len(text) < 200 else f"{text!a:.80}"


def keep_with_run(path: Path, names: Sequence[str]) -> None:
    """Keep the given seed samples with the run; refuse to go on with others than it was begun with."""
    text = "".join(f"{name}\n" for name in names).encode("utf-8", "surrogateescape")
    if not path.exists():
        write_atomically(path, lambda file: file.write(text))
    elif path.read_bytes() != text:
        raise UserError(
            f"seed_samples: the run in {path.parent} was begun with other seed samples ({path.name}): give those, or begin a "
            "new run: with --set run=NAME and without --resume, or with --resume False"
        )
