"""ASD: train a clean classifier on a poisoned training set.

Gao et al., "Backdoor Defense via Adaptively Splitting Poisoned Dataset", CVPR 2023. This file is the method, in order:
the epoch loop, the split into a clean and a polluted pool, the virtual model, and the MixMatch training on both pools.

    python ASD.py --config config/baseline_asd.yaml --resume False --gpu 0
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.augment import Pipeline
from data.batches import MixMatchDraws, SupervisedDraws, draw_mixmatch, draw_scoring, draw_supervised, views
from data.poison import PoisonedData, TestSets, build_attack, build_test_sets, load_raw, poison_training_set
from data.pools import (
    check_pool_sizes,
    class_agnostic_split,
    class_aware_split,
    draw_seed_samples,
    meta_split,
    per_class,
    rest,
)
from data.sets import POISONED, ImageSet
from loss.mixmatch import guess_labels, interleave, mixmatch_loss, mixup, ramp_up
from loss.supervised import cross_entropy, symmetric_cross_entropy
from model.classifier import Classifier, build_classifier, virtual_copy
from model.optimizer import build_optimizer, build_scheduler
from model.scoring import predict
from utils import checkpoint, config, pictures
from utils.checkpoint import State
from utils.cli import command, parse_arguments
from utils.config import Config, to_yaml
from utils.device import Precision, choose_device, choose_precision, set_determinism
from utils.draws import key_seed
from utils.errors import UserError
from utils.run import BEST, LATEST, Run, open_run
from utils.runlog import RunLog, progress, write_metrics
from utils.schema import as_dict


def main() -> None:
    """Read the command line, open the run, train."""
    args = parse_arguments("Train with ASD on a poisoned data set.", None, training=True)
    settings = config.load(args.config, args.set)
    device = choose_device(args.gpu, print)
    set_determinism(settings.seed.deterministic, settings.seed.benchmark)
    run, _lock = open_run(settings, Path(args.config), args.resume == "False", print)
    train(settings, run, device, args.resume)


def train(config: Config, run: Run, device: torch.device, resume: str) -> None:
    """Run all epochs that are still to do, from the checkpoint that `resume` names or from scratch."""
    raw = load_raw(config)
    attack = build_attack(config, raw, run.saved)
    poisoned = poison_training_set(config, raw, attack, run.saved)
    tests = build_test_sets(config, raw, attack).to(device)
    train_set = poisoned.train.to(device)
    augment, plain = build_pipelines(config, train_set)
    precision = choose_precision(device, config.runtime.amp, print)
    seeds = torch.zeros(0, dtype=torch.int64)
    if config.defense == "asd":
        check_pool_sizes(config, poisoned.train.labels)
        seeds = draw_seed_samples(
            poisoned.train.labels, poisoned.oracle, config.num_classes, config.global_.seed_num, config.seed.seed
        )

    state = build_state(config, device, precision, len(train_set))
    latest = run.checkpoint(LATEST if resume in ("", "False") else resume)
    if resume not in ("", "False") or (resume == "" and latest.exists()):
        checkpoint.load(latest, state, as_dict(config))
    log = RunLog(run.log, state.epoch)
    announce(log, run, config, device, precision, poisoned, tests, state)

    for epoch in range(state.epoch, config.num_epochs):
        started = time.monotonic()
        torch.manual_seed(key_seed(config.seed.seed, "torch", epoch))  # for networks that drop units
        if config.defense == "asd":
            clean_pool, split_values = split_pools(config, epoch, state.model, train_set, seeds, augment, precision)
            show_split(config, run, log, poisoned, epoch, clean_pool, split_values)
            losses = train_mixmatch(config, epoch, state, train_set, clean_pool, augment, precision)
            state.clean_pool = clean_pool
            state.epochs_in_clean_pool[clean_pool] += 1
        else:
            losses = train_undefended(config, epoch, state, train_set, augment, precision)
        if state.scheduler is not None:
            state.scheduler.step()
        clean_accuracy = accuracy(config, state.model, tests.clean, plain, precision)
        attack_success_rate = accuracy(config, state.model, tests.backdoor, plain, precision)
        finish_epoch(config, run, log, poisoned, state, losses, clean_accuracy, attack_success_rate, started)
    conclude(config, run, log, poisoned, state)


def split_pools(
    config: Config, epoch: int, model: nn.Module, train_set: ImageSet, seeds: Tensor, augment: Pipeline, precision: Precision
) -> tuple[Tensor, Tensor]:
    """Split the training set for one epoch (paper section 3.2; asd.md section 6).

    Returns:
        the clean pool, sorted indices (P,) int64, and the values (N,) that decided; both on the CPU.
    """
    g, n = config.global_, len(train_set)
    labels = train_set.labels.cpu()
    losses = split_losses(config, epoch, "score", model, train_set, augment, precision)
    if epoch < g.epoch_first:
        pool = class_aware_split(losses, labels, seeds, config.num_classes, per_class(epoch, g.n, g.t))
        return pool, losses
    if epoch < g.epoch_second:
        pool, values = class_agnostic_split(losses, g.epsilon), losses
    else:
        virtual_model = train_virtual_model(config, epoch, model, train_set, augment, precision)
        virtual_losses = split_losses(config, epoch, "score virtual", virtual_model, train_set, augment, precision)
        pool, values = meta_split(losses, virtual_losses, g.epsilon), losses - virtual_losses
    if g.keep_seeds:
        pool = torch.cat([pool, seeds]).unique()
    assert 0 < len(pool) < n
    return pool, values


def split_losses(
    config: Config, epoch: int, purpose: str, model: nn.Module, train_set: ImageSet, augment: Pipeline, precision: Precision
) -> Tensor:
    """Return the split loss (N,) float32, on the CPU, of every image with the label it carries, under one augmented view."""
    n, batch, sce = len(train_set), config.loader.batch_size, config.split.criterion.sce
    draws = draw_scoring(config.seed.seed, purpose, epoch, n, augment).to(train_set.images.device)
    batches = views(train_set.images, draws, augment, batch)
    logits = predict(model, progress(batches, purpose, -(-n // batch)), precision)  # (N, C)
    losses = symmetric_cross_entropy(logits, train_set.labels, sce.alpha, sce.beta).cpu()
    wrong = torch.nonzero(~torch.isfinite(losses)).squeeze(1)
    if len(wrong):
        raise UserError(
            f"epoch {epoch}: the split loss of {len(wrong)} of {n} images is not finite (first: image {int(wrong[0])}): "
            f"lower the learning rate of {'meta.optimizer' if 'virtual' in purpose else 'optimizer'}; "
            "the last checkpoint is kept"
        )
    return losses


def train_virtual_model(
    config: Config, epoch: int, model: nn.Module, train_set: ImageSet, augment: Pipeline, precision: Precision
) -> Classifier:
    """Return a copy of the model, trained a little on all images with the labels they carry (paper section 3.2.3)."""
    assert isinstance(model, Classifier)
    virtual_model, last_layers = virtual_copy(model)
    optimizer = build_optimizer(config.meta.optimizer, last_layers)
    for i in range(config.meta.epoch):
        draws = draw_supervised(config.seed.seed, f"virtual {i}", epoch, len(train_set), augment)
        train_supervised(
            "virtual model", virtual_model, optimizer, train_set, draws, augment, config.loader.batch_size, precision
        )
    return virtual_model


def train_mixmatch(
    config: Config, epoch: int, state: State, train_set: ImageSet, clean_pool: Tensor, augment: Pipeline, precision: Precision
) -> dict[str, float]:
    """Train one epoch on both pools: labels of the clean pool are used, those of the polluted pool are not.

    Returns:
        the epoch's means of `loss`, `loss_x`, `loss_u`, `lambda_u`.
    """
    s = config.semi
    steps, device = s.mixmatch.train_iteration, train_set.images.device
    lambda_u = ramp_up(epoch, steps, s.criterion.mixmatch.lambda_u, s.criterion.mixmatch.rampup_length)  # (S,)
    polluted_pool = rest(clean_pool, len(train_set))
    draws = draw_mixmatch(config, epoch, clean_pool, polluted_pool, augment, lambda_u).to(device)
    sums = torch.zeros(3, device=device)  # loss, Lx, Lu, read once at the end: no step waits for the host
    state.model.train()
    for i in progress(range(steps), "MixMatch", steps):
        sums += mixmatch_step(config, state.model, state.optimizer, train_set, draws.step(i), augment, precision)
    means = dict(zip(("loss", "loss_x", "loss_u"), (sums / steps).tolist(), strict=True))
    return means | {"lambda_u": float(lambda_u.mean())}


def mixmatch_step(
    config: Config,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    train_set: ImageSet,
    draw: MixMatchDraws,
    augment: Pipeline,
    precision: Precision,
) -> Tensor:
    """One MixMatch step (asd.md section 7). B labelled and B unlabelled images, C classes.

    Returns:
        (3,): loss, Lx, Lu, detached.
    """
    b = draw.labelled.shape[0]
    index = torch.cat([draw.labelled, draw.unlabelled, draw.unlabelled])
    inputs = precision.lay_out(augment(train_set.images[index], draw.views))  # (3B, 3, H, W): x, u1, u2

    with torch.no_grad(), precision.autocast():  # in train mode: these statistics count too
        logits1, logits2 = model(inputs[b : 2 * b]), model(inputs[2 * b :])  # (B, C) each
    guessed = guess_labels(logits1, logits2, config.semi.mixmatch.temperature)  # (B, C)
    given = F.one_hot(train_set.labels[draw.labelled], config.num_classes).to(guessed.dtype)  # (B, C)
    targets = torch.cat([given, guessed, guessed])  # (3B, C)

    mixed_inputs = mixup(inputs, draw.lam, draw.permutation)
    mixed_targets = mixup(targets, draw.lam, draw.permutation)
    with precision.autocast():
        blocks = interleave(mixed_inputs, b).split(b)  # 3 x (B, 3, H, W), each of labelled and unlabelled rows
        logits = interleave(torch.cat([model(precision.lay_out(block)) for block in blocks]), b)  # (3B, C)
    loss_x, loss_u = mixmatch_loss(logits, mixed_targets, labelled=b)
    loss = loss_x + draw.lambda_u * loss_u

    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return torch.stack([loss.detach(), loss_x.detach(), loss_u.detach()])


def train_undefended(
    config: Config, epoch: int, state: State, train_set: ImageSet, augment: Pipeline, precision: Precision
) -> dict[str, float]:
    """`defense: none`: one epoch of plain training on all images with the labels they carry."""
    draws = draw_supervised(config.seed.seed, "undefended", epoch, len(train_set), augment)
    batch = config.undefended.batch_size
    return {"loss": train_supervised("training", state.model, state.optimizer, train_set, draws, augment, batch, precision)}


def train_supervised(
    name: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    train_set: ImageSet,
    draws: SupervisedDraws,
    augment: Pipeline,
    batch: int,
    precision: Precision,
) -> float:
    """Train one pass over all images with cross-entropy, the last batch kept; return the mean loss."""
    draws = draws.to(train_set.images.device)
    total = torch.zeros((), device=train_set.images.device)
    model.train()
    starts = range(0, len(train_set), batch)
    for start in progress(starts, name, len(starts)):
        index, view = draws.order[start : start + batch], draws.views[start : start + batch]
        inputs = precision.lay_out(augment(train_set.images[index], view))  # (B, 3, H, W)
        with precision.autocast():
            logits = model(inputs)  # (B, C)
        losses = cross_entropy(logits, train_set.labels[index])  # (B,)
        optimizer.zero_grad(set_to_none=True)
        losses.mean().backward()
        optimizer.step()
        total += losses.detach().sum()
    return float(total) / len(train_set)


def accuracy(config: Config, model: nn.Module, test_set: ImageSet, plain: Pipeline, precision: Precision) -> float:
    """Return the share of images that get their label: a count over the whole set divided by its size.

    On the clean test set that is ACC, on the backdoor test set ASR.
    """
    n, batch = len(test_set), config.loader.batch_size
    no_draws = torch.zeros(n, 0, device=test_set.images.device)
    batches = progress(views(test_set.images, no_draws, plain, batch), "test", -(-n // batch))
    return int((predict(model, batches, precision).argmax(1) == test_set.labels).sum()) / n


def build_pipelines(config: Config, images: ImageSet) -> tuple[Pipeline, Pipeline]:
    """Return the train augmentation and the plain transform of test images."""
    height, width = images.images.shape[2:]
    t = config.transform
    train_pipeline = Pipeline(t.train.primary, t.train.remaining, height, width)
    return train_pipeline, Pipeline(t.test.primary, t.test.remaining, height, width)


def build_state(config: Config, device: torch.device, precision: Precision, count: int) -> State:
    """Return a run's state before its first epoch: fresh weights, optimizer, schedule."""
    model = build_classifier(config.network, config.num_classes, config.seed.seed).to(device)
    if precision.amp:
        model = model.to(memory_format=torch.channels_last)
    plan: Any = config if config.defense == "asd" else config.undefended
    optimizer = build_optimizer(plan.optimizer, model.parameters())
    scheduler = build_scheduler(plan.lr_scheduler, optimizer, config.num_epochs)
    return State(model, optimizer, scheduler, epochs_in_clean_pool=torch.zeros(count, dtype=torch.int32))


def announce(
    log: RunLog,
    run: Run,
    config: Config,
    device: torch.device,
    precision: Precision,
    poisoned: PoisonedData,
    tests: TestSets,
    state: State,
) -> None:
    """Say what is about to run, and draw the triggered images."""
    count = int(poisoned.oracle.poisoned().sum())
    network = f"{config.network.name}, {sum(p.numel() for p in state.model.parameters()):,} parameters"
    log.say(
        f"run {run.name}: defense {config.defense}, attack {config.attack.name}, target class {config.backdoor.target_label}"
    )
    log.say(
        f"training images {len(poisoned.train)} ({count} poisoned), test images {len(tests.clean)}, "
        f"triggered test images {len(tests.backdoor)}"
    )
    log.say(f"{network}, on {device} in {'bf16' if precision.amp else 'fp32'}; logs in {run.log}")
    if state.epoch >= config.num_epochs:
        log.say(f"the checkpoint has all {config.num_epochs} epochs: nothing to do")
    elif state.epoch:
        log.say(f"going on after epoch {state.epoch}/{config.num_epochs}")
    else:
        log.start(as_dict(config), to_yaml(config), poisoned.examples[1])
    if state.history:
        write_metrics(run.log, state.history)  # a run killed after its checkpoint has not written its last row
    if count:
        title = f"{config.attack.name}: poisoned training images"
        pictures.draw_triggered(run.log / "triggered.png", poisoned.examples, title)


def show_split(
    config: Config, run: Run, log: RunLog, poisoned: PoisonedData, epoch: int, clean_pool: Tensor, values: Tensor
) -> None:
    """Report the values that split the set, and draw them at the end of each stage."""
    flags = poisoned.oracle.flags
    log.losses(values, flags, epoch)
    stage, last = config.stage(epoch), epoch + 1 == config.num_epochs
    if last or config.stage(epoch + 1) != stage:
        label = "split loss - split loss of the virtual model" if stage == "meta-split" else "split loss"
        title = f"{stage.removesuffix('-split')} split of epoch {epoch + 1}: {len(clean_pool)} images in the clean pool"
        path = run.log / f"split_{stage}.png"
        pictures.draw_losses(path, values.numpy(), flags.numpy(), clean_pool.numpy(), label, title)


def finish_epoch(
    config: Config,
    run: Run,
    log: RunLog,
    poisoned: PoisonedData,
    state: State,
    losses: dict[str, float],
    clean_accuracy: float,
    attack_success_rate: float,
    started: float,
) -> None:
    """Write the epoch's row and its checkpoints; the epoch counts as finished once `latest_model.pt` is there."""
    asd, n = config.defense == "asd", len(poisoned.train)
    if not torch.isfinite(torch.tensor(list(losses.values()))).all():
        what = "optimizer" if asd else "undefended.optimizer"
        raise UserError(
            f"epoch {state.epoch}: the training loss is not finite: lower the learning rate of {what}; "
            "the last checkpoint is kept"
        )
    row: dict[str, Any] = {
        "epoch": state.epoch,
        "defense": config.defense,
        "stage": config.stage(state.epoch),
        "clean_accuracy": clean_accuracy,
        "attack_success_rate": attack_success_rate,
        "clean_pool_size": len(state.clean_pool) if asd else None,
        "polluted_pool_size": n - len(state.clean_pool) if asd else None,
        "poisoned_in_clean_pool": int((poisoned.oracle.flags[state.clean_pool] == POISONED).sum()) if asd else None,
        "loss": losses["loss"],
        "loss_x": losses.get("loss_x"),
        "loss_u": losses.get("loss_u"),
        "lambda_u": losses.get("lambda_u"),
        "learning_rate": state.optimizer.param_groups[0]["lr"],
        "seconds": round(time.monotonic() - started, 3),
    }
    state.history.append(row)
    state.epoch += 1
    if clean_accuracy > state.best_acc:
        state.best_acc, state.best_epoch = clean_accuracy, state.epoch
        checkpoint.save(run.checkpoints / BEST, state, as_dict(config))
    checkpoint.save(run.checkpoints / LATEST, state, as_dict(config))
    log.epoch(state.history, config.num_epochs)


def conclude(config: Config, run: Run, log: RunLog, poisoned: PoisonedData, state: State) -> None:
    """Draw the run's pictures and say what came out."""
    if not state.history:  # the authors' checkpoints have none
        return
    row, title = state.history[-1], f"{run.name}: {config.attack.name}, defense {config.defense}"
    pictures.draw_accuracy(run.log / "accuracy.png", state.history, title)
    if config.defense == "asd":
        share = float(poisoned.oracle.poisoned().float().mean())
        pictures.draw_purity(run.log / "purity.png", state.history, share, title)
    seconds = sum(r["seconds"] for r in state.history)
    log.say(
        f"done: ACC {100 * row['clean_accuracy']:.2f} %, ASR {100 * row['attack_success_rate']:.2f} % after "
        f"{state.epoch} epochs in {seconds:.0f} s; best ACC {100 * state.best_acc:.2f} % in epoch {state.best_epoch}"
    )
    log.finish(checkpoint.flatten(as_dict(config)), row)


if __name__ == "__main__":
    command("ASD.py", main)
