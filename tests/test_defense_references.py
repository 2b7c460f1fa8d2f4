"""Whole runs of the other defenses against plain loops that were written from their papers.

The loops share with the program the data, the network, and the random draws of orders and views; losses, optimizers, schedules
and the modes of the networks are written out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training import last, small, train_here

from data.augment import Pipeline
from data.batches import SupervisedDraws, draw_supervised, draw_views
from data.seeds import choose_seed_samples
from data.sources import prepare
from defenses._start import split_clean
from defenses.dbd import published_views
from engine.context import build_transforms
from engine.session import Session
from model.classifier import Classifier, build_classifier, new_classifier
from utils.config import Config
from utils.draws import generator, key_seed

SEED = 7
Loss = Callable[[Classifier, Tensor, Tensor], Tensor]  # network, views (B, 3, H, W), indices (B,) -> scalar


class Plain:
    """The data of a run, and passes over them."""

    def __init__(self, settings: Config, folder: Path) -> None:
        data = prepare(settings, folder / "plain data", new_classifier=new_classifier)
        self.images, self.labels, self.config = data.train.images, data.train.labels, settings
        self.given = choose_seed_samples(settings, data, folder)
        self.augment, self.resize = build_transforms(settings, data.train)

    def network(self, weights: dict[str, Tensor] | None = None) -> Classifier:
        """A new network with the run's first weights, or with those of a checkpoint."""
        network = build_classifier(self.config.network, 10, SEED)
        if weights is not None:
            network.load_state_dict(weights)
        return network.train()

    def train(
        self, network: Classifier, optimizer: torch.optim.Optimizer, draws: SupervisedDraws, batch: int, loss: Loss,
        transform: Pipeline | None = None,
    ) -> None:  # fmt: skip
        """One pass in batches; the last one is smaller."""
        for start in range(0, len(draws.order), batch):
            index, numbers = draws.order[start : start + batch], draws.views[start : start + batch]
            views = (transform or self.augment)(self.images[index], numbers)
            optimizer.zero_grad()
            loss(network, views, index).backward()
            optimizer.step()

    def draws(self, purpose: str, epoch: int, chosen: Tensor, transform: Pipeline | None = None) -> SupervisedDraws:
        """The draws of one pass over the chosen images."""
        return draw_supervised(SEED, purpose, epoch, len(chosen), transform or self.augment).of(chosen)

    def cross_entropy(self, network: Classifier, views: Tensor, index: Tensor) -> Tensor:
        """The mean cross-entropy with the labels that the images carry."""
        return F.cross_entropy(network(views), self.labels[index])

    @torch.no_grad()
    def logits(self, network: Classifier) -> Tensor:
        """The logits of all images, not augmented, in eval mode."""
        out: Tensor = copy.deepcopy(network).eval()(self.resize(self.images, torch.zeros(len(self.images), 0)))
        return out


def sgd(network: nn.Module, lr: float) -> torch.optim.Optimizer:
    """A new optimizer, whose momentum starts at 0."""
    return torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)


def close(network: nn.Module, saved: dict[str, Tensor], tolerance: float = 1e-3) -> bool:
    """Return whether weights and BN statistics are equal but for rounding errors."""
    own = network.state_dict()
    assert own.keys() == saved.keys()
    return all(torch.allclose(own[name].float(), saved[name].float(), atol=tolerance, rtol=tolerance) for name in own)


def moved(network: nn.Module, start: dict[str, Tensor], by: float = 1e-2) -> bool:
    """Return whether some weight, and not BN's statistics alone, differs by ten times what `close` forgives."""
    return any(not torch.allclose(p, start[name], atol=by, rtol=by) for name, p in network.named_parameters())


# -- ABL ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unlearn_bn", "gamma", "augmented"),
    [("train", 2.35, ("isolation", "finetune", "unlearn")), ("eval", 2.4, ("finetune",)), ("train", 2.35, ("isolation",))],
)
def test_abl_is_its_published_loop(tmp_path: Path, unlearn_bn: str, gamma: float, augmented: tuple[str, ...]) -> None:
    """Local gradient ascent on all images; fine-tuning on those that are not isolated, with new momentum and a falling rate;
    gradient ascent on the isolated ones. The stages that are not named in `augmented` see the images as they are."""
    rate = "{SGD: {lr: 0.002, momentum: 0.9, weight_decay: 0.0005}}"  # a high one would let rounding errors grow
    given = [f"gamma={gamma}", "finetune_scheduler={multi_step: {milestones: [1]}}", "unlearn_epochs=2"]
    given += [
        f"augmented=[{', '.join(augmented)}]",
        f"unlearn_bn={unlearn_bn}",
        f"isolation_optimizer={rate}",
        f"finetune_optimizer={rate}",
        f"unlearn_optimizer={rate.replace('0.002', '0.02')}",
    ]
    settings, path = small(tmp_path, "abl", "run=abl", *(f"defense.abl.{text}" for text in given))
    train_here(settings, path)
    plain = Plain(settings, tmp_path)
    network, everything, signs = plain.network(), torch.arange(200), set()

    def ascent(network: Classifier, views: Tensor, index: Tensor) -> Tensor:
        mean = plain.cross_entropy(network, views, index)
        signs.add(float(mean.detach()) > gamma)
        return mean if mean > gamma else -mean

    def one_pass(stage: str, epoch: int, chosen: Tensor, loss: Loss) -> None:
        transform = plain.augment if stage in augmented else plain.resize
        plain.train(network, optimizer, plain.draws("abl", epoch, chosen, transform), 32, loss, transform)

    optimizer = sgd(network, 0.002)
    for epoch in range(2):
        one_pass("isolation", epoch, everything, ascent)
    assert signs == {True, False}
    losses = F.cross_entropy(plain.logits(network), plain.labels, reduction="none")
    isolated = losses.argsort(stable=True)[:20].sort().values
    saved = last(tmp_path, "abl")
    assert torch.equal(isolated, saved["sets"]["isolated"])
    others = everything[~torch.isin(everything, isolated)]
    for epoch, lr in ((2, 0.002), (3, 0.0002)):
        optimizer = optimizer if epoch == 3 else sgd(network, lr)
        optimizer.param_groups[0]["lr"] = lr
        one_pass("finetune", epoch, others, plain.cross_entropy)
    optimizer, before = sgd(network, 0.02), copy.deepcopy(network.state_dict())
    network.train(unlearn_bn == "train")
    for epoch in (4, 5):
        one_pass("unlearn", epoch, isolated, lambda *batch: -plain.cross_entropy(*batch))
    assert close(network, saved["model_state_dict"]) and moved(network, before)


# -- Defenses that repair ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undefended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run without a defense, whose network has learned something."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("undefended")
    train_here(*small(folder, "none", "run=plain", *LEARNS))
    assert last(folder, "plain")["history"][-1]["clean_accuracy"] > 0.15
    return folder


LEARNS = ("network.resnet18_cifar.width=8", "num_epochs=12", "undefended.batch_size=16", "undefended.lr_scheduler=null",
          "undefended.optimizer={SGD: {lr: 0.05, momentum: 0.9}}", "global.epoch_third=12", "global.seed_num=6")  # fmt: skip


def repaired(folder: Path, name: str, *given: str) -> tuple[Config, dict[str, Any], dict[str, Tensor]]:
    """Repair the undefended network; return the settings, the last checkpoint, and the weights that it started from."""
    options = [f"defense.{name}.{text}" for text in ("start_run=plain", *given)]
    settings, path = small(folder, name, f"run={name}{len(given)}", *LEARNS, *options)
    train_here(settings, path, "False")
    return settings, last(folder, settings.run or ""), last(folder, "plain")["model_state_dict"]


@pytest.mark.parametrize("betas", [(500.0, 500.0), (0.0, 0.0)])
def test_nad_is_its_published_loop(undefended: Path, tmp_path: Path, betas: tuple[float, float]) -> None:
    """The teacher is the undefended network, fine-tuned; the student, too, but near the teacher's attention maps. With betas of
    0 it is plain fine-tuning."""
    layers = ("layer2", "layer4")
    settings, saved, start = repaired(
        undefended, "nad", f"layers=[{', '.join(layers)}]", f"betas=[{betas[0]}, {betas[1]}]",
        "student_scheduler={multi_step: {milestones: [1]}}",
    )  # fmt: skip
    plain = Plain(settings, tmp_path)
    teacher, student = plain.network(start), plain.network(start)
    optimizer = sgd(teacher, 0.01)
    for epoch in range(2):
        plain.train(teacher, optimizer, plain.draws("nad", epoch, plain.given), 16, plain.cross_entropy)
    assert close(teacher, saved["networks"]["teacher"]) and moved(teacher, start)
    teacher.eval()
    seen: dict[tuple[str, str], Tensor] = {}
    for who, network in (("student", student), ("teacher", teacher)):
        for name in layers:

            def keep(_: nn.Module, __: object, out: Tensor, key: tuple[str, str] = (who, name)) -> None:
                seen[key] = out

            network.backbone.get_submodule(name).register_forward_hook(keep)

    def distilled(network: Classifier, views: Tensor, index: Tensor) -> Tensor:
        loss = plain.cross_entropy(network, views, index)
        with torch.no_grad():
            teacher(views)
        for name, beta in zip(layers, betas, strict=True):
            for i in range(len(index)):
                maps = [(seen[who, name][i] ** 2).sum(0).flatten() for who in ("student", "teacher")]
                maps = [m / (m.norm() + 1e-6) for m in maps]
                loss = loss + beta * ((maps[0] - maps[1]) ** 2).mean() / len(index)
        return loss

    optimizer = sgd(student, 0.01)
    for epoch, rate in ((2, 0.01), (3, 0.001)):
        optimizer.param_groups[0]["lr"] = rate
        plain.train(student, optimizer, plain.draws("nad", epoch, plain.given), 16, distilled)
    assert close(student, saved["model_state_dict"]) and moved(student, start)


@pytest.mark.parametrize("drop", [0.0, 0.1])
def test_fine_pruning_is_its_published_loop(undefended: Path, tmp_path: Path, drop: float) -> None:
    """Channels are pruned in order of their mean activation on half of the clean images, as long as accuracy on the other half
    allows; the network without them is fine-tuned."""
    settings, saved, start = repaired(undefended, "fp", f"accuracy_drop={drop}", "finetune_epochs=2")
    plain = Plain(settings, tmp_path)
    network = plain.network(start)
    rank, check = split_clean(plain.given, SEED)
    inner = copy.deepcopy(network).eval()
    with torch.no_grad():
        features = inner.features(plain.resize(plain.images, torch.zeros(len(plain.images), 0)))  # (N, D)
        order = features[rank].abs().mean(0).argsort(stable=True)

        def accuracy(count: int) -> float:
            kept = features[check].clone()
            kept[:, order[:count]] = 0
            return float((inner.linear(kept).argmax(1) == plain.labels[check]).float().mean())

        counts = [k for k in range(features.shape[1] + 1) if accuracy(k) >= accuracy(0) - drop - 1e-6]
    pruned = order[: max(counts)]
    assert 0 < len(pruned) < features.shape[1]
    assert torch.equal(saved["tables"]["pruned channels"], pruned)
    optimizer = sgd(network, 0.01)

    def silent(network: Classifier, views: Tensor, index: Tensor) -> Tensor:
        with torch.no_grad():
            network.linear.weight[:, pruned] = 0
        return plain.cross_entropy(network, views, index)

    for epoch in (1, 2):
        plain.train(network, optimizer, plain.draws("fp", epoch, plain.given), 8, silent)
    with torch.no_grad():
        network.linear.weight[:, pruned] = 0
    assert close(network, saved["model_state_dict"])
    assert [row.get("channels_pruned") for row in saved["history"]] == [len(pruned)] * 3
    zero = (saved["model_state_dict"]["linear.weight"] == 0).all(0)
    assert torch.equal(torch.nonzero(zero).squeeze(1), pruned.sort().values)


# -- CBD ---------------------------------------------------------------------------------------------------------------


def test_cbd_is_its_published_loop(tmp_path: Path) -> None:
    """A biased network with cross-entropy; then a new one, with new momentum and a falling rate, that learns an image the more
    the higher the biased network's loss is."""
    rate = "{SGD: {lr: 0.01, momentum: 0.9, weight_decay: 0.0001, nesterov: true}}"
    given = [f"optimizer={rate}", "clean_epochs=3", "lr_scheduler={multi_step: {milestones: [1, 2]}}", "batch_size=32"]
    settings, path = small(tmp_path, "cbd", "run=cbd", *(f"defense.cbd.{text}" for text in given))
    train_here(settings, path)
    plain, everything, saved = Plain(settings, tmp_path), torch.arange(200), last(tmp_path, "cbd")

    def nesterov(network: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, nesterov=True)

    biased = build_classifier(settings.network, 10, SEED + 1).train()
    optimizer = nesterov(biased)
    for epoch in range(2):
        plain.train(biased, optimizer, plain.draws("cbd", epoch, everything), 32, plain.cross_entropy)
    assert close(biased, saved["networks"]["biased"])
    biased.eval()

    def deconfounded(network: Classifier, views: Tensor, index: Tensor) -> Tensor:
        logits, labels = network(views), plain.labels[index]
        weights = []
        for own, other, label in zip(logits.detach().double(), biased(views).detach().double(), labels, strict=True):
            loss, known = (float(each.logsumexp(0) - each[label]) for each in (own, other))
            weights.append(known / (known + loss + 1e-8))
        scaled = [w * len(weights) / sum(weights) for w in weights]
        losses = [row.logsumexp(0) - row[label] for row, label in zip(logits, labels, strict=True)]
        return torch.stack([w * loss for w, loss in zip(scaled, losses, strict=True)]).mean()

    network = plain.network()
    optimizer = nesterov(network)
    for epoch, rate in ((2, 0.01), (3, 0.001), (4, 0.0001)):
        optimizer.param_groups[0]["lr"] = rate
        plain.train(network, optimizer, plain.draws("cbd", epoch, everything), 32, deconfounded)
    assert close(network, saved["model_state_dict"]) and moved(network, plain.network().state_dict())


# -- DBD ---------------------------------------------------------------------------------------------------------------


def learn_features(plain: Plain, network: Classifier) -> nn.Module:
    """Two epochs of SimCLR on two views of each image; return the projection that was trained along."""
    views = Pipeline(published_views(32), plain.config.transform.train.remaining, 32, 32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key_seed(SEED, "dbd projection"))
        narrow = nn.Linear(16, 8)  # the program draws this layer's weights first
        projection = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), narrow)

    def contrast(network: Classifier, both: Tensor, index: Tensor) -> Tensor:
        z = F.normalize(projection(network.backbone(both)), dim=1)
        count, loss = len(index), torch.zeros(())
        for i in range(count):
            similar = z @ z[i] / 0.5
            rest = torch.cat([similar[:i], similar[i + 1 :]])
            loss = loss + rest.logsumexp(0) - similar[count + i]
        return loss / count

    trained = [*network.backbone.parameters(), *projection.parameters()]
    optimizer = torch.optim.SGD(trained, lr=0.0005, momentum=0.9, weight_decay=1e-4)
    for epoch in range(2):
        optimizer.param_groups[0]["lr"] = 0.0005 * (1 + torch.cos(torch.tensor(torch.pi * epoch / 1000)).item()) / 2
        rng = generator(SEED, "simclr", epoch)
        order = torch.randperm(200, generator=rng)
        first, second = views.draw(200, rng), views.draw(200, rng)
        for at in range(0, 200, 32):
            index = order[at : at + 32]
            both = torch.cat([views(plain.images[index], table[at : at + 32]) for table in (first, second)])
            optimizer.zero_grad()
            contrast(network, both, index).backward()
            optimizer.step()
    return projection


def symmetric_loss(plain: Plain) -> Loss:
    """The symmetric cross-entropy of the linear layer, on features that get no gradient."""

    def sce(network: Classifier, batch: Tensor, index: Tensor) -> Tensor:
        with torch.no_grad():
            features = network.features(batch)
        logits = network.linear(features)
        probabilities = logits.softmax(1).clamp(1e-7, 1)
        onehot = F.one_hot(plain.labels[index], 10).float().clamp(1e-4, 1)
        return 0.1 * F.cross_entropy(logits, plain.labels[index]) - (probabilities * onehot.log()).sum(1).mean()

    return sce


@torch.no_grad()
def split_loss(plain: Plain, network: Classifier, epoch: int) -> Tensor:
    """The symmetric cross-entropy of each image under one augmented view, in eval mode."""
    views = plain.augment(plain.images, draw_views(SEED, "score", epoch, 200, plain.augment))
    logits, labels = network.eval()(views), plain.labels
    probabilities, onehot = logits.softmax(1).clamp(1e-7, 1), F.one_hot(labels, 10).float().clamp(1e-4, 1)
    out: Tensor = 0.1 * F.cross_entropy(logits, labels, reduction="none") - (probabilities * onehot.log()).sum(1)
    return out


def test_dbd_is_its_published_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SimCLR on two different views of each image; a new linear layer, with symmetric cross-entropy, on features whose BN
    statistics move; then MixMatch, on the half with the lowest losses, with the same Adam, whose lambda_u has been rising since
    the linear layer's first epoch."""
    given = (
        "simclr_transform=[]",
        "simclr_optimizer={SGD: {lr: 0.0005, momentum: 0.9, weight_decay: 0.0001}}",
        "rampup_length=30",
        "head_batch_size=64",
    )
    settings, path = small(tmp_path, "dbd", "run=dbd", *(f"defense.dbd.{text}" for text in given))
    finish = Session.finish_epoch

    def stop_after(session: Session, losses: dict[str, float]) -> None:
        finish(session, losses)
        session.writer.wait()
        if session.state.epoch in (3, 4):
            raise KeyboardInterrupt

    saved_after = []
    with monkeypatch.context() as patch:
        patch.setattr(Session, "finish_epoch", stop_after)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                train_here(settings, path)
            saved_after.append(last(tmp_path, "dbd"))
    saved, first = saved_after
    plain = Plain(settings, tmp_path)
    network = plain.network()
    projection = learn_features(plain, network)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key_seed(SEED, "dbd head"))
        network.linear.load_state_dict(nn.Linear(16, 10).state_dict())
    assert settings.split.criterion.sce.alpha == 0.1 and settings.split.criterion.sce.beta == 1.0

    adam = torch.optim.Adam(network.parameters(), lr=0.002)
    plain.train(network, adam, plain.draws("dbd head", 2, torch.arange(200)), 64, symmetric_loss(plain))
    assert close(network, saved["model_state_dict"]) and close(projection, saved["networks"]["projection"])
    losses = split_loss(plain, plain.network(saved["model_state_dict"]), 3)
    assert torch.equal(losses.argsort(stable=True)[:100].sort().values, first["clean_pool"])
    train_here(settings, path)
    rows, steps = last(tmp_path, "dbd")["history"][3:], settings.semi.mixmatch.train_iteration
    greatest = settings.semi.criterion.mixmatch.lambda_u
    assert [row["lambda_u"] for row in rows] == pytest.approx(
        [greatest * (1 + e + (steps - 1) / steps / 2) / 30 for e in (0, 1)]
    )
    moments = last(tmp_path, "dbd")["optimizer_state_dict"]["state"]
    assert {int(state["step"]) for state in moments.values()} == {2 * steps, 2 * steps + 4}  # linear: four steps more


def test_fine_tuning_needs_no_teacher(undefended: Path, tmp_path: Path) -> None:
    """Without epochs of the teacher the student begins as the named run's network, from its first epoch on."""
    given = ("teacher_epochs=0", "betas=[0.0, 0.0, 0.0]", "student_scheduler=null")
    settings, saved, start = repaired(undefended, "nad", *given)
    plain = Plain(settings, tmp_path)
    student = plain.network(start)
    optimizer = sgd(student, 0.01)
    for epoch in range(2):
        plain.train(student, optimizer, plain.draws("nad", epoch, plain.given), 16, plain.cross_entropy)
    assert close(student, saved["model_state_dict"])
    assert close(plain.network(start), saved["networks"]["teacher"])
