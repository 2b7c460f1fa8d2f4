"""The seed samples: drawn with the ground truth where it is known, given by the user (`seed_samples`) where it is not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.datasets.folder import visible
from data.digests import short
from data.export import class_text
from data.poison import PoisonedData
from data.pools import draw_seed_samples
from utils.config import Config
from utils.errors import UserError
from utils.files import write_atomically
from utils.manifest import with_input

KEPT = "seed_samples.txt"  # in the run's folder: the given ones


def choose_seed_samples(config: Config, data: PoisonedData, folder: Path) -> Tensor:
    """Return the images that the defender knows to be clean, (S,) int64.

    Args:
        folder: the run's, where given seed samples are kept: it goes on with the same ones or not at all.
    """
    if config.defense != "asd":  # which needs none
        return torch.zeros(0, dtype=torch.int64)
    labels = data.train.labels
    if config.seed_samples is None:
        assert data.oracle is not None  # where nobody knows the truth, utils/config.py demands the key
        return draw_seed_samples(labels, data.oracle, config.num_classes, config.global_.seed_num, config.seed.seed)
    source = Path(config.seed_samples).expanduser()
    names = data.names or tuple(map(str, range(len(labels))))
    seeds = read_seed_samples(source, names, labels.cpu().numpy(), data.class_names, config.num_classes)
    keep_with_run(folder / KEPT, [names[i] for i in seeds])
    return torch.from_numpy(seeds)


def complete_manifest(config: Config, data: PoisonedData, seeds: Tensor) -> str:
    """Return the manifest of all that a run is given: its data, and the seed samples where the user has chosen them.

    Args:
        seeds: (S,) int64, what `choose_seed_samples` returned.
    """
    if config.seed_samples is None or config.defense != "asd":
        return data.manifest
    return with_input(data.manifest, "seed_samples", short(seeds.numpy().tobytes()))


def read_seed_samples(
    source: Path, names: Sequence[str], labels: np.ndarray, class_names: tuple[str, ...], num_classes: int
) -> np.ndarray:
    """Return the images that a list or a folder names, (S,) int64, sorted.

    Args:
        source: a text file, an image's name a line, or a folder with a sub-folder for each class, whose files are named as
            training images of that class.
        names: (N,) of the training images; where they are numbers, a file `17.png` means image 17.
        labels: (N,) int64.
    Raises:
        UserError: one line: it cannot be read, an unknown name, one named twice, a class without any.
    """
    number = {name: i for i, name in enumerate(names)}
    seen: dict[int, str] = {}
    entries = from_folder(source, number, labels, class_names) if source.is_dir() else from_list(source)
    for place, name in entries:
        if name not in number:
            raise UserError(f"{place}: {shown(name)}: the training set has no image of that name; {hint(name, names)}")
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


def from_list(source: Path) -> Iterator[tuple[str, str]]:
    """Yield (place, name) of every line that is neither blank nor a comment (#)."""
    try:
        text = source.read_text(encoding="utf-8-sig", errors="surrogateescape")  # file names need not be UTF-8
    except OSError as error:
        raise UserError(
            f"seed_samples: {source}: cannot be read ({error.strerror}): give a text file of image names, or a folder"
        ) from None
    for i, line in enumerate(text.splitlines(), 1):
        name = line.strip().replace("\\", "/").removeprefix("./")
        if name and not name.startswith("#"):
            yield f"{source}: line {i}", name


def from_folder(
    source: Path, number: dict[str, int], labels: np.ndarray, class_names: tuple[str, ...]
) -> Iterator[tuple[str, str]]:
    """Yield (place, name) of every file of the class folders; a file's class must be that of the image it names."""
    for entry in visible(source):
        if not entry.is_dir():
            raise UserError(f"{entry.path}: lies in no class folder: move it into {source}/<class>/")
        for file in visible(Path(entry.path)):
            name, stem = f"{entry.name}/{file.name}", Path(file.name).stem
            if name not in number and stem in number:
                label = int(labels[number[stem]])
                if entry.name not in (str(label), *class_names[label : label + 1]):
                    raise UserError(
                        f"{file.path}: image {stem} is of class {class_text(label, class_names)}: move it into the folder of "
                        "that class"
                    )
                name = stem
            yield file.path, name


def hint(name: str, names: Sequence[str]) -> str:
    """Return the remedy for an unknown name: the nearest known one."""
    if names[-1] == str(len(names) - 1):
        return f"its images have no file names: give their numbers, 0 to {len(names) - 1}"
    same_file = [known for known in names if known.rpartition("/")[2] == name.rpartition("/")[2]]
    close = get_close_matches(name, same_file or names, n=1, cutoff=0.0 if same_file else 0.5)
    return f"did you mean {shown(close[0])}?" if close else f"names are like {shown(names[0])}"


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
