"""The baseline: the parts of an epoch, written like most research scripts.

It uses torchvision transforms on PIL images, a DataLoader with or without workers, contiguous fp32 tensors, five forward
passes per step, losses read by `.item()`, and a labeled loader that is rebuilt whenever it is exhausted. It computes the same
as `ASD.mixmatch_step` (tests/test_equality.py).
"""

from __future__ import annotations

import copy
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

from benchmark.workload import CLASSES, SIDE
from data.sets import ImageSet
from engine.context import Context
from model.classifier import build_classifier

TRANSFORM = T.Compose([
    T.RandomCrop(SIDE, padding=4, padding_mode="reflect"),
    T.RandomHorizontalFlip(),
    T.ToTensor(),
    T.Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
])  # fmt: skip


class PilImages(Dataset[Any]):
    """Images that are converted to PIL one by one; each item has `views` augmented tensors and the label."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, views: int = 1) -> None:
        self.images, self.labels, self.views = images, labels, views  # (N, 32, 32, 3) uint8, (N,)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Any, ...]:
        picture = Image.fromarray(self.images[i])
        return (*(TRANSFORM(picture) for _ in range(self.views)), int(self.labels[i]))

    def part(self, rows: slice, views: int = 1) -> PilImages:
        """Return some of the images as a separate data set: a copy, as such scripts make it."""
        return PilImages(self.images[rows].copy(), self.labels[rows].copy(), views)


def pil_images(train_set: ImageSet) -> PilImages:
    """Return the images of a run in host memory."""
    images = train_set.images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return PilImages(images, train_set.labels.cpu().numpy())


class Script:
    """A research script on the images of a run.

    Args:
        workers: number of worker processes of its loaders.
    """

    def __init__(self, context: Context, workers: int) -> None:
        self.config, self.device, self.workers = context.config, context.machine.device, workers
        self.data = pil_images(context.train_set)
        self.model = build_classifier(self.config.network, CLASSES, self.config.seed.seed).to(self.device)

    def loader(self, data: Dataset[Any], batch: int, shuffle: bool = False, drop_last: bool = False) -> DataLoader[Any]:
        """Return a DataLoader with the usual options."""
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores, as in the original
        pin = self.device.type == "cuda"
        return DataLoader(data, batch, shuffle=shuffle, num_workers=self.workers, pin_memory=pin, drop_last=drop_last)

    def feed(self) -> None:
        """Iterate once over all images, with one view each."""
        for images, _ in self.loader(self.data, self.config.semi.loader.batch_size):
            images.to(self.device)

    def inference(self) -> np.ndarray:
        """Return the split losses (N,); each batch is copied to the host."""
        alpha, beta = 0.1, 1.0
        self.model.eval()
        losses = []
        with torch.no_grad():
            for images, labels in self.loader(self.data, self.config.loader.batch_size):
                images, labels = images.to(self.device), labels.to(self.device)
                logits = self.model(images)
                p = torch.clamp(F.softmax(logits, dim=1), min=1e-7, max=1.0)
                one_hot = torch.clamp(F.one_hot(labels, CLASSES).float(), min=1e-4, max=1.0)
                reverse = -torch.sum(p * torch.log(one_hot), dim=1)
                losses.append((alpha * F.cross_entropy(logits, labels, reduction="none") + beta * reverse).cpu().numpy())
        self.model.train()
        return np.concatenate(losses)

    def virtual_epoch(self) -> nn.Module:
        """Train a deep copy for one epoch; the optimizer has only the last layers."""
        virtual: Any = copy.deepcopy(self.model)
        last = [*virtual.backbone.layer3.parameters(), *virtual.backbone.layer4.parameters(), *virtual.linear.parameters()]
        optimizer = torch.optim.Adam(last, lr=0.015)
        virtual.train()
        total = 0.0
        for images, labels in self.loader(self.data, self.config.loader.batch_size, shuffle=True):
            images, labels = images.to(self.device), labels.to(self.device)
            loss = F.cross_entropy(virtual(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        return virtual  # type: ignore[no-any-return]


class MixMatchScript(Script):
    """Training of the script with the first `pool` images as clean pool; a call trains `steps` steps."""

    def __init__(self, context: Context, pool: int, steps: int, workers: int) -> None:
        super().__init__(context, workers)
        self.steps, self.batch = steps, self.config.semi.loader.batch_size
        self.labeled = self.endless(self.data.part(slice(0, pool)))
        self.unlabeled = self.endless(self.data.part(slice(pool, None), views=2))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.002)
        self.model.train()

    def endless(self, data: PilImages) -> Iterator[Any]:
        """Yield batches; whenever the loader is exhausted, from a new one."""
        while True:
            yield from self.loader(data, self.batch, shuffle=True, drop_last=True)

    def __call__(self) -> float:
        """Train; return the sum of the losses."""
        total = 0.0
        for step in range(self.steps):
            (x, y), (u1, u2, _) = next(self.labeled), next(self.unlabeled)
            batch = tuple(t.to(self.device, non_blocking=True) for t in (x, y, u1, u2))
            lam = float(np.random.default_rng().beta(0.75, 0.75))
            mix = max(lam, 1 - lam), torch.randperm(3 * self.batch).to(self.device)
            total += mixmatch_step(self.model, self.optimizer, batch, mix, 15 * step / self.steps)[0]
        return total


def mixmatch_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, ...], mix: tuple[float, Tensor], lambda_u: float
) -> tuple[float, float, float]:
    """One MixMatch step with five forward passes.

    Args:
        batch: x (B, 3, H, W), its labels (B,), u1 and u2 (B, 3, H, W).
        mix: lambda and the permutation (3B,) int64 of mixup.
    Returns:
        loss, Lx, Lu.
    """
    x, y, u1, u2 = batch
    lam, permutation = mix
    b = x.size(0)
    target_x = torch.zeros(b, CLASSES, device=x.device, dtype=x.dtype).scatter_(1, y.view(-1, 1), 1)
    with torch.no_grad():
        p = (torch.softmax(model(u1), dim=1) + torch.softmax(model(u2), dim=1)) / 2
        p = p ** (1 / 0.5)
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
    loss = loss_x + lambda_u * loss_u
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item(), loss_x.item(), loss_u.item()


def swap_groups(rows: Tensor, batch: int) -> list[Tensor]:
    """Divide (3B, ...) into three blocks, and swap group i of block 0 with group i of block i."""
    third, left = divmod(batch, 3)
    sizes = [third, third + (left == 2), third + (left > 0)]
    groups = [list(block.split(sizes)) for block in rows.split(batch)]
    for i in (1, 2):
        groups[0][i], groups[i][i] = groups[i][i], groups[0][i]
    return [torch.cat(block) for block in groups]


def split(data: PilImages, losses: np.ndarray, epsilon: float) -> tuple[Subset[Any], Subset[Any]]:
    """Return the clean and the polluted pool, each with its own copy of the data set."""
    order = sorted(range(len(losses)), key=lambda i: losses[i])
    size = int(len(losses) * epsilon)
    return Subset(copy.deepcopy(data), sorted(order[:size])), Subset(copy.deepcopy(data), sorted(order[size:]))
