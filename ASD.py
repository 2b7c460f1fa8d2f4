"""ASD: train a clean classifier on a poisoned training set.

Gao et al., "Backdoor Defense via Adaptively Splitting Poisoned Dataset", CVPR 2023. This file is the method, in order:
the epoch loop, the split into a clean and a polluted pool, the virtual model, and the MixMatch training on both pools.

    python ASD.py --config config/baseline_asd.yaml --resume False --gpu 0
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds: Ctrl-C and SIGTERM end in one line from here on
    from utils.startup import begin

    begin("ASD.py")

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.augment import Pipeline
from data.batches import MixMatchDraws, SupervisedDraws, draw_mixmatch, draw_scoring, draw_supervised, views
from data.poison import TestSets, prepare
from data.pools import check_pool_sizes, class_agnostic_split, class_aware_split, meta_split, per_class, rest
from data.seeds import choose_seed_samples, complete_manifest
from data.sets import COVER, POISONED, ImageSet, Oracle
from loss.mixmatch import guess_labels, interleave_order, mixmatch_loss, mixup, ramp_up
from loss.supervised import cross_entropy, symmetric_cross_entropy
from model.batch_counters import count_at_end
from model.classifier import Classifier, build_classifier, copy_values, new_classifier, virtual_copy
from model.grouped_norm import forward_each, group, rows_per_group
from model.inference import predict
from model.optimizer import build_optimizer, build_scheduler, restart
from model.sync_norm import synchronize
from utils import checkpoint, config, manifest
from utils.checkpoint import State
from utils.cli import command, parse_arguments
from utils.config import Config, check_processes
from utils.draws import key_seed
from utils.errors import UserError
from utils.machine import Machine, choose_machine, mute, set_determinism, start_processes
from utils.paths import exists
from utils.report import Report, Silence
from utils.run import BEST, LATEST, Run, locate, make_ready, open_run
from utils.runlog import progress
from utils.schema import as_dict, stand_ins
from utils.stepper import Stepper
from utils.suspects import CSV as SUSPECTS
from utils.suspects import Evidence


@dataclass(frozen=True)
class Context:
    """What is fixed for a run and known to the defender: no ground truth."""

    config: Config
    machine: Machine
    train_set: ImageSet  # N images with the labels that they carry
    augment: Pipeline  # the train augmentation


def main() -> None:
    """Read the command line, open the run, train; several devices mean one process for each."""
    args = parse_arguments("Train with ASD on a poisoned data set.", None, training=True)
    settings = config.load(args.config, args.set)
    start_processes(args.gpu, partial(check_processes, settings))
    machine = choose_machine(args.gpu, settings.runtime.amp, print)
    set_determinism(settings.seed.deterministic, settings.seed.benchmark)
    check_processes(settings, machine.size)
    if machine.rank == 0:
        _run, _lock = open_run(settings, Path(args.config), args.resume == "False", print)
    machine.wait()
    with checkpoint.Writer() as writer:  # however the run ends, the checkpoint that is being written is finished
        train(settings, locate(settings, Path(args.config)), machine, args.resume, writer)
    machine.leave()


def train(config: Config, run: Run, machine: Machine, resume: str, writer: checkpoint.Writer | None = None) -> None:
    """Run all epochs that are still to do, from the checkpoint that `resume` names or from scratch."""
    writer = writer or checkpoint.Writer()
    latest = run.checkpoints / LATEST if resume in ("", "False") else run.checkpoint(resume)
    saved = None
    if resume not in ("", "False") or (resume == "" and exists(latest, "--resume")):
        saved = checkpoint.read(latest)
        names = {key for key, _, _ in stand_ins(config)}
        checkpoint.refuse_other_settings(latest, saved, as_dict(config), names)  # before anything is decoded or made
    with machine.first_alone():  # it makes what is kept with the run, the others read it
        data = prepare(config, run.saved, machine.device, print if machine.rank == 0 else mute, machine.size, new_classifier)
        seeds = choose_seed_samples(config, data, run.saved)
    tests, train_set = data.tests.to(machine.device), data.train.to(machine.device)
    augment, plain = build_pipelines(config, train_set)
    if config.defense == "asd":
        check_pool_sizes(config, data.train.labels, seeds)

    state = build_state(config, machine, len(train_set))
    state.about = {"class_names": list(data.class_names), "image_size": list(train_set.images.shape[2:])}
    state.data = complete_manifest(config, data, seeds)
    if saved is not None:
        checkpoint.load(latest, state, as_dict(config), saved)
    if not make_ready(run, config, latest, state, print if machine.rank == 0 else None):
        return
    report: Any = Silence()
    if machine.rank == 0:
        manifest.keep(run.saved, state.data)
        flags = data.oracle.flags if data.oracle else None
        report = Report(run, config, data.backdoor, data.class_names, flags, data.examples, data.caption, state.epoch)
    report.start(machine, state, *(len(part) if part else None for part in (tests.clean, tests.backdoor)))
    context = Context(config, machine, train_set, augment)
    state.steps = mixmatch_steps(context, state) if config.defense == "asd" else supervised_steps(context, state)
    virtual = build_virtual(context, state.model) if config.defense == "asd" else None

    trains = state.epoch < config.num_epochs
    for epoch in range(state.epoch, config.num_epochs):
        started = time.monotonic()
        torch.manual_seed(key_seed(config.seed.seed, "torch", epoch))  # for networks that drop units
        if config.defense == "asd":
            clean_pool, split_values = split_pools(context, epoch, state.model, seeds, virtual)
            report.split(epoch, clean_pool, split_values)
            losses = train_mixmatch(context, epoch, state, clean_pool)
            state.clean_pool = clean_pool
            state.epochs_in_clean_pool[clean_pool] += 1
        else:
            losses = train_undefended(context, epoch, state)
        machine.average_buffers(state.model)
        figures = evaluate(config, state.model, tests, plain, machine)
        finish_epoch(config, state, data.oracle, losses, figures, time.monotonic() - started)
        if machine.rank == 0:
            save(config, run, state, writer, report)
    writer.wait()
    if config.defense == "asd" and (trains or not (run.saved / SUSPECTS).exists()):
        report.rank_suspects(weigh_images(context, state, plain), train_set, data.names, data.class_names)
    report.conclude(state)


def split_pools(
    context: Context, epoch: int, model: nn.Module, seeds: Tensor, virtual: State | None = None
) -> tuple[Tensor, Tensor]:
    """Split the training set for one epoch (paper section 3.2; asd.md section 6).

    Args:
        seeds: (S,) int64, on the CPU.
        virtual: as for `train_virtual_model`.
    Returns:
        the clean pool, sorted indices (P,) int64, and the values (N,) that decided; both on the CPU.
    """
    config, n = context.config, len(context.train_set)
    g, labels = config.global_, context.train_set.labels.cpu()
    losses = split_losses(context, epoch, "score", model)
    if epoch < g.epoch_first:
        pool = class_aware_split(losses, labels, seeds, config.num_classes, per_class(epoch, g.n, g.t))
        return pool, losses
    if epoch < g.epoch_second:
        pool, values = class_agnostic_split(losses, g.epsilon), losses
    else:
        virtual_model = train_virtual_model(context, epoch, model, virtual)
        virtual_losses = split_losses(context, epoch, "score virtual", virtual_model)
        pool, values = meta_split(losses, virtual_losses, g.epsilon), losses - virtual_losses
    if g.keep_seeds:
        pool = torch.cat([pool, seeds]).unique()
    assert 0 < len(pool) < n
    return pool, values


def split_losses(context: Context, epoch: int, purpose: str, model: nn.Module) -> Tensor:
    """Return the split loss (N,) float32, on the CPU, of every image with the label it carries, under one augmented view."""
    config, machine, train_set, augment = context.config, context.machine, context.train_set, context.augment
    n, batch, sce = len(train_set), machine.inference_batch(config.loader.batch_size), config.split.criterion.sce
    draws = draw_scoring(config.seed.seed, purpose, epoch, n, augment).to(machine.device)
    mine = machine.share(n)
    batches = views(train_set.part(mine), draws[mine], augment, batch)
    logits = predict(model, progress(batches, purpose, -(-n // machine.size // batch)), machine)  # (N, C), its share
    losses = symmetric_cross_entropy(logits, train_set.labels[mine], sce.alpha, sce.beta)
    losses = machine.gather(losses, n).cpu()  # (N,)
    wrong = torch.nonzero(~torch.isfinite(losses)).squeeze(1)
    if len(wrong):
        raise UserError(
            f"epoch {epoch}: the split loss of {len(wrong)} of {n} images is not finite (first: image {int(wrong[0])}): "
            f"lower the learning rate of {'meta.optimizer' if 'virtual' in purpose else 'optimizer'}; "
            "the last checkpoint is kept"
        )
    return losses


def train_virtual_model(context: Context, epoch: int, model: nn.Module, virtual: State | None = None) -> Classifier:
    """Return a copy of the model, trained a little on all images with the labels they carry (paper section 3.2.3).

    Args:
        virtual: overwritten with the copy, whose model is returned; None: the copy is a new one.
    """
    virtual = virtual or build_virtual(context, model)
    copy_values(model, virtual.model)
    restart(virtual.optimizer)
    batch, seed = context.config.loader.batch_size, context.config.seed.seed
    for i in range(context.config.meta.epoch):
        draws = draw_supervised(seed, f"virtual {i}", epoch, len(context.train_set), context.augment)
        train_supervised(context, virtual, "virtual model", draws, batch)
    context.machine.average_buffers(virtual.model)
    assert isinstance(virtual.model, Classifier)
    return virtual.model


def build_virtual(context: Context, model: nn.Module) -> State:
    """Return a copy of the model whose last layers can be trained.

    One serves all epochs, each of which overwrites it: a captured step finds its tensors by their addresses.
    """
    assert isinstance(model, Classifier)
    config, machine = context.config, context.machine
    virtual_model, last_layers = virtual_copy(model)
    graph = machine.uses_graph(config.runtime.mode)
    virtual = State(virtual_model, build_optimizer(config.meta.optimizer, last_layers, capturable=graph), scheduler=None)
    virtual.parallel = machine.wrap(virtual_model)
    virtual.steps = supervised_steps(context, virtual)
    return virtual


def train_mixmatch(context: Context, epoch: int, state: State, clean_pool: Tensor) -> dict[str, float]:
    """Train one epoch on both pools: labels of the clean pool are used, those of the polluted pool are not.

    Args:
        clean_pool: (P,) int64 on the CPU.
    Returns:
        the epoch's means of `loss`, `loss_x`, `loss_u`, `lambda_u`.
    """
    s = context.config.semi
    count = s.mixmatch.train_iteration
    lambda_u = ramp_up(epoch, count, s.criterion.mixmatch.lambda_u, s.criterion.mixmatch.rampup_length)  # (S,)
    polluted_pool = rest(clean_pool, len(context.train_set))
    draws = draw_mixmatch(context.config, epoch, clean_pool, polluted_pool, context.augment, lambda_u)
    steps = state.steps or mixmatch_steps(context, state)
    state.model.train()
    with count_at_end(state.model, FORWARDS * count):
        sums = steps.run(draws.to(context.machine.device), lambda numbers: progress(numbers, "MixMatch", count))
    means = dict(zip(("loss", "loss_x", "loss_u"), (sums / count).tolist(), strict=True))  # read once: no step waits for it
    return means | {"lambda_u": float(lambda_u.mean())}


def mixmatch_steps(context: Context, state: State) -> Stepper:
    """Return what runs the MixMatch steps of every epoch."""
    losses = context.machine.compiled(mixmatch_losses) if context.config.runtime.compile else mixmatch_losses

    def step(draw: MixMatchDraws) -> Tensor:
        return mixmatch_step(context, state.parallel, state.optimizer, draw, losses)

    return build_stepper(context, state, step, width=3)


def build_stepper(context: Context, state: State, step: Callable[[Any], Tensor], width: int) -> Stepper:
    """Return what runs a step over tables of draws: eagerly, or as a CUDA graph captured once.

    Args:
        step: changes the tensors of `state`, returns (width,).
    Raises:
        UserError: `runtime.mode: graph` insists on a graph, and the images are not on the device.
    """
    mode, resident = context.config.runtime.mode, context.train_set.resident
    graph = context.machine.uses_graph(mode)
    if graph and mode == "graph" and not resident:
        raise UserError("runtime.mode: graph: needs the images on the device: set data.placement=device, or runtime.mode=auto")
    capture = graph and resident  # to fetch images from elsewhere the step waits for the host
    return Stepper(step, state.tensors, width, capture, insist=mode == "graph")


def mixmatch_step(
    context: Context,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    draw: MixMatchDraws,
    losses: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """One MixMatch step (asd.md section 7). B labelled and B unlabelled images, C classes.

    Args:
        losses: `mixmatch_losses`, or the same function compiled.
    Returns:
        (3,): loss, Lx, Lu, detached.
    """
    config, machine, train_set = context.config, context.machine, context.train_set
    b = draw.labelled.shape[0]
    index = torch.cat([draw.labelled, draw.unlabelled, draw.unlabelled])
    inputs = machine.lay_out(context.augment(train_set.fetch(index), draw.views))  # (3B, 3, H, W): x, u1, u2
    given = F.one_hot(train_set.labels[draw.labelled], config.num_classes)  # (B, C)
    order = interleave_order(b, 3, inputs.device)

    with rows_per_group(model, b):
        loss_x, loss_u = (losses or mixmatch_losses)(config, model, inputs, given, draw.lam, draw.permutation, order, machine)
    loss = loss_x + draw.lambda_u * loss_u

    optimizer.zero_grad(set_to_none=True)
    (loss * machine.size).backward()  # DistributedDataParallel divides the sum of the shares' gradients again
    optimizer.step()
    return torch.stack([loss.detach(), loss_x.detach(), loss_u.detach()])


FORWARDS = 5  # of a MixMatch step: 2 guess labels, 3 train


def mixmatch_losses(
    config: Config,
    model: nn.Module,
    inputs: Tensor,
    given: Tensor,
    lam: Tensor,
    permutation: Tensor,
    order: Tensor,
    machine: Machine,
) -> tuple[Tensor, Tensor]:
    """Guess the labels of the unlabelled images, mix all images, and return (Lx, Lu).

    With several processes each forwards its share of every B rows; where there is one, `mine` is all of them.

    Args:
        inputs: (3B, 3, H, W) augmented: x, and two views u1, u2 of the unlabelled images.
        given: (B, C) one-hot labels of x.
        lam, permutation: of the mixup, () and (3B,).
        order: (3B,) `interleave_order`: BN sees labelled and unlabelled rows together; it is its own inverse.
    """
    b = given.shape[0]
    mine = machine.share(b)
    _x, u1, u2 = inputs.split(b)

    with torch.no_grad(), machine.autocast(cast_once=True):  # in train mode: these statistics count too
        logits1, logits2 = forward_each(model, (u1[mine], u2[mine]))  # (B, C) each
    guessed = machine.gather(guess_labels(logits1, logits2, config.semi.mixmatch.temperature), b)  # (B, C)
    targets = torch.cat([given.to(guessed.dtype), guessed, guessed])  # (3B, C)

    mixed_inputs = mixup(inputs, lam, permutation)
    mixed_targets = mixup(targets, lam, permutation)
    blocks = mixed_inputs[order].split(b)  # 3 x (B, 3, H, W), each of labelled and unlabelled rows
    with machine.autocast():
        parts = forward_each(model, [machine.lay_out(block[mine]) for block in blocks])  # 3 x (B, C)
    logits = torch.cat([machine.gather(part, b) for part in parts])[order]  # (3B, C)
    return mixmatch_loss(logits, mixed_targets, labelled=b)


def train_undefended(context: Context, epoch: int, state: State) -> dict[str, float]:
    """`defense: none`: one epoch of plain training on all images with the labels they carry."""
    config = context.config
    draws = draw_supervised(config.seed.seed, "undefended", epoch, len(context.train_set), context.augment)
    return {"loss": train_supervised(context, state, "training", draws, config.undefended.batch_size)}


def train_supervised(context: Context, state: State, name: str, draws: SupervisedDraws, batch: int) -> float:
    """Train one pass over all images with cross-entropy; return the mean loss."""
    machine = context.machine
    full, last = draws.to(machine.device).cut(batch, least=2 * machine.size)
    steps = state.steps or supervised_steps(context, state)
    total = torch.zeros(1, device=machine.device)
    state.model.train()
    with count_at_end(state.model, len(full.order) + (len(last.order) > 0)):
        if len(full.order):
            total = steps.run(full, lambda numbers: progress(numbers, name, len(full.order)))
        if len(last.order):
            total += steps.step(last)  # a graph is of fixed shapes: a batch of another size is no replay
    return float(machine.sum(total)) / len(draws.order)


def supervised_steps(context: Context, state: State) -> Stepper:
    """Return what runs the steps of training with cross-entropy."""
    machine, train_set = context.machine, context.train_set

    def step(draw: SupervisedDraws) -> Tensor:
        """Train on a batch of B images; return the sum of its losses (1,), this process' part."""
        count = len(draw.order)
        mine = machine.share(count)
        index = draw.order[mine]
        inputs = machine.lay_out(context.augment(train_set.fetch(index), draw.views[mine]))  # (B, 3, H, W), its share
        with machine.autocast():
            logits = state.parallel(inputs)  # (B, C)
        losses = cross_entropy(logits, train_set.labels[index])  # (B,)
        mean = losses.sum() / count * machine.size
        state.optimizer.zero_grad(set_to_none=True)
        mean.backward()  # the mean over the shares is the mean over the batch
        state.optimizer.step()
        return mean.detach().view(1) * (count / machine.size)

    return build_stepper(context, state, step, width=1)


def evaluate(config: Config, model: nn.Module, tests: TestSets, plain: Pipeline, machine: Machine) -> dict[str, float | None]:
    """Return the shares of the test images that count; None where the test set is missing.

    Returns:
        `clean_accuracy`: ACC, clean images that get their label. Of the triggered images: `attack_success_rate`, ASR, those
        that get the label the attacker wants; `robust_accuracy`, RA, those that get the label of the image they were made
        from; `clean_as_target`, those that get the attacker's label without the trigger, which an ASR is to be compared with.
    """
    figures = dict.fromkeys(("clean_accuracy", "attack_success_rate", "robust_accuracy", "clean_as_target"))

    def guess(images: ImageSet) -> Tensor:
        return machine.gather(plain_logits(config, "test", model, images, plain, machine), len(images)).argmax(1)

    if tests.clean is None:
        return figures
    guessed = guess(tests.clean)  # (M,)
    hits = {"clean_accuracy": guessed == tests.clean.labels}
    if tests.backdoor is not None and tests.origin is not None:
        triggered, wanted = guess(tests.backdoor), tests.backdoor.labels  # (M',) each
        hits["attack_success_rate"] = triggered == wanted
        hits["robust_accuracy"] = triggered == tests.clean.labels[tests.origin]
        hits["clean_as_target"] = guessed[tests.origin] == wanted
    return figures | {name: int(hit.sum()) / len(hit) for name, hit in hits.items()}


def plain_logits(config: Config, purpose: str, model: nn.Module, images: ImageSet, plain: Pipeline, machine: Machine) -> Tensor:
    """Return the logits (N, C) of this process' share of the images, without augmentation."""
    n, batch = len(images), machine.inference_batch(config.loader.batch_size)
    mine = machine.share(n)
    no_draws = torch.zeros(n, 0, device=images.labels.device)
    batches = views(images.part(mine), no_draws[mine], plain, batch)
    return predict(model, progress(batches, purpose, -(-n // machine.size // batch)), machine)


def weigh_images(context: Context, state: State, plain: Pipeline) -> Evidence:
    """Return what the finished model and the splits say of each training image: what the suspects are ranked by."""
    config, machine, train_set = context.config, context.machine, context.train_set
    n, sce = len(train_set), config.split.criterion.sce
    logits = machine.gather(plain_logits(config, "suspects", state.model, train_set, plain, machine), n)  # (N, C)
    losses = symmetric_cross_entropy(logits, train_set.labels, sce.alpha, sce.beta)
    carried, probabilities = train_set.labels[:, None], logits.double().softmax(1)  # of sure ones float32 gives ties
    own, rival = probabilities.gather(1, carried).squeeze(1), probabilities.scatter(1, carried, -1).amax(1)
    columns = (train_set.labels, logits.argmax(1), own, rival, losses, state.epochs_in_clean_pool)  # (N,) each
    return Evidence(*(column.cpu().numpy() for column in columns))


def build_pipelines(config: Config, images: ImageSet) -> tuple[Pipeline, Pipeline]:
    """Return the train augmentation and the plain transform of test images."""
    height, width = images.images.shape[2:]
    t = config.transform
    train_pipeline = Pipeline(t.train.primary, t.train.remaining, height, width)
    return train_pipeline, Pipeline(t.test.primary, t.test.remaining, height, width)


def build_state(config: Config, machine: Machine, count: int) -> State:
    """Return a run's state before its first epoch: fresh weights, optimizer, schedule."""
    model: nn.Module = build_classifier(config.network, config.num_classes, config.seed.seed)
    model = model.to(machine.device).to(memory_format=machine.memory_format)
    if config.sync_bn and machine.size > 1:
        model = synchronize(model, machine.device)
    if config.runtime.merged:
        model = group(model)
    plan: Any = config if config.defense == "asd" else config.undefended
    optimizer = build_optimizer(plan.optimizer, model.parameters(), capturable=machine.uses_graph(config.runtime.mode))
    scheduler = build_scheduler(plan.lr_scheduler, optimizer, config.num_epochs)
    state = State(model, optimizer, scheduler, epochs_in_clean_pool=torch.zeros(count, dtype=torch.int32))
    state.parallel = machine.wrap(model)
    return state


def finish_epoch(
    config: Config,
    state: State,
    oracle: Oracle | None,
    losses: dict[str, float],
    figures: dict[str, float | None],
    seconds: float,
) -> None:
    """Add the epoch's row to the history and move on to the next epoch: its number and its learning rate.

    Args:
        losses: the epoch's means.
        figures: of the tests, as `evaluate` returns them.
    """
    asd, n = config.defense == "asd", len(state.epochs_in_clean_pool)
    if not torch.isfinite(torch.tensor(list(losses.values()))).all():
        what = "optimizer" if asd else "undefended.optimizer"
        raise UserError(
            f"epoch {state.epoch}: the training loss is not finite: lower the learning rate of {what}; "
            "the last checkpoint is kept"
        )
    state.history.append({
        "epoch": state.epoch,
        "defense": config.defense,
        "stage": config.stage(state.epoch),
        **figures,
        "clean_pool_size": len(state.clean_pool) if asd else None,
        "polluted_pool_size": n - len(state.clean_pool) if asd else None,
        **truth_of_pool(oracle, state.clean_pool if asd else None),
        "loss": losses["loss"],
        "loss_x": losses.get("loss_x"),
        "loss_u": losses.get("loss_u"),
        "lambda_u": losses.get("lambda_u"),
        "learning_rate": float(state.optimizer.param_groups[0]["lr"]),
        "seconds": round(seconds, 3),
    })  # fmt: skip
    if state.scheduler is not None:
        state.scheduler.step()  # only now: the row has the rate that the epoch was trained with
    state.epoch += 1


def truth_of_pool(oracle: Oracle | None, clean_pool: Tensor | None) -> dict[str, int | None]:
    """Return how many poisoned images the clean pool has, and how many cover images where the set has any."""
    kinds = {"poisoned_in_clean_pool": POISONED}
    if oracle is not None and bool((oracle.flags == COVER).any()):
        kinds["cover_in_clean_pool"] = COVER
    if oracle is None or clean_pool is None:
        return dict.fromkeys(kinds)
    return {key: int((oracle.flags[clean_pool] == flag).sum()) for key, flag in kinds.items()}


def save(config: Config, run: Run, state: State, writer: checkpoint.Writer, report: Report) -> None:
    """Begin to write the checkpoint; the epoch counts as finished, and is reported, once `latest_model.pt` is there.

    Without test images nothing tells which epoch is the best: there is no `best_model.pt`.
    """
    acc, best = state.history[-1]["clean_accuracy"], []
    if acc is not None and acc > state.best_acc:
        state.best_acc, state.best_epoch, best = acc, state.epoch, [run.checkpoints / BEST]
    history = list(state.history)
    report.record(history[-1])
    writer.save(run.checkpoints / LATEST, state, as_dict(config), best, lambda: report.epoch(history))


if __name__ == "__main__":
    command("ASD.py", main, kept="Every finished epoch is kept: the same command without --resume False goes on.")
