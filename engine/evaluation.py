"""Evaluation of a model on the test images, and the evidence about each training image."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data.batches import views
from data.sets import ImageSet, TestSets
from engine.context import Context
from loss.supervised import symmetric_cross_entropy
from model.classifier import Classifier, Features
from model.inference import predict
from utils.checkpoint import State
from utils.errors import UserError
from utils.metrics import SHARES
from utils.reporting.confusion import ByClass, confusion_matrix
from utils.reporting.runlog import progress
from utils.reporting.suspects import Evidence


class Evaluation(NamedTuple):
    """The figures of a model on the test images.

    Attributes:
        shares: fractions in 0..1, None without the test set. `clean_accuracy` (ACC): clean images classified correctly. Of the
            triggered images: `attack_success_rate` (ASR): those classified as the attacker wants; `robust_accuracy` (RA):
            those classified as their original class; `clean_as_target`: those classified as the attacker wants even without
            the trigger, the baseline of the ASR.
        by_class: what is predicted for the images of each class; None without test images.
    """

    shares: dict[str, float | None]
    by_class: ByClass | None


class Diverged(UserError):
    """A model gives outputs that are not finite: what it predicts has no meaning."""


def predicted_labels(context: Context, model: nn.Module, images: ImageSet) -> Tensor:
    """Return the labels (N,) int64 that a model predicts for test images.

    Raises:
        Diverged: its outputs are not finite.
    """
    logits = infer(context, "test", model, images)  # (N, C)
    if not torch.isfinite(logits).all():
        raise Diverged("the model's outputs are not finite: its training has diverged: use an earlier checkpoint")
    return logits.argmax(1)


def evaluate(context: Context, model: nn.Module, tests: TestSets) -> Evaluation:
    """Evaluate a model on the clean and the triggered test images.

    Raises:
        Diverged: its outputs are not finite.
    """
    figures = dict.fromkeys(SHARES)
    if tests.clean is None:
        return Evaluation(figures, None)
    classes = context.config.num_classes
    predicted = predicted_labels(context, model, tests.clean)  # (M,)
    hits = {"clean_accuracy": predicted == tests.clean.labels}
    by_class = ByClass(confusion_matrix(tests.clean.labels, predicted, classes))
    if tests.backdoor is not None and tests.origin is not None:
        triggered = predicted_labels(context, model, tests.backdoor)  # (M',)
        wanted, original = tests.backdoor.labels, tests.clean.labels[tests.origin]  # (M',)
        hits["attack_success_rate"] = triggered == wanted
        hits["robust_accuracy"] = triggered == original
        hits["clean_as_target"] = predicted[tests.origin] == wanted
        successes = torch.bincount(original[triggered == wanted].cpu(), minlength=classes)  # (C,)
        by_class = by_class._replace(triggered=confusion_matrix(original, triggered, classes), successes=successes)
    return Evaluation(figures | {name: int(hit.sum()) / len(hit) for name, hit in hits.items()}, by_class)


def infer(context: Context, purpose: str, model: nn.Module, images: ImageSet, draws: Tensor | None = None) -> Tensor:
    """Return the logits (N, C) of the images in eval mode; every process computes its shard.

    Args:
        purpose: the label of the progress bar.
        draws: (N, k) of the train transform, one view of each image; None: the eval transform.
    """
    machine, n = context.machine, len(images)
    transform = context.eval_transform if draws is None else context.train_transform
    draws = torch.zeros(n, 0, device=images.labels.device) if draws is None else draws
    few = n < machine.world_size  # then every process computes all of them
    batch = machine.inference_batch(context.config.loader.batch_size, math.prod(transform.output_size))
    mine = slice(n) if few else machine.shard(n)
    batches = views(images.part(mine), draws[mine], transform, batch)
    logits = predict(model, progress(batches, purpose, -(-n // machine.world_size // batch)), machine)
    return logits if few else machine.all_gather(logits, n)


def training_features(context: Context, model: nn.Module) -> Tensor:
    """Return the penultimate features (N, D) of the training images, on the CPU."""
    assert isinstance(model, Classifier)
    return infer(context, "features", Features(model), context.train_set).cpu()


def class_probabilities(model: nn.Module, features: Tensor) -> Tensor:
    """Return the probabilities (N, C) float32 that the model's last layer gives to features (N, D); both on the CPU."""
    assert isinstance(model, Classifier)
    weight, bias = model.linear.weight.detach().cpu(), model.linear.bias.detach().cpu()
    return torch.nn.functional.linear(features.double(), weight.double(), bias.double()).softmax(1).float()


def collect_evidence(context: Context, state: State) -> Evidence:
    """Return what the final model and the splits show about each training image, for the ranking of suspects."""
    train_set, sce = context.train_set, context.config.split.criterion.sce
    logits = infer(context, "suspects", state.model, train_set)  # (N, C)
    losses = symmetric_cross_entropy(logits, train_set.labels, sce.alpha, sce.beta)
    carried, probabilities = train_set.labels[:, None], logits.double().softmax(1)  # float32 has ties near 1
    own, rival = probabilities.gather(1, carried).squeeze(1), probabilities.scatter(1, carried, -1).amax(1)
    columns = (train_set.labels, logits.argmax(1), own, rival, losses, state.epochs_in_clean_pool)  # (N,) each
    return Evidence(*(column.cpu().numpy() for column in columns))
