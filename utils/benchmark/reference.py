"""The benchmark's baseline: ASD's parts written the way most research scripts are.

torchvision transforms on PIL images, a DataLoader with workers, fp32 with the channels first, five forward passes a step,
losses read by `.item()`, the labelled loader built anew whenever it ends. The arithmetic is that of asd.md and so of
`ASD.mixmatch_step` (a proof of the benchmark); only the way there is the usual one.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms as T

from utils.benchmark.setup import CLASSES, SIDE, Bench, fresh_model

TRANSFORM = T.Compose([
    T.RandomCrop(SIDE, padding=4, padding_mode="reflect"),
    T.RandomHorizontalFlip(),
    T.ToTensor(),
    T.Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
])  # fmt: skip


class PictureSet(Dataset[Any]):
    """Images that become PIL pictures one by one; each item is `views` augmented tensors and the label."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, views: int = 1) -> None:
        self.images, self.labels, self.views = images, labels, views  # (N, 32, 32, 3) uint8, (N,)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Any, ...]:
        picture = Image.fromarray(self.images[i])
        return (*(TRANSFORM(picture) for _ in range(self.views)), int(self.labels[i]))

    def first(self, count: int) -> PictureSet:
        """Return the first images as a set of their own."""
        return PictureSet(self.images[:count], self.labels[:count], self.views)

    def part(self, index: np.ndarray, views: int = 1) -> PictureSet:
        """Return the images of an index as a set of their own, copied as such scripts do."""
        return PictureSet(self.images[index], self.labels[index], views)


def pictures(bench: Bench) -> PictureSet:
    """Return the bench's images as numpy arrays on the host."""
    images = bench.train_set.images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return PictureSet(images, bench.train_set.labels.cpu().numpy())


def loader(
    data: Dataset[Any], batch: int, workers: int, shuffle: bool, drop_last: bool, device: torch.device
) -> DataLoader[Any]:
    """Return a DataLoader with the usual options."""
    pin = device.type == "cuda"
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores: as in the original's YAML
    return DataLoader(data, batch, shuffle=shuffle, num_workers=workers, pin_memory=pin, drop_last=drop_last)


def feed(bench: Bench, data: PictureSet, batch: int, workers: int) -> float:
    """Iterate once over all images, one view each; return images a second."""
    start = time.perf_counter()
    for images, _ in loader(data, batch, workers, False, False, bench.device):
        images.to(bench.device)
    if bench.device.type == "cuda":
        torch.cuda.synchronize()
    return len(data) / (time.perf_counter() - start)


def swap_groups(rows: Tensor, batch: int) -> list[Tensor]:
    """Cut (3B, ...) into three blocks and swap group i of block 0 with group i of block i."""
    blocks = [block.clone() for block in torch.split(rows, batch)]
    third, left = divmod(batch, 3)
    sizes = [third + (1 if i >= 3 - left else 0) for i in range(3)]
    edges = [0, sizes[0], sizes[0] + sizes[1], batch]
    for i in (1, 2):
        a, b = edges[i], edges[i + 1]
        kept = blocks[0][a:b].clone()
        blocks[0][a:b] = blocks[i][a:b]
        blocks[i][a:b] = kept
    return blocks


def reference_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor, Tensor, Tensor],
    lam: float,
    permutation: Tensor,
    weight: float,
    temperature: float = 0.5,
) -> tuple[float, float, float]:
    """One MixMatch step in five forwards.

    Args:
        batch: x (B, 3, H, W), its labels (B,), u1 and u2 (B, 3, H, W).
        permutation: (3B,) int64.
        weight: lambda_u.
    Returns:
        loss, Lx, Lu.
    """
    x, y, u1, u2 = batch
    b = x.size(0)
    target_x = torch.zeros(b, CLASSES, device=x.device, dtype=x.dtype).scatter_(1, y.view(-1, 1), 1)
    with torch.no_grad():
        p = (torch.softmax(model(u1), dim=1) + torch.softmax(model(u2), dim=1)) / 2
        p = p ** (1 / temperature)
        target_u = (p / p.sum(dim=1, keepdim=True)).detach()

    inputs = torch.cat([x, u1, u2], dim=0)
    targets = torch.cat([target_x, target_u, target_u], dim=0)
    mixed_inputs = lam * inputs + (1 - lam) * inputs[permutation]
    mixed_targets = lam * targets + (1 - lam) * targets[permutation]
    outputs = [model(block) for block in swap_groups(mixed_inputs, b)]
    outputs = swap_groups(torch.cat(outputs, dim=0), b)
    logits_x, logits_u = outputs[0], torch.cat(outputs[1:], dim=0)

    loss_x = -torch.mean(torch.sum(F.log_softmax(logits_x, dim=1) * mixed_targets[:b], dim=1))
    loss_u = torch.mean((torch.softmax(logits_u, dim=1) - mixed_targets[b:]) ** 2)
    loss = loss_x + weight * loss_u
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item(), loss_x.item(), loss_u.item()


class ReferenceTraining:
    """MixMatch with a clean pool of the first images; a call trains `steps` steps."""

    def __init__(self, bench: Bench, data: PictureSet, pool: int, steps: int, workers: int) -> None:
        self.batch, self.workers, self.steps, self.device = bench.config.semi.loader.batch_size, workers, steps, bench.device
        self.labelled = data.part(np.arange(pool))
        self.unlabelled = data.part(np.arange(pool, len(data)), views=2)
        self.labelled_batches, self.unlabelled_batches = self.start(self.labelled), self.start(self.unlabelled)
        self.model = fresh_model(bench).to(memory_format=torch.contiguous_format)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.002)
        self.model.train()

    def start(self, data: PictureSet) -> Iterator[Any]:
        """Build a loader anew and start it."""
        return iter(loader(data, self.batch, self.workers, True, True, self.device))

    def __call__(self) -> float:
        """Train; return the milliseconds a step."""
        total = 0.0
        start = time.perf_counter()
        for step in range(self.steps):
            try:
                x, y = next(self.labelled_batches)
            except StopIteration:
                self.labelled_batches = self.start(self.labelled)
                x, y = next(self.labelled_batches)
            try:
                u1, u2, _ = next(self.unlabelled_batches)
            except StopIteration:
                self.unlabelled_batches = self.start(self.unlabelled)
                u1, u2, _ = next(self.unlabelled_batches)
            x, y, u1, u2 = (t.to(self.device, non_blocking=True) for t in (x, y, u1, u2))
            lam = float(np.random.default_rng().beta(0.75, 0.75))
            permutation = torch.randperm(3 * self.batch).to(self.device)
            weight = 15 * step / self.steps
            total += reference_step(self.model, self.optimizer, (x, y, u1, u2), max(lam, 1 - lam), permutation, weight)[0]
        return 1000 * (time.perf_counter() - start) / self.steps


def score(bench: Bench, model: nn.Module, data: PictureSet, workers: int) -> np.ndarray:
    """Return the split losses (N,), batch by batch, each batch brought to the host."""
    alpha, beta = 0.1, 1.0
    model.eval()
    losses = []
    with torch.no_grad():
        for images, labels in loader(data, bench.config.loader.batch_size, workers, False, False, bench.device):
            images, labels = images.to(bench.device), labels.to(bench.device)
            logits = model(images)
            p = torch.clamp(F.softmax(logits, dim=1), min=1e-7, max=1.0)
            one_hot = torch.clamp(F.one_hot(labels, CLASSES).float(), min=1e-4, max=1.0)
            reverse = -torch.sum(p * torch.log(one_hot), dim=1)
            losses.append((alpha * F.cross_entropy(logits, labels, reduction="none") + beta * reverse).cpu().numpy())
    model.train()
    return np.concatenate(losses)


def virtual_epoch(bench: Bench, model: nn.Module, data: PictureSet, workers: int) -> nn.Module:
    """Train a deep copy once over all images; only the last layers are given to the optimizer."""
    virtual: Any = copy.deepcopy(model)
    last = [*virtual.backbone.layer3.parameters(), *virtual.backbone.layer4.parameters(), *virtual.linear.parameters()]
    optimizer = torch.optim.Adam(last, lr=0.015)
    virtual.train()
    total = 0.0
    for images, labels in loader(data, bench.config.loader.batch_size, workers, True, False, bench.device):
        images, labels = images.to(bench.device), labels.to(bench.device)
        loss = F.cross_entropy(virtual(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    assert np.isfinite(total)
    return virtual  # type: ignore[no-any-return]


def split(losses: np.ndarray, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the clean and the polluted pool as sorted indices."""
    order = sorted(range(len(losses)), key=lambda i: losses[i])
    count = int(len(losses) * epsilon)
    return np.array(sorted(order[:count])), np.array(sorted(order[count:]))


def split_and_copy(data: PictureSet, losses: np.ndarray, epsilon: float) -> tuple[Subset[Any], Subset[Any]]:
    """Split and give each pool its own copy of the data set."""
    clean, polluted = split(losses, epsilon)
    return Subset(copy.deepcopy(data), clean.tolist()), Subset(copy.deepcopy(data), polluted.tolist())
