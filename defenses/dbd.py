"""DBD: learn features without labels, then a linear layer on them, then MixMatch on the half with low losses.

Huang et al., "Backdoor Defense via Decoupling the Training Process", ICLR 2022.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ASD import mixmatch_steps, split_losses, train_mixmatch
from data.augment import Pipeline
from data.batches import SupervisedDraws, draw_supervised
from data.pools import check_share, class_agnostic_split
from engine.context import Context, auxiliary_state, check_sizes, place
from engine.defense import DefenseBase
from engine.supervised import supervised_steps, train_supervised
from loss.contrastive import nt_xent
from loss.mixmatch import ramp_up
from loss.supervised import symmetric_cross_entropy
from model.classifier import Classifier
from utils import plugins
from utils.checkpoint import State
from utils.config import Config
from utils.config.schema import Named, batch_size_setting, setting
from utils.config.settings import OPTIMIZERS, SCHEDULERS, SGD, Adam, CosineAnnealing, transforms
from utils.config.stages import SPLITS, DefenseSettings, Stage, locate
from utils.draws import generator, key_seed

PROJECTION = "projection"


@dataclass(frozen=True)
class Settings(DefenseSettings):
    unread = (*SPLITS, "optimizer", "lr_scheduler", "undefended")
    simclr_transform: tuple[Named, ...] = setting(
        (),
        "augmentation of the views of SimCLR, in this order; empty: the published one, for square crops of the images' size",
        choices=transforms("transform.train.primary"),
    )
    simclr_epochs: int = setting(100, "epochs of SimCLR", low=1)
    simclr_optimizer: Named = setting(
        Named("SGD", SGD(lr=0.4, momentum=0.9, weight_decay=1e-4)), "optimizer of SimCLR", choices=OPTIMIZERS
    )
    simclr_scheduler: Named | None = setting(
        Named("cosine_annealing", CosineAnnealing(T_max=1000)), "learning rate of SimCLR; null: constant", choices=SCHEDULERS
    )
    simclr_batch_size: int = batch_size_setting(512, "images of a SimCLR step, two views of each")
    temperature: float = setting(0.5, "temperature of SimCLR's similarities", above=0)
    projection_dim: int = setting(128, "width of the projection that SimCLR compares", low=1)
    head_epochs: int = setting(10, "epochs of the linear layer", low=1)
    head_batch_size: int = batch_size_setting(128, "batch size of the linear layer")
    optimizer: Named = setting(
        Named("Adam", Adam(lr=0.002)), "one optimizer for the linear layer and for MixMatch", choices=OPTIMIZERS
    )
    mixmatch_epochs: int = setting(190, "epochs of MixMatch; its other settings are those of semi and global.epsilon", low=1)
    rampup_length: int = setting(
        190, "epochs, from the first of the linear layer on, over which lambda_u rises (instead of that of semi)", low=0
    )

    def stages(self, config: Config) -> tuple[Stage, ...]:
        """The optimizer of the linear layer goes on in MixMatch."""
        key = "defense.dbd"
        simclr = self.simclr_epochs, self.simclr_optimizer, self.simclr_scheduler
        return (
            Stage("simclr", *simclr, f"{key}.simclr_optimizer", prepares=True),
            Stage("head", self.head_epochs, self.optimizer, None, f"{key}.optimizer", prepares=True),
            Stage("mixmatch", self.mixmatch_epochs, self.optimizer, None, f"{key}.optimizer", new_optimizer=False),
        )


def published_views(side: int) -> tuple[Named, ...]:
    """Return the augmentation with which DBD was published, which is SimCLR's for CIFAR-10 and a blur; square crops."""
    steps: dict[str, dict[str, Any]] = {
        "random_resize_crop": {"size": side, "scale": (0.2, 1.0)},
        "random_horizontal_flip": {"p": 0.5},
        "random_color_jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "p": 0.8},
        "random_grayscale": {"p": 0.2},
        "gaussian_blur": {"sigma": (0.1, 2.0), "p": 0.5},
    }
    return tuple(Named(name, plugins.settings("data.transforms", name)(**given)) for name, given in steps.items())


class Projected(nn.Module):
    """The backbone with SimCLR's projection on top; it shares the weights of both."""

    def __init__(self, classifier: Classifier, projection: nn.Module) -> None:
        super().__init__()
        self.backbone, self.projection = classifier.backbone, projection

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to projections (B, d)."""
        out: Tensor = self.projection(self.backbone(x))
        return out


class Defense(DefenseBase):
    """The three stages of DBD on one network."""

    def __init__(self, context: Context, given: Tensor) -> None:
        super().__init__(context, given)
        check_share(context.config, len(context.train_set), self.settings.simclr_epochs + self.settings.head_epochs)
        train, (height, width) = context.config.transform.train, context.train_set.images.shape[2:]
        steps = self.settings.simclr_transform or published_views(min(height, width))
        # One pipeline for all steps: its constants are on the device before a step is captured.
        self.views = Pipeline(steps, train.remaining, height, width)
        check_sizes(context.config, self.views)

    def build(self, state: State, stage: Stage) -> None:
        """Build the projection head, the stage's optimizer and its stepper."""
        assert isinstance(state.model, Classifier)
        config, machine = self.context.config, self.context.machine
        if PROJECTION not in state.networks:
            state.networks[PROJECTION] = place(self.build_projection(state.model.linear.in_features), config, machine)
        if stage.name == "simclr":
            network = Projected(state.model, state.networks[PROJECTION])
            self.set_optimizer(state, stage, network.parameters())
            self.simclr = auxiliary_state(self.context, network, state.optimizer)
            self.simclr.stepper = supervised_steps(self.context, self.simclr, self.contrast, self.two_views)  # type: ignore[arg-type]
            return
        if hasattr(self, "simclr"):
            self.simclr.stepper = None  # a captured step has memory that nothing else can use
        super().build(state, stage)
        self.prepare_steps(state, stage)

    def prepare_steps(self, state: State, stage: Stage) -> None:
        """Give the state what runs the steps of the linear layer or of MixMatch."""
        if stage.name == "mixmatch":
            state.stepper = mixmatch_steps(self.context, state)
            return
        assert isinstance(state.model, Classifier)
        model, linear = state.model, self.context.machine.wrap(state.model.linear)
        sce, labels = self.context.config.split.criterion.sce, self.context.train_set.labels

        def loss(inputs: Tensor, index: Tensor, count: int) -> Tensor:
            """Return this rank's part of the mean symmetric cross-entropy; the backbone's BN statistics move."""
            with self.context.machine.autocast():
                with torch.no_grad():
                    features = model.features(inputs)
                logits = linear(features)  # (b, C)
            return symmetric_cross_entropy(logits, labels[index], sce.alpha, sce.beta).sum() / count

        state.stepper = supervised_steps(self.context, state, loss)

    def start_stage(self, state: State, stage: Stage) -> None:
        """The linear layer starts with new weights; MixMatch keeps the optimizer but uses its own steps."""
        assert isinstance(state.model, Classifier)
        if stage.name == "head":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(key_seed(self.context.config.seed.seed, "dbd head"))
                fresh = nn.Linear(state.model.linear.in_features, state.model.linear.out_features)
            state.model.linear.load_state_dict(fresh.state_dict())
        elif stage.name == "mixmatch":
            self.prepare_steps(state, stage)

    def build_projection(self, width: int) -> nn.Module:
        """Return SimCLR's projection: (B, D) to (B, d), with weights by the run's seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key_seed(self.context.config.seed.seed, "dbd projection"))
            last = nn.Linear(width, self.settings.projection_dim)
            return nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), last)

    def two_views(self, images: Tensor, draws: Tensor) -> Tensor:
        """Return the first views of a batch (b, 3, H, W), then the second ones: (2b, 3, H, W)."""
        return torch.cat([self.views(images, part) for part in draws.chunk(2, dim=1)])

    def contrast(self, inputs: Tensor, index: Tensor, count: int) -> Tensor:
        """Return SimCLR's mean loss over the whole batch, with the value of this rank's part and the whole gradient."""
        machine = self.context.machine
        with machine.autocast():
            projected = self.simclr.parallel(inputs)  # (2b, d)
        first, second = (machine.all_gather(part, count) for part in projected.chunk(2))  # (B, d) each
        loss = nt_xent(first, second, self.settings.temperature).mean()
        return loss / machine.world_size + (1 - 1 / machine.world_size) * (loss - loss.detach())

    def train_epoch(self, state: State, epoch: int) -> dict[str, float]:
        """Train one epoch of the stage; return the means of its losses."""
        stage, e = locate(self.context.config.stages, epoch)
        if stage.name == "mixmatch":
            return self.train_mixmatch(state, epoch, e)
        seed, count, s = self.context.config.seed.seed, len(self.context.train_set), self.settings
        if stage.name == "head":
            draws = draw_supervised(seed, "dbd head", epoch, count, self.context.train_transform)
            state.model.train()
            return {"loss": train_supervised(self.context, state, stage.name, draws, s.head_batch_size)}
        rng = generator(seed, "simclr", epoch)
        order = torch.randperm(count, generator=rng)
        draws = SupervisedDraws(order, torch.cat([self.views.draw(count, rng) for _ in range(2)], 1))
        self.simclr.model.train()
        return {"loss": train_supervised(self.context, self.simclr, stage.name, draws, s.simclr_batch_size)}

    def train_mixmatch(self, state: State, epoch: int, e: int) -> dict[str, float]:
        """Split by the losses, then train one epoch of MixMatch; lambda_u rises from the linear layer's first epoch on."""
        losses = split_losses(self.context, epoch, state.model)
        pool = class_agnostic_split(losses, self.context.config.global_.epsilon)
        state.keep_split(pool, losses)
        semi = self.context.config.semi
        begun, greatest = self.settings.head_epochs + e, semi.criterion.mixmatch.lambda_u
        lambda_u = ramp_up(begun, semi.mixmatch.train_iteration, greatest, self.settings.rampup_length)
        return train_mixmatch(self.context, epoch, state, pool, lambda_u)
