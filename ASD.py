"""ASD: train a clean classifier on a poisoned training set.

Gao et al., "Backdoor Defense via Adaptively Splitting Poisoned Dataset", CVPR 2023. This file is the method, in order:
the epoch loop, the split into a clean and a polluted pool, the virtual model, and the MixMatch training on both pools.

    python ASD.py --config config/baseline_asd.yaml --resume False --gpu 0
"""

from __future__ import annotations

if __name__ == "__main__":  # before the slow imports: from here on Ctrl-C and SIGTERM end the program in one line
    from utils.startup import begin

    begin("ASD.py")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.batches import MixMatchDraws, draw_mixmatch, draw_supervised, draw_views
from data.pools import check_pool_sizes, class_agnostic_split, class_aware_split, meta_split, per_class, pools_of
from engine.context import Context, auxiliary_state, build_stepper
from engine.defense import DefenseBase
from engine.evaluation import infer
from engine.session import Session, open_session
from engine.supervised import supervised_steps, train_supervised
from loss.mixmatch import guess_labels, interleave_order, mixmatch_loss, mixup, ramp_up
from loss.supervised import symmetric_cross_entropy
from model.batch_counters import count_at_end
from model.classifier import Classifier, copy_values, virtual_copy
from model.forward import forward
from model.optimizer import build_optimizer, restart
from utils.checkpoint import State
from utils.cli import command, parse_arguments
from utils.config.stages import Stage, locate
from utils.errors import UserError
from utils.reporting.runlog import progress
from utils.runtime.stepper import Stepper


def main() -> None:
    """Train the run that the command line names."""
    with open_session(parse_arguments("Train with ASD on a poisoned data set.", None, training=True)) as session:
        if session:
            train(session)


def train(session: Session) -> None:
    """Run the remaining epochs of the configured defense (ASD: paper section 3.2 and Algorithm 1)."""
    for epoch in session.epochs():
        losses = session.defense.train_epoch(session.state, epoch)
        session.finish_epoch(losses)
    session.conclude()


class Defense(DefenseBase):
    """`defense: asd`: every epoch splits the training set, then trains on both pools."""

    def __init__(self, context: Context, seed_samples: Tensor) -> None:
        super().__init__(context, seed_samples)
        check_pool_sizes(context.config, context.train_set.labels, seed_samples)
        self.virtual: State | None = None

    def build(self, state: State, stage: Stage) -> None:
        """Build the optimizer, the stepper of the MixMatch steps, and the virtual model."""
        super().build(state, stage)
        state.stepper = mixmatch_steps(self.context, state)
        self.virtual = build_virtual(self.context, state.model)

    def train_epoch(self, state: State, epoch: int) -> dict[str, float]:
        """Split the training set, then train one epoch on both pools; return the epoch's mean losses."""
        clean_pool, split_values = split_pools(self.context, epoch, state.model, self.given, self.virtual)
        state.keep_split(clean_pool, split_values)
        return train_mixmatch(self.context, epoch, state, clean_pool)


def split_pools(
    context: Context, epoch: int, model: nn.Module, seed_samples: Tensor, virtual: State | None = None
) -> tuple[Tensor, Tensor]:
    """Split the training set for one epoch (paper section 3.2).

    Args:
        seed_samples: (S,) int64, on the CPU.
        virtual: preallocated virtual model (see `build_virtual`), used in stage 3 only; None: build a new one.
    Returns:
        the clean pool as sorted indices (P,) int64, and the values (N,) by which the images were ranked; both on the CPU.
    """
    config, n = context.config, len(context.train_set)
    g, labels = config.global_, context.train_set.labels.cpu()
    losses = split_losses(context, epoch, model)
    if epoch < g.epoch_first:
        pool = class_aware_split(losses, labels, seed_samples, config.num_classes, per_class(epoch, g.n, g.t))
        return pool, losses
    if epoch < g.epoch_second:
        pool, values = class_agnostic_split(losses, g.epsilon), losses
    else:
        virtual_model = train_virtual_model(context, epoch, model, virtual)
        virtual_losses = split_losses(context, epoch, virtual_model, virtual=True)
        pool, values = meta_split(losses, virtual_losses, g.epsilon), losses - virtual_losses
    if g.keep_seeds:
        pool = torch.cat([pool, seed_samples]).unique()
    assert 0 < len(pool) < n
    return pool, values


def split_losses(context: Context, epoch: int, model: nn.Module, virtual: bool = False) -> Tensor:
    """Return the split loss (N,) float32, on the CPU, of every image with the label it carries, under one augmented view.

    Args:
        virtual: the model is the virtual one, which has views of its own.
    Raises:
        UserError: a loss is not finite.
    """
    purpose = "score virtual" if virtual else "score"  # key of the random draws
    config, train_set, sce = context.config, context.train_set, context.config.split.criterion.sce
    draws = draw_views(config.seed.seed, purpose, epoch, len(train_set), context.train_transform)
    logits = infer(context, purpose, model, train_set, draws.to(context.machine.device))  # (N, C)
    losses = symmetric_cross_entropy(logits, train_set.labels, sce.alpha, sce.beta).cpu()  # (N,)
    wrong = torch.nonzero(~torch.isfinite(losses)).squeeze(1)
    if len(wrong):
        key = "meta.optimizer" if virtual else locate(config.stages, epoch)[0].key
        raise UserError(
            f"epoch {epoch + 1}: the split loss of {len(wrong)} of {len(losses)} images is not finite (first: image "
            f"{int(wrong[0])}): lower the learning rate of {key} in a new run (--set run=NAME); the checkpoint of the epoch "
            "before is kept"
        )
    return losses


def train_virtual_model(context: Context, epoch: int, model: nn.Module, virtual: State | None = None) -> Classifier:
    """Return a copy of the model, briefly trained on all images with the labels they carry (paper section 3.2.3).

    Args:
        virtual: preallocated virtual model whose values are overwritten; None: build a new one.
    """
    virtual = virtual or build_virtual(context, model)
    copy_values(model, virtual.model)
    restart(virtual.optimizer)
    virtual.model.train()
    batch, seed = context.config.loader.batch_size, context.config.seed.seed
    for i in range(context.config.meta.epoch):
        draws = draw_supervised(seed, f"virtual {i}", epoch, len(context.train_set), context.train_transform)
        train_supervised(context, virtual, "virtual model", draws, batch)
    context.machine.average_buffers(virtual.model)
    assert isinstance(virtual.model, Classifier)
    return virtual.model


def build_virtual(context: Context, model: nn.Module) -> State:
    """Return a copy of the model in which only the last layers are trainable, with its optimizer and stepper.

    All epochs reuse this copy, because a captured CUDA graph holds the addresses of its tensors.
    """
    assert isinstance(model, Classifier)
    virtual_model, last_layers = virtual_copy(model)
    graph = context.machine.uses_graph(context.config.runtime.mode)
    optimizer = build_optimizer(context.config.meta.optimizer, last_layers, capturable=graph)
    virtual = auxiliary_state(context, virtual_model, optimizer)
    virtual.stepper = supervised_steps(context, virtual)
    return virtual


FORWARDS = 5  # forward passes in a MixMatch step: 2 to guess labels, 3 to train


def train_mixmatch(
    context: Context, epoch: int, state: State, clean_pool: Tensor, lambda_u: Tensor | None = None
) -> dict[str, float]:
    """Train one epoch on both pools, using only the labels of the clean pool.

    Args:
        clean_pool: (P,) int64 on the CPU.
        lambda_u: (S,) weight of the unlabeled loss in each step; None: ASD's linear ramp-up, counted from epoch 0.
    Returns:
        means over the epoch of `loss`, `loss_x`, `loss_u`, `lambda_u`.
    """
    s = context.config.semi
    count = s.mixmatch.train_iteration
    if lambda_u is None:
        lambda_u = ramp_up(epoch, count, s.criterion.mixmatch.lambda_u, s.criterion.mixmatch.rampup_length)  # (S,)
    pools = pools_of(clean_pool, len(context.train_set))
    draws = draw_mixmatch(context.config, epoch, pools, context.train_transform, lambda_u)
    steps = state.stepper or mixmatch_steps(context, state)
    state.model.train()
    with count_at_end(state.model, FORWARDS * count):
        sums = steps.run(draws.to(context.machine.device), lambda numbers: progress(numbers, "MixMatch", count))
    means = dict(
        zip(("loss", "loss_x", "loss_u"), (sums / count).tolist(), strict=True)
    )  # the epoch's only device-to-host sync
    return means | {"lambda_u": float(lambda_u.mean())}


def mixmatch_steps(context: Context, state: State) -> Stepper:
    """Return the stepper of the MixMatch steps, eager or as a captured CUDA graph; it serves all epochs."""
    return build_stepper(context, state, lambda draw: mixmatch_step(context, state.parallel, state.optimizer, draw), width=3)


def mixmatch_step(context: Context, model: nn.Module, optimizer: torch.optim.Optimizer, draw: MixMatchDraws) -> Tensor:
    """One MixMatch step: guess, mix, interleave, train (paper section 3.3). B labeled and B unlabeled images, C classes.

    Returns:
        (3,): loss, Lx, Lu, detached.
    """
    config, machine, train_set = context.config, context.machine, context.train_set
    b = len(draw.labeled)
    index = torch.cat([draw.labeled, draw.unlabeled, draw.unlabeled])
    inputs = machine.to_memory_format(context.train_transform(train_set.fetch(index), draw.views))  # (3B, 3, H, W)
    _x, u1, u2 = inputs.split(b)

    with torch.no_grad():  # train mode, so these passes update the BN statistics as well
        logits1, logits2 = forward(model, [u1, u2], machine)  # (B, C) each
        guessed = guess_labels(logits1, logits2, config.semi.mixmatch.temperature)  # (B, C)
    given = F.one_hot(train_set.labels[draw.labeled], config.num_classes).to(guessed.dtype)  # (B, C)
    targets = torch.cat([given, guessed, guessed])  # (3B, C)

    mixed_inputs = mixup(inputs, draw.lam, draw.permutation)  # (3B, 3, H, W)
    mixed_targets = mixup(targets, draw.lam, draw.permutation)  # (3B, C)
    # Interleave the blocks, so that each forward pass normalizes labeled and unlabeled images together; undone by [order].
    order = interleave_order(b, 3, inputs.device)  # (3B,), its own inverse
    logits = torch.cat(forward(model, mixed_inputs[order].split(b), machine))[order]  # (3B, C)
    loss_x, loss_u = mixmatch_loss(logits, mixed_targets, labeled=b)
    loss = loss_x + draw.lambda_u * loss_u

    optimizer.zero_grad(set_to_none=True)
    machine.backward(loss)
    optimizer.step()
    return torch.stack([loss, loss_x, loss_u]).detach()


if __name__ == "__main__":
    command("ASD.py", main, kept="Finished epochs are saved. To resume, run the same command without --resume False.")
