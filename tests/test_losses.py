"""The losses and MixMatch's functions against their formulas, written out with Python floats."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loss.attention import attention_distance, attention_map
from loss.contrastive import nt_xent
from loss.mixmatch import guess_labels, interleave_order, mixmatch_loss, mixup, ramp_up, sharpen
from loss.supervised import cross_entropy, reverse_cross_entropy, symmetric_cross_entropy

FEW = settings(max_examples=25, deadline=None)


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16])
def test_losses_are_computed_in_at_least_float32(kind: torch.dtype) -> None:
    """Half precision is widened, and float64 is kept, so that variants can be compared exactly."""
    wanted = torch.float64 if kind == torch.float64 else torch.float32
    x, y, labels = torch.rand(4, 3, 2, 2).to(kind), torch.rand(4, 3, 2, 2).to(kind), torch.tensor([0, 1, 2, 0])
    logits, other = x[..., 0, 0], y[..., 0, 0]
    for loss in (cross_entropy(logits, labels), symmetric_cross_entropy(logits, labels, 0.1, 1.0),
                 nt_xent(logits, other, 0.5), attention_distance(x, y)):  # fmt: skip
        assert loss.dtype == wanted and loss.shape == (4,)


def test_the_attention_map_of_faint_features_is_damped() -> None:
    """The 1e-6 in the denominator: a map of norm 1e-6 gets half the length, a dark one stays 0."""
    faint = torch.full((1, 1, 2, 2), (0.5e-6) ** 0.5)  # four squares of 0.5e-6: norm 1e-6
    assert float(attention_map(faint).norm()) == pytest.approx(0.5, rel=1e-3)
    assert float(attention_map(0 * faint).norm()) == 0


# The references: one row at a time, Python floats.


def slow_softmax(row: list[float]) -> list[float]:
    """Softmax of one row of logits."""
    top = max(row)
    powers = [math.exp(z - top) for z in row]
    return [p / sum(powers) for p in powers]


def slow_log_softmax(row: list[float]) -> list[float]:
    """Log of the softmax of one row, also where the softmax itself underflows."""
    top = max(row)
    log_sum = top + math.log(sum(math.exp(z - top) for z in row))
    return [z - log_sum for z in row]


def slow_ce(row: list[float], label: int) -> float:
    """Cross-entropy of one row."""
    return -slow_log_softmax(row)[label]


def slow_rce(row: list[float], label: int) -> float:
    """Reverse cross-entropy of one row: probabilities floored at 1e-7, the one-hot label at 1e-4."""
    total = 0.0
    for c, p in enumerate(slow_softmax(row)):
        onehot = 1.0 if c == label else 0.0
        total -= min(max(p, 1e-7), 1.0) * math.log(min(max(onehot, 1e-4), 1.0))
    return total


def slow_sharpen(row: list[float], temperature: float) -> list[float]:
    """p^(1/T) of one row, normalized."""
    powered = [p ** (1 / temperature) for p in row]
    return [p / sum(powered) for p in powered]


def interleave(rows: torch.Tensor, batch: int) -> torch.Tensor:
    """Bring rows into the order of the code under test."""
    return rows[interleave_order(batch, len(rows) // batch, rows.device)]


def slow_interleave(rows: list[int], batch: int) -> list[int]:
    """Cut the rows into blocks and swap group i of block 0 with group i of block i, by lists."""
    count = len(rows) // batch
    blocks = [rows[i * batch : (i + 1) * batch] for i in range(count)]
    sizes = [batch // count] * count
    for extra in range(batch - sum(sizes)):
        sizes[-1 - extra] += 1  # the remainder, from the last group on
    groups = []
    for block in blocks:
        cut, at = [], 0
        for size in sizes:
            cut.append(block[at : at + size])
            at += size
        groups.append(cut)
    for i in range(1, count):
        groups[0][i], groups[i][i] = groups[i][i], groups[0][i]
    return [row for block in groups for group in block for row in group]


@st.composite
def logits_and_labels(draw: st.DrawFn, scale: float = 60.0) -> tuple[list[list[float]], list[int]]:
    """Rows of logits, some far apart so that the floors of the losses matter, and a label of each."""
    classes = draw(st.integers(2, 6))
    number = st.floats(-scale, scale, allow_nan=False, width=32)
    rows = draw(st.lists(st.lists(number, min_size=classes, max_size=classes), min_size=1, max_size=5))
    labels = [draw(st.integers(0, classes - 1)) for _ in rows]
    return rows, labels


def double(values: object) -> Tensor:
    """Return a float64 tensor."""
    return torch.tensor(values, dtype=torch.float64)


def test_losses_of_a_worked_example() -> None:
    """Two equal logits of two classes have the CE log 2 and the RCE log(10000) / 2, for any label."""
    logits, labels = torch.zeros(2, 2), torch.tensor([0, 1])
    assert cross_entropy(logits, labels).tolist() == pytest.approx([math.log(2)] * 2)
    assert reverse_cross_entropy(logits, labels).tolist() == pytest.approx([0.5 * math.log(1e4)] * 2)


@FEW
@given(logits_and_labels(), st.floats(0, 3), st.floats(0, 3))
def test_supervised_losses_follow_the_formulas(sample: tuple[list[list[float]], list[int]], alpha: float, beta: float) -> None:
    """CE, RCE and SCE give each image the loss of the paper's formula, including floors."""
    rows, labels = sample
    z, y = double(rows), torch.tensor(labels)
    ce = [slow_ce(row, label) for row, label in zip(rows, labels, strict=True)]
    rce = [slow_rce(row, label) for row, label in zip(rows, labels, strict=True)]
    sce = [alpha * a + beta * b for a, b in zip(ce, rce, strict=True)]
    assert cross_entropy(z, y).tolist() == pytest.approx(ce, abs=1e-10)
    assert reverse_cross_entropy(z, y).tolist() == pytest.approx(rce, abs=1e-10)
    assert symmetric_cross_entropy(z, y, alpha, beta).tolist() == pytest.approx(sce, abs=1e-10)


def test_floor_of_a_hopeless_prediction() -> None:
    """A class of probability 0 counts as 1e-7 in the RCE, so a perfect prediction has a small positive loss."""
    logits, label = double([[200.0, 0.0, 0.0]]), torch.tensor([0])
    assert reverse_cross_entropy(logits, label).item() == pytest.approx(-2e-7 * math.log(1e-4), rel=1e-9)


def finite_differences(function: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-6) -> Tensor:
    """Return the gradient of a scalar function by central differences, entry by entry."""
    gradient = torch.zeros_like(at)
    for i in range(at.numel()):
        high, low = at.clone(), at.clone()
        high.view(-1)[i] += step
        low.view(-1)[i] -= step
        gradient.view(-1)[i] = (function(high) - function(low)) / (2 * step)
    return gradient


LABELS = torch.tensor([0, 3, 1, 2])
TARGETS = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0, 0, 0, 1], [0.25] * 4, [0.5, 0.5, 0, 0]], dtype=torch.float64)


@pytest.mark.parametrize(
    "scalar",
    [
        lambda z: cross_entropy(z, LABELS).mean(),
        lambda z: reverse_cross_entropy(z, LABELS).sum(),
        lambda z: symmetric_cross_entropy(z, LABELS, 0.1, 1.0).mean(),
        lambda z: mixmatch_loss(z, TARGETS, 2)[0],
        lambda z: mixmatch_loss(z, TARGETS, 2)[1],
    ],
    ids=["CE", "RCE", "SCE", "Lx", "Lu"],
)
def test_gradients_are_those_of_the_formula(scalar: Callable[[Tensor], Tensor]) -> None:
    """The gradients of all training losses equal finite differences."""
    logits = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    (gradient,) = torch.autograd.grad(scalar(logits), logits)
    slow = finite_differences(lambda z: scalar(z).detach(), logits.detach())
    assert slow.abs().max() > 1e-3
    torch.testing.assert_close(gradient, slow, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(kind: torch.dtype) -> None:
    """With bf16 and fp16 logits the losses are float32 and equal those of the same numbers in float64."""
    logits = (8 * torch.randn(5, 4, generator=torch.Generator().manual_seed(0))).to(kind)
    rows, labels = logits.double().tolist(), [0, 1, 2, 3, 0]
    y = torch.tensor(labels)
    ce = [slow_ce(row, label) for row, label in zip(rows, labels, strict=True)]
    rce = [slow_rce(row, label) for row, label in zip(rows, labels, strict=True)]
    for fast, slow in ((cross_entropy(logits, y), ce), (reverse_cross_entropy(logits, y), rce)):
        assert fast.dtype == torch.float32
        assert fast.tolist() == pytest.approx(slow, rel=1e-5, abs=1e-5)
    p, q = [slow_softmax(row) for row in rows], [slow_softmax(row[::-1]) for row in rows]
    guessed = guess_labels(logits, logits.flip(1), 0.5)
    mean = [[(a + b) / 2 for a, b in zip(*pair, strict=True)] for pair in zip(p, q, strict=True)]
    assert guessed.dtype == torch.float32
    torch.testing.assert_close(guessed.double(), double([slow_sharpen(row, 0.5) for row in mean]), rtol=1e-5, atol=1e-6)
    loss_x, loss_u = mixmatch_loss(logits, torch.full((5, 4), 0.25), 2)
    assert loss_x.dtype == loss_u.dtype == torch.float32
    assert loss_x.item() == pytest.approx(sum(-0.25 * sum(slow_log_softmax(row)) for row in rows[:2]) / 2, rel=1e-5)


@FEW
@given(st.data(), st.integers(1, 4), st.integers(1, 4), st.integers(2, 5))
def test_mixmatch_loss_follows_the_formula(data: st.DataObject, labeled: int, others: int, classes: int) -> None:
    """Lx is the mean cross-entropy of the labeled rows, Lu the mean squared error over the other rows and the classes."""
    rng = random.Random(data.draw(st.integers(0, 10**6)))
    rows = [[rng.uniform(-20, 20) for _ in range(classes)] for _ in range(labeled + others)]
    targets = [slow_softmax([rng.uniform(-3, 3) for _ in range(classes)]) for _ in rows]
    loss_x = loss_u = 0.0
    for i, (row, target) in enumerate(zip(rows, targets, strict=True)):
        for c in range(classes):
            if i < labeled:
                loss_x -= target[c] * slow_log_softmax(row)[c] / labeled
            else:
                loss_u += (slow_softmax(row)[c] - target[c]) ** 2 / (others * classes)
    fast_x, fast_u = mixmatch_loss(double(rows), double(targets), labeled)
    assert fast_x.item() == pytest.approx(loss_x, rel=1e-10, abs=1e-12)
    assert fast_u.item() == pytest.approx(loss_u, rel=1e-10, abs=1e-12)


@FEW
@given(logits_and_labels(scale=4.0), st.floats(0.2, 2.0))
def test_sharpen_and_guess_follow_the_formulas(sample: tuple[list[list[float]], list[int]], temperature: float) -> None:
    """The guessed label is the sharpened mean of the two views' probabilities; it sums to 1 and keeps the best class."""
    rows, _ = sample
    views = rows, [row[::-1] for row in rows]
    means = [
        [(a + b) / 2 for a, b in zip(slow_softmax(one), slow_softmax(two), strict=True)]
        for one, two in zip(*views, strict=True)
    ]
    slow = double([slow_sharpen(row, temperature) for row in means])
    guessed = guess_labels(double(views[0]), double(views[1]), temperature)
    torch.testing.assert_close(guessed, slow, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(sharpen(double(means), temperature), slow, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(guessed.sum(1), torch.ones(len(rows), dtype=torch.float64))


def test_a_low_temperature_sharpens() -> None:
    """At T = 0.5 probabilities 0.8 and 0.2 become 16 to 1; at T = 1 they stay."""
    p = double([[0.8, 0.2]])
    assert sharpen(p, 0.5).tolist()[0] == pytest.approx([16 / 17, 1 / 17])
    assert sharpen(p, 1.0).tolist()[0] == pytest.approx([0.8, 0.2])


@FEW
@given(st.integers(1, 7), st.floats(0.5, 1.0), st.randoms(use_true_random=False))
def test_mixup_mixes_each_row_with_its_partner(count: int, lam: float, rng: random.Random) -> None:
    """Row i becomes lam times itself and 1 - lam times row permutation[i], images and targets alike."""
    permutation = list(range(count))
    rng.shuffle(permutation)
    values = [[[rng.uniform(-1, 1) for _ in range(2)] for _ in range(3)] for _ in range(count)]
    slow = [
        [[lam * values[i][j][k] + (1 - lam) * values[permutation[i]][j][k] for k in range(2)] for j in range(3)]
        for i in range(count)
    ]
    fast = mixup(double(values), double(lam), torch.tensor(permutation))
    torch.testing.assert_close(fast, double(slow), rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 5))
def test_interleave_swaps_the_groups_and_is_its_own_inverse(batch: int, blocks: int) -> None:
    """Any batch is interleaved as the lists say, also batches smaller than the number of blocks; a second time restores it."""
    rows = list(range(blocks * batch))
    once = interleave(torch.tensor(rows), batch)
    assert once.tolist() == slow_interleave(rows, batch)
    assert interleave(once, batch).tolist() == rows


def test_interleave_of_the_papers_batch() -> None:
    """With batches of 64 the groups are 21, 21 and 22 rows, so every forward sees labeled and unlabeled rows."""
    mixed = interleave(torch.arange(192), 64).tolist()
    assert mixed[:64] == [*range(21), *range(64 + 21, 64 + 42), *range(128 + 42, 128 + 64)]
    assert mixed[64:128] == [*range(64, 64 + 21), *range(21, 42), *range(64 + 42, 128)]
    assert mixed[128:] == [*range(128, 128 + 42), *range(42, 64)]


def test_interleave_moves_whole_images_and_lets_gradients_through() -> None:
    """Images of any shape are moved as a whole, and the gradient of a row reaches its source row."""
    images = torch.randn(9, 2, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    order = slow_interleave(list(range(9)), 3)
    mixed = interleave(images, 3)
    for place, row in enumerate(order):
        assert torch.equal(mixed[place], images[row])
    (mixed * torch.arange(9.0).view(9, 1, 1)).sum().backward()
    assert images.grad is not None
    for place, row in enumerate(order):
        assert (images.grad[row] == place).all()


@FEW
@given(st.integers(0, 200), st.integers(1, 12), st.floats(0, 100), st.sampled_from([0.0, 1.0, 2.5, 40.0, 120.0]))
def test_lambda_u_grows_linearly_with_the_step(epoch: int, steps: int, lambda_u: float, length: float) -> None:
    """In step i of an epoch the weight of the unlabeled loss is lambda_u * clip((epoch + i / steps) / length, 0, 1)."""
    slow = []
    for i in range(steps):
        at = epoch + i / steps
        slow.append(lambda_u if length == 0 else lambda_u * min(max(at / length, 0.0), 1.0))
    assert ramp_up(epoch, steps, lambda_u, length).tolist() == pytest.approx(slow, rel=1e-12)


def test_lambda_u_of_the_paper() -> None:
    """With 15 and 120 the weight is 0 at the start, 7.5 when epoch 60 starts, and stays 15 after epoch 120."""
    assert ramp_up(0, 4, 15, 120)[0].item() == 0
    assert ramp_up(60, 4, 15, 120).tolist() == pytest.approx([7.5, 7.53125, 7.5625, 7.59375])
    assert ramp_up(130, 2, 15, 120).tolist() == [15, 15]
    assert ramp_up(0, 3, 15, 0).tolist() == [15, 15, 15]
