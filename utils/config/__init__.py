"""The configuration of a run: `Config` is the top level of the YAML, `utils/config/settings.py` has its sections.

`load(path, overrides)` reads a YAML file by `utils/config/layers.py` and checks all settings before anything is built.
`python -m utils.config` prints docs/configuration.md, which lists every key.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from utils.config.layers import parse_override, read_with_base
from utils.config.reader import Reader
from utils.config.schema import REQUIRED, Named, as_dict, setting
from utils.config.settings import (
    DATASETS,
    DEFENSES,
    NETWORKS,
    OPTIMIZERS,
    SCHEDULERS,
    Adam,
    Backdoor,
    Criterion,
    Data,
    Global,
    Loader,
    Meta,
    Runtime,
    Seed,
    Semi,
    Split,
    Transform,
    Undefended,
    transforms,
)
from utils.config.stages import Stage, locate
from utils.errors import UserError
from utils.paths import PROJECT

DEFAULT_TARGET = 3  # the target class of the paper's experiments
PARTS, SHARED = ("log", "checkpoint"), ("assets", "tables")  # folders of a run, and folders in saved_dir
SMALLEST = 2.0**-126  # the smallest normal float32


@dataclass(frozen=True)
class Config:
    """All settings of a run. Frozen: no setting changes after loading."""

    network: Named = setting(REQUIRED, "the classifier", choices=NETWORKS)
    backdoor: Backdoor | None = setting(
        REQUIRED, "the attack that poisons the training set; null: unknown, or recorded in set.json"
    )
    num_classes: int = setting(10, "classes of the data set", low=1)
    seed: Seed = setting(Seed)
    dataset: Named | None = setting(
        None, "the data set; null: inferred from dataset_dir's name", choices=DATASETS, stands_for="images"
    )
    dataset_dir: str | None = setting(None, "folder of the data set's files", stands_for="images")
    download: bool = setting(False, "download the data set into dataset_dir's parent folder if it is missing")
    data: Data = setting(Data)
    seed_samples: str | None = setting(
        None, "list or folder of images known to be clean; null: seed_num of each class, drawn", stands_for="images"
    )
    transform: Transform = setting(Transform)
    prefetch: bool = setting(True, "accepted for the authors' YAML files; see data.placement")
    num_epochs: int = setting(120, "epochs of the run; defenses with stages of their own may add epochs or ignore it", low=1)
    optimizer: Named = setting(Named("Adam", Adam()), "one optimizer for the whole run", choices=OPTIMIZERS)
    lr_scheduler: Named | None = setting(None, "learning rate by epoch; null: constant", choices=SCHEDULERS)
    criterion: Criterion = setting(Criterion)
    split: Split = setting(Split)
    semi: Semi = setting(Semi)
    global_: Global = setting(Global, key="global")
    meta: Meta = setting(Meta)
    undefended: Undefended = setting(Undefended)
    defense: Named = setting("asd", "the defense; none: training without one", choices=DEFENSES)
    loader: Loader = setting(Loader)
    sync_bn: bool = setting(False, "several processes: BN statistics over the whole batch")
    saved_dir: str = setting("./saved_data", "logs and results: <saved_dir>/<run>/")
    storage_dir: str = setting("./storage", "checkpoints: <storage_dir>/<run>/checkpoint/")
    evidence: bool = setting(
        True, "at the end, keep features and probabilities of all training images in evidence.npz: 4 N (D + C + 4) bytes"
    )
    run: str | None = setting(None, "the run's name; null: from the YAML's path")
    runtime: Runtime = setting(Runtime)

    @property
    def attacker(self) -> Backdoor:
        """The section `backdoor`; only for runs that poison their data set themselves."""
        assert self.backdoor is not None
        return self.backdoor

    @property
    def attack(self) -> Named:
        """The attack and its settings; as `attacker`."""
        return self.attacker.attack

    @property
    def poisoned_already(self) -> bool:
        """Whether the data set that the YAML names is poisoned already, with its ground truth."""
        return self.dataset is not None and self.dataset.name in DATASETS.declared("POISONED")

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of the defense."""
        found: tuple[Stage, ...] = self.defense.settings.stages(self)
        return found

    @property
    def epochs(self) -> int:
        """The epochs of all stages."""
        return sum(stage.epochs for stage in self.stages)

    def stage(self, epoch: int) -> str:
        """Return the name of the stage that a 0-based epoch belongs to."""
        return locate(self.stages, epoch)[0].name


def load(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Config:
    """Read, merge and check a configuration.

    Args:
        path: the YAML.
        overrides: `key.path=value` strings of `--set`; later ones win.
    Raises:
        UserError: one line with file, key, value and remedy.
    """
    path = Path(path)
    layers = read_with_base(path, Config)
    for text in overrides:
        layers = layers.under(parse_override(text), Config)

    def where(key: str) -> str:
        while key and key not in layers.origin:
            key = key.rpartition(".")[0]
        return layers.origin.get(key, str(path))

    reader = Reader(where, layers.written)
    config: Config = reader.section(Config, layers.tree)
    if config.backdoor is not None and config.backdoor.target_label is None and config.backdoor.target_shift is None:
        config = replace(config, backdoor=replace(config.backdoor, target_label=DEFAULT_TARGET))
    config = replace(config, run=run_name(path) if config.run is None else config.run)
    check(config, reader)
    return config


def check(config: Config, reader: Reader) -> None:
    """Refuse combinations of settings that are invalid although each setting is valid."""
    g, c = config.global_, config.num_classes
    if c < 2:
        reader.fail("num_classes", c, "a classifier needs at least 2 classes")
    nested = {
        f"network.{config.network.name}.num_classes": getattr(config.network.settings, "num_classes", None),
        "split.criterion.sce.num_classes": config.split.criterion.sce.num_classes,
        "semi.mixmatch.num_classes": config.semi.mixmatch.num_classes,
    }
    for key, value in nested.items():
        if value is not None and value != c:
            reader.fail(key, value, f"num_classes is {c}: give {c} or leave the key out")
    temperature = config.semi.mixmatch.temperature
    if c ** (-1 / temperature) < SMALLEST:
        least = math.log(c) / -math.log(SMALLEST)
        remedy = f"probabilities of {c} classes, sharpened so much, are 0 in float32: must be at least {least:.2g}"
        reader.fail("semi.mixmatch.temperature", temperature, remedy)
    if config.backdoor is None:
        if config.defense.settings.needs_clean and config.seed_samples is None and not config.poisoned_already:
            remedy = "required with backdoor: null: give a list (one image name per line) or a folder of clean images"
            reader.fail("seed_samples", None, remedy)
    else:
        label, shift = config.backdoor.target_label, config.backdoor.target_shift
        if label is not None and shift is not None:
            reader.fail("backdoor.target_label", label, f"target_shift is {shift}: give only one of the two")
        if label is not None and label >= c:
            reader.fail("backdoor.target_label", label, f"must be in 0..{c - 1}")
        if shift is not None and shift >= c:
            reader.fail("backdoor.target_shift", shift, f"must be in 1..{c - 1}")
    if g.epoch_second < g.epoch_first:
        reader.fail("global.epoch_second", g.epoch_second, f"must be at least epoch_first ({g.epoch_first})")
    if g.epoch_third < g.epoch_second:
        reader.fail("global.epoch_third", g.epoch_third, f"must be at least epoch_second ({g.epoch_second})")
    for name in ("train", "test"):
        key, steps = f"transform.{name}.remaining", getattr(config.transform, name).remaining
        positions = transforms(key).declared("POSITION")
        if not steps or [positions[step.name] for step in steps] != list(range(len(steps))):
            first, *others = sorted(positions, key=lambda step: positions[step])
            listed = ", ".join(step.name for step in steps) or "nothing"
            reader.fail(key, listed, f"give {first}: true, and after it, if wanted, {' or '.join(others)}")
    if config.runtime.merged and not config.runtime.compile:
        reader.fail("runtime.merged", True, "is slower without runtime.compile: set that to true as well, or leave this out")
    if config.dataset is None and config.dataset_dir is None:
        built_in = ", ".join(DATASETS.declared("BUILT_IN"))
        reader.fail("dataset_dir", None, f"missing: give the folder of the data set, or a built-in `dataset`: {built_in}")
    check_run_name(str(config.run), reader)
    config.defense.settings.check(config, reader)
    if not config.epochs:
        reader.fail(f"defense.{config.defense.name}", 0, "no stage has any epochs: give one at least 1")


def check_run_name(name: str, reader: Reader) -> None:
    """Refuse a name that is not one, or whose folder would be inside that of another run or of files that runs share."""
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)*", name) or ".." in name:
        reader.fail("run", name, "must be a name such as asd-seed-1 or group/asd-seed-1")
    first, *below = name.split("/")
    taken = next((part for part in below if part in PARTS), first if first in SHARED else None)
    if taken:
        reader.fail("run", name, f"{taken} is a folder that runs have or share: give another name, e.g. {name}-1")


def check_processes(config: Config, processes: int) -> None:
    """Refuse what several processes do not support: a batch size that they cannot share, a captured, compiled or merged step.

    Every `batch_size` is the total over all processes.
    """
    sizes = {
        "loader.batch_size": config.loader.batch_size,
        "semi.loader.batch_size": config.semi.loader.batch_size,
        "undefended.batch_size": config.undefended.batch_size,
    }
    own = as_dict(config.defense.settings)
    sizes |= {f"defense.{config.defense.name}.{key}": size for key, size in own.items() if key.endswith("batch_size")}
    unread = config.defense.settings.unread
    for key, size in sizes.items():
        if any(key.startswith(f"{section}.") for section in unread):
            continue
        if size % processes or size < 2 * processes:  # batch normalization cannot train on a single image
            least = f", and at least {2 * processes}" if size < 2 * processes else ""
            raise UserError(f"{key}: {size}: must be a multiple of {processes}, the number of processes{least}")
    if processes > 1 and config.runtime.mode == "graph":
        raise UserError(f"runtime.mode: graph: supports one process, not {processes}: set runtime.mode=auto or eager")
    for key, on in (("runtime.merged", config.runtime.merged), ("runtime.compile", config.runtime.compile)):
        if processes > 1 and on:
            raise UserError(f"{key}: true: supports one process, not {processes}: leave it out")


def run_name(path: Path) -> str:
    """Return the run's name: `a/b` for config/a/b.yaml; the file name of a YAML outside config/.

    Characters that a name may not have become hyphens, e.g. `my run.yaml` gives `my-run`.
    """
    stem = (path.parent.resolve() / path.name).with_suffix("")  # a link has its own name
    inside = next((f for f in (Path.cwd().resolve() / "config", PROJECT / "config") if stem.is_relative_to(f)), None)
    parts = stem.relative_to(inside).parts if inside else (path.stem,)
    return "/".join(re.sub(r"[^\w.-]+|\.\.+", "-", part).strip(".-") or "run" for part in parts)


def to_yaml(config: Config) -> str:
    """Return the whole resolved configuration as YAML."""
    text: str = yaml.safe_dump(as_dict(config), sort_keys=False)
    return text
