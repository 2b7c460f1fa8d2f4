"""The documentation matches the code: list of settings, commands, links, examples."""

from __future__ import annotations

import importlib
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import REPOSITORY, run_script

from data.sets import AttackContext, RawData
from utils import plugins
from utils.config import Config, load
from utils.config.documentation import documentation
from utils.config.schema import as_dict, describe
from utils.errors import UserError
from utils.sweep.plan import read

README = (REPOSITORY / "README.md").read_text()
GUIDES = [Path("README.md"), Path("CONTRIBUTING.md"), *(path.relative_to(REPOSITORY) for path in REPOSITORY.glob("docs/*.md"))]
PAGES = [*GUIDES, *(path.relative_to(REPOSITORY) for path in REPOSITORY.glob("results/**/README.md"))]


def test_the_list_of_settings_is_the_generated_one() -> None:
    """docs/configuration.md is the output of `python -m utils.config`, and lists each key once."""
    assert (REPOSITORY / "docs" / "configuration.md").read_text() == documentation()
    keys = [key for key, *_ in describe(Config)]
    assert len(keys) == len(set(keys))


MILESTONES = "{multi_step: {milestones: [0.5]}}"
# Where a default alone is no YAML: values of keys that need one, or a key that needs another.
SAMPLES = {
    "network": ["network=resnet18_cifar"],
    "backdoor": ["backdoor={blend: {}}"],
    **{
        f"dataset.backdoorbench_record.{key}": [f"dataset={{backdoorbench_record: {{record: a, attack: b, clean: {clean}}}}}"]
        for key, clean in (("record", "cifar10"), ("attack", "{shapes: {}}"), ("clean", "gtsrb"))
    },
    **{
        f"dataset.backdoorbench_record.{key}": [
            "dataset={backdoorbench_record: {record: a, attack: b, clean: cifar10}}",
            f"dataset.backdoorbench_record.{key}={default}",
        ]
        for key, default in (("unchanged", "auto"), ("target_label", "null"), ("poison_ratio", "null"))
    },
    "dataset_dir": ["dataset=shapes", "dataset_dir=null"],
    "lr_scheduler.multi_step.milestones": [f"lr_scheduler={MILESTONES}"],
    "lr_scheduler.multi_step.gamma": [f"lr_scheduler={MILESTONES}", "lr_scheduler.multi_step.gamma=0.1"],
    "transform.train.remaining": ["transform.train.remaining={to_tensor: true}"],
    "transform.test.remaining": ["transform.test.remaining={to_tensor: true}"],
}


@pytest.mark.parametrize(("key", "default"), [(key, default) for key, _, default, _ in describe(Config)])
def test_every_listed_key_is_accepted(key: str, default: str) -> None:
    """Every listed key may be set to the listed default in a YAML."""
    overrides = SAMPLES.get(key, [f"{key}={default}"])
    section, remaining, inner = key.partition(".remaining.")
    if remaining:  # these steps are given together
        name, setting = inner.split(".")
        overrides = [f"{section}.remaining={{to_tensor: true, {name}: {{{setting}: {default}}}}}"]
    load(REPOSITORY / "config" / "baseline_asd.yaml", overrides)


CHOSEN = [(key, default) for key, kind, default, _ in describe(Config) if kind == "one of" and default.startswith("{")]


@pytest.mark.parametrize(("key", "default"), CHOSEN)
def test_a_listed_default_is_what_applies_without_the_key(tmp_path: Path, key: str, default: str) -> None:
    """An optimizer or schedule that is chosen by default is listed with its settings: to write them down changes nothing."""
    path, section = tmp_path / "a.yaml", key.split(".")
    path.write_text(
        "dataset: shapes\nnetwork: resnet18_cifar\nbackdoor: {badnets: {}}\n"
        "transform: {train: {remaining: {to_tensor: true}}, test: {remaining: {to_tensor: true}}}\n"
    )
    own = [f"defense={{{section[1]}: {{}}}}"] if section[0] == "defense" else []
    assert as_dict(load(path, own)) == as_dict(load(path, [*own, f"{key}={default}"]))


PLACES = ("transform.pre", "transform.train.primary", "transform.train.remaining", "transform.test.primary")


@pytest.mark.parametrize("name", plugins.names("data.transforms"))
@pytest.mark.parametrize("place", [*PLACES, "transform.test.remaining"])
def test_transforms_are_listed_only_where_they_are_accepted(place: str, name: str) -> None:
    """Each transform is accepted in exactly the sections that its file declares."""
    first = "to_tensor: true, " if place.endswith(".remaining") and name != "to_tensor" else ""
    steps = f"{{{first}{name}: {{}}}}"
    override = [f"{place}={steps}"]
    if place in plugins.load("data.transforms", name).PLACES:
        load(REPOSITORY / "config" / "baseline_asd.yaml", override)
    else:
        with pytest.raises(UserError, match=f"{place}.{name}: .*belongs under transform"):
            load(REPOSITORY / "config" / "baseline_asd.yaml", override)


def anchors(text: str) -> set[str]:
    """Return GitHub's anchors for the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short() -> None:
    """The README has at most 150 lines."""
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_link_resolves(page: Path) -> None:
    """Links and images of all pages are addresses or files of the repository, and their anchors are headings."""
    for link in re.findall(r"\]\(([^)\s]+)\)", (REPOSITORY / page).read_text()):
        if link.startswith("https://"):
            continue
        target, _, anchor = link.partition("#")
        path = (REPOSITORY / page).parent / target if target else REPOSITORY / page
        assert path.exists(), link
        assert not anchor or anchor in anchors(path.read_text()), link


@pytest.mark.parametrize("page", GUIDES, ids=str)
def test_every_named_function_is_in_the_linked_file(page: Path) -> None:
    """A link whose text is a name leads to the Python file that defines it."""
    for name, target in re.findall(r"\[`(\w+)`\]\(([^)]+\.py)\)", (REPOSITORY / page).read_text()):
        source = ((REPOSITORY / page).parent / target).read_text()
        assert re.search(rf"^(def|class) {name}\b", source, re.M), f"{name} in {target}"


def test_the_pages_have_what_these_tests_check() -> None:
    """Links to functions, commands and examples are found in the form in which they are written."""
    text = "".join((REPOSITORY / page).read_text() for page in GUIDES)
    assert len(re.findall(r"\[`\w+`\]\([^)]+\.py\)", text)) > 20
    assert len(re.findall(r"```sh\n", text)) > 10 and len(re.findall(r"```yaml\n", text)) > 4


@pytest.fixture(scope="module")
def options() -> str:
    """Return the options of both scripts."""
    return run_script("ASD.py", "--help").stdout + run_script("test.py", "--help").stdout


@pytest.mark.parametrize("page", GUIDES, ids=str)
def test_every_command_exists(page: Path, options: str) -> None:
    """Scripts, modules, configurations, options and make targets in the commands exist."""
    for block in re.findall(r"```sh\n(.*?)```", (REPOSITORY / page).read_text(), re.S):
        for line in block.splitlines():
            words = line.partition("#")[0].split()
            for before, word in zip(["", *words], words, strict=False):
                if word.endswith((".py", ".yaml")):
                    assert (REPOSITORY / word).is_file(), line
                if re.fullmatch(r"--[a-z]+", word) and {"ASD.py", "test.py"} & {*words}:
                    assert word in options, line
                if before == "-m" and word != "venv":
                    place = REPOSITORY / word.replace(".", "/")
                    assert place.is_dir() or place.with_suffix(".py").is_file(), line
            if words[:1] == ["make"]:
                dry = subprocess.run(["make", "-n", words[1]], cwd=REPOSITORY, capture_output=True, text=True)
                assert dry.returncode == 0, dry.stderr


@pytest.mark.parametrize("page", GUIDES, ids=str)
def test_every_yaml_example_loads(page: Path, tmp_path: Path) -> None:
    """The examples of all pages are configurations or sweep files that load, beside the shipped ones."""
    for i, example in enumerate(re.findall(r"```yaml\n(.*?)```", (REPOSITORY / page).read_text(), re.S)):
        path = tmp_path / f"example{i}.yaml"
        if example.startswith("config: "):
            path.write_text(example.replace("config: ../", f"config: {REPOSITORY / 'config'}/"))
            read(path)
            continue
        assert example.startswith("base: ")
        path.write_text(example.replace("base: ", f"base: {REPOSITORY / 'config'}/"))
        load(path)


def test_the_trigger_of_the_readmes_example_can_be_made(tmp_path: Path) -> None:
    """The README's example of another attack stamps nine pixels into the lower right corner."""
    from data.poisoning import build_attack

    path = tmp_path / "mine.yaml"
    path.write_text(re.findall(r"```yaml\n(.*?)```", README, re.S)[0].replace("base: ", f"base: {REPOSITORY / 'config'}/"))
    images, labels = np.zeros((10, 32, 32, 3), np.uint8), np.arange(10)
    attack: Any = build_attack(load(path), RawData(images, labels, images, labels, tuple("abcdefghij")))
    assert attack.mask.sum() == 9 and attack.mask[-3:, -3:].all()


def test_the_example_of_a_new_attack_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The attack in docs/attacks.md makes a column white and does not modify the given images."""
    (tmp_path / "stripe.py").write_text(
        re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs/attacks.md").read_text(), re.S)[0]
    )
    monkeypatch.syspath_prepend(tmp_path)
    stripe = importlib.import_module("stripe")
    images, labels = np.zeros((2, 8, 8, 3), np.uint8), np.arange(2)
    context = AttackContext(RawData(images, labels, images, labels, ("a", "b")), 0, 2, 7, tmp_path)
    altered = stripe.Attack(stripe.Settings(column=5), context).apply(images, labels, "train")
    assert (altered[:, :, 5] == 255).all() and altered.sum() == 2 * 8 * 3 * 255 and not images.any()


def test_no_file_has_a_path_of_a_machine() -> None:
    """No file of the project contains the path of a home folder."""
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True).stdout.split()
    if not listed:
        pytest.skip("no git checkout")
    for name in listed:
        path = REPOSITORY / name
        if path.suffix in (".py", ".md", ".yaml", ".toml", ".txt", ".jsonl", ".json") and name != "tests/test_readme.py":
            assert not re.search(r"(?<![\w.])/(root|home)/\w", path.read_text(errors="ignore")), name


def test_the_public_ci_runs_the_same_command() -> None:
    """The workflow of the public CI runs .ci/run, on the oldest supported Python too."""
    workflow = yaml.safe_load((REPOSITORY / ".github/workflows/ci.yml").read_text())
    job = workflow["jobs"]["test"]
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert "3.10" in job["strategy"]["matrix"]["python"] and "Python 3.10" in README
