"""The documentation says what is so: the list of settings, commands, links."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY, run_script

from data.sets import RawData
from utils import plugins
from utils.config import Config, documentation, load
from utils.errors import UserError
from utils.schema import describe

README = (REPOSITORY / "README.md").read_text()


def test_the_list_of_settings_is_the_generated_one() -> None:
    """docs/configuration.md is what `python -m utils.config` prints, and lists each key once."""
    assert (REPOSITORY / "docs" / "configuration.md").read_text() == documentation()
    keys = [key for key, *_ in describe(Config)]
    assert len(keys) == len(set(keys))


MILESTONES = "{multi_step: {milestones: [0.5]}}"
# Where a default alone is no YAML: values of keys that need one, or a key that needs another.
SAMPLES = {
    "network": ["network=resnet18_cifar"],
    "backdoor": ["backdoor={blend: {}}"],
    "dataset_dir": ["dataset=shapes", "dataset_dir=null"],
    "lr_scheduler.multi_step.milestones": [f"lr_scheduler={MILESTONES}"],
    "lr_scheduler.multi_step.gamma": [f"lr_scheduler={MILESTONES}", "lr_scheduler.multi_step.gamma=0.1"],
    "undefended.lr_scheduler": [f"undefended.lr_scheduler={MILESTONES}"],
    "transform.train.remaining": ["transform.train.remaining={to_tensor: true}"],
    "transform.test.remaining": ["transform.test.remaining={to_tensor: true}"],
}


@pytest.mark.parametrize(("key", "default"), [(key, default) for key, _, default, _ in describe(Config)])
def test_every_listed_key_is_accepted(key: str, default: str) -> None:
    """A YAML may give any key of the list, with the default that the list names."""
    overrides = SAMPLES.get(key, [f"{key}={default}"])
    section, remaining, inner = key.partition(".remaining.")
    if remaining:  # these steps are given together
        name, setting = inner.split(".")
        overrides = [f"{section}.remaining={{to_tensor: true, {name}: {{{setting}: {default}}}}}"]
    load(REPOSITORY / "config" / "baseline_asd.yaml", overrides)


PLACES = ("transform.pre", "transform.train.primary", "transform.train.remaining", "transform.test.primary")


@pytest.mark.parametrize("name", plugins.names("data.transforms"))
@pytest.mark.parametrize("place", [*PLACES, "transform.test.remaining"])
def test_transforms_are_listed_only_where_they_are_accepted(place: str, name: str) -> None:
    """Each transform is refused in every section that its file does not declare, and accepted in those that it does."""
    first = "to_tensor: true, " if place.endswith(".remaining") and name != "to_tensor" else ""
    steps = f"{{{first}{name}: {{}}}}"
    override = [f"{place}={steps}"]
    if place in plugins.load("data.transforms", name).PLACES:
        load(REPOSITORY / "config" / "baseline_asd.yaml", override)
    else:
        with pytest.raises(UserError, match=f"{place}.{name}: .*belongs under transform"):
            load(REPOSITORY / "config" / "baseline_asd.yaml", override)


def test_every_link_leads_somewhere() -> None:
    """Links and pictures of README and CONTRIBUTING are files of the repository or addresses."""
    for document in ("README.md", "CONTRIBUTING.md"):
        for link in re.findall(r"\]\(([^)#]+)\)", (REPOSITORY / document).read_text()):
            assert link.startswith("https://") or (REPOSITORY / link).exists(), f"{document}: {link}"


def test_every_command_exists() -> None:
    """Scripts, configurations, options and make targets of the README's commands are there."""
    options = run_script("ASD.py", "--help").stdout + run_script("test.py", "--help").stdout
    for block in re.findall(r"```sh\n(.*?)```", README, re.S):
        for line in block.splitlines():
            words = line.partition("#")[0].split()
            for word in words:
                if word.endswith((".py", ".yaml")):
                    assert (REPOSITORY / word).is_file(), line
                if re.fullmatch(r"--[a-z]+", word) and "ASD.py" in words:
                    assert word in options, line
            if words[:1] == ["make"]:
                dry = subprocess.run(["make", "-n", words[1]], cwd=REPOSITORY, capture_output=True, text=True)
                assert dry.returncode == 0, dry.stderr


def test_the_yaml_example_loads(tmp_path: Path) -> None:
    """The README's example of another attack is a configuration that loads, and its trigger can be made."""
    from data.poison import build_attack

    example = re.findall(r"```yaml\n(.*?)```", README, re.S)[0]
    assert "base: baseline_asd.yaml" in example
    path = tmp_path / "mine.yaml"
    path.write_text(example.replace("base: ", f"base: {REPOSITORY / 'config'}/"))
    c = load(path)
    images, labels = np.zeros((10, 32, 32, 3), np.uint8), np.arange(10)
    attack: Any = build_attack(c, RawData(images, labels, images, labels, tuple("abcdefghij")))
    assert attack.mask.sum() == 9 and attack.mask[-3:, -3:].all()


def test_nothing_of_the_repository_speaks_of_a_machine() -> None:
    """No file of the project holds the path of somebody's home folder."""
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True).stdout.split()
    if not listed:
        pytest.skip("no git checkout")
    for name in listed:
        path = REPOSITORY / name
        if path.suffix in (".py", ".md", ".yaml", ".toml", ".txt", ".jsonl", ".json") and name != "tests/test_readme.py":
            assert not re.search(r"(?<![\w.])/(root|home)/\w", path.read_text(errors="ignore")), name
