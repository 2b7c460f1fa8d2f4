"""The README says what is so: its table of keys, its commands, its links."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY, run_script

from data.sets import RawData
from utils.config import Config
from utils.schema import describe

README = (REPOSITORY / "README.md").read_text()


@pytest.mark.parametrize("row", list(describe(Config)), ids=lambda row: row[0])
def test_every_key_stands_in_the_table(row: tuple[str, str, str, str]) -> None:
    """The table has every key with its kind, default and meaning, as `python -m utils.config` prints it."""
    key, kind, default, text = row
    assert f"| `{key}` | {kind} | {default} | {text} |" in README


def test_the_table_has_no_key_that_does_not_exist() -> None:
    """A key of the table that no setting has would mislead."""
    table = README[README.index("## Every key") :]
    told = re.findall(r"^\| `([\w.]+)` \|", table, re.M)
    assert set(told) == {key for key, *_ in describe(Config)} and len(told) == len(set(told))


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
    from utils.config import load

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
