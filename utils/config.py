"""Every setting of a run: its name, type, range, default and meaning. The dataclasses below are the YAML's schema.

`load(path, overrides)` reads a YAML file by `utils/layers.py` and checks all settings before anything is built.
`python -m utils.config` prints docs/configuration.md, which lists every key.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from utils.errors import UserError
from utils.layers import parse_override, read_with_base
from utils.names import class_text
from utils.schema import REQUIRED, Choices, Named, Reader, as_dict, describe, setting
from utils.stages import Stage, locate

ATTACKS = Choices(kind="attacks")
DATASETS = Choices(kind="datasets")
NETWORKS = Choices(kind="networks")
DEFENSES = Choices(kind="defenses")
DEFAULT_TARGET = 3  # the target class of the paper's experiments


@dataclass(frozen=True)
class Adam:
    lr: float = setting(0.002, "learning rate", above=0)
    betas: tuple[float, ...] = setting((0.9, 0.999), "decay rates of the two moments", low=0, below=1, count=2)
    eps: float = setting(1e-8, "added to the root of the second moment", above=0)
    weight_decay: float = setting(0.0, "L2 penalty", low=0)


@dataclass(frozen=True)
class SGD:
    lr: float = setting(0.1, "learning rate", above=0)
    momentum: float = setting(0.0, "momentum", low=0, below=1)
    weight_decay: float = setting(0.0, "L2 penalty", low=0)
    nesterov: bool = setting(False, "Nesterov's momentum")


@dataclass(frozen=True)
class MultiStep:
    milestones: tuple[float, ...] = setting(
        REQUIRED, "epochs at which the rate falls; a number under 1 is a fraction of num_epochs", above=0
    )
    gamma: float = setting(0.1, "factor at each milestone", above=0)

    @property
    def follows_length(self) -> bool:
        """Whether the rates change if the run has another number of epochs."""
        return any(milestone < 1 for milestone in self.milestones)


@dataclass(frozen=True)
class CosineAnnealing:
    T_max: int | None = setting(None, "epochs from the first rate to eta_min; null: num_epochs", low=1)
    eta_min: float = setting(0.0, "the last learning rate", low=0)

    @property
    def follows_length(self) -> bool:
        """Whether the rates change if the run has another number of epochs."""
        return self.T_max is None


OPTIMIZERS = Choices(table={"Adam": Adam, "SGD": SGD})
SCHEDULERS = Choices(table={"multi_step": MultiStep, "cosine_annealing": CosineAnnealing})


@dataclass(frozen=True)
class Seed:
    seed: int = setting(100, "seed of every random draw of the run", low=0, high=2**32 - 1)
    deterministic: bool = setting(False, "CUDA: bit-for-bit repeatable kernels, slower (the CPU always repeats)")
    benchmark: bool = setting(True, "CUDA: let cuDNN choose the fastest kernels")


@dataclass(frozen=True)
class Data:
    train_limit: int | None = setting(None, "use only this many training images; of image files, some of each class", low=1)
    test_limit: int | None = setting(None, "use only this many test images; of image files, some of each class", low=1)
    placement: str = setting(
        "auto",
        "where the images are kept during the run; auto: the first of device, host memory, disk with enough space",
        options=("auto", "device", "host", "disk"),
    )
    cache_dir: str | None = setting(None, "folder of decoded images, reused by other runs; null: <saved_dir>/tables")


def transforms(place: str) -> Choices:
    """Return the transforms that one section of the YAML accepts."""
    return Choices(kind="transforms", place=place)


@dataclass(frozen=True)
class TransformTrain:
    primary: tuple[Named, ...] = setting(
        (), "augmentation of raw images, in this order", choices=transforms("transform.train.primary")
    )
    remaining: tuple[Named, ...] = setting(
        (), "conversion of uint8 pixels to normalized floats", choices=transforms("transform.train.remaining")
    )


@dataclass(frozen=True)
class TransformTest:
    primary: tuple[Named, ...] = setting((), "resize or crop of test images", choices=transforms("transform.test.primary"))
    remaining: tuple[Named, ...] = setting(
        (), "from bytes to normalized numbers", choices=transforms("transform.test.remaining")
    )


@dataclass(frozen=True)
class Transform:
    pre: tuple[Named, ...] = setting(
        (), "once, when the data are loaded, before the trigger", choices=transforms("transform.pre")
    )
    train: TransformTrain = setting(TransformTrain)
    test: TransformTest = setting(TransformTest)


@dataclass(frozen=True)
class Backdoor:
    attack: Named = setting(REQUIRED, "the attack", choices=ATTACKS, inline=True)
    poison_ratio: float = setting(
        0.05,
        "share of the training images that the attacker may alter; for clean-label attacks, of those of the target class",
        low=0,
        high=1,
    )
    target_label: int | None = setting(
        None, "the label of poisoned images; null: 3, or none with target_shift", low=0, instead_of="target_shift"
    )
    target_shift: int | None = setting(
        None,
        "all-to-all labels: a poisoned image of class y gets the label (y + target_shift) mod num_classes",
        low=1,
        instead_of="target_label",
    )
    poison_mode: str = setting(
        "bernoulli",
        "bernoulli: each image independently with probability poison_ratio; exact: a fixed number of images",
        options=("bernoulli", "exact"),
    )

    def target_text(self, class_names: Sequence[str]) -> str:
        """Return the label of poisoned images as text: `3 (cat)`, or `y + 1 (all-to-all)` if they are of any class y."""
        if self.target_label is None:
            return f"y + {self.target_shift} (all-to-all)"
        return class_text(self.target_label, class_names)


@dataclass(frozen=True)
class Loader:
    batch_size: int = setting(
        128, "batch size of the virtual model's training; for inference and testing on CUDA 8 times as large", low=1
    )
    num_workers: int = setting(0, "accepted for the authors' YAML files; no worker is started", low=0)
    pin_memory: bool = setting(True, "accepted for the authors' YAML files; not needed")


@dataclass(frozen=True)
class SemiLoader:
    batch_size: int = setting(64, "labeled images of a MixMatch step, and as many unlabeled ones", low=2)
    num_workers: int = setting(0, "accepted for the authors' YAML files", low=0)
    pin_memory: bool = setting(True, "accepted for the authors' YAML files")


@dataclass(frozen=True)
class SCE:
    alpha: float = setting(0.1, "weight of the cross-entropy", low=0)
    beta: float = setting(1.0, "weight of the reverse cross-entropy", low=0)
    num_classes: int | None = setting(None, "must equal the top-level num_classes; null: the same", low=1)


@dataclass(frozen=True)
class SplitCriterion:
    sce: SCE = setting(SCE)


@dataclass(frozen=True)
class Split:
    criterion: SplitCriterion = setting(SplitCriterion)


@dataclass(frozen=True)
class MixMatchLoss:
    lambda_u: float = setting(15.0, "weight of the unlabeled loss at full strength", low=0)
    rampup_length: float = setting(120, "epochs over which lambda_u grows from 0; 0: full strength at once", low=0)


@dataclass(frozen=True)
class SemiCriterion:
    mixmatch: MixMatchLoss = setting(MixMatchLoss)


@dataclass(frozen=True)
class MixMatch:
    train_iteration: int = setting(1024, "MixMatch steps an epoch", low=1)
    temperature: float = setting(0.5, "sharpening temperature T of the guessed labels", above=0)
    alpha: float = setting(0.75, "lambda of mixup is drawn from Beta(alpha, alpha)", above=0)
    num_classes: int | None = setting(None, "must equal the top-level num_classes; null: the same", low=1)


@dataclass(frozen=True)
class Semi:
    loader: SemiLoader = setting(SemiLoader)
    criterion: SemiCriterion = setting(SemiCriterion)
    mixmatch: MixMatch = setting(MixMatch)


@dataclass(frozen=True)
class CrossEntropy:
    reduction: str = setting("mean", "how the losses of a batch are reduced", options=("mean",))


@dataclass(frozen=True)
class Criterion:
    cross_entropy: CrossEntropy = setting(CrossEntropy)


@dataclass(frozen=True)
class Global:
    epoch_first: int = setting(60, "class-aware loss-guided split in the epochs before this one", low=0)
    epoch_second: int = setting(90, "class-agnostic loss-guided split in the epochs before this one", low=0)
    epoch_third: int = setting(120, "meta-split in the epochs before this one", low=0)
    seed_num: int = setting(10, "clean seed samples of each class that the defender knows", low=0)
    epsilon: float = setting(0.5, "fraction of the training set in the clean pool from stage 2 on", above=0, below=1)
    t: int = setting(5, "stage 1: the clean pool grows every t epochs", low=1)
    n: int = setting(10, "stage 1: images per class by which the clean pool grows every t epochs", low=0)
    keep_seeds: bool = setting(False, "stages 2 and 3: seed samples are always in the clean pool (not in the paper)")


@dataclass(frozen=True)
class Meta:
    optimizer: Named = setting(Named("Adam", Adam(lr=0.015)), "the virtual model's optimizer", choices=OPTIMIZERS)
    criterion: Criterion = setting(Criterion)
    epoch: int = setting(1, "epochs of the virtual model's training", low=1)


@dataclass(frozen=True)
class Undefended:
    """`defense: none`: the same network on the same poisoned set, without ASD."""

    batch_size: int = setting(128, "batch size", low=2)
    optimizer: Named = setting(
        Named("SGD", SGD(lr=0.1, momentum=0.9, weight_decay=5e-4)), "the optimizer without defense", choices=OPTIMIZERS
    )
    lr_scheduler: Named | None = setting(
        Named("multi_step", MultiStep(milestones=(0.5, 0.75))), "the schedule without defense", choices=SCHEDULERS
    )


@dataclass(frozen=True)
class Runtime:
    mode: str = setting(
        "auto",
        "training steps as one CUDA graph, or eager; auto: on one CUDA device the graph, if a trial step equals the eager one",
        options=("auto", "graph", "eager"),
    )
    merged: bool = setting(
        False,
        "with runtime.compile: merge the 2 and the 3 forward passes of a step into one each, with grouped BN; equal except "
        "under dropout",
    )
    compile: bool = setting(False, "torch.compile the network: one process only; takes minutes at the start")
    amp: bool = setting(False, "bf16 for the convolutions (also --amp); weights, BN and losses stay fp32")


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
        True, "at the end, keep features and probabilities of all training images in evidence.npz: 4 N (D + C) bytes"
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
    check(config, reader)
    return replace(config, run=config.run or run_name(path))


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
    if (config.run is not None and not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)*", config.run)) or ".." in (config.run or ""):
        reader.fail("run", config.run, "must be a name such as asd-seed-1 or group/asd-seed-1")
    config.defense.settings.check(config, reader)
    if not config.epochs:
        reader.fail(f"defense.{config.defense.name}", 0, "no stage has any epochs: give one at least 1")


def check_processes(config: Config, processes: int) -> None:
    """Refuse what several processes do not support: a batch size that they cannot share, a captured, compiled or merged step.

    Every `batch_size` is the total over all processes.
    """
    sizes = {
        "loader.batch_size": config.loader.batch_size,
        "semi.loader.batch_size": config.semi.loader.batch_size,
        "undefended.batch_size": config.undefended.batch_size,
    }
    for key, size in sizes.items():
        if size % processes:
            raise UserError(f"{key}: {size}: must be a multiple of {processes}, the number of processes")
    if processes > 1 and config.runtime.mode == "graph":
        raise UserError(f"runtime.mode: graph: supports one process, not {processes}: set runtime.mode=auto or eager")
    for key, on in (("runtime.merged", config.runtime.merged), ("runtime.compile", config.runtime.compile)):
        if processes > 1 and on:
            raise UserError(f"{key}: true: supports one process, not {processes}: leave it out")


def run_name(path: Path) -> str:
    """Return the run's name: `a/b` for config/a/b.yaml; the file name of a YAML outside config/."""
    stem = path.resolve().with_suffix("")
    for folder in (Path.cwd().resolve() / "config", Path(__file__).resolve().parents[1] / "config"):
        if stem.is_relative_to(folder):
            return stem.relative_to(folder).as_posix()
    return path.stem


def to_yaml(config: Config) -> str:
    """Return the whole resolved configuration as YAML."""
    text: str = yaml.safe_dump(as_dict(config), sort_keys=False)
    return text


HEAD = """# Every setting

Generated by `python -m utils.config > docs/configuration.md`; do not edit. A YAML may begin with `base: OTHER.yaml`, a path
relative to its own, and then gives only the differences; `--set key.path=value` overrides a setting on the command line. The
settings of an optimizer, a transform or a network are listed once, under the first key that accepts it.
"""


def documentation() -> str:
    """Return the text of docs/configuration.md, which lists each key that a YAML may have once."""
    sections: dict[str, list[str]] = {"The top level": []}
    for key, kind, default, text in describe(Config):
        top, dot, _ = key.partition(".")
        single = not dot and kind != "section"
        rows = sections["The top level"] if single else sections.setdefault(f"`{top}`", [])
        rows.append(f"| `{key}` | {kind} | {default} | {text} |\n")
    parts = [HEAD]
    for title, rows in sections.items():
        parts += [f"\n## {title}\n\n", "| key | type | default | meaning |\n| --- | --- | --- | --- |\n", *rows]
    return "".join(parts)


if __name__ == "__main__":
    from utils import config  # the module that plug-ins import: its classes are not those of `__main__`

    print(config.documentation(), end="")
