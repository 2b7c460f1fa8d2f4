"""Random numbers by key, and plug-ins by file name."""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import REPOSITORY, TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from utils import draws, plugins
from utils.errors import UserError, nearest

KEYS = st.lists(st.one_of(st.integers(0, 200), st.sampled_from(["score", "virtual 0", "mixmatch", ""])), max_size=3)


def numbers(seed: int, *key: object) -> tuple[list[float], list[float]]:
    """Eight numbers each from torch's and from numpy's generator for a key."""
    from_torch = torch.rand(8, generator=draws.generator(seed, *key), dtype=torch.float64).tolist()
    return from_torch, draws.numpy_generator(seed, *key).random(8).tolist()


@given(st.integers(0, 2**32 - 1), KEYS)
@settings(deadline=None, max_examples=40)
def test_the_same_key_gives_the_same_numbers(seed: int, key: list[object]) -> None:
    """The numbers for a key do not depend on earlier draws, with this or another key or from the global generators."""
    first = numbers(seed, *key)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 - the global state is the point
    random.seed(1)
    draws.generator(seed, "other").initial_seed()
    torch.rand(3)
    assert numbers(seed, *key) == first


def test_drawing_does_not_change_the_global_generators() -> None:
    """Drawing by key does not change the state of the global generators, so it cannot affect other draws."""
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    expected = torch.rand(3).tolist(), np.random.random(3).tolist()  # noqa: NPY002
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    numbers(5, "score", 3)
    assert (torch.rand(3).tolist(), np.random.random(3).tolist()) == expected  # noqa: NPY002


@given(st.integers(0, 2**32 - 1), KEYS, st.integers(0, 2**32 - 1), KEYS)
@settings(deadline=None, max_examples=60)
def test_another_key_gives_other_numbers(seed: int, key: list[object], other_seed: int, other: list[object]) -> None:
    """Any two keys that differ in the seed, in one part, or in the number of parts give unrelated numbers."""
    if (seed, key) != (other_seed, other):
        for one, two in zip(numbers(seed, *key), numbers(other_seed, *other), strict=True):
            assert one != two and not set(one) & set(two)


OTHERS = [(8, "score", 3), (7, "scare", 3), (7, "score", 4), (7, "score"), (7, 3, "score"), (7, "score", 3, 0), (7, "score3")]


@pytest.mark.parametrize("other", OTHERS)
def test_each_part_of_a_key_counts(other: tuple[int | str, ...]) -> None:
    """The numbers depend on the seed, the purpose, the epoch and their order."""
    assert not set(numbers(7, "score", 3)[0]) & set(numbers(*other)[0])  # type: ignore[arg-type]


def test_consecutive_epochs_are_independent() -> None:
    """The draws of 200 consecutive epochs are as uniform and as uncorrelated as those of one generator."""
    table = np.array([numbers(100, "mixmatch", epoch)[0] for epoch in range(200)])
    assert abs(table.mean() - 0.5) < 5 / (12 * table.size) ** 0.5
    correlation = np.corrcoef(table[:-1].ravel(), table[1:].ravel())[0, 1]
    assert abs(correlation) < 5 / table.size**0.5


def test_a_seed_is_the_beginning_of_the_digest_of_its_key() -> None:
    """Runs of earlier versions can be repeated: a key's seed is the first 63 bits of the SHA-256 digest of `seed/part/part`."""
    for key in ((7, "score", 3), (0, "mixmatch", 119), (2**32 - 1, "iab", "mask")):
        digest = hashlib.sha256("/".join(map(str, key)).encode()).hexdigest()
        assert draws.key_seed(*key) == int(digest[:16], 16) // 2
    assert draws.key_seed(0, "score", 0) == 2500355493974164017


def test_seeds_fit_every_generator() -> None:
    """The seed for a key is an integer that both torch and numpy accept."""
    assert all(0 <= draws.key_seed(seed, "x", epoch) < 2**63 for seed in (0, 2**32 - 1) for epoch in range(50))


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package `spare_tools` with the plug-ins hammer and saw, and files that are not plug-ins."""
    package = tmp_path / "spare_tools"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "hammer.py").write_text("class Settings:\n    weight = 3\n")
    (package / "saw.py").write_text("class Settings:\n    teeth = 40\n")
    (package / "_helpers.py").write_text("raise RuntimeError('not a plug-in')\n")
    (package / "README.txt").write_text("not a plug-in")
    monkeypatch.syspath_prepend(tmp_path)
    yield package
    for name in [name for name in sys.modules if name.partition(".")[0] == "spare_tools"]:
        del sys.modules[name]


def test_a_new_file_is_a_new_plugin(tools: Path) -> None:
    """A file added to the folder is found by its name, without a change of any list."""
    assert plugins.names("spare_tools") == ["hammer", "saw"]
    assert plugins.settings("spare_tools", "saw").teeth == 40
    (tools / "drill.py").write_text("class Settings:\n    bits = 5\nspeed = 9\n")
    importlib.invalidate_caches()
    assert plugins.names("spare_tools") == ["drill", "hammer", "saw"]
    assert plugins.settings("spare_tools", "drill").bits == 5
    assert plugins.load("spare_tools", "drill").speed == 9


def test_a_plugin_that_lacks_a_name_is_refused_in_one_line(tools: Path) -> None:
    """A file without one of the names in the package's `DECLARED` is an error with file and name once it is chosen; other
    plug-ins can be used, and their attributes read, all the same."""
    (tools / "__init__.py").write_text('DECLARED = ("Settings", "strike")\n')
    (tools / "hammer.py").write_text("class Settings:\n    weight = 3\n\n\ndef strike(): ...\n")
    assert plugins.settings("spare_tools", "hammer").weight == 3
    with pytest.raises(UserError, match=r"^spare_tools/saw\.py: declares no strike: see spare_tools/__init__\.py$"):
        plugins.load("spare_tools", "saw")
    assert set(plugins.declared("spare_tools", "Settings")) == {"hammer", "saw"}
    for package in ("data.attacks", "data.datasets", "data.transforms", "defenses", "model.networks"):
        assert "Settings" in importlib.import_module(package).DECLARED


@pytest.mark.parametrize("name", ["hamer", "Hammer", "_helpers", "README", "os", "../hammer", "hammer.Settings", ""])
def test_the_error_for_an_unknown_plugin_has_the_known_ones(tools: Path, name: str) -> None:
    """An unknown name is one line with the existing names; nothing is imported for it."""
    with pytest.raises(UserError) as caught:
        plugins.load("spare_tools", name)
    line = str(caught.value)
    assert repr(name) in line and "spare_tools/" in line and "hammer, saw" in line and "\n" not in line
    assert ("did you mean hammer?" in line) == (name in ("hamer", "Hammer", "../hammer", "hammer.Settings"))


@pytest.mark.parametrize(("package", "has"), [("data.attacks", "badnets"), ("model.networks", "resnet18_cifar")])
def test_the_repositorys_plugins_are_found(package: str, has: str) -> None:
    """The attacks and networks of the repository are found by their file names."""
    folder = Path(importlib.import_module(package).__path__[0])
    expected = sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_"))
    assert plugins.names(package) == expected and has in expected


DROPPED = {
    "data/attacks/framed.py": """
import logging
from dataclasses import dataclass
import torch
from data.attack import AttackBase
from utils.config.settings import NETWORKS
from utils.config.schema import Named, setting

@dataclass(frozen=True)
class Settings:
    width: int = setting(2, "pixels of the frame", low=1)
    helper: Named = setting("color_mean", "a network of the attacker", choices=NETWORKS)

class Attack(AttackBase):
    def __init__(self, settings, context):
        self.width = settings.width
        logits = context.new_classifier(settings.helper, context.num_classes)(torch.zeros(2, 3, 16, 16))
        logging.getLogger(__name__).info(f"framed: the helper gives {tuple(logits.shape)}")

    def apply(self, images, index, split):
        out = images.copy()
        out[:, : self.width] = 255
        return out
""",
    "data/datasets/tinted_noise.py": """
from dataclasses import dataclass
import numpy as np
from data.sets import RawData

FOLDER_NAMES = "tinted"

@dataclass(frozen=True)
class Settings:
    pass

def load(settings, dataset_dir, download):
    def part(count, seed):
        labels = np.arange(count) % 4
        noise = np.random.default_rng(seed).integers(0, 60, (count, 16, 16, 3))
        return (noise + 45 * labels[:, None, None, None]).astype(np.uint8), labels
    return RawData(*part(80, 0), *part(20, 1), ("a", "b", "c", "d"))
""",
    "data/transforms/negative.py": """
from dataclasses import dataclass
import torch

PLACES = ("transform.train.primary",)

@dataclass(frozen=True)
class Settings:
    def draw(self, count, height, width, generator):
        return torch.rand(count, 1, generator=generator, dtype=torch.float64)

    def apply(self, images, draws):
        return torch.where(draws[:, :, None, None] < 0.5, images, 255 - images)
""",
    "model/networks/color_mean.py": """
from dataclasses import dataclass
from torch import nn
from model.backbone import finish
from utils.config.schema import setting

@dataclass(frozen=True)
class Settings:
    channels: int = setting(5, "features", low=1)

def build(settings):
    n = settings.channels
    parts = nn.Conv2d(3, n, 3, padding=1), nn.BatchNorm2d(n), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return finish("color_mean", nn.Sequential(*parts), n, None, ["0"])
""",
}


def copy_program(folder: Path) -> Path:
    """Return a copy of the program, without its documentation and tests, that a test may add files to."""
    program = folder / "program"
    for folder in ("data", "defenses", "engine", "loss", "model", "utils"):
        shutil.copytree(REPOSITORY / folder, program / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for script in ("ASD.py", "test.py"):
        shutil.copy(REPOSITORY / script, program)
    return program


@pytest.mark.slow
def test_plugins_are_new_files_without_other_changes(tmp_path: Path) -> None:
    """An attack that builds a network, a data set, a network and a transform are four new files; no other file changes.

    ASD.py trains with them in all stages, test.py tests the checkpoint, and `python -m data.poison` writes the poisoned set.
    """
    program = copy_program(tmp_path)
    for name, text in DROPPED.items():
        assert not (program / name).exists()
        (program / name).write_text(text)
    (tmp_path / "my-tinted-images").mkdir()
    plan = {key: value for key, value in TINY.items() if key != "dataset"} | {
        "dataset_dir": str(tmp_path / "my-tinted-images"),
        "num_classes": 4,
        "network": {"color_mean": {"channels": 6}},
        "backdoor": {"poison_ratio": 0.2, "target_label": 1, "framed": {"width": 3}},
        "transform": {key: {"remaining": {"to_tensor": True}} for key in ("train", "test")},
        "num_epochs": 3,
        "global": {"epoch_first": 1, "epoch_second": 2, "epoch_third": 3, "seed_num": 2, "t": 1, "n": 2},
        "saved_dir": str(tmp_path / "saved"),
        "storage_dir": str(tmp_path / "storage"),
    }
    plan["transform"]["train"]["primary"] = {"negative": {}}  # type: ignore[index]
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    said = []
    for command in (["ASD.py"], ["test.py"], ["-m", "data.poison", "--out", str(tmp_path / "set")]):
        line = [sys.executable, *command, "--config", str(tmp_path / "plan.yaml"), "--gpu", "cpu"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
        done = subprocess.run(line, cwd=program, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert all("framed: the helper gives (2, 4)" in text for text in said)
    saved = tmp_path / "saved" / "plan"
    resolved = yaml.safe_load((saved / "config.yaml").read_text())
    assert resolved["backdoor"]["framed"] == {"width": 3, "helper": {"color_mean": {"channels": 5}}}
    rows = [json.loads(row) for row in (saved / "log" / "metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["class-aware", "class-agnostic", "meta-split"]
    assert json.loads((saved / "log" / "test.json").read_text())["backdoor_total"] == 15
    described = json.loads((tmp_path / "set" / "set.json").read_text())
    assert list(described["dataset"]) == ["tinted_noise"] and "framed" in described["backdoor"]


def test_nearest_names() -> None:
    """For a misspelled name the most similar one is suggested, for any other name the list is given."""
    assert nearest("epsilom", ["alpha", "epsilon"]).startswith("did you mean epsilon?")
    assert nearest("xyz", ["alpha", "epsilon"]) == "known: alpha, epsilon"
    assert nearest(3, []) == "known: none"


DEFENSE = """
import torch
from dataclasses import dataclass
from data.batches import draw_supervised
from engine.defense import DefenseBase
from engine.supervised import supervised_steps, train_supervised
from loss.supervised import cross_entropy
from model.classifier import build_classifier
from utils.config.settings import OPTIMIZERS, SGD
from utils.config.schema import Named, setting
from utils.config.stages import DefenseSettings, Stage

@dataclass(frozen=True)
class Settings(DefenseSettings):
    needs_clean = True
    first: int = setting(2, "epochs on all images", low=0)
    last: int = setting(2, "epochs on the lowest losses", low=0)
    optimizer: Named = setting(Named("SGD", SGD(lr=0.05, momentum=0.9)), "of both stages", choices=OPTIMIZERS)

    def stages(self, config):
        return Stage("helper", self.first, self.optimizer), Stage("lowest", self.last, self.optimizer)

class Defense(DefenseBase):
    def build(self, state, stage):
        config, device = self.context.config, self.context.machine.device
        helper = state.networks.setdefault("helper", build_classifier(config.network, config.num_classes, 1).to(device))
        self.set_optimizer(state, stage, (helper if stage.name == "helper" else state.model).parameters())
        self.trained = helper if stage.name == "helper" else state.model
        state.stepper = supervised_steps(self.context, state, self.loss)

    def loss(self, inputs, index, count):
        return cross_entropy(self.trained(inputs), self.context.train_set.labels[index]).sum() / count

    def start_stage(self, state, stage):
        if stage.name == "lowest":
            state.sets["lowest"] = self.given.sort().values
            state.model.load_state_dict(state.networks["helper"].state_dict())

    def train_epoch(self, state, epoch):
        chosen = state.sets.get("lowest", torch.arange(len(self.context.train_set)))
        draws = draw_supervised(self.context.config.seed.seed, "plain", epoch, len(chosen), self.context.train_transform)
        self.trained.train()
        loss = train_supervised(self.context, state, "training", draws.of(chosen), 16)
        return {"loss": loss, "images": len(chosen)}
"""


@pytest.mark.slow
def test_a_dropped_in_defense_trains_and_resumes(tmp_path: Path) -> None:
    """A defense is one new file: with stages, networks and index sets of its own it trains, is tested, and resumes exactly."""
    program = copy_program(tmp_path)
    (program / "defenses" / "two_stages.py").write_text(DEFENSE)
    plan = TINY | {"defense": {"two_stages": {"last": 1}}}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))

    def call(script: str, *options: str, code: int = 0) -> str:
        line = [sys.executable, script, "--config", str(tmp_path / "plan.yaml"), "--gpu", "cpu", *options]
        line += [f"--set=saved_dir={tmp_path / 'saved'}", f"--set=storage_dir={tmp_path / 'storage'}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
        done = subprocess.run(line, cwd=program, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    call("ASD.py", "--set=run=whole")
    call("test.py", "--set=run=whole")
    rows = [json.loads(row) for row in (tmp_path / "saved/whole/log/metrics.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["images"], row.get("lowest_size")) for row in rows] == [
        ("helper", 200, None), ("helper", 200, None), ("lowest", 20, 20),
    ]  # fmt: skip
    assert rows[-1]["poisoned_in_lowest"] == 0 and {row["defense"] for row in rows} == {"two_stages"}
    for stop in (1, 2):  # within the first stage, and between the stages
        cut = f"--set=run=cut-{stop}"
        environment_line = "import sys, engine.session as s; old = s.Session.finish_epoch\n" + textwrap.dedent(f"""
            def finish(self, losses):
                old(self, losses)
                if self.state.epoch == {stop}:
                    self.writer.wait()
                    raise KeyboardInterrupt
            s.Session.finish_epoch = finish
            import ASD, runpy
            from utils.cli import command
            command("ASD.py", ASD.main)
        """)
        (program / "cut.py").write_text(environment_line)
        call("cut.py", cut, code=130)
        assert f"epoch {stop}/3" in call("ASD.py", cut)
        one, two = (
            torch.load(tmp_path / "storage" / name / "checkpoint/latest_model.pt", weights_only=True)
            for name in ("whole", f"cut-{stop}")
        )
        for part in ("model_state_dict", "optimizer_state_dict", "networks", "sets"):
            assert same(one[part], two[part]), (stop, part)
    assert "two_stages.lst" in call("ASD.py", "--set=defense.two_stages.lst=1", code=2)
    assert "no stage" in call("ASD.py", "--set=defense={two_stages: {first: 0, last: 0}}", code=2)


def same(one: Any, two: Any) -> bool:
    """Return whether two nested containers hold equal values."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    return torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


EXAMPLES = {  # where the documentation says that they belong
    "data/attacks/stripe.py": "docs/attacks.md",
    "data/datasets/noise.py": "CONTRIBUTING.md",
    "defenses/clean_only.py": "docs/defenses.md",
}


@pytest.mark.slow
def test_the_examples_of_the_documentation_work_as_they_are(tmp_path: Path) -> None:
    """The attack, the data set and the defense of the documentation, as the files that it names, train together and are tested;
    every function has types and a docstring, as the checks of this repository demand."""
    program = copy_program(tmp_path)
    for name, document in EXAMPLES.items():
        text = (REPOSITORY / document).read_text()
        assert f"`{name}`" in text
        (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
        (program / name).write_text(code)
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.FunctionDef):
                assert ast.get_docstring(node) or node.name == "__init__", node.name
                assert node.returns and all(arg.annotation or arg.arg == "self" for arg in node.args.args), node.name
    plan = TINY | {
        "dataset": {"noise": {"train_size": 80, "test_size": 20}},
        "num_classes": 4,
        "defense": {"clean_only": {"epochs": 2}},
    }
    plan |= {
        "backdoor": {"poison_ratio": 0.1, "stripe": {"column": 3}},
        "network": {"resnet18_cifar": {"width": 2, "blocks": 1, "num_classes": 4}},
    }
    plan |= {"saved_dir": str(tmp_path / "saved"), "storage_dir": str(tmp_path / "storage")}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    for script in ("ASD.py", "test.py"):
        line = [sys.executable, script, "--config", str(tmp_path / "plan.yaml"), "--gpu", "cpu"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
        done = subprocess.run(line, cwd=program, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    rows = [json.loads(row) for row in (tmp_path / "saved/plan/log/metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["clean only"] * 2
