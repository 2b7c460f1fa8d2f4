"""The attacker: the poisoned training set, the clean and the backdoor test set (`data/choice.py`: which images).

    python -m data.poison --config config/wanet.yaml --out DIR [--set K=V] [--gpu N|cpu]

writes the poisoned set by itself, for any other defense; `dataset: poisoned_set` trains on such a folder.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from utils.startup import begin

    begin("data.poison")

import logging
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data.attack import BATCH, AttackBase
from data.choice import draw_cover, draw_poisoned, label_after, poison_index
from data.contact_sheet import Group, columns, draw_contact_sheet
from data.digests import manifest_of, poisoned_input
from data.export import (
    StoredSet,
    count,
    examples_of,
    holds_same_set,
    keep_with_run,
    settings_of_set,
    write_set,
)
from data.loading import dataset_of, load_data, load_raw
from data.placement import choose_placement
from data.sets import (
    CLEAN,
    COVER,
    POISONED,
    ImageSet,
    NewClassifier,
    Oracle,
    Part,
    PoisonedSet,
    RawData,
    Scene,
    no_network,
    to_set,
)
from data.tables import own_copy, read_table
from utils import manifest, plugins
from utils.best_effort import BestEffort
from utils.cli import DEFAULT_CONFIG, Parser, command
from utils.config import Backdoor, Config
from utils.config import load as load_config
from utils.errors import UserError
from utils.machine import choose_device, set_determinism
from utils.paths import exists, is_dir, user_path

logger = logging.getLogger(__name__)
ATTACKS = "data.attacks"
EXAMPLES = 16  # poisoned images kept for the pictures


@dataclass(frozen=True)
class PoisonedTrain:
    """The poisoned training set, its ground truth, and pictures of what the attack does."""

    train: ImageSet  # poisoned images and the labels that they carry
    oracle: Oracle  # for seed samples and reports only
    examples: np.ndarray  # (2, n, H, W, 3) uint8: some poisoned images before and after


@dataclass(frozen=True)
class TestSets:
    """The two sets that a model is tested on."""

    clean: ImageSet | None  # None: there is no test image, and the attack is unknown
    backdoor: ImageSet | None  # `trigger_images`; None: attack unknown
    origin: torch.Tensor | None = None  # (M',) int64: which clean test image each triggered one was made from

    def to(self, device: torch.device) -> TestSets:
        """Return both sets on a device."""
        return TestSets(
            self.clean.to(device) if self.clean else None,
            self.backdoor.to(device) if self.backdoor else None,
            self.origin if self.origin is None else self.origin.to(device),
        )


@dataclass(frozen=True)
class PoisonedData:
    """All images that a run works with, wherever they come from."""

    train: ImageSet
    tests: TestSets
    oracle: Oracle | None  # for seed samples and reports only; None: nobody knows which images are poisoned
    backdoor: Backdoor | None  # the attack that made the set; None: unknown
    examples: np.ndarray  # (2, n, H, W, 3) uint8: some images before and after the attack
    caption: str  # what the examples are
    class_names: tuple[str, ...]
    names: tuple[str, ...] | None  # N, of the training images; None: they have numbers only
    manifest: str  # what the data are (`utils/manifest.py`)


def prepare(
    config: Config,
    folder: Path,
    device: torch.device | None = None,
    processes: int = 1,
    new_classifier: NewClassifier = no_network,
) -> PoisonedData:
    """Return the configured data: raw images that the attack poisons here, or a set that was poisoned before.

    Args:
        folder: the run's, where `poison_idx.npy` is kept, and `set.json` of a set poisoned before.
        device: where an attack makes its assets; none: the CPU.
        processes: of the run, on this computer.
        new_classifier: `model.classifier`'s, for attacks that train a network.
    Raises:
        UserError: also where the run in `folder` was begun with other data.
    """
    data = load_data(config)
    known = manifest_of(config, data)
    manifest.check(folder, known)
    placement = place(config, data, device, processes)
    if isinstance(data, StoredSet):
        keep_with_run(folder, data)
        logger.info(f"{data.folder}: a set poisoned by {data.backdoor.attack.name}; its files are as set.json says")
        examples, caption = examples_of(data, EXAMPLES)
        parts = data.parts
        return PoisonedData(
            parts.train.to_set(placement), test_sets(parts, placement), parts.train.oracle(), data.backdoor, examples, caption,
            data.class_names, None, known,
        )  # fmt: skip
    if config.backdoor is None:
        train, none = given_images(data, placement), data.train_images[None, :0].repeat(2, 0)
        return PoisonedData(train, given_tests(data, placement), None, None, none, "", data.class_names, data.names, known)
    attack = build_attack(config, data, device, new_classifier)
    tests = build_test_sets(config, data, attack, placement)  # refused before anything is kept with the run
    poisoned = poison_training_set(config, data, attack, folder, placement)
    caption = f"{config.attack.name}: {training_caption(config.attacker, attack, data.class_names)}"
    known = manifest.with_input(known, *poisoned_input(poisoned.oracle.poisoned().numpy()))
    return PoisonedData(
        poisoned.train, tests, poisoned.oracle, config.attacker, poisoned.examples, caption, data.class_names, data.names, known
    )


def prepare_tests(config: Config, device: torch.device | None = None, new_classifier: NewClassifier = no_network) -> TestSets:
    """Return the test sets of `prepare` without the training set; a run's folder stays as it is."""
    data = load_data(config)
    placement = place(config, data, device, 1)
    if isinstance(data, StoredSet):
        return test_sets(data.parts, placement)
    if config.backdoor is None:
        return given_tests(data, placement)
    return build_test_sets(config, data, build_attack(config, data, device, new_classifier), placement)


def place(config: Config, data: RawData | StoredSet, device: torch.device | None, processes: int) -> str:
    """Return where the images lie (`data.placement`); the backdoor test set counts as large as the clean one."""
    if isinstance(data, StoredSet):
        train, tests = data.parts.train.images, [data.parts.clean_test.images, data.parts.backdoor_test.images]
    else:
        train, tests = data.train_images, [data.test_images] * (1 if config.backdoor is None else 2)
    return choose_placement(config.data.placement, train, tests, device or torch.device("cpu"), processes)


def test_sets(parts: PoisonedSet, placement: str) -> TestSets:
    """Return both test sets of a poisoned set; the clean one alone where no training image is poisoned."""
    if not (parts.train.flags == POISONED).any():
        return TestSets(parts.clean_test.to_set(placement), None)
    return join(parts.clean_test, parts.backdoor_test, placement)


def join(clean: Part, backdoor: Part, placement: str) -> TestSets:
    """Return both test sets, and where the images of the second are in the first."""
    origin = torch.from_numpy(np.searchsorted(clean.indices, backdoor.indices))
    return TestSets(clean.to_set(placement), backdoor.to_set(placement), origin)


def training_caption(backdoor: Backdoor, attack: AttackBase, class_names: tuple[str, ...]) -> str:
    """Return what poisoned training images are and which label they carry."""
    label = backdoor.target_text(class_names)
    if attack.clean_label:
        return f"poisoned training images of class {label}, their labels unchanged"
    return f"poisoned training images, labelled {label}"


def build_attack(
    config: Config,
    raw: RawData,
    device: torch.device | None = None,
    new_classifier: NewClassifier = no_network,
) -> AttackBase:
    """Make the configured attack; assets that it makes are kept in `<saved_dir>/assets`, for all runs there.

    Args:
        device: where assets are made; none: the CPU.
        new_classifier: as for `prepare`.
    """
    module = plugins.load(ATTACKS, config.attack.name)
    folder = user_path(config.saved_dir, "saved_dir") / "assets"
    device = device or torch.device("cpu")
    b = config.attacker
    shift = b.target_shift
    scene = Scene(raw, b.target_label, config.num_classes, config.seed.seed, folder, device, new_classifier, target_shift=shift)
    attack: AttackBase = module.Attack(config.attack.settings, scene)
    if attack.clean_label and shift is not None:
        raise UserError(
            f"backdoor.target_shift: {shift}: {config.attack.name} leaves all labels unchanged, so they cannot be "
            "all-to-all: remove the key, or choose an attack that changes labels"
        )
    return attack


def poison_training_set(
    config: Config, raw: RawData, attack: AttackBase, folder: Path, placement: str = "device"
) -> PoisonedTrain:
    """Let the attack poison the training set; which images is kept as `poison_idx.npy` in the run's folder."""
    index = poison_index(folder / "poison_idx.npy", raw.train_labels, config, attack.clean_label)
    part = poison_images(config, raw, attack, index, placement)
    some = np.flatnonzero(part.flags == POISONED)[:EXAMPLES]
    return PoisonedTrain(part.to_set(placement), part.oracle(), np.stack([raw.train_images[some], part.images[some]]))


def poison_images(config: Config, raw: RawData, attack: AttackBase, index: np.ndarray, placement: str = "device") -> Part:
    """Return the training set as the attacker leaves it; the raw images stay as they are.

    Args:
        index: (N,) of 0 and 1, which images are poisoned; cover images are drawn among the others.
    """
    wanted = wanted_labels(config, raw.train_labels)
    allowed = None if attack.cover_target_class else raw.train_labels != wanted
    poisoned, cover = np.flatnonzero(index), draw_cover(index, attack.cover_ratio, config.seed.seed, allowed)
    images, labels = own_copy(raw.train_images, placement), raw.train_labels.astype(np.int64)
    flags = np.full(len(labels), CLEAN, np.uint8)
    if len(poisoned):
        images[poisoned] = attack.apply(raw.train_images[poisoned], poisoned, "train")
        labels[poisoned] = wanted[poisoned]
        flags[poisoned] = POISONED
    if len(cover):
        images[cover] = attack.cover(raw.train_images[cover], cover)
        flags[cover] = COVER
    return Part(images, labels, raw.train_labels.astype(np.int64), flags, np.arange(len(labels)))


def wanted_labels(config: Config, labels: np.ndarray) -> np.ndarray:
    """Return the labels (n,) int64 that the attacker gives to images of the labels (n,)."""
    return label_after(labels, config.attacker.target_label, config.attacker.target_shift, config.num_classes)


def given_images(raw: RawData, placement: str) -> ImageSet:
    """Return the training set of data that nobody poisons here."""
    return to_set(read_table(raw.train_images) if placement == "host" else raw.train_images, raw.train_labels, placement)


def given_tests(raw: RawData, placement: str) -> TestSets:
    """Return the test set of data that nobody poisons here: the test images as they are, if there are any."""
    return TestSets(clean_images(raw, placement).to_set(placement) if len(raw.test_labels) else None, None)


def build_test_sets(config: Config, raw: RawData, attack: AttackBase, placement: str = "device") -> TestSets:
    """Return the clean test set and the backdoor test set.

    The latter is new images: where the others stay on disk, it lies in host memory. With `poison_ratio: 0` there is
    none, for without an attack there is no success rate.
    """
    if len(raw.test_labels) == 0:
        raise UserError(f"dataset_dir: {config.dataset_dir}: no test images: add some, or train with backdoor: null")
    if config.attacker.poison_ratio == 0:
        return given_tests(raw, placement)
    return join(clean_images(raw, placement), trigger_images(config, raw, attack), placement)


def clean_images(raw: RawData, placement: str = "device") -> Part:
    """Return the test images as they are."""
    labels, n = raw.test_labels.astype(np.int64), len(raw.test_labels)
    images = read_table(raw.test_images) if placement == "host" else raw.test_images
    return Part(images, labels, labels, np.full(n, CLEAN, np.uint8), np.arange(n))


def trigger_images(config: Config, raw: RawData, attack: AttackBase) -> Part:
    """Return the triggered test images with the labels that the attacker wants, without those of the target class.

    With all-to-all labels there is none: all test images are triggered.
    """
    wanted = wanted_labels(config, raw.test_labels)
    others = np.flatnonzero(raw.test_labels != wanted)
    if len(others) == 0:
        target = config.attacker.target_text(raw.class_names)
        raise UserError(
            f"backdoor.target_label: {target}: every test image is of that class, so there is no success "
            "rate: give another class, or add test images of others"
        )
    n = len(others)
    images = np.empty((n, *raw.test_images.shape[1:]), np.uint8)
    for start in range(0, n, BATCH):  # not all at once: at 224 px that would be a copy of the whole test set
        part = others[start : start + BATCH]
        images[start : start + BATCH] = attack.apply(raw.test_images[part], part, "test")
    originals = raw.test_labels[others].astype(np.int64)
    return Part(images, wanted[others], originals, np.full(n, POISONED, np.uint8), others)


def export(config: Config, out: Path, device: torch.device, new_classifier: NewClassifier = no_network) -> None:
    """Write the poisoned set into a folder of its own (`data/export.py`); one that is there already is verified.

    Raises:
        UserError: the folder holds something else.
    """
    started = time.monotonic()
    settings = settings_of_set(config, dataset_of(config))
    if exists(out, "--out") and (not is_dir(out, "--out") or any(out.iterdir())):
        if holds_same_set(out, settings):
            logger.info(f"{out}: holds this set already, made with the same settings; its files are as set.json says")
            return
        raise UserError(f"--out {out}: is not empty and holds no set of the same settings: give another name")
    raw = load_raw(config)
    attack = build_attack(config, raw, device, new_classifier)
    b = config.attacker
    wanted = wanted_labels(config, raw.train_labels)
    index = draw_poisoned(raw.train_labels, wanted, b.poison_ratio, config.seed.seed, b.poison_mode, attack.clean_label)
    parts = PoisonedSet(poison_images(config, raw, attack, index), clean_images(raw), trigger_images(config, raw, attack))
    groups = sheet_groups(config, raw, attack, parts)
    class_names = {"class_names": list(raw.class_names)}

    def draw_sheet(path: Path) -> None:
        BestEffort().attempt(path.name, draw_contact_sheet, path, groups)

    write_set(out, parts, settings | class_names, draw_sheet)
    counts = count(parts.train)
    logger.info(
        f"{out}: {counts['clean']} clean, {counts['poisoned']} poisoned and {counts['cover']} cover training images, "
        f"{len(parts.clean_test)} test images, {len(parts.backdoor_test)} triggered ones; {time.monotonic() - started:.1f} s"
    )


def sheet_groups(config: Config, raw: RawData, attack: AttackBase, parts: PoisonedSet) -> list[Group]:
    """Return what the contact sheet shows: poisoned training images, triggered test images, cover images."""
    name, target = config.attack.name, config.attacker.target_text(raw.class_names)
    shown = (
        (training_caption(config.attacker, attack, raw.class_names), parts.train, raw.train_images, POISONED, "triggered"),
        (f"triggered test images, labelled {target}", parts.backdoor_test, raw.test_images, POISONED, "triggered"),
        ("cover images, their labels unchanged", parts.train, raw.train_images, COVER, "cover"),
    )
    groups = []
    for title, part, originals, flag, row in shown:
        at = np.flatnonzero(part.flags == flag)
        if len(at):
            n = min(len(at), columns(max(part.images.shape[1:3])))
            at = at[np.arange(n) * len(at) // n]  # from all over the set
            place = part.indices[at]
            names = [raw.class_names[label] for label in part.original_labels[at]]
            captions = [f"{i} {text}" for i, text in zip(place, names, strict=True)]
            groups.append(Group(f"{name}: {title}", row, originals[place], part.images[at], captions))
    return groups


def main(new_classifier: NewClassifier) -> None:
    """Read the command line and write the set."""
    parser = Parser(prog="data.poison", description="Write a poisoned data set by itself.", allow_abbrev=False)
    parser.add_argument("--config", default=DEFAULT_CONFIG, metavar="YAML", help=f"settings (default {DEFAULT_CONFIG})")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the set; absent or empty")
    parser.add_argument("--gpu", default="0", help="number of the CUDA device on which assets are made, or cpu")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting of the YAML")
    args = parser.parse_args()
    config = load_config(args.config, args.set)
    device = choose_device(args.gpu, 0)
    set_determinism(config.seed.deterministic, config.seed.benchmark)
    if config.backdoor is None:
        raise UserError(f"backdoor: null: there is no attack to poison with: name one of {', '.join(plugins.names(ATTACKS))}")
    export(config, user_path(args.out, "--out").resolve(), device, new_classifier)


if __name__ == "__main__":
    from model.classifier import new_classifier  # the command line, not this module, stands above the networks

    kept = "What an attack has finished making is kept: the same command uses it."
    command("data.poison", partial(main, new_classifier), kept=kept)
