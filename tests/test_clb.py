"""CLB: the trigger's pixels, the adversarial perturbation, the surrogate, and the assets."""

from __future__ import annotations

import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, logged
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from data.attack import keep_asset
from data.attacks import _surrogate as surrogate
from data.attacks import badnets, clb
from data.attacks._surrogate import Adversary, build_augmentation, load_surrogate, pgd, rise_and_fall, train_surrogate
from data.attacks.clb import Attack, Settings, build_trigger, to_uint8
from data.batches import endless_order
from data.poisoning import build_test_sets, poison_training_set
from data.sets import AttackContext, RawData
from model.classifier import new_classifier
from model.networks import resnet18_cifar
from utils import config
from utils.config.schema import Named, merge
from utils.draws import generator, key_seed
from utils.errors import UserError
from utils.kinds import POISONED

TARGET = 1
SMALL = Named("resnet18_cifar", resnet18_cifar.Settings(width=2, blocks=1))
QUICK = Settings(surrogate=SMALL, training="fast", epochs=2, batch_size=16, steps=5)
# The published trigger on 32 x 32 pixels: (row, column) of the white ones, four in each corner.
WHITE = {
    (0, 0), (1, 1), (2, 0), (2, 2), (0, 31), (1, 30), (2, 29), (2, 31),
    (29, 0), (30, 1), (31, 0), (31, 2), (29, 31), (30, 30), (31, 29), (31, 31),
}  # fmt: skip


def world(count: int = 120, side: int = 8, seed: int = 0) -> RawData:
    """Read-only noise in three classes; class c is brighter by 30 c, so that the classes can be learned."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    pixels = rng.integers(0, 150, (count, side, side, 3)) + 30 * labels[:, None, None, None]
    images = pixels.astype(np.uint8)
    images.flags.writeable = False
    return RawData(images, labels, images[:40], labels[:40], ("a", "b", "c"))


def make(folder: Path, chosen: Settings = QUICK, raw: RawData | None = None, seed: int = 5) -> Attack:
    """The attack on a small world."""
    return Attack(chosen, AttackContext(raw or world(), TARGET, 3, seed, folder, new_classifier=new_classifier))


def victims(attack: Attack) -> tuple[np.ndarray, np.ndarray]:
    """All training images of the target class and their indices."""
    raw = attack.context.raw
    index = np.flatnonzero(raw.train_labels == TARGET)
    return raw.train_images[index], index


# -- The trigger -------------------------------------------------------------------------------------------------------


def test_corner_trigger_is_36_pixels_16_white_and_20_black() -> None:
    """On 32 x 32 images the trigger is the published one: 3 x 3 pixels in each corner, in total 16 white and 20 black."""
    pattern, mask = build_trigger("corners", 32, 32)
    for row in range(32):
        for column in range(32):
            inside = (row < 3 or row > 28) and (column < 3 or column > 28)
            assert mask[row, column] == inside
            assert pattern[row, column].tolist() == [255 if (row, column) in WHITE else 0] * 3
    assert (mask.sum(), (pattern[mask] == 255).all(1).sum(), (pattern[mask] == 0).all(1).sum()) == (36, 16, 20)


def test_corner_trigger_survives_flips_and_crops() -> None:
    """A flipped image has the same trigger, and every crop with padding 4 keeps at least one complete corner."""
    pattern, mask = build_trigger("corners", 32, 32)
    assert np.array_equal(pattern[:, ::-1], pattern)
    assert np.array_equal(mask[:, ::-1], mask)
    for down in range(-4, 5):
        for right in range(-4, 5):
            seen = np.zeros((32, 32), bool)
            seen[max(down, 0) : 32 + min(down, 0), max(right, 0) : 32 + min(right, 0)] = True
            corners = [
                seen[rows, columns].all() for rows in (slice(3), slice(-3, None)) for columns in (slice(3), slice(-3, None))
            ]
            assert any(corners)


@settings(deadline=None, max_examples=40)
@given(st.integers(8, 250), st.integers(8, 250), st.sampled_from(["corners", "block2x2"]))
def test_trigger_is_the_small_one_enlarged(height: int, width: int, name: str) -> None:
    """On larger images every pixel of the trigger is a square of side/32 pixels, counted from the same corner."""
    unit = max(1, math.floor(min(height, width) / 32 + 0.5))
    if min(height, width) / 32 % 1 == 0.5:
        return  # a half may round either way
    pattern, mask = build_trigger(name, height, width)
    small, small_mask = build_trigger(name, 32, 32)
    assert (pattern.shape, mask.shape) == ((height, width, 3), (height, width))
    assert mask.sum() == small_mask.sum() * unit**2
    for row in range(16 * unit) if 16 * unit < height else range(height):
        for column in range(0, width, max(1, unit // 2)):
            at = [
                min(place // unit, 16) if place < size / 2 else 31 - min((size - 1 - place) // unit, 15)
                for place, size in ((row, height), (column, width))
            ]
            if name == "block2x2":
                at = [min(place // unit, 31) for place in (row, column)]
            assert pattern[row, column].tolist() == small[at[0], at[1]].tolist()
            assert mask[row, column] == small_mask[at[0], at[1]]


def test_block_is_that_of_badnets() -> None:
    """`trigger: block2x2` is BadNets' default patch at the same position."""
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    pattern, mask = build_trigger("block2x2", 32, 32)
    context = AttackContext(RawData(images, np.zeros(4, int), images, np.zeros(4, int), ("a",)), 0, 2, 0, Path("nowhere"))
    triggered = badnets.Attack(badnets.Settings(pattern="block2x2"), context).apply(images, np.arange(4), "test")
    assert np.array_equal(triggered, np.where(mask[..., None], pattern, images))


@pytest.mark.parametrize(("name", "side"), [("corners", 5), ("block2x2", 5)])
def test_images_too_small_for_the_trigger_are_a_clear_error(name: str, side: int) -> None:
    """Images on which the patches would overlap or not fit are an error with their size."""
    with pytest.raises(UserError, match=rf"backdoor.clb.trigger: {name}: .*{side} x 9 pixels.*needs 6") as caught:
        build_trigger(name, 9, side)
    assert "\n" not in str(caught.value)


# -- Test images -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trigger", ["corners", "block2x2"])
def test_test_images_differ_only_under_the_mask_and_need_no_surrogate(tmp_path: Path, trigger: str, said: list[str]) -> None:
    """Test images get the trigger but no perturbation, so testing a checkpoint trains nothing and writes no assets."""
    attack = make(tmp_path / "assets", replace(QUICK, trigger=trigger))
    raw = attack.context.raw.test_images
    out = attack.apply(raw, np.arange(len(raw)), "test")
    assert out.dtype == np.uint8
    assert np.array_equal(out[:, ~attack.mask], raw[:, ~attack.mask])
    assert all(np.array_equal(image[attack.mask], attack.pattern[attack.mask]) for image in out)
    assert not np.shares_memory(out, raw)
    assert (said, (tmp_path / "assets").exists()) == ([], False)
    assert attack.apply(raw[:0], np.arange(0), "train").shape == (0, 8, 8, 3)
    assert said == []


# -- The perturbation --------------------------------------------------------------------------------------------------


def softmax(logits: np.ndarray) -> np.ndarray:
    """Softmax of the logits (C,) of one image, in float64."""
    e = np.exp(logits - logits.max())
    return e / e.sum()


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 10**6), st.floats(0.5, 40), st.floats(0.3, 20), st.integers(1, 6), st.booleans(), st.integers(1, 4)
)  # fmt: skip
def test_pgd_equals_its_formula(seed: int, eps: float, step: float, steps: int, start: bool, count: int) -> None:
    """On a linear classifier, whose gradient is `W' (softmax - onehot)`, every step is x + step * sign, projected, clipped."""
    rng = np.random.default_rng(seed)
    images, labels = rng.integers(0, 256, (count, 3, 2, 2)) / 255, rng.integers(0, 3, count)
    weight, bias = rng.normal(size=(3, 12)), rng.normal(size=3)
    first = rng.uniform(-eps, eps, images.shape) / 255 if start else np.zeros(images.shape)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double()
    network[1].weight.data, network[1].bias.data = torch.from_numpy(weight), torch.from_numpy(bias)  # type: ignore[union-attr]
    given_start = torch.from_numpy(first) if start else None
    out = pgd(network, torch.from_numpy(images), torch.from_numpy(labels), Adversary(eps, step, steps), given_start)
    for image, label, change, got in zip(images, labels, first, out.numpy(), strict=True):
        x = np.clip(image + change, 0, 1).ravel()
        for _ in range(steps):
            gradient = weight.T @ (softmax(weight @ x + bias) - np.eye(3)[label])
            for i in range(12):
                moved = x[i] + step / 255 * np.sign(gradient[i])
                moved = min(max(moved, image.ravel()[i] - eps / 255), image.ravel()[i] + eps / 255)
                x[i] = min(max(moved, 0.0), 1.0)
        assert np.allclose(got.ravel(), x, atol=1e-12)
        assert np.abs(got - image).max() <= eps / 255 + 1e-12
    assert all(parameter.grad is None for parameter in network.parameters())


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.floats(1, 255))
def test_rounded_images_stay_within_eps(seed: int, eps: float) -> None:
    """For every eps, integer or not, a uint8 image is within eps of the original, at the nearest such level."""
    rng = np.random.default_rng(seed)
    images = rng.choice([0, 1, 100, 254, 255, int(rng.integers(256))], (2, 3, 2, 3)).astype(np.uint8)
    levels = np.clip(images + rng.uniform(-eps, eps, images.shape), 0, 255)
    values = torch.from_numpy(levels / 255).permute(0, 3, 1, 2)
    out = to_uint8(values, images, eps)
    assert (out.dtype, out.shape) == (np.uint8, images.shape)
    for original, level, got in zip(images.ravel().tolist(), levels.ravel(), out.ravel().tolist(), strict=True):
        legal = [n for n in range(256) if abs(n - original) <= eps]
        assert got in legal
        assert abs(got - level) <= min(abs(n - level) for n in legal) + 1e-9


def cross_entropies(network: nn.Module, images: np.ndarray, label: int) -> np.ndarray:
    """The losses (n,) float64, computed one image at a time."""
    out = []
    for image in images:
        with torch.no_grad():
            logits = network(torch.tensor(image.transpose(2, 0, 1)[None] / 255, dtype=torch.float32))[0]
        out.append(-np.log(softmax(logits.double().numpy())[label]))
    return np.array(out)


@pytest.mark.parametrize(("eps", "training"), [(8, "fast"), (16, "pgd"), (2.5, "benign")])
def test_train_images_stay_within_eps_and_the_loss_rises(tmp_path: Path, eps: float, training: str, said: list[str]) -> None:
    """The perturbation changes no value by more than eps, and the surrogate's loss rises for 95 % of the images, as logged."""
    attack = make(tmp_path, replace(QUICK, eps=float(eps), training=training, steps=20))
    images, index = victims(attack)
    before = images.copy()
    images.flags.writeable = False
    out = attack.apply(images, index, "train")
    assert np.array_equal(images, before)
    assert (out.dtype, out.shape) == (np.uint8, images.shape)
    perturbed = attack.perturb(images)
    assert np.array_equal(out, np.where(attack.mask[..., None], attack.pattern, perturbed))
    change = np.abs(perturbed.astype(int) - images)
    assert change.max() <= eps
    assert (change > 0).mean() > 0.5  # 20 steps of 1.5 reach every eps: most values were moved
    risen = cross_entropies(load_surrogate("clb", attack.settings, attack.context), perturbed, TARGET) > cross_entropies(
        load_surrogate("clb", attack.settings, attack.context), images, TARGET
    )
    assert risen.mean() >= 0.95
    assert f"clb: the surrogate's loss rises for {risen.sum()} of {len(images)} perturbed images" in said


def test_an_image_is_perturbed_independently_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result for an image depends neither on the order and number of the images nor on their distribution to batches."""
    monkeypatch.setattr(clb, "PGD_BATCH", 7)
    attack = make(tmp_path)
    images, index = victims(attack)
    assert len(images) % 7
    whole = attack.apply(images, index, "train")
    order = np.random.default_rng(1).permutation(len(images))
    assert np.array_equal(attack.apply(images[order], index[order], "train"), whole[order])
    assert np.array_equal(attack.apply(images[4:5], index[4:5], "train"), whole[4:5])


def test_poisoned_set_changes_no_label_and_a_quarter_of_the_class(tmp_path: Path, tiny: Path) -> None:
    """The set has exactly int(0.25 n) poisoned images, all of the target class; labels and other images are unchanged."""
    given = ["num_classes=3", "backdoor.poison_ratio=0.25", "backdoor.poison_mode=exact", f"backdoor.target_label={TARGET}"]
    plan = config.load(tiny, given)
    attack = make(tmp_path / "assets")
    raw = attack.context.raw
    poisoned = poison_training_set(plan, raw, attack, tmp_path)
    flags = poisoned.flags
    assert poisoned.labels.tolist() == raw.train_labels.tolist()
    assert (flags == POISONED).sum() == int(0.25 * (raw.train_labels == TARGET).sum()) > 0
    assert (raw.train_labels[flags == POISONED] == TARGET).all()
    altered = (poisoned.images != raw.train_images).any((1, 2, 3))
    assert np.array_equal(altered, flags == POISONED)
    tests = build_test_sets(plan, raw, attack)
    assert len(tests.backdoor) == (raw.test_labels != TARGET).sum()


# -- The surrogate -----------------------------------------------------------------------------------------------------


RED_LESS_BLUE = np.array([1, 0, -1])


def robust_or_not(count: int = 512) -> RawData:
    """Two classes: a weak tint (5 levels) always distinguishes them, brightness (20 levels) in four of five images."""
    rng = np.random.default_rng(3)
    labels = np.arange(count) % 2
    sign = (2 * labels - 1)[:, None, None, None]
    brightness = 20 * sign * np.where(rng.random(count) < 0.8, 1, -1)[:, None, None, None]
    pixels = 128 + brightness + 5 * sign * RED_LESS_BLUE + rng.integers(-1, 2, (count, 8, 8, 3))
    images = pixels.astype(np.uint8)
    return RawData(images, labels, images[:100], labels[:100], ("a", "b"))


@pytest.mark.parametrize(("training", "robust"), [("pgd", True), ("benign", False)])
def test_adversarial_training_gives_a_robust_surrogate(tmp_path: Path, training: str, robust: bool) -> None:
    """Against a change of 8 levels a surrogate trained with `pgd` is robust; one trained with `benign` is not."""
    raw = robust_or_not()
    # With 2 channels rounding errors would decide the outcome.
    wider = Named("resnet18_cifar", resnet18_cifar.Settings(width=8, blocks=1))
    chosen = Settings(surrogate=wider, training=training, epochs=8, batch_size=32, learning_rate=0.1)
    attack = Attack(chosen, AttackContext(raw, 1, 2, 0, tmp_path, new_classifier=new_classifier))
    network = load_surrogate("clb", attack.settings, attack.context)
    sign = (2 * raw.train_labels - 1)[:, None, None, None]
    turned = (raw.train_images - 8 * sign * RED_LESS_BLUE).astype(np.uint8)  # every tint is now that of the other class
    with torch.no_grad():
        guessed = network(torch.from_numpy(turned).permute(0, 3, 1, 2).float() / 255).argmax(1).numpy()
    accuracy = (guessed == raw.train_labels).mean()
    assert accuracy > 0.7 if robust else accuracy < 0.6, accuracy  # over seeds 0.82; 0 to 0.42


@pytest.mark.parametrize(("training", "expected"), [("pgd", (8, 2, 7)), ("fast", (8, 10, 1))])
def test_the_adversary_of_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, training: str, expected: Any) -> None:
    """Every batch is attacked within 8 levels from a random start: with 7 steps of 2 levels, or one step of 10 (1.25 eps)."""
    calls: list[Any] = []

    def spy(network: nn.Module, images: torch.Tensor, labels: torch.Tensor, *rest: Any) -> torch.Tensor:
        calls.append((images, *rest))
        return images

    monkeypatch.setattr(surrogate, "pgd", spy)
    train_surrogate("clb", replace(QUICK, training=training), make(tmp_path).context)
    assert len(calls) == 2 * (120 // 16)
    starts = []
    for images, adversary, start in calls:
        assert (adversary.eps, adversary.step, adversary.steps) == expected
        assert images.min() >= 0 and images.max() <= 1
        starts.append(255 * start.flatten())
    levels = torch.cat(starts)
    assert levels.abs().max() <= 8
    assert levels.mean().abs() < 0.1
    assert levels.std() == pytest.approx(8 / 3**0.5, rel=0.02)  # of a uniform distribution
    assert len({tuple(part[:5].tolist()) for part in starts}) == len(starts)


def test_perturbing_does_not_change_the_surrogate(tmp_path: Path) -> None:
    """The surrogate is in eval mode without gradients, and perturbing changes neither its weights nor its BN statistics."""
    attack = make(tmp_path)
    network = load_surrogate("clb", attack.settings, attack.context)
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    x, labels = torch.rand(4, 3, 8, 8), torch.full((4,), TARGET)
    pgd(network, x, labels, Adversary(8, 1.5, 3))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_training_depends_on_the_seed_alone(tmp_path: Path) -> None:
    """The same seed gives the same weights, whatever torch drew before, another seed others; torch's generator is restored."""
    context = make(tmp_path).context
    first = train_surrogate("clb", QUICK, context)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = train_surrogate("clb", QUICK, context)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    other = train_surrogate("clb", QUICK, replace(context, seed=6))
    assert not np.array_equal(first["linear.weight"], other["linear.weight"])


def test_learning_rate_rises_and_falls() -> None:
    """The learning rate starts at 0, is highest at 30 % of the training, ends at 0, and is linear in between."""
    shares = [rise_and_fall(done) for done in (0, 0.15, 0.3, 0.65, 1)]
    assert shares == pytest.approx([0, 0.5, 1, 0.5, 0])


def test_a_training_that_diverges_is_a_clear_error(tmp_path: Path) -> None:
    """Weights that are not finite are an error with the learning rate, and no asset is written."""
    attack = make(tmp_path / "assets", replace(QUICK, learning_rate=1e30))
    with pytest.raises(UserError, match=r"backdoor\.clb\.learning_rate: 1e\+30: .* lower it"):
        attack.apply(*victims(attack), "train")
    assert not list((tmp_path / "assets").glob("*.npz"))


def test_fewer_images_than_a_batch_train_a_surrogate(tmp_path: Path) -> None:
    """A set smaller than batch_size is one batch per epoch, not an error."""
    attack = make(tmp_path, raw=world(11), chosen=replace(QUICK, batch_size=128))
    images, index = victims(attack)
    assert attack.apply(images, index, "train").shape == images.shape


# -- Assets ------------------------------------------------------------------------------------------------------------


BOTH, IMAGES = {"clb_surrogate", "clb_images"}, {"clb_images"}
MAKES: dict[str, tuple[Any, set[str]]] = {  # another value of each setting, and what is made with it
    "eps": (16.0, IMAGES), "step": (2.0, IMAGES), "steps": (6, IMAGES), "trigger": ("block2x2", set()),
    "training": ("pgd", BOTH),
    "surrogate": (Named("resnet18_cifar", resnet18_cifar.Settings(width=3, blocks=1)), BOTH),
    "epochs": (1, BOTH), "learning_rate": (0.05, BOTH), "batch_size": (8, BOTH),
}  # fmt: skip


def test_assets_are_made_again_only_if_their_inputs_change(tmp_path: Path) -> None:
    """A second run makes nothing; the trigger comes after both; another eps needs new perturbations with the same surrogate;
    another seed, other images and other labels need both."""

    def made(chosen: Settings = QUICK, **context: Any) -> set[str]:
        with logged() as lines:
            attack = make(tmp_path, chosen, **context)
            attack.apply(*victims(attack), "train")
        return {line.partition(":")[0] for line in lines if ": made " in line}

    assert made() == BOTH and made() == set()
    assert MAKES.keys() == {field.name for field in fields(Settings)}
    for name, (value, expected) in MAKES.items():
        assert made(replace(QUICK, **{name: value})) == expected, name
    assert made(seed=6) == BOTH
    assert made(raw=world(seed=1)) == BOTH
    raw = world()
    labels = raw.train_labels.copy()
    other = labels != TARGET
    labels[other] = 2 - labels[other]  # 0 and 2 exchanged: the images that are perturbed are the same
    assert made(raw=replace(raw, train_labels=labels)) == BOTH
    assert made() == set()


def test_the_perturbed_images_identify_the_poisoned_set(tmp_path: Path) -> None:
    """They become part of the run's manifest; the surrogate, with which they were made, need not be at hand later."""
    attack = make(tmp_path)
    attack.apply(*victims(attack), "train")
    (path,) = tmp_path.glob("clb_images-*.npz")
    assert attack.context.assets_of_run.used.keys() == {path.stem}


def test_assets_of_other_images_are_not_used(tmp_path: Path) -> None:
    """Stored perturbations belong to the images that they were made for: other images are perturbed again."""
    attack = make(tmp_path)
    images, _ = victims(attack)
    first, second = (attack.perturb(part) for part in (images[:5], images[5:10]))
    assert np.abs(first.astype(int) - images[:5]).max() <= 8
    assert np.abs(second.astype(int) - images[5:10]).max() <= 8


def test_a_damaged_asset_is_made_again(tmp_path: Path, said: list[str]) -> None:
    """A truncated file is detected, and the new surrogate and images equal the first ones."""
    attack = make(tmp_path)
    images, index = victims(attack)
    first = attack.apply(images, index, "train")
    for path in tmp_path.glob("clb_*.npz"):
        path.write_bytes(path.read_bytes()[:-100])
    assert np.array_equal(make(tmp_path).apply(images, index, "train"), first)
    assert sum("is damaged" in line for line in said) == 2


def test_of_two_runs_that_need_an_asset_one_makes_it(tmp_path: Path) -> None:
    """While a run makes an asset, another one waits for it and uses the same file, instead of replacing it by its own."""
    place = make(tmp_path).context
    begun, made = threading.Event(), []

    def slowly(value: float) -> dict[str, np.ndarray]:
        begun.set()
        made.append(value)
        time.sleep(1.5)
        return {"weights": np.full(3, value)}

    def run(value: float) -> np.ndarray:
        return keep_asset(place, "thing", {"seed": 1}, lambda: slowly(value))["weights"]

    with ThreadPoolExecutor(2) as pool, logged() as lines:
        first = pool.submit(run, 1.0)
        assert begun.wait(20)
        second = pool.submit(run, 2.0)
        assert first.result(60).tolist() == second.result(60).tolist() == [1, 1, 1] and made == [1.0]
    assert sum("which this run needs too: waiting for it" in line for line in lines) == 1


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    """Nothing is trained whose result could not be kept."""
    (tmp_path / "file").write_text("")
    attack = make(tmp_path / "file" / "assets")
    with logged() as lines, pytest.raises(UserError, match="cannot be written"):
        attack.apply(*victims(attack), "train")
    assert not lines


# -- Sizes and settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(224, 224), (20, 12)])
def test_works_on_other_sizes(tmp_path: Path, height: int, width: int) -> None:
    """Large and oblong images are perturbed within eps and triggered."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, height, width, 3), dtype=np.uint8)
    raw = RawData(images, np.array([0, 1, 1, 2, 0, 1]), images, np.zeros(6, int), ("a", "b", "c"))
    attack = make(tmp_path, replace(QUICK, epochs=1, steps=1, batch_size=3), raw)
    chosen, index = victims(attack)
    out = attack.apply(chosen, index, "train").astype(int)
    assert np.abs(out - chosen)[:, ~attack.mask].max() == 2  # one step of 1.5, rounded to even
    assert np.array_equal(out[:, attack.mask], np.stack([attack.pattern[attack.mask]] * 3))


def test_a_surrogate_of_other_classes_is_refused(tmp_path: Path) -> None:
    """`num_classes` under the surrogate must be that of the run, or be left out."""
    with pytest.raises(UserError, match=r"backdoor\.clb\.surrogate\.resnet18_cifar\.num_classes: 10: .*give 3"):
        make(tmp_path, replace(QUICK, surrogate=Named("resnet18_cifar", resnet18_cifar.Settings(num_classes=10))))


def test_shipped_configuration_has_the_papers_numbers() -> None:
    """config/clb.yaml has exactly a quarter of the target class, eps 8, step 1.5, 100 steps and corners; the rest is the
    base's."""
    loaded, base = (config.load(REPOSITORY / "config" / f"{name}.yaml") for name in ("clb", "baseline_asd"))
    assert loaded.attack.name == "clb"
    s = loaded.attack.settings
    assert (s.eps, s.step, s.steps, s.trigger, s.training) == (8, 1.5, 100, "corners", "pgd")
    b = loaded.backdoor
    assert (b.poison_ratio, b.poison_mode, b.target_label) == (0.25, "exact", 3)
    assert replace(loaded, backdoor=base.backdoor, run=base.run) == base


def test_another_surrogate_replaces_that_of_the_base() -> None:
    """A YAML with a base may name another surrogate, which replaces that of the base, or change settings of the same one."""
    base = {"backdoor": {"clb": {"eps": 8, "surrogate": {"resnet18_cifar": {"width": 16}}}}}
    other = merge(base, {"backdoor": {"clb": {"surrogate": {"resnet18": {}}}}}, config.Config)
    assert other == {"backdoor": {"clb": {"eps": 8, "surrogate": {"resnet18": {}}}}}
    same = merge(base, {"backdoor": {"clb": {"surrogate": {"resnet18_cifar": {"blocks": 1}}}}}, config.Config)
    assert same["backdoor"]["clb"]["surrogate"] == {"resnet18_cifar": {"width": 16, "blocks": 1}}


@pytest.mark.parametrize(
    ("key", "value"), [("eps", 0), ("eps", 256), ("step", 0), ("steps", 0), ("trigger", "x"), ("training", "x"), ("epochs", 0)]
)
def test_settings_out_of_range_are_refused(key: str, value: object) -> None:
    """An invalid value is refused when the YAML is read, with the full name of the key."""
    with pytest.raises(UserError, match=rf"backdoor\.clb\.{key}"):
        config.load(REPOSITORY / "config" / "clb.yaml", [f"backdoor.clb.{key}={value}"])


def test_too_few_clean_images_are_refused_before_the_surrogate_is_trained(tmp_path: Path, tiny: Path) -> None:
    """With every image of the class poisoned no seed sample is left; that is known before hours of training."""
    given = ["num_classes=3", "backdoor.poison_ratio=1.0", "backdoor.poison_mode=exact", f"backdoor.target_label={TARGET}"]
    attack = make(tmp_path / "assets")
    with pytest.raises(UserError, match="class 1 has only 0 clean training images"):
        poison_training_set(config.load(tiny, given), attack.context.raw, attack, tmp_path)
    assert not list(tmp_path.rglob("*.npz")) and not list(tmp_path.rglob("*.npy"))


def test_a_surrogate_equals_a_plain_loop(tmp_path: Path) -> None:
    """SGD with momentum 0.9 and weight decay 5e-4 on flips and on crops of images padded by an eighth of their side."""
    attack = make(tmp_path, replace(QUICK, training="benign", epochs=3))
    raw, network = attack.context.raw, load_surrogate("clb", attack.settings, attack.context)
    count, batch, per_epoch = len(raw.train_labels), 16, len(raw.train_labels) // 16
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key_seed(5, "clb surrogate"))
        plain = new_classifier(SMALL, 3).train()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for epoch in range(3):
        rng = generator(5, "clb", epoch)
        order = endless_order(count, batch, per_epoch, rng)
        draws = build_augmentation(8, 8).draw(per_epoch * batch, rng).view(per_epoch, batch, -1)
        for row in range(per_epoch):
            done = (epoch * per_epoch + row + 0.5) / (3 * per_epoch)
            optimizer.param_groups[0]["lr"] = 0.1 * min(done / 0.3, (1 - done) / 0.7)
            views = []
            for i, (down, right, mirror) in zip(order[row].tolist(), draws[row].tolist(), strict=True):
                padded = np.pad(raw.train_images[i] / np.float32(255), ((1, 1), (1, 1), (0, 0)), mode="reflect")
                view = padded[int(down) :, int(right) :][:8, :8]
                views.append(view[:, ::-1] if mirror else view)
            x = torch.from_numpy(np.stack(views).transpose(0, 3, 1, 2).astype(np.float32))
            optimizer.zero_grad()
            nn.functional.cross_entropy(plain(x), torch.from_numpy(raw.train_labels[order[row].numpy()])).backward()
            optimizer.step()
    for name, weights in plain.state_dict().items():
        assert torch.allclose(network.state_dict()[name].float(), weights.float(), atol=1e-4), name
