"""`dataset: poisoned_arrays`: a set that other code has poisoned, as one file of arrays."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import logged
from training import train_here

from data.loading import load_data
from data.poisoned_sets import export
from data.poisoned_sets.folder import read_set
from data.poisoned_sets.stored import StoredSet
from utils import config
from utils.config import Config
from utils.errors import UserError

Arrays = dict[str, Any]


@pytest.fixture
def mine(tiny: Path, tmp_path: Path) -> Arrays:
    """The tiny set as the code of an attack would have it in memory: plain arrays, 64-bit or 8-bit labels."""
    export.export(config.load(tiny), tmp_path / "made", torch.device("cpu"))
    made = read_set(tmp_path / "made")
    return {
        "train_images": made.train.images,
        "train_labels": made.train.labels.astype(np.uint8),
        "train_original_labels": made.train.original_labels,
        "train_poisoned": made.train.flags == 1,
        "test_images": made.clean_test.images,
        "test_labels": made.clean_test.labels.astype(np.int32),
        "triggered_images": made.backdoor_test.images,
        "triggered_indices": made.backdoor_test.indices,
        "class_names": np.array(made.class_names),
    }


def plan(tiny: Path, arrays: Arrays, *overrides: str, **settings: object) -> tuple[Config, Path]:
    """Write the arrays and a YAML that names them; return the configuration and the YAML's path."""
    np.savez(tiny.parent / "mine.npz", **arrays)
    own = {"poisoned_arrays": {"target_label": 3} | settings}
    raw = yaml.safe_load(tiny.read_text()) | {"dataset": own, "dataset_dir": str(tiny.parent / "mine.npz"), "backdoor": None}
    path = tiny.parent / "on_arrays.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return config.load(path, overrides), path


def read(tiny: Path, arrays: Arrays, **settings: object) -> StoredSet:
    """Return the stored set that the arrays give."""
    stored = load_data(plan(tiny, arrays, **settings)[0])[1]
    assert stored is not None
    return stored


def test_a_run_on_arrays_equals_the_run_that_poisons_the_data_itself(tiny: Path, mine: Arrays) -> None:
    """Losses, pools, ACC, ASR and weights are the same bit for bit; the log names the attack."""
    short = ("num_epochs=3", "global.epoch_first=1", "global.epoch_second=2")
    states = []
    for settings, path in ((config.load(tiny, short), tiny), plan(tiny, mine, *short, attack="halo")):
        run = train_here(settings, path, "False")
        state = torch.load(run.checkpoints / "latest_model.pt", weights_only=True)
        for row in state["history"]:
            del row["seconds"]
        states.append(state)
    assert states[0]["history"] == states[1]["history"] and len(states[0]["history"]) == 3
    assert states[0]["history"][-1]["attack_success_rate"] is not None
    for name, tensor in states[0]["model_state_dict"].items():
        assert torch.equal(tensor, states[1]["model_state_dict"][name]), name
    assert "attack halo, target class 3" in (run.log / "asd.log").read_text()


def test_arrays_become_an_exported_set(tiny: Path, tmp_path: Path, mine: Arrays) -> None:
    """`python -m data.poison` writes them as a set with checksums: the same arrays as those of the original export."""
    settings, _ = plan(tiny, mine)
    export.export(settings, tmp_path / "copy", torch.device("cpu"))
    one, two = read_set(tmp_path / "made"), read_set(tmp_path / "copy")
    for part in ("train", "clean_test", "backdoor_test"):
        for name, array in vars(getattr(one, part)).items():
            assert np.array_equal(array, getattr(getattr(two, part), name)), (part, name)
    assert two.class_names == one.class_names
    assert two.backdoor.poison_ratio == pytest.approx(mine["train_poisoned"].mean())
    with logged() as said:
        export.export(settings, tmp_path / "copy", torch.device("cpu"))
    assert "contains this set already" in said[-1]
    other, _ = plan(tiny, mine | {"train_images": 255 - mine["train_images"]})
    with pytest.raises(UserError, match="another name"):
        export.export(other, tmp_path / "copy", torch.device("cpu"))


def test_optional_arrays_and_other_labels(tiny: Path, mine: Arrays) -> None:
    """Without class names the classes are numbered; cover images are marked; clean-label and all-to-all sets are read."""
    del mine["class_names"]
    cover = np.zeros(200, bool)
    cover[np.flatnonzero(~mine["train_poisoned"])[:5]] = True
    stored = read(tiny, mine | {"train_cover": cover})
    assert stored.class_names == tuple(map(str, range(10)))
    assert (stored.train.flags == 2).sum() == 5 and (stored.train.flags == 1).sum() == mine["train_poisoned"].sum()

    labels = mine["train_original_labels"]
    inside = labels == 3
    stored = read(tiny, mine | {"train_labels": labels, "train_poisoned": inside})
    assert stored.backdoor.poison_ratio == 1 and np.array_equal(stored.train.labels, labels)

    shifted = np.where(mine["train_poisoned"], (labels + 1) % 10, labels)
    every = {"triggered_images": 255 - mine["test_images"], "triggered_indices": np.arange(43)}
    stored = read(tiny, mine | {"train_labels": shifted} | every, target_label=None, target_shift=1)
    assert np.array_equal(stored.backdoor_test.labels, (mine["test_labels"] + 1) % 10)


def test_a_limit_that_leaves_no_images_is_refused(tiny: Path, mine: Arrays) -> None:
    """The line names the limit and the least value that leaves an image of each kind; that value works."""
    first = int(mine["triggered_indices"][8])
    for name in ("triggered_images", "triggered_indices"):
        mine[name] = mine[name][8:]
    with pytest.raises(UserError, match=rf"^data\.test_limit: {first}: keeps no triggered .*: must be at least {first + 1}$"):
        load_data(plan(tiny, mine, f"data.test_limit={first}")[0])
    stored = load_data(plan(tiny, mine, f"data.test_limit={first + 1}")[0])[1]
    assert stored is not None and len(stored.clean_test) == first + 1 and len(stored.backdoor_test) == 1


def without(name: str) -> Callable[[Arrays], None]:
    """Remove an array."""
    return lambda arrays: arrays.pop(name)


def change(name: str, make: Callable[[np.ndarray], np.ndarray]) -> Callable[[Arrays], None]:
    """Replace an array."""
    return lambda arrays: arrays.update({name: make(arrays[name])})


DAMAGES: dict[str, tuple[Callable[[Arrays], None], str]] = {
    "no truth": (without("train_poisoned"), "has no train_poisoned: needs train_images, train_labels"),
    "unknown array": (lambda arrays: arrays.update(extra=np.zeros(2)), "has 'extra', which is unknown"),
    "float images": (change("train_images", lambda x: x / 255), "train_images: float64 (200, 32, 32, 3): must be uint8"),
    "channels first": (change("test_images", lambda x: x.transpose(0, 3, 1, 2)), "test_images: uint8 (43, 3, 32, 32): must be"),
    "one-hot labels": (change("train_labels", lambda x: np.eye(10)[x]), "train_labels: float64 (200, 10): must be integers"),
    "too few labels": (change("test_labels", lambda x: x[1:]), "test_labels: 42 values for 43 images"),
    "index mask": (change("train_poisoned", np.flatnonzero), "train_poisoned: int64"),
    "negative": (change("train_original_labels", lambda x: x - 1), "train: original_labels: -1"),
    "foreign position": (change("triggered_indices", lambda x: x + 9), "triggered_indices: "),
    "not ascending": (change("triggered_indices", lambda x: x[::-1]), "triggered: indices: must ascend"),
    "other size": (change("triggered_images", lambda x: x[:, :16, :16]), "with one size in all parts"),
    "target class": (
        change("triggered_indices", lambda x: np.arange(len(x))),
        "triggered: contains images",
    ),
    "clean marked": (change("train_poisoned", lambda x: ~x), "train: labels: poisoned images do not carry class 3"),
    "cover too": (lambda arrays: arrays.update(train_cover=arrays["train_poisoned"]), "train_cover: marks images that"),
    "no trigger": (
        lambda arrays: arrays.update(triggered_images=arrays["test_images"][arrays["triggered_indices"]]),
        "triggered_images: are the test images, without any trigger",
    ),
    "equal names": (change("class_names", lambda x: np.full(10, "cat")), "class_names: a name occurs twice"),
    "an empty name": (change("class_names", lambda x: np.array(["", *x[1:]])), "class_names: a name is empty"),
    "one image alone": (change("train_images", lambda x: np.uint8(3)), "train_images: uint8 (): must be"),
    "few names": (change("class_names", lambda x: x[:9]), "there are 9 classes"),
    "empty": (change("train_images", lambda x: x[:0]), "not empty"),
    "objects": (change("train_labels", lambda x: x.astype(object)), "not an .npz file of arrays"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_with_a_fault_is_refused_in_one_line(tiny: Path, mine: Arrays, damage: str) -> None:
    """The line names the file, the array and what it must be."""
    make, text = DAMAGES[damage]
    make(mine)
    with pytest.raises(UserError) as caught:
        read(tiny, mine)
    line = str(caught.value)
    assert "\n" not in line and "mine.npz" in line and text in line, line


def test_a_member_that_is_not_an_array_is_refused(tiny: Path, mine: Arrays) -> None:
    """numpy returns the bytes of such a member: one line, as for any other file that is not one of arrays."""
    mine.pop("train_cover", None)
    settings, _ = plan(tiny, mine)
    with zipfile.ZipFile(tiny.parent / "mine.npz", "a") as archive:
        archive.writestr("train_cover", b"hello")
    with pytest.raises(UserError, match=r"mine\.npz: not an \.npz file of arrays \('train_cover' is not an array\)"):
        load_data(settings)


def test_one_wrong_label_does_not_decide_the_number_of_classes(tiny: Path, mine: Arrays) -> None:
    """Without class names a label that no data set has is refused with its array and value, and no class is named for it."""
    del mine["class_names"]
    mine["train_original_labels"][7] = 10**9
    with pytest.raises(
        UserError, match=r"mine\.npz: train_original_labels: the largest is 1000000000: must be less than 1000000$"
    ):
        read(tiny, mine)


def test_settings_with_a_fault_are_refused(tiny: Path, mine: Arrays) -> None:
    """A missing file, a file of another kind, a pickle, no target or two: one line each, and nothing in a file is run."""
    for settings, text in (({"target_label": None}, "needs either"), ({"target_shift": 2}, "needs either")):
        with pytest.raises(UserError, match=text):
            read(tiny, mine, **settings)
    for name in ("target_label", "target_shift", "poison_ratio", "poison_mode"):
        with pytest.raises(UserError, match=f"^dataset.poisoned_arrays.attack: {name}: .*another name$"):
            read(tiny, mine, attack=name)
    for name in ("", "two words", "a\nb"):
        with pytest.raises(UserError, match=r"dataset\.poisoned_arrays\.attack: .*: must be a plain name"):
            read(tiny, mine, attack=name)
    settings, _ = plan(tiny, mine, "dataset_dir=nothing.npz")
    with pytest.raises(UserError, match=r"nothing\.npz: no such file"):
        load_data(settings)
    settings, _ = plan(tiny, mine)
    for contents in (b"no arrays", pickle.dumps(Bomb())):
        (tiny.parent / "mine.npz").write_bytes(contents)
        with pytest.raises(UserError, match=r"not an \.npz file"):
            load_data(settings)
    with pytest.raises(UserError, match="num_classes: 12: the set has 10"):
        load_data(plan(tiny, mine, "num_classes=12", "network.resnet18_cifar.num_classes=null")[0])


class Bomb:
    """Fails the test if it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return pytest.fail, ("code of the file was run",)
