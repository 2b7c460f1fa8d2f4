"""The sections of a configuration: every key with its type, range, default and meaning.

The dataclasses are the schema of the YAML (`schema.py`); `Config` joins them to the whole configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from utils.config.schema import REQUIRED, Choices, Named, batch_size_setting, setting
from utils.names import class_text

ATTACKS = Choices(kind="attacks")
DATASETS = Choices(kind="datasets")
NETWORKS = Choices(kind="networks")
DEFENSES = Choices(kind="defenses")


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
    nesterov: bool = setting(False, "Nesterov's momentum; needs a momentum above 0")

    def contradiction(self) -> tuple[str, str] | None:
        """Return a key and what is expected of it, if the settings contradict each other."""
        wrong = self.nesterov and not self.momentum
        return ("nesterov", "needs a momentum: set momentum, e.g. 0.9, or leave this out") if wrong else None


@dataclass(frozen=True)
class MultiStep:
    milestones: tuple[float, ...] = setting(
        REQUIRED,
        "epochs at which the rate falls; a number under 1 is a fraction of those that the schedule spans",
        above=0,
    )
    gamma: float = setting(0.1, "factor at each milestone", above=0)

    @property
    def follows_length(self) -> bool:
        """Whether the rates change if the run has another number of epochs."""
        return any(milestone < 1 for milestone in self.milestones)


@dataclass(frozen=True)
class CosineAnnealing:
    T_max: int | None = setting(None, "epochs from the first rate to eta_min; null: all that the schedule spans", low=1)
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
        (), "conversion of uint8 pixels to normalized floats", choices=transforms("transform.test.remaining")
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
    batch_size: int = batch_size_setting(
        128,
        "batch size of the virtual model's training; for inference and testing on CUDA 8 times as large",
    )
    num_workers: int = setting(0, "accepted for the authors' YAML files; no worker is started", low=0)
    pin_memory: bool = setting(True, "accepted for the authors' YAML files; not needed")


@dataclass(frozen=True)
class SemiLoader:
    batch_size: int = batch_size_setting(64, "labeled images of a MixMatch step, and as many unlabeled ones")
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

    batch_size: int = batch_size_setting(128, "batch size")
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
    amp: bool = setting(False, "bf16 for convolutions and linear layers (also --amp); weights, BN and losses stay fp32")
