"""A run in progress: opening, resuming, evaluating and saving it. A training method runs inside a session."""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from data.seeds import choose_seed_samples, complete_manifest
from data.sets import PoisonedData, TestSets
from data.sources import prepare
from engine.context import Context, build_context, build_state, check_sizes
from engine.defense import DefenseBase
from engine.evaluation import Diverged, Evaluation, class_probabilities, collect_evidence, evaluate, training_features
from model.classifier import new_classifier
from utils import checkpoint, config, manifest, plugins
from utils.checkpoint import State
from utils.config import Config, check_processes, stages
from utils.config.compatibility import refuse_other_settings
from utils.config.schema import as_dict, stand_ins
from utils.config.settings import DEFENSES
from utils.draws import key_seed
from utils.errors import UserError
from utils.reporting.confusion import FILE as CONFUSION
from utils.reporting.evidence import FILE as EVIDENCE
from utils.reporting.page import FILE as PAGE
from utils.reporting.plots import FEATURES
from utils.reporting.report import Report, Subject
from utils.reporting.suspects import CSV as SUSPECTS
from utils.run import BEST, LATEST, Run, locate, make_ready, open_run
from utils.runtime.machine import Machine, choose_machine, set_determinism, start_processes

LOSSES = ("loss", "loss_x", "loss_u", "lambda_u")  # figures that a defense gives for every row


@dataclass
class Session:
    """A run in progress: its context and state, the defense, the test sets, and where results are written."""

    context: Context
    state: State
    defense: DefenseBase
    tests: TestSets  # on the device
    report: Report | None  # None on every rank but 0
    writer: checkpoint.Writer  # of the checkpoints

    def __post_init__(self) -> None:
        self.trains = self.state.epoch < self.context.config.epochs
        self.started = time.monotonic()
        self.evaluation: Evaluation | None = None  # of the last epoch
        self.evaluated = ""  # the stage of that epoch

    def epochs(self) -> Iterator[int]:
        """Yield the 0-based numbers of the remaining epochs; call `finish_epoch` at the end of each."""
        for epoch in range(self.state.epoch, self.context.config.epochs):
            self.started = time.monotonic()
            rank = self.context.machine.rank  # on several processes, each part of a batch has its own dropout
            torch.manual_seed(key_seed(self.context.config.seed.seed, "torch", epoch, *([rank] if rank else [])))
            self.defense.begin_epoch(self.state, epoch)
            yield epoch

    def finish_epoch(self, given: dict[str, float]) -> None:
        """Evaluate the model, add the epoch's row to the history, save and report the epoch.

        Args:
            given: the epoch's means, as `DefenseBase.train_epoch` returns them.
        Raises:
            UserError: the loss or a weight is not finite, or the defense left something that could not be stored or resumed.
        """
        context, state = self.context, self.state
        for network in (state.model, *state.networks.values()):
            context.machine.average_buffers(network)
        source = f"defenses/{context.config.defense.name}.py"
        losses = own_figures(given, source)
        self.check_finite(losses)
        checkpoint.check_kept(state, len(context.train_set), self.defense.built, source)
        figures = self.evaluate().shares
        if self.report and state.split_values is not None:
            self.report.split(state.epoch, state.clean_pool, state.split_values)
        row = self.row(figures)
        if taken := losses.keys() & row.keys() - set(LOSSES):
            raise UserError(f"{source}: train_epoch: {min(taken)}: is measured by the run itself: give the figure another name")
        state.history.append(row | losses)
        if state.scheduler is not None:
            state.scheduler.step()  # after the row, which has the learning rate of this epoch
        state.epoch += 1
        if self.report:
            save(context.config, state, self.writer, self.report)

    def evaluate(self) -> Evaluation:
        """Return the figures of the model in this epoch; raise `UserError` if its outputs are not finite."""
        stage = stages.locate(self.context.config.stages, self.state.epoch)[0]
        if self.evaluation is None or not (stage.keeps_model and stage.name == self.evaluated):
            try:
                self.evaluation, self.evaluated = evaluate(self.context, self.state.model, self.tests), stage.name
            except Diverged:
                raise self.diverged("model's outputs are") from None
        return self.evaluation

    def check_finite(self, losses: dict[str, float | None]) -> None:
        """Raise `UserError` if a loss or a weight is not finite: the model is useless then, but the last checkpoint is intact.

        No loss shows what the last step of an epoch has done to the weights.
        """
        networks = (self.state.model, *self.state.networks.values())
        values = (value for network in networks for value in network.state_dict().values() if value.is_floating_point())
        known = (losses.get(key) for key in LOSSES)
        wrong = "" if all(value is None or math.isfinite(value) for value in known) else "training loss is"
        wrong = wrong or ("" if all(bool(torch.isfinite(value).all()) for value in values) else "weights are")
        if wrong:
            raise self.diverged(wrong)

    def diverged(self, what: str) -> UserError:
        """Return the error for an epoch in which the training has diverged."""
        key = stages.locate(self.context.config.stages, self.state.epoch)[0].key
        return UserError(
            f"epoch {self.state.epoch + 1}: the {what} not finite: lower the learning rate of {key} in a new run "
            "(--set run=NAME); the checkpoint of the epoch before is kept"
        )

    def row(self, figures: dict[str, float | None]) -> dict[str, object]:
        """Return the epoch's row of `metrics.jsonl`, its losses None."""
        config, state, report = self.context.config, self.state, self.report
        pool = state.clean_pool if len(state.clean_pool) else None
        return {
            "epoch": state.epoch,
            "defense": config.defense.name,
            "stage": config.stage(state.epoch),
            **figures,
            "clean_pool_size": None if pool is None else len(pool),
            "polluted_pool_size": None if pool is None else len(state.epochs_in_clean_pool) - len(pool),
            **(report.truth_of_pool(pool) if report else {}),
            **{f"{name}_size": len(indices) for name, indices in state.sets.items()},
            **({f"poisoned_in_{name}": report.poisoned_in(indices) for name, indices in state.sets.items()} if report else {}),
            **dict.fromkeys(LOSSES),
            "learning_rate": float(state.optimizer.param_groups[0]["lr"]),
            "seconds": round(time.monotonic() - self.started, 3),
        }

    def conclude(self) -> None:
        """Finish the run: rank the suspects, write the evidence and the confusion matrices, draw the plots."""
        self.writer.wait()
        context, state, report, run = self.context, self.state, self.report, locate(self.context.config)

        again = self.trains or not (run.log / PAGE).exists()  # the page is written last: without it, the rest may be old

        def due(path: Path) -> bool:
            """Return whether a file must be written."""
            return again or not path.exists()

        if len(state.clean_pool) and due(run.saved / SUSPECTS):
            evidence = collect_evidence(context, state)
            if report:
                report.rank_suspects(evidence, context.train_set)
        if self.evaluation is None and due(run.log / CONFUSION):
            self.evaluation = evaluate(context, state.model, self.tests)
        plot_due, evidence_due = due(run.log / FEATURES), context.config.evidence and due(run.saved / EVIDENCE)
        if plot_due or evidence_due:
            features = training_features(context, state.model)  # (N, D)
            if report and plot_due:
                report.draw_features(state, features)
            if report and evidence_due:
                probabilities = class_probabilities(state.model, features)  # (N, C)
                report.keep_evidence(features, probabilities, context.train_set.labels.cpu())
        if again and not context.config.evidence:
            (run.saved / EVIDENCE).unlink(missing_ok=True)  # of an earlier epoch
        if report:
            report.conclude(state, self.evaluation.by_class if self.evaluation else None)


@contextlib.contextmanager
def open_session(args: argparse.Namespace) -> Iterator[Session | None]:
    """Open the run that the command line names, and lock it for the block. Several devices get one process each.

    Yields:
        None if the checkpoint has all configured epochs while the run's folder holds later ones; nothing is changed then.
    """
    settings = config.load(args.config, args.set)
    start_processes(args.gpu, partial(check_processes, settings))
    machine = choose_machine(args.gpu, settings.runtime.amp)
    set_determinism(settings.seed.deterministic, settings.seed.benchmark)
    check_processes(settings, machine.world_size)
    run, fresh = locate(settings, Path(args.config)), args.resume == "False"
    if args.resume and not fresh:
        run.resume(args.resume)  # before anything is created: it may be missing
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
        run: its folders exist.
        resume: the checkpoint to resume from; None: start with the first epoch.
        stack: on exit, waits for the checkpoint being written and closes the run's log.
    Returns:
        None if the checkpoint has all configured epochs while the run's folder holds later ones; nothing is changed then.
    """
    first = machine.rank == 0
    saved = None
    if resume is not None:
        saved = checkpoint.read(resume)
        names = {key for key, _, _ in stand_ins(config)}
        refuse_other_settings(resume, saved, as_dict(config), names)  # before any data is decoded or written
    with machine.first_alone():  # rank 0 writes the run's files, the other ranks read them
        data = prepare(config, run.saved, machine, new_classifier, checkpoint.data_of(saved))
        seeds = choose_seed_samples(config, data, run.saved)
    inputs = complete_manifest(config, data, seeds)
    if not machine.agree(f"{saved and saved.get('epoch')} {config.epochs} {inputs}"):
        raise UserError(
            f"saved_dir: {config.saved_dir}: the processes do not find the same run or the same data there, in storage_dir "
            "and in dataset_dir: give folders that all of them share, and the same options"
        )

    context = build_context(config, machine, data.train.to(machine.device))
    check_sizes(config, context.train_transform, context.eval_transform)
    defense = build_defense(context, data, seeds)
    state = build_state(config, machine, len(context.train_set))
    state.about = {"class_names": list(data.class_names), "image_size": list(context.train_set.images.shape[2:])}
    state.data = inputs
    if saved is not None and resume is not None:
        defense.prepare(state, stages.locate(config.stages, checkpoint.last_epoch(saved, config.epochs))[0])
        checkpoint.load(resume, state, as_dict(config), saved)
    if not make_ready(run, config, resume or run.checkpoints / LATEST, state, machine):
        return None
    tests, report = data.tests.to(machine.device), None
    if first:
        manifest.keep(run.saved, state.data)
        flags = data.ground_truth.flags if data.ground_truth else None
        subject = Subject(data.backdoor, data.class_names, data.names, flags, data.examples, data.caption)
        report = Report(run, config, subject, state.epoch)
        stack.callback(report.close)
        report.start(machine, state, *(len(part) if part else None for part in (tests.clean, tests.backdoor)))
    writer = stack.enter_context(checkpoint.Writer())  # exits before the report: it logs each checkpoint
    return Session(context, state, defense, tests, report, writer)


def build_defense(context: Context, data: PoisonedData, seeds: Tensor) -> DefenseBase:
    """Return the configured defense.

    Args:
        data: its ground truth is for oracle baselines alone, and only to choose indices.
        seeds: (S,) int64, the images known to be clean.
    """
    config, truth = context.config, data.ground_truth
    plugin, given = plugins.load(DEFENSES.package, config.defense.name), seeds
    if hasattr(plugin, "reference_images"):
        if truth is None:
            raise UserError(f"defense: {config.defense.name}: needs the ground truth, which is unknown for these images")
        given = plugin.reference_images(config, truth.flags)
    defense: DefenseBase = plugin.Defense(context, given)
    return defense


def own_figures(given: object, source: str) -> dict[str, float | None]:
    """Return what a defense reports of an epoch as numbers for `metrics.jsonl`; None for those that are not finite, but losses.

    Args:
        given: what `train_epoch` returned.
        source: file of the defense.
    """
    if not isinstance(given, dict) or given.get("loss") is None:
        raise UserError(f"{source}: train_epoch: returned {given!r:.80}: return a dictionary of the epoch's means, with `loss`")
    found: dict[str, float | None] = {}
    for key, value in given.items():
        try:
            number = value if value is None or isinstance(value, (int, float)) else float(value)
        except (TypeError, ValueError, RuntimeError):
            raise UserError(f"{source}: train_epoch: {key}: {value!r:.80}: must be a number, or None") from None
        found[str(key)] = None if number is not None and key not in LOSSES and not math.isfinite(number) else number
    return found


def save(config: Config, state: State, writer: checkpoint.Writer, report: Report) -> None:
    """Start writing the checkpoint. The epoch is finished, and is reported, once `latest_model.pt` is on disk.

    The best epoch is one with the highest ACC; the stages in which a defense only prepares its work do not count. Without test
    images no epoch is known to be the best, and there is no `best_model.pt`.
    """
    acc, best, checkpoints = state.history[-1]["clean_accuracy"], [], report.run.checkpoints
    if acc is not None and acc > state.best_acc and stages.gives_result(config.stages, state.epoch - 1):
        state.best_acc, state.best_epoch, best = acc, state.epoch, [checkpoints / BEST]
    history = list(state.history)
    report.record(history[-1])
    writer.save(checkpoints / LATEST, state, as_dict(config), best, lambda: report.epoch(history))
