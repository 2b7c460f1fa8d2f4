"""The stored runs of the study, and the targets they are held to."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from utils import metrics
from utils.metrics import read_rows
from utils.reporting import suspects

SIX = {"badnets": "BadNets", "blend": "Blend", "wanet": "WaNet", "iab": "IAB", "refool": "Refool", "clb": "CLB"}
MAIN = SIX | {"no_attack": "no attack", "gtsrb_badnets": "GTSRB, BadNets"}
FURTHER = {
    "lookalike": "look-alike", "sig": "SIG", "bpp": "BPP", "adaptive_patch_1pct": "Adaptive-Patch (1 %)",
    "adaptive_blend_1pct": "Adaptive-Blend (1 %)", "all_to_all": "all-to-all BadNets",
}  # fmt: skip
TITLES = MAIN | FURTHER
PUBLISHED = {"wanet_published": "WaNet, 5 %, s 0.5", "refool_published": "Refool, 5 %", "clb_eps8": "CLB, eps 8"}
FORMS = {  # trained without a defense alone
    "wanet_cover": "WaNet with cover images", "sig_flipped": "SIG with changed labels",
    "bpp_no_cover": "BPP without cover images", "bpp_dithered": "BPP, dithered",
    "adaptive_blend_smooth": "Adaptive-Blend (0.3 %), smooth trigger image",
}  # fmt: skip
PAPER = {"badnets_paper": "BadNets", "clb_paper": "CLB", "iab_paper": "IAB", "refool_paper": "Refool"}
STAGES = ("class-aware", "class-agnostic", "meta-split", "undefended")
KEYS = ("clean_accuracy", "attack_success_rate", "clean_as_target", "robust_accuracy")
NAMES = tuple(metrics.SHARES[key] for key in KEYS)
LAST = 5  # final epochs to average over
NOT_RUN = "not run"
UNDEFENDED_RUN = "undefended"  # followed by the seed, if it is not the first one
# Runs with ASD that were stopped because the attack had succeeded.
STOPPED = {"iab": "trials/iab/n800_seed100.jsonl", "clb": "trials/clb/n800.jsonl"}
Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A stored run: its card, the rows of `metrics.jsonl`, and with ASD the quality of its ranking of suspects."""

    name: str
    card: dict[str, Any]
    rows: list[Row]
    quality: dict[str, Any] | None

    @property
    def attack(self) -> str:
        """The folder of the run, a key of `TITLES`."""
        return self.name.partition("/")[0]

    @property
    def ends(self) -> tuple[Row, Row]:
        """The figures, in %, of the last epoch and as the mean of the last five."""
        tail = [percents(row) for row in self.rows[-LAST:]]
        return tail[-1], {key: statistics.fmean(row[key] for row in tail) for key in KEYS}


class Runs(dict[str, Run]):
    """All stored runs by name, and the names of all planned or stored runs.

    Attributes:
        stopped, unfinished: rows by name, of runs that were stopped because the attack had succeeded, or that go on.
    """

    def __init__(self, folder: Path) -> None:
        for card in sorted(folder.glob("*/*.json")):
            name, kept = f"{card.parent.name}/{card.stem}", card.with_suffix("")
            ranked = kept / suspects.QUALITY
            self[name] = Run(name, read(card), read_rows(kept / "metrics.jsonl"), read(ranked) if ranked.exists() else None)
        planned = re.findall(r"^run (\S+)", (folder / "run.sh").read_text(), re.MULTILINE)
        self.names = list(dict.fromkeys([*planned, *self]))
        self.defended = [name for name in self.names if not is_undefended(name)]
        kept = folder / "unfinished"
        self.unfinished = {str(path.relative_to(kept).with_suffix("")): read_rows(path) for path in kept.glob("*/*.jsonl")}
        self.stopped = {
            f"{attack}/asd": read_rows(folder / file) for attack, file in STOPPED.items() if (folder / file).exists()
        }

    def of(self, attack: str) -> tuple[Run | None, Run | None]:
        """Return the runs without and with ASD against an attack, for the first seed."""
        return self.get(f"{subject(attack)}/{UNDEFENDED_RUN}"), self.get(f"{attack}/asd")

    def baseline_of(self, run: Run) -> Run | None:
        """Return the run without a defense on the poisoned set of a run with ASD; where it is not stored, that of the first
        seed."""
        own = f"{subject(run.attack)}/{run.name.partition('/')[2].replace('asd', UNDEFENDED_RUN)}"
        return self.get(own) or self.of(run.attack)[0]

    def epochs_of(self, attack: str) -> list[Row]:
        """Return the rows of the run with ASD against an attack, for the first seed, even if it was stopped or goes on."""
        own, name = self.of(attack)[1], f"{attack}/asd"
        return own.rows if own else self.stopped.get(name) or self.unfinished.get(name, [])


def is_undefended(name: str) -> bool:
    """Return whether a run is one without a defense, by its name."""
    return name.partition("/")[2].startswith(UNDEFENDED_RUN)


def subject(attack: str) -> str:
    """Return the attack whose poisoned set and undefended run belong to a row: the same for both settings of ASD."""
    return attack.removesuffix("_paper")


def read(path: Path) -> Any:
    """Return the contents of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def percents(row: Row, keys: Sequence[str] = KEYS) -> Row:
    """Return figures of a row in %; NaN for missing ones, e.g. the ASR without an attack."""
    return {key: math.nan if row[key] is None else 100 * row[key] for key in keys}


# -- Targets -----------------------------------------------------------------------------------------------------------


class Target(NamedTuple):
    """A figure in %, or a difference in points, and its bound."""

    name: str
    sense: str  # >= or <=
    bound: float
    value: Callable[[Row, Row], float]  # computed from the runs with ASD and without a defense

    def holds(self, values: Iterable[float]) -> bool:
        """Return whether all values satisfy the bound, up to rounding errors of floats."""
        return all((value - self.bound) * (1 if self.sense == ">=" else -1) > -1e-9 for value in values)


def targets(attack: str) -> list[Target]:
    """Return the targets for an attack."""
    attack = subject(attack)
    gap = Target("ACC drop", "<=", 5, lambda own, baseline: baseline["clean_accuracy"] - own["clean_accuracy"])
    if attack == "no_attack":
        return [gap]
    if attack == "gtsrb_badnets":
        return [
            Target("ACC", ">=", 93, lambda own, _: own["clean_accuracy"]),
            Target("ASR", "<=", 3, lambda own, _: own["attack_success_rate"]),
        ]
    least = 90 if attack == "wanet" else 95
    strength = Target("undefended ASR", ">=", least, lambda _, baseline: baseline["attack_success_rate"])
    return [
        *([strength] if attack in SIX else []),
        gap,
        Target("ACC", ">=", 83, lambda own, _: own["clean_accuracy"]),
        Target("ASR excess", "<=", 3, lambda own, _: own["attack_success_rate"] - own["clean_as_target"]),
    ]


def judge(run: Run, runs: Runs) -> list[tuple[Target, list[float]]]:
    """Return the targets of a run with its values (last epoch, mean of the last five); empty without the undefended run."""
    baseline = runs.baseline_of(run)
    pairs = list(zip(run.ends, baseline.ends, strict=True)) if baseline else []
    return [(target, [target.value(*pair) for pair in pairs]) for target in targets(run.attack) if pairs]


def verdict(attack: str, runs: Runs) -> str:
    """Return whether the run with ASD against an attack meets all targets."""
    run, name = runs.of(attack)[1], f"{attack}/asd"
    if run is None and name in runs.stopped:
        return f"missed: stopped after {len(runs.stopped[name])} epochs"
    if run is None and name in runs.unfinished:
        return f"{NOT_RUN} to the end: epoch {len(runs.unfinished[name])}"
    found = judge(run, runs) if run else []
    missed = [target.name for target, values in found if not target.holds(values)]
    if not found:
        return "undefended not run" if run else NOT_RUN
    return f"missed: {', '.join(missed)}" if missed else "met"
