"""Random numbers by key, and plug-ins by file name."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils import draws, plugins
from utils.errors import UserError, nearest

KEYS = st.lists(st.one_of(st.integers(0, 200), st.sampled_from(["score", "virtual 0", "mixmatch", ""])), max_size=3)


def numbers(seed: int, *key: object) -> tuple[list[float], list[float]]:
    """Eight numbers of torch's and of numpy's generator for a key."""
    from_torch = torch.rand(8, generator=draws.generator(seed, *key), dtype=torch.float64).tolist()
    return from_torch, draws.numpy_generator(seed, *key).random(8).tolist()


@given(st.integers(0, 2**32 - 1), KEYS)
@settings(deadline=None, max_examples=40)
def test_the_same_key_gives_the_same_numbers(seed: int, key: list[object]) -> None:
    """What a key gives does not depend on what was drawn before, here or from the global generators."""
    first = numbers(seed, *key)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 - the global state is the point
    random.seed(1)
    draws.generator(seed, "other").initial_seed()
    torch.rand(3)
    assert numbers(seed, *key) == first


def test_drawing_leaves_the_global_generators_alone() -> None:
    """Drawing by key moves no global generator, so it cannot shift anything else in a program."""
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
    """The seed, the purpose, the epoch and their order all count."""
    assert not set(numbers(7, "score", 3)[0]) & set(numbers(*other)[0])  # type: ignore[arg-type]


def test_neighbouring_epochs_are_not_alike() -> None:
    """The draws of 200 epochs in a row are as even and as unrelated as those of one long generator."""
    table = np.array([numbers(100, "mixmatch", epoch)[0] for epoch in range(200)])
    assert abs(table.mean() - 0.5) < 5 / (12 * table.size) ** 0.5
    neighbours = np.corrcoef(table[:-1].ravel(), table[1:].ravel())[0, 1]
    assert abs(neighbours) < 5 / table.size**0.5


def test_seeds_fit_every_generator() -> None:
    """A key's seed is a whole number that torch and numpy both take."""
    assert all(0 <= draws.key_seed(seed, "x", epoch) < 2**63 for seed in (0, 2**32 - 1) for epoch in range(50))


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package `spare_tools` with the plug-ins hammer and saw, and helpers that are none."""
    package = tmp_path / "spare_tools"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "hammer.py").write_text("class Settings:\n    weight = 3\n")
    (package / "saw.py").write_text("class Settings:\n    teeth = 40\n")
    (package / "_helpers.py").write_text("raise RuntimeError('no plug-in')\n")
    (package / "README.txt").write_text("none either")
    monkeypatch.syspath_prepend(tmp_path)
    yield package
    for name in [name for name in sys.modules if name.partition(".")[0] == "spare_tools"]:
        del sys.modules[name]


def test_a_new_file_is_a_new_plugin(tools: Path) -> None:
    """A file dropped into the folder is found by its name, and no list must be changed."""
    assert plugins.names("spare_tools") == ["hammer", "saw"]
    assert plugins.settings("spare_tools", "saw").teeth == 40
    (tools / "drill.py").write_text("class Settings:\n    bits = 5\nspeed = 9\n")
    importlib.invalidate_caches()
    assert plugins.names("spare_tools") == ["drill", "hammer", "saw"]
    assert plugins.settings("spare_tools", "drill").bits == 5
    assert plugins.load("spare_tools", "drill").speed == 9


@pytest.mark.parametrize("name", ["hamer", "Hammer", "_helpers", "README", "os", "../hammer", "hammer.Settings", ""])
def test_an_unknown_plugin_is_answered_with_the_known_ones(tools: Path, name: str) -> None:
    """A name that no file has is refused in one line with the names that there are; nothing is imported for it."""
    with pytest.raises(UserError) as caught:
        plugins.load("spare_tools", name)
    line = str(caught.value)
    assert repr(name) in line and "spare_tools/" in line and "hammer, saw" in line and "\n" not in line
    assert ("did you mean hammer?" in line) == (name in ("hamer", "Hammer", "../hammer", "hammer.Settings"))


@pytest.mark.parametrize(("package", "has"), [("data.attacks", "badnets"), ("model.networks", "resnet18_cifar")])
def test_the_repositorys_plugins_are_found(package: str, has: str) -> None:
    """The attacks and networks that ship are found by their files' names."""
    folder = Path(importlib.import_module(package).__path__[0])
    expected = sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_"))
    assert plugins.names(package) == expected and has in expected


def test_nearest_names() -> None:
    """A misspelt name is answered with the one that it is nearest to, a foreign one with the list alone."""
    assert nearest("epsilom", ["alpha", "epsilon"]).startswith("did you mean epsilon?")
    assert nearest("xyz", ["alpha", "epsilon"]) == "known: alpha, epsilon"
    assert nearest(3, []) == "known: none"
