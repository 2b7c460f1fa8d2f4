"""The configuration: what loads, what is refused and how, and which file or option sets each value."""

from __future__ import annotations

import copy
import dataclasses
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import CONFIGS, REPOSITORY, TINY
from hypothesis import given, settings
from hypothesis import strategies as st

import data.attacks
from utils import config
from utils.cli import parse_arguments
from utils.config import Config
from utils.config.schema import merge
from utils.errors import UserError

ORIGINAL = """\
---
seed:
  seed: 100
  deterministic: False
  benchmark: True

dataset_dir: /some/cifar-10-batches-py
num_classes: 10
saved_dir: ./saved_data
storage_dir: ./storage
prefetch: True
transform:
  pre: null
  train:
    primary:
      random_crop:
        size: 32
        padding: 4
        padding_mode: "reflect"
      random_horizontal_flip:
        p: 0.5
    remaining:
      to_tensor: True
      normalize:
        mean:
          - 0.4914
          - 0.4822
          - 0.4465
        std:
          - 0.2023
          - 0.1994
          - 0.2010
  test:
    primary: null
    remaining:
      to_tensor: True
      normalize:
        mean:
          - 0.4914
          - 0.4822
          - 0.4465
        std:
          - 0.2023
          - 0.1994
          - 0.2010

backdoor:
  poison_ratio: 0.05
  target_label: 3
  badnets:
    trigger_path: ./data/trigger/cifar_1.png

loader:
  batch_size: 128
  num_workers: 4
  pin_memory: True

split:
  criterion:
    sce:
      alpha: 0.1
      beta: 1
      num_classes: 10

semi:
  loader:
    batch_size: 64
    num_workers: 4
    pin_memory: True
  criterion:
    mixmatch:
      lambda_u: 15
      rampup_length: 120
  mixmatch:
    train_iteration: 1024
    temperature: 0.5
    alpha: 0.75
    num_classes: 10

network:
  resnet18_cifar:
    num_classes: 10
sync_bn: True
optimizer:
  Adam:
    lr: 0.002
lr_scheduler: null
num_epochs: 120
criterion:
  cross_entropy:
    reduction: "mean"

global:
  epoch_first: 60
  epoch_second: 90
  epoch_third: 120
  seed_num: 10
  epsilon: 0.5
  t: 5
  n: 10

meta:
  optimizer:
    Adam:
      lr: 0.015
  criterion:
    cross_entropy:
      reduction: "mean"
  epoch: 1
"""

REMOVED: Any = object()


def changed(tree: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Return a deep copy of nested dictionaries with the dotted key set, or removed."""
    out = copy.deepcopy(tree)
    *sections, last = key.split(".")
    at = out
    for name in sections:
        at = at.setdefault(name, {})
    if value is REMOVED:
        del at[last]
    else:
        at[last] = value
    return out


def write(path: Path, content: dict[str, Any] | str | bytes) -> Path:
    """Write a YAML file from a tree, a string or bytes."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return path


def refusal(path: Path, overrides: tuple[str, ...] = ()) -> str:
    """Return the error with which loading fails; it must be one line."""
    with pytest.raises(UserError) as caught:
        config.load(path, overrides)
    line = str(caught.value)
    assert line and "\n" not in line
    return line


def leaf(tree: Any, key: str) -> Any:
    """Return the attribute for a dotted key."""
    for name in key.split("."):
        tree = getattr(tree, name)
    return tree


def test_the_originals_file_loads_unchanged(tmp_path: Path) -> None:
    """The authors' YAML loads unchanged, and all of its values reach the settings of the method."""
    c = config.load(write(tmp_path / "original.yaml", ORIGINAL))
    expected = {
        "seed.seed": 100, "seed.deterministic": False, "seed.benchmark": True, "dataset_dir": "/some/cifar-10-batches-py",
        "num_classes": 10, "saved_dir": "./saved_data", "storage_dir": "./storage", "prefetch": True, "transform.pre": (),
        "transform.test.primary": (), "backdoor.poison_ratio": 0.05, "backdoor.target_label": 3, "loader.batch_size": 128,
        "loader.num_workers": 4, "loader.pin_memory": True, "split.criterion.sce.alpha": 0.1, "split.criterion.sce.beta": 1.0,
        "split.criterion.sce.num_classes": 10, "semi.loader.batch_size": 64, "semi.criterion.mixmatch.lambda_u": 15.0,
        "semi.criterion.mixmatch.rampup_length": 120.0, "semi.mixmatch.train_iteration": 1024,
        "semi.mixmatch.temperature": 0.5, "semi.mixmatch.alpha": 0.75, "sync_bn": True, "lr_scheduler": None,
        "num_epochs": 120, "criterion.cross_entropy.reduction": "mean", "global_.epoch_first": 60,
        "global_.epoch_second": 90, "global_.epoch_third": 120, "global_.seed_num": 10, "global_.epsilon": 0.5,
        "global_.t": 5, "global_.n": 10, "meta.epoch": 1, "meta.criterion.cross_entropy.reduction": "mean",
        "defense.name": "asd", "run": "original", "backdoor.poison_mode": "bernoulli", "global_.keep_seeds": False,
    }  # fmt: skip
    assert {key: leaf(c, key) for key in expected} == expected
    assert (c.optimizer.name, c.optimizer.settings.lr) == ("Adam", 0.002)
    assert (c.meta.optimizer.name, c.meta.optimizer.settings.lr) == ("Adam", 0.015)
    assert (c.optimizer.settings.betas, c.optimizer.settings.eps, c.optimizer.settings.weight_decay) == ((0.9, 0.999), 1e-8, 0)
    assert (c.attack.name, c.attack.settings.trigger_path) == ("badnets", "./data/trigger/cifar_1.png")
    assert (c.network.name, c.network.settings.num_classes, c.network.settings.width) == ("resnet18_cifar", 10, 64)
    crop, flip = c.transform.train.primary
    assert (crop.name, crop.settings.size, crop.settings.padding, crop.settings.padding_mode) == (
        "random_crop",
        32,
        4,
        "reflect",
    )
    assert (flip.name, flip.settings.p) == ("random_horizontal_flip", 0.5)
    for part in (c.transform.train, c.transform.test):
        assert [item.name for item in part.remaining] == ["to_tensor", "normalize"]
        assert part.remaining[1].settings.mean == (0.4914, 0.4822, 0.4465)
        assert part.remaining[1].settings.std == (0.2023, 0.1994, 0.2010)


def test_the_repositorys_baseline_is_the_originals_file(tmp_path: Path) -> None:
    """config/baseline_asd.yaml has the values of the authors' file, except for the data path."""
    ours = config.load(REPOSITORY / "config" / "baseline_asd.yaml")
    theirs = config.load(write(tmp_path / "baseline_asd.yaml", ORIGINAL))
    assert dataclasses.replace(ours, dataset_dir=theirs.dataset_dir) == theirs


@pytest.mark.parametrize("name", [path.relative_to(REPOSITORY).as_posix() for path in CONFIGS])
def test_every_configuration_of_the_repository_loads(name: str) -> None:
    """Every YAML in config/ loads, and its run is named after its path in config/."""
    assert config.load(REPOSITORY / name).run == name.removeprefix("config/").removesuffix(".yaml")


def test_a_random_defense_plan_has_its_stages_by_epoch(tiny: Path) -> None:
    """The stage of an epoch depends only on the three bounds."""
    c = config.load(tiny, ["global.epoch_first=2", "global.epoch_second=3", "global.epoch_third=6", "num_epochs=6"])
    assert [c.stage(e) for e in range(6)] == ["class-aware"] * 2 + ["class-agnostic"] + ["meta-split"] * 3
    none = config.load(tiny, ["defense=none"])
    assert {none.stage(e) for e in range(6)} == {"undefended"}


# key, value, what the line must hold beside file, key and value
MISTAKES: list[tuple[str, Any, list[str]]] = [
    ("runtime.merged", True, ["runtime.compile"]),
    ("num_epoch", 120, ["unknown key", "num_epochs"]),
    ("global.epoch_frist", 60, ["unknown key", "did you mean epoch_first?"]),
    ("semi.mixmatch.temprature", 0.5, ["unknown key", "did you mean temperature?"]),
    ("backdoor.poison_rato", 0.05, ["unknown key", "did you mean poison_ratio?"]),
    ("network.resnet18_cifar.widht", 3, ["unknown key", "did you mean width?"]),
    ("optimizer.Adam.learning_rate", 0.1, ["unknown key", "known: betas, eps, lr, weight_decay"]),
    ("num_epochs", "many", ["wrong type (str)", "whole number"]),
    ("num_epochs", 1.5, ["wrong type (float)", "whole number"]),
    ("num_epochs", True, ["wrong type (bool)", "whole number"]),
    ("num_epochs", None, ["wrong type (NoneType)", "whole number"]),
    ("sync_bn", "maybe", ["wrong type (str)", "true or false"]),
    ("saved_dir", ["a"], ["wrong type (list)", "a string", "quotes"]),
    ("saved_dir", None, ["wrong type (NoneType)", "a string"]),
    ("seed", 100, ["section of keys"]),
    ("optimizer.Adam.betas", 0.9, ["give a list"]),
    ("optimizer.Adam.betas", [0.9], ["2 numbers"]),
    ("transform.train.primary", ["random_crop"], ["section of names", "random_crop"]),
    ("num_epochs", 0, ["out of range", ">= 1"]),
    ("seed.seed", -1, ["out of range", ">= 0"]),
    ("seed.seed", 2**32, ["out of range", "<= 4294967295"]),
    ("global.epsilon", 0, ["out of range", "> 0 and < 1"]),
    ("global.epsilon", 1.0, ["out of range", "> 0 and < 1"]),
    ("global.epsilon", float("nan"), ["out of range", "> 0 and < 1"]),
    ("optimizer.Adam.lr", float("inf"), ["out of range", "> 0"]),
    ("optimizer.Adam.lr", -0.1, ["out of range", "> 0"]),
    ("backdoor.poison_ratio", 1.01, ["out of range", ">= 0 and <= 1"]),
    ("backdoor.poison_mode", "exakt", ["did you mean exact?"]),
    ("defense", "asdf", ["did you mean asd?"]),
    ("optimizer.Adam.lr", "2e-3", ["a string", "write 2.0e-3"]),
    ("backdoor.poison_ratio", "5e-2", ["a string", "write 5.0e-2"]),
    ("semi.mixmatch.train_iteration", "1e3", ["a string", "write 1.0e+3"]),
    ("global.epoch_second", 1, ["epoch_first (2)"]),
    ("global.epoch_third", 3, ["epoch_second (4)"]),
    ("num_epochs", 7, ["no split", "epoch 6", "global.epoch_third"]),
    ("global.seed_num", 0, ["empty", "at least 1"]),
    ("global.seed_num", -2, ["out of range", ">= 0"]),
    ("num_classes", 0, ["out of range", ">= 1"]),
    ("num_classes", 1, ["at least 2 classes"]),
    ("network.resnet18_cifar.num_classes", 9, ["num_classes is 10", "give 10"]),
    ("split.criterion.sce.num_classes", 100, ["num_classes is 10", "give 10"]),
    ("semi.mixmatch.num_classes", 2, ["num_classes is 10", "give 10"]),
    ("backdoor.target_label", 10, ["0..9"]),
    ("backdoor.target_label", -1, ["out of range", ">= 0"]),
    ("backdoor.badnet", {}, ["unknown key", "did you mean badnets?"]),
    ("network", {"resnet18_cifr": {}}, ["unknown key", "did you mean resnet18_cifar?"]),
    ("network", "vgg", ["unknown", "resnet18_cifar"]),
    ("network", None, ["name one of", "resnet18_cifar"]),
    ("dataset", {"cifar_10": {}}, ["unknown key", "did you mean cifar10?"]),
    ("transform.train.primary", {"random_corp": {"size": 32}}, ["unknown key", "did you mean random_crop?"]),
    ("optimizer", {"adam": {"lr": 0.1}}, ["unknown key", "did you mean Adam?"]),
    ("lr_scheduler", {"multistep": {}}, ["unknown key", "did you mean multi_step?"]),
    ("lr_scheduler", {"multi_step": {}}, ["milestones", "missing"]),
    ("optimizer", {"Adam": {}, "SGD": {}}, ["2 names", "keep one of Adam, SGD"]),
    ("transform.train.remaining", {"normalize": {}}, ["to_tensor: true"]),
    ("transform.test.remaining", None, ["to_tensor: true"]),
    ("transform.test.remaining", {"to_tensor": False}, ["to_tensor: true"]),
    ("transform.test.remaining", {"normalize": {}, "to_tensor": True}, ["to_tensor: true"]),
    ("transform.test.primary", {"random_crop": {"size": 32}}, ["random_crop", "belongs under", "transform.train.primary"]),
    ("transform.test.primary", {"gaussian_blur": {}}, ["gaussian_blur", "transform.train.primary"]),
    ("transform.pre", {"random_horizontal_flip": {}}, ["random_horizontal_flip", "transform.train.primary"]),
    ("transform.train.primary", {"to_tensor": True}, ["to_tensor", "transform.train.remaining"]),
    ("optimizer", {"SGD": {"nesterov": True}}, ["nesterov", "momentum"]),
    ("semi.mixmatch.temperature", 0.02, ["float32", "at least 0.026"]),
    ("run", "../x", ["a name"]),
    ("run", "a b", ["a name"]),
    ("run", "/etc", ["a name"]),
    ("run", ".", ["a name"]),
    ("run", "a/./b", ["a name"]),
    ("run", "", ["a name"]),
    ("run", "a\nb", ["a name"]),
    ("num_epochs", 10**400, ["out of range"]),
    ("optimizer.Adam.lr", 10**400, ["out of range"]),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "remedies"), MISTAKES, ids=[f"{k}={str(v)[:25]!r}" for k, v, _ in MISTAKES])
def test_a_mistake_is_one_line_with_file_key_value_and_remedy(
    tmp_path: Path, key: str, value: Any, remedies: list[str]
) -> None:
    """For any invalid setting, the error has the file, the key, the value and what is expected."""
    tree = changed(TINY, key, value)
    if key == "backdoor.badnet":
        del tree["backdoor"]["badnets"]
    path = write(tmp_path / "wrong.yaml", tree)
    line = refusal(path)
    assert line.startswith(f"{path}: {key}")
    shown = str(value) if isinstance(value, (int, float, list)) else repr(value) if isinstance(value, str) else ""
    if len(shown) < 100 and "unknown key" not in remedies:
        assert shown in line
    for remedy in remedies:
        assert remedy in line


@pytest.mark.parametrize("key", ["network", "backdoor", "dataset"])
def test_a_section_that_must_be_there_is_named(tmp_path: Path, key: str) -> None:
    """A run without network, attack or data is refused with the missing key."""
    line = refusal(write(tmp_path / "short.yaml", changed(TINY, key, REMOVED)))
    assert key in line.split(": ")[1] and "missing" in line


def test_no_attack_and_two_attacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`backdoor` must have exactly one attack: none and two are refused with the legal names."""
    plugins = tmp_path / "attacks"
    plugins.mkdir()
    (plugins / "stripes.py").write_text(
        "from dataclasses import dataclass\n\n@dataclass(frozen=True)\nclass Settings:\n    width: int = 1\n\nAttack = None\n"
    )
    monkeypatch.setattr(data.attacks, "__path__", [*data.attacks.__path__, str(plugins)])
    none = write(tmp_path / "none.yaml", changed(TINY, "backdoor.badnets", REMOVED))
    line = refusal(none)
    assert line.startswith(f"{none}: backdoor") and "badnets" in line and "stripes" in line
    two = write(tmp_path / "two.yaml", changed(TINY, "backdoor.stripes", None))
    line = refusal(two)
    assert line.startswith(f"{two}: backdoor") and "2 names" in line and "keep one of badnets, stripes" in line


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("seed:\n  seed: 1\nnum_epochs: 3\nseed:\n  seed: 2\n", ["line 4", "seed", "given twice"]),
        ("optimizer:\n  Adam:\n    lr: 0.1\n    lr: 0.2\n", ["line 4", "lr", "given twice"]),
        ("num_epochs: 3\nloader: {batch_size: 3\n", ["line", "invalid YAML"]),
        ("num_epochs: 3\nloader: batch: 3\n", ["line 2", "invalid YAML"]),
        ("num_epochs: 3\n\tloader: 3\n", ["line 2", "invalid YAML"]),
        ("seed: 2020-13-45\n", ["invalid YAML"]),
        ("seed: !!python/object/apply:os.getcwd []\n", ["line 1", "invalid YAML"]),
        ("seed: &here {seed: *here}\n", ["invalid YAML"]),
        ("? [a, b]\n: 3\n", ["line 1", "a string"]),
        ("", ["mapping"]),
        ("# only a remark\n", ["mapping"]),
        ("- a\n- b\n", ["mapping"]),
        ("\x00\x01\x02", ["invalid YAML"]),
        (b"\x89PNG\r\n\x1a\n\x00\xff\xfe", ["cannot be read as text"]),
    ],
)
def test_an_invalid_file_is_refused(tmp_path: Path, content: str | bytes, expected: list[str]) -> None:
    """A damaged, empty or foreign file is refused in one line with its name and, if possible, the line number."""
    path = write(tmp_path / "odd.yaml", content)
    line = refusal(path)
    assert line.startswith(f"{path}:")
    for part in expected:
        assert part in line


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    """A path that is not a file is refused with the path and what is expected."""
    for path in (tmp_path / "absent.yaml", tmp_path):
        line = refusal(path)
        assert str(path) in line and "give a YAML file" in line


def test_yaml_merge_keys_work(tmp_path: Path) -> None:
    """YAML's `<<` works, so sections can be shared by an anchor."""
    text = yaml.safe_dump(TINY, sort_keys=False)
    text += "meta:\n  optimizer:\n    Adam: &a {lr: 0.25}\nundefended:\n  optimizer: {Adam: {<<: *a, eps: 0.5}}\n"
    c = config.load(write(tmp_path / "anchors.yaml", text))
    assert (c.undefended.optimizer.settings.lr, c.undefended.optimizer.settings.eps) == (0.25, 0.5)


def test_merge_keys_may_be_overridden_and_chained(tmp_path: Path) -> None:
    """Keys merged by `<<` may be overridden and merged again; they are not duplicates."""
    text = yaml.safe_dump(TINY, sort_keys=False)
    text += "undefended: {optimizer: {Adam: &slow {lr: 0.001, weight_decay: 0.0005}}}\n"
    text += "meta: {optimizer: {Adam: &fast {<<: *slow, lr: 0.01}}}\noptimizer: {Adam: {<<: [*fast, *slow]}}\n"
    c = config.load(write(tmp_path / "anchors.yaml", text))
    assert (c.meta.optimizer.settings.lr, c.meta.optimizer.settings.weight_decay) == (0.01, 0.0005)
    assert (c.optimizer.settings.lr, c.optimizer.settings.weight_decay) == (0.01, 0.0005)
    twice = text.replace("lr: 0.01}", "lr: 0.01, lr: 0.02}")
    assert "given twice" in refusal(write(tmp_path / "twice.yaml", twice))


AS_WRITTEN = ["no", "yes", "On", "001", "2024", "010", "1_0", "0x10", "1:30", "1e3", "1.50", "2024-01-01", ".5", "true"]


@pytest.mark.parametrize("text", AS_WRITTEN)
def test_a_string_is_its_source_text(tmp_path: Path, tiny: Path, text: str) -> None:
    """The value of a string setting is its source text, even if YAML would read a number, a boolean or a date."""
    folder = {"dataset": {"folder": {"classes": ["a", "b"]}}, "dataset_dir": "x"}
    tree = yaml.safe_dump({key: value for key, value in (TINY | folder).items() if key != "dataset_dir"}, sort_keys=False)
    path = write(tmp_path / "texts.yaml", f"{tree}dataset_dir: {text}\nsaved_dir: {text}\n")
    for c in (config.load(path), config.load(path, [f"dataset_dir={text}", f"saved_dir={text}"])):
        assert (c.dataset_dir, c.saved_dir) == (text, text)
        again = config.load(write(tmp_path / "again.yaml", config.to_yaml(c)))
        assert (again.dataset_dir, again.saved_dir) == (text, text)
    c = config.load(path, [f"dataset.folder.classes=[{text}, b]"])
    assert c.dataset is not None and c.dataset.settings.classes == (text, "b")


WHOLE = ["set #1", "#1", " bee", "bee ", "@pics", "&data", "&a b", "*a", "!x y", "%x", "--- a", "|x", "a: b", "a:", "a: b # c",
         "- a", "b\udce9e", "a\tb", "a\nb", "C:\\x", "`x`", "... a", "x # y"]  # fmt: skip


@pytest.mark.parametrize("text", WHOLE)
def test_nothing_of_a_value_is_dropped(tiny: Path, text: str) -> None:
    """A string on the command line is taken completely, even if YAML finds a comment, an anchor, a tag or an error in it."""
    c = config.load(tiny, [f"dataset_dir={text}"])
    assert c.dataset_dir == text
    again = config.load(write(tiny.with_name("again.yaml"), config.to_yaml(c)))
    assert again.dataset_dir == text


@pytest.mark.parametrize("text", ["[set] #1", '"a" b', "{a} # b", "[b\udce9", "'a", '["a\\'])
def test_a_value_in_brackets_or_quotes_is_yaml_and_whole(tiny: Path, text: str) -> None:
    """A value that begins like YAML but is invalid is refused; the option that the error suggests gives the string."""
    line = refusal(tiny, (f"dataset_dir={text}",))
    option, proposed = shlex.split(line.partition("quote it: ")[2])
    assert option == "--set" and config.load(tiny, [proposed]).dataset_dir == text


@pytest.mark.parametrize("value", ["010", "1_0", "0x10", "0b11", "1:30", "+010"])
@pytest.mark.parametrize("key", ["seed.seed", "optimizer.Adam.lr", "data.train_limit"])
def test_numbers_are_plain_decimals(tiny: Path, key: str, value: str) -> None:
    """Numbers in notations that most people misread are refused, in files and on the command line."""
    sections = "".join(f"{'  ' * depth}{name}:\n" for depth, name in enumerate(key.split(".")[:-1]))
    text = f"base: {tiny.name}\n{sections}{'  ' * key.count('.')}{key.rpartition('.')[2]}: {value}\n"
    for line in (refusal(tiny, (f"{key}={value}",)), refusal(write(tiny.with_name("upper.yaml"), text))):
        assert f"{key}: {value}" in line and "decimal" in line


@pytest.mark.parametrize(
    ("key", "value", "attribute", "expected"),
    [
        ("seed.seed", "0", "seed.seed", 0),
        ("seed.seed", "+7", "seed.seed", 7),
        ("optimizer.Adam.lr", "1.0e-3", "optimizer.settings.lr", 0.001),
        ("optimizer.Adam.lr", ".5", "optimizer.settings.lr", 0.5),
        ("optimizer.Adam.lr", "00.5", "optimizer.settings.lr", 0.5),
        ("optimizer.Adam.lr", "2.", "optimizer.settings.lr", 2.0),
        ("data.train_limit", "null", "data.train_limit", None),
        ("data.train_limit", "~", "data.train_limit", None),
        ("dataset_dir", "null", "dataset_dir", None),
        ("dataset_dir", "", "dataset_dir", None),
    ],
)
def test_plain_numbers_and_null_are_read(tiny: Path, key: str, value: str, attribute: str, expected: Any) -> None:
    """All usual decimal notations are numbers; null is None, also for a string setting."""
    assert leaf(config.load(tiny, [f"{key}={value}"]), attribute) == expected


@pytest.mark.parametrize("key", ["backdoor", "data.train_limit", "lr_scheduler"])
@pytest.mark.parametrize("value", ["none", "None", "no"])
def test_null_is_named_where_none_is_meant(tiny: Path, key: str, value: str) -> None:
    """For `none` or `no` in an optional setting, the error suggests null."""
    line = refusal(tiny, (f"{key}={value}",))
    assert f"{key}: " in line and value in line and "null" in line
    config.load(tiny, [f"{key}=null", "seed_samples=x"])


def test_the_runs_copy_of_a_yaml_leads_to_its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy of a YAML in a run's folder has no base there; the error names the run's config.yaml, which loads."""
    write(tmp_path / "base.yaml", TINY)
    upper = write(tmp_path / "upper.yaml", "base: base.yaml\nnum_epochs: 2\n")
    c, run = config.load(upper), tmp_path / "saved" / "upper"
    run.mkdir(parents=True)
    (run / "upper.yaml").write_text(upper.read_text())
    assert "config.yaml" not in refusal(run / "upper.yaml")
    (run / "config.yaml").write_text(config.to_yaml(c))
    advice = refusal(run / "upper.yaml").partition("--config ")[2].partition(",")[0]
    assert config.load(advice) == c


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("num_epochs=3", "num_epochs", 3),
        ("global.epsilon=0.25", "global_.epsilon", 0.25),
        ("optimizer.Adam.lr=0.5", "optimizer.settings.lr", 0.5),
        ("optimizer={SGD: {lr: 0.5}}", "optimizer.name", "SGD"),
        ("optimizer=SGD", "optimizer.name", "SGD"),
        ("optimizer.SGD.lr=0.5", "optimizer.settings.lr", 0.5),
        ("network.resnet18_cifar.width=4", "network.settings.width", 4),
        ("backdoor.badnets.pattern=corner3x3", "backdoor.attack.settings.pattern", "corner3x3"),
        ("undefended.lr_scheduler={cosine_annealing: {}}", "undefended.lr_scheduler.name", "cosine_annealing"),
        ("undefended.lr_scheduler=null", "undefended.lr_scheduler", None),
        ("run=seeds/one", "run", "seeds/one"),
        ("saved_dir=a=b", "saved_dir", "a=b"),
        ("transform.train.primary=", "transform.train.primary", ()),
    ],
)
def test_set_overrides_one_setting(tiny: Path, override: str, key: str, value: Any) -> None:
    """`--set key.path=value` changes this setting and no other."""
    plain, c = config.load(tiny), config.load(tiny, [override])
    assert leaf(c, key) == value
    assert leaf(plain, key) != value
    top = key.split(".")[0]
    assert all(getattr(c, f.name) == getattr(plain, f.name) for f in dataclasses.fields(Config) if f.name != top)


@pytest.mark.parametrize(("given", "other"), [("pattern=corner3x3", "trigger_path"), ("trigger_path=a.png", "pattern")])
def test_of_two_keys_that_exclude_each_other_the_upper_one_counts(tmp_path: Path, given: str, other: str) -> None:
    """A pattern replaces the trigger_path of the base, and vice versa; other keys stay."""
    below = {"trigger_path": "b.png"} if other == "trigger_path" else {"pattern": "checker3x3"}
    backdoor = {"backdoor": {"poison_ratio": 0.25, "badnets": below}}
    base = write(tmp_path / "base.yaml", yaml.safe_dump({**TINY, **backdoor}, sort_keys=False))
    key, _, value = given.partition("=")
    over = write(tmp_path / "over.yaml", yaml.safe_dump({"base": "base.yaml", "backdoor": {"badnets": {key: value}}}))
    for c in (config.load(base, [f"backdoor.badnets.{given}"]), config.load(over)):
        assert getattr(c.attack.settings, key) == value
        assert getattr(c.attack.settings, other) is None
        assert c.attacker.poison_ratio == 0.25


def test_what_a_base_has_written_does_not_stand_for_an_override(tmp_path: Path, tiny: Path) -> None:
    """A value of a base is neither used nor shown in place of the one that replaces it."""
    (tmp_path / "base.yaml").write_text(tiny.read_text() + "run: 001\n")
    for text, expected in (("run: mine", "mine"), ("run: 0x6", "0x6")):
        (tmp_path / "own.yaml").write_text(f"base: base.yaml\n{text}\n")
        assert config.load(tmp_path / "own.yaml").run == expected
    assert config.load(tmp_path / "base.yaml", ["run=other"]).run == "other"
    for value, shown in (("", "None"), ("[1, 2]", "[1, 2]"), ("{}", "{}")):
        with pytest.raises(UserError) as caught:
            config.load(tiny, [f"num_epochs={value}"])
        assert f"num_epochs: {shown}" in str(caught.value) and "6" not in str(caught.value).partition("num_epochs")[2][:12]
    (tmp_path / "own.yaml").write_text("base: base.yaml\nrun: [a]\n")
    with pytest.raises(UserError, match=r"run: .*wrong type"):
        config.load(tmp_path / "own.yaml")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ('saved_dir="a\\0b"', "saved_dir: .*null character"),
        ("network.resnet18_cifar.width=1000000000", r"network\.resnet18_cifar: cannot be built .*lower its width"),
        ("network.resnet18_cifar.blocks=100000", "blocks: 100000: out of range"),
        ("loader.batch_size=4611686018427387904", r"loader\.batch_size: .*out of range"),
        ("seed.seed=9223372036854775808", r"seed\.seed: .*out of range"),
    ],
)
def test_what_no_system_can_hold_is_refused(tiny: Path, override: str, expected: str) -> None:
    """Before anything is trained, and in one line."""
    with pytest.raises(UserError, match=expected) as caught:
        config.load(tiny, [override])
    assert "\n" not in str(caught.value)


def test_the_last_override_wins(tiny: Path) -> None:
    """Of two `--set` options for one key, the later one wins."""
    assert config.load(tiny, ["num_epochs=3", "num_epochs=5"]).num_epochs == 5


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("num_epochs", ["key.path=value"]),
        ("=3", ["key.path=value"]),
        ("a b=3", ["key.path=value"]),
        ("global..epsilon=3", ["key.path=value"]),
        ("global.epsilon=[", ["not valid YAML", "quote"]),
        ("num_epochs=2020-13-45", ["2020-13-45", "whole number"]),
        ("optimizer={Adam: {lr: 1, lr: 2}}", ["lr", "given twice"]),
        ("num_epocs=3", ["num_epocs", "3", "did you mean num_epochs?"]),
        ("global.epsillon=3", ["global.epsillon", "3", "did you mean epsilon?"]),
        ("global.epsilon=3", ["global.epsilon", "3", "out of range", "> 0 and < 1"]),
        ("global=3", ["global", "3", "section"]),
        ("optimizer.Adam.lr=2e-3", ["optimizer.Adam.lr", "2e-3", "2.0e-3"]),
        ("num_epochs=99", ["num_epochs", "99", "no split"]),
    ],
)
def test_a_wrong_override_names_itself(tiny: Path, override: str, expected: list[str]) -> None:
    """An error on the command line names the `--set` option, not the file."""
    line = refusal(tiny, (override,))
    assert line.startswith(f"--set {override.partition('=')[0]}")
    for part in expected:
        assert part in line


PLAIN = {
    "num_epochs": ("num_epochs", st.integers(1, 6)),
    "seed.seed": ("seed.seed", st.integers(0, 2**32 - 1)),
    "global.epsilon": ("global_.epsilon", st.floats(0.01, 0.99)),
    "semi.mixmatch.alpha": ("semi.mixmatch.alpha", st.floats(0.1, 9)),
    "semi.mixmatch.temperature": ("semi.mixmatch.temperature", st.floats(0.1, 9)),
    "optimizer.Adam.lr": ("optimizer.settings.lr", st.floats(1e-6, 1)),
    "optimizer.Adam.eps": ("optimizer.settings.eps", st.floats(1e-9, 1)),
    "backdoor.poison_ratio": ("backdoor.poison_ratio", st.floats(0, 1)),
}


@given(st.lists(st.fixed_dictionaries({}, optional={k: s for k, (_, s) in PLAIN.items()}), min_size=1, max_size=3))
@settings(deadline=None, max_examples=25)
def test_the_uppermost_file_that_gives_a_key_wins(
    tmp_path_factory: pytest.TempPathFactory, layers: list[dict[str, Any]]
) -> None:
    """In a chain of bases each key has the value of the uppermost file that sets it."""
    folder = tmp_path_factory.mktemp("chain")
    path = write(folder / "0.yaml", TINY)
    for number, layer in enumerate(layers, 1):
        tree: dict[str, Any] = {"base": path.name}
        for key, value in layer.items():
            tree = changed(tree, key, value)
        path = write(folder / f"{number}.yaml", tree)
    c, plain = config.load(path), config.load(folder / "0.yaml")
    for key, (attribute, _) in PLAIN.items():
        expected = leaf(plain, attribute)
        for layer in layers:
            expected = layer.get(key, expected)
        assert leaf(c, attribute) == expected


def test_choices_of_a_base_are_replaced_or_merged(tmp_path: Path) -> None:
    """Another name replaces the base's choice with its settings; the same name keeps the settings that are not overridden."""
    base = changed(TINY, "optimizer", {"SGD": {"lr": 0.3, "momentum": 0.7}})
    base = changed(base, "lr_scheduler", {"multi_step": {"milestones": [2], "gamma": 0.3}})
    write(tmp_path / "base.yaml", base)
    same = config.load(write(tmp_path / "same.yaml", "base: base.yaml\noptimizer: {SGD: {lr: 0.5}}\n"))
    assert (same.optimizer.settings.lr, same.optimizer.settings.momentum) == (0.5, 0.7)
    other = config.load(
        write(tmp_path / "other.yaml", "base: base.yaml\noptimizer: {Adam: {eps: 0.1}}\nlr_scheduler: {cosine_annealing: {}}\n")
    )
    assert (other.optimizer.name, other.optimizer.settings.lr, other.optimizer.settings.eps) == ("Adam", 0.002, 0.1)
    assert other.lr_scheduler is not None and other.lr_scheduler.name == "cosine_annealing"
    off = config.load(write(tmp_path / "off.yaml", "base: base.yaml\nlr_scheduler: null\n"))
    assert off.lr_scheduler is None


def test_another_attack_replaces_the_bases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with another attack than its base keeps ratio and target, and drops the base's attack."""
    plugins = tmp_path / "attacks"
    plugins.mkdir()
    (plugins / "dots.py").write_text(
        "from dataclasses import dataclass\n\n@dataclass(frozen=True)\nclass Settings:\n    width: int = 1\n\nAttack = None\n"
    )
    monkeypatch.setattr(data.attacks, "__path__", [*data.attacks.__path__, str(plugins)])
    write(tmp_path / "base.yaml", TINY)
    c = config.load(write(tmp_path / "upper.yaml", "base: base.yaml\nbackdoor: {dots: {width: 4}, target_label: 5}\n"))
    assert (c.attack.name, c.attack.settings.width) == ("dots", 4)
    assert (c.backdoor.target_label, c.backdoor.poison_ratio) == (5, TINY["backdoor"]["poison_ratio"])  # type: ignore[index]


def test_the_order_of_transforms_is_the_upper_files(tmp_path: Path) -> None:
    """The transforms are exactly those of the upper file, in its order."""
    write(tmp_path / "base.yaml", TINY)  # crop, then flip
    upper = "base: base.yaml\ntransform:\n  train:\n    primary:\n"
    for order in (["random_horizontal_flip", "random_crop"], ["random_grayscale", "random_crop"], ["random_crop"]):
        path = write(tmp_path / "upper.yaml", upper + "".join(f"      {name}: {{}}\n" for name in order))
        assert [item.name for item in config.load(path).transform.train.primary] == order
    assert [item.name for item in config.load(path).transform.train.remaining] == ["to_tensor", "normalize"]


def test_an_override_of_one_transform_leaves_the_others(tiny: Path) -> None:
    """`--set` below a list of transforms changes that setting alone; `false` removes one transform, a section replaces all."""

    def primary(*overrides: str) -> list[tuple[str, dict[str, Any]]]:
        steps = config.load(tiny, [f"transform.train.primary{text}" for text in overrides]).transform.train.primary
        return [(step.name, dataclasses.asdict(step.settings)) for step in steps]

    (crop, settings), flip = primary()
    assert (crop, flip[0]) == ("random_crop", "random_horizontal_flip") and settings["padding_mode"] == "reflect"
    assert primary(".random_crop.padding=2") == [(crop, settings | {"padding": 2}), flip]
    assert primary(".random_horizontal_flip.p=0.25") == [(crop, settings), (flip[0], {"p": 0.25})]
    assert primary(".random_horizontal_flip=false") == [(crop, settings)]
    assert primary(".random_crop.padding=2", ".random_horizontal_flip=true") == [(crop, settings | {"padding": 2}), flip]
    assert [name for name, _ in primary(".random_grayscale.p=0.2")] == [crop, flip[0], "random_grayscale"]
    assert primary("={random_horizontal_flip: {p: 0.25}}") == [(flip[0], {"p": 0.25})]


def test_null_leaves_the_other_key(tiny: Path) -> None:
    """A key that stands in place of another removes it only if it is given a value."""
    for override, label, shift in (
        ("backdoor.target_shift=null", 3, None), ("backdoor.target_shift=1", None, 1), ("backdoor.target_label=5", 5, None),
    ):  # fmt: skip
        backdoor = config.load(tiny, ["backdoor.target_label=3", override]).attacker
        assert (backdoor.target_label, backdoor.target_shift) == (label, shift)
    backdoor = config.load(tiny, ["backdoor.target_label=8", "backdoor.target_shift=null"]).attacker
    assert (backdoor.target_label, backdoor.target_shift) == (8, None)


@pytest.mark.parametrize("name", ["a/log", "a/checkpoint", "a/log/b", "assets", "tables/a"])
def test_a_run_is_not_inside_the_folders_of_another(tiny: Path, name: str) -> None:
    """A run's folder is not one of those that another run has, or that runs share."""
    with pytest.raises(UserError, match=f"run: '{name}': .* is a folder"):
        config.load(tiny, [f"run={name}"])
    assert config.load(tiny, [f"run={name}-1" if "/" not in name else "run=log/a"]).run


def test_spaces_around_an_overriding_number_do_not_matter(tiny: Path) -> None:
    """`--set "seed.seed= 7"` is 7."""
    assert config.load(tiny, ["seed.seed= 7 "]).seed.seed == 7


def test_the_default_configuration_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `--config` the commands use the project's own YAML, wherever they are started."""
    monkeypatch.chdir(tmp_path)
    path = parse_arguments("", [], training=True).config
    assert config.load(path).run == "baseline_asd"


@pytest.mark.parametrize("in_base", [True, False])
@pytest.mark.parametrize(
    ("key", "value"), [("global.epsilon", 2), ("global.epsilo", 2), ("optimizer.Adam.lr", 0), ("transform.pre.random_crop", {})]
)
def test_an_error_names_the_file_that_the_key_came_from(tmp_path: Path, in_base: bool, key: str, value: Any) -> None:
    """The error names the file that sets the key, also if a file and its base both have the section."""
    wrong, right = changed({}, key, value), changed({}, f"{key.rpartition('.')[0]}", {})
    if key.startswith("optimizer"):
        right = {"optimizer": {"Adam": {"eps": 0.5}}}
    tree = copy.deepcopy(TINY)
    base, upper = (wrong, right) if in_base else (right, wrong)
    if key.startswith("transform") and in_base:
        upper = {"seed": {"seed": 3}}  # a list of transforms given above replaces the base's
    (tmp_path / "deep").mkdir()
    base_path = write(tmp_path / "deep" / "base.yaml", merge(tree, base, Config))
    upper_path = write(tmp_path / "upper.yaml", {"base": "deep/base.yaml"} | upper)
    line = refusal(upper_path)
    assert line.startswith(f"{base_path if in_base else upper_path}: {key}")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("base: nowhere.yaml\n", ["base", "nowhere.yaml", "no such file"]),
        ("base: upper.yaml\n", ["base", "circular"]),
        ("base: twin.yaml\n", ["base", "circular"]),
        ("base: 3\n", ["base", "3", "path"]),
        ("base: [a.yaml, b.yaml]\n", ["base", "a.yaml", "path"]),
        ("base: broken.yaml\n", ["broken.yaml", "line 1", "invalid YAML"]),
    ],
)
def test_a_base_that_cannot_be_used(tmp_path: Path, content: str, expected: list[str]) -> None:
    """A base that is missing, not text, invalid or circular is refused in one line."""
    write(tmp_path / "twin.yaml", "base: upper.yaml\n")
    write(tmp_path / "broken.yaml", "a: b: c\n")
    line = refusal(write(tmp_path / "upper.yaml", content))
    for part in expected:
        assert part in line


def test_a_base_is_found_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a base is relative to the file that names it, whatever the working directory."""
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    write(tmp_path / "deep" / "base.yaml", TINY)
    path = write(tmp_path / "deep" / "deeper" / "upper.yaml", "base: ../base.yaml\nnum_epochs: 2\n")
    monkeypatch.chdir(tmp_path)
    assert config.load(path.relative_to(tmp_path)).num_epochs == 2


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("config/b.yaml", "b"),
        ("config/a/b.yaml", "a/b"),
        ("config/a/b/c.yml", "a/b/c"),
        ("elsewhere/config/b.yaml", "b"),
        ("b.yaml", "b"),
        ("configs/a/b.yaml", "b"),
        ("my run (2).yaml", "my-run-2"),
        ("config/a b/c..d.yaml", "a-b/c-d"),
        ("+.yaml", "run"),
    ],
)
def test_a_run_is_named_by_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, name: str) -> None:
    """A YAML in config/ names its run by its path there, any other one by its file name."""
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, TINY)
    monkeypatch.chdir(tmp_path)
    assert config.load(place).run == config.load(path).run == name
    assert config.load(place, ["run=other-1.x/y"]).run == "other-1.x/y"
    assert config.load(path, [f"run={name}"]).run == name


@pytest.mark.parametrize("overrides", [(), ("lr_scheduler={multi_step: {milestones: [0.5, 3]}}", "dataset=cifar10", "run=a/b")])
def test_the_resolved_yaml_gives_the_same_configuration(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    """The config.yaml of a run can be passed as --config: it gives the same settings."""
    for number, path in enumerate([write(tmp_path / "tiny.yaml", TINY), *CONFIGS]):
        c = config.load(path, overrides)
        again = config.load(write(tmp_path / f"resolved{number}.yaml", config.to_yaml(c)))
        assert again == c


def test_nothing_changes_a_loaded_configuration(tiny: Path) -> None:
    """A loaded configuration is frozen at every level."""
    c = config.load(tiny, ["lr_scheduler=cosine_annealing"])
    parts = [c, c.seed, c.global_, c.semi.mixmatch, c.optimizer, c.optimizer.settings, c.attack.settings, c.network.settings]
    for part in [*parts, c.lr_scheduler, c.transform.train.primary[0].settings, c.dataset]:
        assert dataclasses.is_dataclass(part) and not isinstance(part, type)
        name = dataclasses.fields(part)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, name, None)


@pytest.mark.parametrize("value", ["!!bool maybe", "!!timestamp maybe", "!!int ''"])
def test_a_value_that_does_not_fit_its_tag_is_one_line(tmp_path: Path, value: str) -> None:
    """In a file it is invalid YAML; on the command line it is a text, as other invalid YAML is."""
    (tmp_path / "a.yaml").write_text(f"evidence: {value}\n")
    with pytest.raises(UserError, match=r"a\.yaml: invalid YAML: .*tag"):
        config.load(tmp_path / "a.yaml")
    with pytest.raises(UserError, match=r"evidence: "):
        config.load(REPOSITORY / "config/demo.yaml", [f"evidence={value}"])
