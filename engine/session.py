"""A run in progress: opened, resumed, evaluated and saved after every epoch. A training method works inside of it."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from data.pools import check_pool_sizes
from data.seeds import choose_seed_samples, complete_manifest
from data.sets import TestSets
from data.sources import prepare
from engine.context import Context, build_context, build_state
from engine.evaluation import class_probabilities, collect_evidence, evaluate_with_confusion, training_features
from model.classifier import new_classifier
from utils import checkpoint, config, manifest
from utils.checkpoint import State
from utils.config import Config, check_processes
from utils.confusion import FILE as CONFUSION
from utils.draws import key_seed
from utils.errors import UserError
from utils.evidence import FILE as EVIDENCE
from utils.machine import Machine, choose_machine, set_determinism, start_processes
from utils.pictures import FEATURES
from utils.report import Report, Subject
from utils.run import BEST, LATEST, Run, locate, make_ready, open_run
from utils.schema import as_dict, stand_ins
from utils.suspects import CSV as SUSPECTS


@dataclass
class Session:
    """A run in progress."""

    context: Context
    state: State
    seeds: Tensor  # (S,) int64, the seed samples, on the CPU
    tests: TestSets  # on the device
    report: Report | None  # None in all processes but the first
    writer: checkpoint.Writer  # of the checkpoints

    def __post_init__(self) -> None:
        self.trains = self.state.epoch < self.context.config.num_epochs
        self.started = time.monotonic()
        self.confusion: Tensor | None = None  # (C, C) of the last epoch

    def epochs(self) -> Iterator[int]:
        """Yield the numbers of the epochs that are still to do; `finish_epoch` ends each of them."""
        for epoch in range(self.state.epoch, self.context.config.num_epochs):
            self.started = time.monotonic()
            torch.manual_seed(key_seed(self.context.config.seed.seed, "torch", epoch))  # for networks that drop units
            yield epoch

    def finish_epoch(self, losses: dict[str, float]) -> None:
        """Evaluate the model, add the epoch's row to the history, save and report the epoch.

        Args:
            losses: the epoch's means of `loss` and, with ASD, of `loss_x`, `loss_u`, `lambda_u`.
        Raises:
            UserError: the loss is not finite.
        """
        context, state = self.context, self.state
        context.machine.average_buffers(state.model)
        figures, self.confusion = evaluate_with_confusion(context, state.model, self.tests)
        self.check_losses(losses)
        state.history.append(self.row(losses, figures))
        if state.scheduler is not None:
            state.scheduler.step()  # only now: the row has the rate that the epoch was trained with
        state.epoch += 1
        if self.report:
            save(context.config, state, self.writer, self.report)

    def check_losses(self, losses: dict[str, float]) -> None:
        """Refuse losses that are not finite: the weights are lost, the last checkpoint is not."""
        if not torch.isfinite(torch.tensor(list(losses.values()))).all():
            what = "optimizer" if self.context.config.defense == "asd" else "undefended.optimizer"
            raise UserError(
                f"epoch {self.state.epoch}: the training loss is not finite: lower the learning rate of {what}; "
                "the last checkpoint is kept"
            )

    def row(self, losses: dict[str, float], figures: dict[str, float | None]) -> dict[str, object]:
        """Return the epoch's row of `metrics.jsonl`."""
        config, state = self.context.config, self.state
        pool = state.clean_pool if config.defense == "asd" else None
        return {
            "epoch": state.epoch,
            "defense": config.defense,
            "stage": config.stage(state.epoch),
            **figures,
            "clean_pool_size": None if pool is None else len(pool),
            "polluted_pool_size": None if pool is None else len(state.epochs_in_clean_pool) - len(pool),
            **(self.report.truth_of_pool(pool) if self.report else {}),
            "loss": losses["loss"],
            "loss_x": losses.get("loss_x"),
            "loss_u": losses.get("loss_u"),
            "lambda_u": losses.get("lambda_u"),
            "learning_rate": float(state.optimizer.param_groups[0]["lr"]),
            "seconds": round(time.monotonic() - self.started, 3),
        }

    def conclude(self) -> None:
        """After the last epoch: rank the suspects, keep the evidence and the confusion matrix, draw the plots."""
        self.writer.wait()
        context, state, report, run = self.context, self.state, self.report, locate(self.context.config)
        if context.config.defense == "asd" and (self.trains or not (run.saved / SUSPECTS).exists()):
            evidence = collect_evidence(context, state)
            if report:
                report.rank_suspects(evidence, context.train_set)
        if not self.trains and not (run.log / CONFUSION).exists():
            self.confusion = evaluate_with_confusion(context, state.model, self.tests)[1]
        drawn = self.trains or not (run.log / FEATURES).exists()
        kept = context.config.evidence and (self.trains or not (run.saved / EVIDENCE).exists())
        if drawn or kept:
            features = training_features(context, state.model)  # (N, D)
            if report and drawn:
                report.draw_features(state, features)
            if report and kept:
                probabilities = class_probabilities(state.model, features)  # (N, C)
                report.keep_evidence(features, probabilities, context.train_set.labels.cpu())
        if report:
            report.conclude(state, self.confusion)


@contextlib.contextmanager
def open_session(args: argparse.Namespace) -> Iterator[Session | None]:
    """Open the run that a command line names; None: it is finished, and a longer one lies in its folder.

    Several devices mean one process for each; the run is locked for the block.
    """
    settings = config.load(args.config, args.set)
    start_processes(args.gpu, partial(check_processes, settings))
    machine = choose_machine(args.gpu, settings.runtime.amp)
    set_determinism(settings.seed.deterministic, settings.seed.benchmark)
    check_processes(settings, machine.world_size)
    run, fresh = locate(settings, Path(args.config)), args.resume == "False"
    with contextlib.ExitStack() as stack:
        if machine.rank == 0:
            stack.enter_context(open_run(run, settings, fresh))
        machine.barrier()
        resume = None if fresh else run.resume(args.resume)
        yield start(settings, run, machine, resume, stack)
    machine.leave()


def start(config: Config, run: Run, machine: Machine, resume: Path | None, stack: contextlib.ExitStack) -> Session | None:
    """Prepare the data and the state of a run.

    Args:
        run: whose folders are there.
        resume: the checkpoint to go on from; None: from the first epoch.
        stack: closes the run's log and finishes the checkpoint that is being written, however the run ends.
    Returns:
        None: the checkpoint has all epochs and the run has more, so that all of it stays as it is.
    """
    first = machine.rank == 0
    saved = None
    if resume is not None:
        saved = checkpoint.read(resume)
        names = {key for key, _, _ in stand_ins(config)}
        checkpoint.refuse_other_settings(resume, saved, as_dict(config), names)  # before anything is decoded or made
    with machine.first_alone():  # it makes what is kept with the run, the others read it
        data = prepare(config, run.saved, machine.device, machine.world_size, new_classifier)
        seeds = choose_seed_samples(config, data, run.saved)
    if config.defense == "asd":
        check_pool_sizes(config, data.train.labels, seeds)

    context = build_context(config, machine, data.train.to(machine.device))
    state = build_state(config, machine, len(context.train_set))
    state.about = {"class_names": list(data.class_names), "image_size": list(context.train_set.images.shape[2:])}
    state.data = complete_manifest(config, data, seeds)
    if saved is not None and resume is not None:
        checkpoint.load(resume, state, as_dict(config), saved)
    if not make_ready(run, config, resume or run.checkpoints / LATEST, state, first):
        return None
    tests, report = data.tests.to(machine.device), None
    if first:
        manifest.keep(run.saved, state.data)
        flags = data.ground_truth.flags if data.ground_truth else None
        subject = Subject(data.backdoor, data.class_names, data.names, flags, data.examples, data.caption)
        report = Report(run, config, subject, state.epoch)
        stack.callback(report.close)
        report.start(machine, state, *(len(part) if part else None for part in (tests.clean, tests.backdoor)))
    writer = stack.enter_context(checkpoint.Writer())  # after the report, which has a line on each checkpoint
    return Session(context, state, seeds, tests, report, writer)


def save(config: Config, state: State, writer: checkpoint.Writer, report: Report) -> None:
    """Begin to write the checkpoint; the epoch counts as finished, and is reported, once `latest_model.pt` is there.

    Without test images nothing tells which epoch is the best: there is no `best_model.pt`.
    """
    acc, best, checkpoints = state.history[-1]["clean_accuracy"], [], report.run.checkpoints
    if acc is not None and acc > state.best_acc:
        state.best_acc, state.best_epoch, best = acc, state.epoch, [checkpoints / BEST]
    history = list(state.history)
    report.record(history[-1])
    writer.save(checkpoints / LATEST, state, as_dict(config), best, lambda: report.epoch(history))
