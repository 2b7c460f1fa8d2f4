"""The seed samples: drawn with the help of the ground truth if it is known, or given by the user (`seed_samples`)."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.digests import short
from data.io.image_file import read_prepared
from data.sets import GroundTruth, PoisonedData
from utils.config import Config
from utils.errors import UserError, printable
from utils.files import write_atomically
from utils.kinds import CLEAN
from utils.manifest import with_input
from utils.names import Names, class_text
from utils.paths import is_dir, require_file, user_path, visible
from utils.run_files import SEED_SAMPLES

MARKS = {  # byte order marks and encodings; UTF-32 before UTF-16, since its mark begins with that of UTF-16
    codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip


def choose_seed_samples(config: Config, data: PoisonedData, folder: Path) -> Tensor:
    """Return the images that the defender knows to be clean, (S,) int64; none if it needs none.

    Args:
        folder: the run's folder, where given seed samples are kept: a run cannot be resumed with other ones.
    """
    if not config.defense.settings.needs_clean:
        return torch.zeros(0, dtype=torch.int64)
    labels = data.train.labels
    if config.seed_samples is None:
        assert data.ground_truth is not None  # if it is unknown, the configuration requires `seed_samples`
        return draw_seed_samples(labels, data.ground_truth, config.num_classes, config.global_.seed_num, config.seed.seed)
    source = user_path(config.seed_samples, "seed_samples")
    names = data.names or tuple(map(str, range(len(labels))))
    seeds = read_seed_samples(source, names, labels.cpu().numpy(), data.class_names, config.num_classes)
    if is_dir(source, "seed_samples"):
        for i, file in seeds.items():
            image = data.train.fetch(torch.tensor([i]))[0].permute(1, 2, 0).cpu().numpy()  # (H, W, 3)
            check_copy(Path(file), names[i], image, data.pre)
    keep_with_run(folder / SEED_SAMPLES, [names[i] for i in seeds])
    return torch.tensor(list(seeds), dtype=torch.int64)


def check_copy(file: Path, name: str, image: np.ndarray, pre: Sequence[Any]) -> None:
    """Raise UserError unless a file in a folder of seed samples is the training image of that name.

    Args:
        image: (H, W, 3) uint8, the training image.
        pre: settings of the transforms that the training images have been through.
    """
    pixels = read_prepared(file, pre)
    if isinstance(pixels, str) or not np.array_equal(pixels, image):
        raise UserError(
            f"{file}: is not the training image {printable(name)}, which is used in its place: if that image was altered, "
            "it is not clean: remove this file; else copy the training image here"
        )


def draw_seed_samples(labels: Tensor, truth: GroundTruth, num_classes: int, seed_num: int, seed: int) -> Tensor:
    """Draw `seed_num` clean images of each class, which the defender knows; the same seed gives the authors' seed samples.

    Args:
        labels: (N,) int64, the labels that the images carry.
    Returns:
        (num_classes * seed_num,) int64, class by class in the order of drawing.
    """
    rng = np.random.RandomState(seed)
    flags, carried = truth.flags.numpy(), labels.cpu().numpy()
    check_clean_left(carried, flags, num_classes, seed_num)
    candidates = (np.flatnonzero((flags == CLEAN) & (carried == c)) for c in range(num_classes))
    drawn = [rng.choice(images, size=seed_num, replace=False) for images in candidates]
    return torch.from_numpy(np.concatenate(drawn).astype(np.int64))


def check_clean_left(labels: np.ndarray, flags: np.ndarray, num_classes: int, seed_num: int) -> None:
    """Raise UserError if a class has fewer than `seed_num` clean images; labels (N,), flags (N,) uint8."""
    for c, count in enumerate(np.bincount(labels[flags == CLEAN], minlength=num_classes)[:num_classes]):
        if count < seed_num:
            raise UserError(
                f"global.seed_num: {seed_num}: class {c} has only {count} clean training images: lower it or "
                "backdoor.poison_ratio, or check num_classes and data.train_limit"
            )


def complete_manifest(config: Config, data: PoisonedData, seeds: Tensor) -> str:
    """Return the manifest of all inputs of a run: its data, and the seed samples if the user gave them.

    Args:
        seeds: (S,) int64, as returned by `choose_seed_samples`.
    """
    if config.seed_samples is None or not config.defense.settings.needs_clean:
        return data.manifest
    return with_input(data.manifest, "seed_samples", short(seeds.numpy().tobytes()))


def read_seed_samples(
    source: Path, names: Sequence[str], labels: np.ndarray, class_names: tuple[str, ...], num_classes: int
) -> dict[int, str]:
    """Return the images that a list or a folder names, in ascending order, each with the line or the file that names it.

    Args:
        source: a text file (UTF-8, or UTF-16 with a byte order mark) with one image name per line, or a folder with one
            sub-folder per class, whose files have the names of training images of that class.
        names: N names of the training images; if they are numbers, a file `17.png` means image 17.
        labels: (N,) int64.
    Raises:
        UserError: the source cannot be read, a name is unknown or occurs twice, or a class has no seed sample.
    """
    number, known = {name: i for i, name in enumerate(names)}, Names(names)
    seen: dict[int, str] = {}
    folder = is_dir(source, "seed_samples")
    entries = from_folder(source, known, number, labels, class_names) if folder else from_list(source, known)
    for place, given in entries:
        name = known.find(given)
        if name is None:
            raise UserError(f"{place}: {printable(given)}: the training set has no image of that name; {hint(given, names)}")
        at = number[name]
        if at in seen:
            raise UserError(f"{place}: {printable(name)}: named twice, first in {seen[at]}: keep one")
        seen[at] = place
    for label, count in enumerate(np.bincount(labels[list(seen)], minlength=num_classes)):
        if not (labels == label).any():
            raise UserError(f"num_classes: {num_classes}: the training set has no image of class {label}: lower it")
        if count == 0:
            raise UserError(
                f"seed_samples: {source}: no image of class {class_text(label, class_names)}: name at least one that is surely "
                "clean, better ten"
            )
    return dict(sorted(seen.items()))


def from_list(source: Path, known: Names) -> Iterator[tuple[str, str]]:
    """Yield (place, name) of every line that is neither blank nor a comment.

    If an image has exactly the name on the line, spaces included, that image is meant. Otherwise a leading `./`, Windows'
    backslashes and spaces at both ends are normalized. A line that begins with # is a comment, unless it names a class folder.
    """
    folders = Names({name.rpartition("/")[0] for name in known.names} - {""})
    for i, line in enumerate(io.StringIO(read_text(source), newline=None), 1):
        exact = line.removesuffix("\n")
        spellings = [exact, *(text.replace("\\", "/").removeprefix("./") for text in (exact, exact.strip()))]
        name = next((text for text in spellings if known.find(text) is not None), spellings[-1])
        if name and not (name.startswith("#") and folders.find(name.rpartition("/")[0]) is None):
            yield f"{source}: line {i}", name


def read_text(source: Path) -> str:
    """Return the text of a list; bytes that are not UTF-8 are kept as surrogates, since file names need not be UTF-8.

    Raises:
        UserError: the file cannot be read as text.
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
        raise UserError(f"seed_samples: {source}: not {encoding.upper()} text ({error.reason}): save it as UTF-8") from None
    if "\0" in text:
        raise UserError(
            f"seed_samples: {source}: contains zero bytes, perhaps UTF-16 without a byte order mark: save it as UTF-8"
        )
    return text


def from_folder(
    source: Path, known: Names, number: dict[str, int], labels: np.ndarray, class_names: tuple[str, ...]
) -> Iterator[tuple[str, str]]:
    """Yield (place, name) of every file in the class folders; a file must be in the folder of its image's class."""
    for entry in visible(source):
        if not is_dir(Path(entry.path), "seed_samples"):
            raise UserError(f"{entry.path}: not in a class folder: move it into {source}/<class>/")
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
    """Return the remedy for an unknown name, e.g. the most similar known name."""
    if not is_utf8(name) and all(map(is_utf8, names)):
        return "the line is not UTF-8: save the list as UTF-8"
    if names[-1] == str(len(names) - 1):
        return f"its images have no names: give their numbers, 0 to {len(names) - 1}"
    same_file = [known for known in names if known.rpartition("/")[2] == name.rpartition("/")[2]]
    close = get_close_matches(name, same_file or names, n=1, cutoff=0.0 if same_file else 0.5)
    return f"did you mean {printable(close[0])}?" if close else f"names look like {printable(names[0])}"


def is_utf8(name: str) -> bool:
    """Return whether all bytes of a name are UTF-8 (others are kept as surrogates)."""
    return not any("\udc80" <= letter <= "\udcff" for letter in name)


def keep_with_run(path: Path, names: Sequence[str]) -> None:
    """Save the given seed samples with the run; raise UserError if it was begun with other ones."""
    text = "".join(f"{name}\n" for name in names).encode("utf-8", "surrogateescape")
    if not path.exists():
        write_atomically(path, lambda file: file.write(text))
    elif path.read_bytes() != text:
        raise UserError(
            f"seed_samples: the run in {path.parent} was begun with other seed samples ({path.name}): give those, or start a "
            "new run with --set run=NAME and without --resume, or with --resume False"
        )
