"""NAD: fine-tune a teacher on clean images, then the student on them with the teacher's attention maps.

Li et al., "Neural Attention Distillation: Erasing Backdoor Triggers from Deep Neural Networks", ICLR 2021. With all `betas` 0
it is plain fine-tuning of the student.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data.batches import draw_supervised
from defenses._start import START_HELP, UNDEFENDED_STAGE, take_weights, train_undefended, undefended_stage
from engine.context import Context, auxiliary_state, check_sizes
from engine.defense import DefenseBase
from engine.supervised import BatchLoss, image_losses, supervised_steps, train_supervised
from loss.attention import attention_distance
from model.classifier import Classifier, new_classifier
from model.feature_maps import collect_maps
from utils.checkpoint import State
from utils.config import Config
from utils.config.reader import Reader
from utils.config.schema import Named, batch_size_setting, setting
from utils.config.settings import OPTIMIZERS, SCHEDULERS, SGD, MultiStep
from utils.config.stages import METHOD, DefenseSettings, Stage
from utils.errors import UserError, nearest

TEACHER = "teacher"
PLAN = Named("SGD", SGD(lr=0.01, momentum=0.9, weight_decay=5e-4))


@dataclass(frozen=True)
class Settings(DefenseSettings):
    needs_clean = True
    unread = METHOD
    start_run: str | None = setting(None, START_HELP)
    teacher_epochs: int = setting(10, "epochs of the teacher", low=0)
    teacher_optimizer: Named = setting(PLAN, "optimizer of the teacher", choices=OPTIMIZERS)
    student_epochs: int = setting(20, "epochs of the student", low=1)
    student_optimizer: Named = setting(PLAN, "optimizer of the student", choices=OPTIMIZERS)
    student_scheduler: Named | None = setting(
        Named("multi_step", MultiStep(milestones=(2, 4, 6, 8))),
        "learning rate of the student; null: constant",
        choices=SCHEDULERS,
    )
    layers: tuple[str, ...] = setting(("layer2", "layer3", "layer4"), "parts of the backbone whose attention maps are compared")
    betas: tuple[float, ...] = setting((500.0, 500.0, 500.0), "weight of each of them", low=0)
    batch_size: int = batch_size_setting(64, "batch size of teacher and student")

    def stages(self, config: Config) -> tuple[Stage, ...]:
        """The undefended network, the teacher, the student."""
        key, teacher = "defense.nad", (self.teacher_epochs, self.teacher_optimizer, None)
        return (
            replace(undefended_stage(config, self.start_run), prepares=True),
            Stage(TEACHER, *teacher, f"{key}.teacher_optimizer", keeps_model=True, prepares=True),
            Stage("student", self.student_epochs, self.student_optimizer, self.student_scheduler, f"{key}.student_optimizer"),
        )

    def check(self, config: Config, reader: Reader) -> None:
        """There are clean images; each layer is one of the network's, and has a weight."""
        super().check(config, reader)
        with torch.device("meta"):  # no memory, no random number
            known = [name for name, _ in new_classifier(config.network, config.num_classes).backbone.named_modules() if name]
        for name in self.layers:
            if name not in known:
                reader.fail("defense.nad.layers", name, f"the network has no such part; {nearest(name, known)}")
        if len(self.layers) != len(self.betas):
            reader.fail("defense.nad.betas", list(self.betas), f"give {len(self.layers)} numbers, one for each of layers")
        if config.runtime.compile:
            reader.fail("runtime.compile", True, "a compiled network does not show nad its feature maps: give false")


def check_maps(context: Context, layers: tuple[str, ...]) -> None:
    """Raise `UserError` if a part of the backbone does not give a feature map (B, c, h, w) of more than one position, whose
    normalized attention would always be 1."""
    maps = check_sizes(context.config, context.train_transform, parts=layers)
    for name in layers:
        found = maps.get(name)
        if not isinstance(found, Tensor) or found.ndim != 4:
            shape = list(found.shape) if isinstance(found, Tensor) else "no single tensor"
            raise UserError(
                f"defense.nad.layers: {name}: gives {shape} for an image, not a map of channels, rows and columns: name "
                "convolutional parts of the backbone"
            )
        if found.shape[2:].numel() == 1:
            raise UserError(
                f"defense.nad.layers: {name}: gives a map of 1 x 1 for these images, whose attention is always 1 and teaches "
                "nothing: leave it out, and its weight in betas"
            )


class Defense(DefenseBase):
    """The model is the undefended network: it stays as it is while the teacher is trained, then becomes the student."""

    def __init__(self, context: Context, given: Tensor) -> None:
        super().__init__(context, given)
        check_maps(context, self.settings.layers)

    def build(self, state: State, stage: Stage) -> None:
        """Build the teacher, the stage's optimizer and its loss."""
        assert isinstance(state.model, Classifier)
        if stage.name != UNDEFENDED_STAGE and TEACHER not in state.networks:
            state.networks[TEACHER] = copy.deepcopy(state.model)
        trained = state.networks[TEACHER] if stage.name == TEACHER else state.model
        self.set_optimizer(state, stage, trained.parameters())
        if stage.name == TEACHER:
            self.teacher = auxiliary_state(self.context, trained, state.optimizer)
            self.teacher.stepper = supervised_steps(self.context, self.teacher)
        elif stage.name == "student":
            if hasattr(self, "teacher"):
                self.teacher.stepper = None  # a captured step has memory that nothing else can use
            state.stepper = supervised_steps(self.context, state, self.distillation(state))

    def start_stage(self, state: State, stage: Stage) -> None:
        """Take another run's weights where one is named; the teacher begins as the undefended network."""
        if stage.name == UNDEFENDED_STAGE:
            return
        first = stage.name == TEACHER or not self.settings.teacher_epochs
        if first and self.settings.start_run:
            take_weights(self.context, state, self.settings.start_run)
        if first:
            state.networks[TEACHER].load_state_dict(state.model.state_dict())

    def distillation(self, state: State) -> BatchLoss:
        """Return the student's loss: cross-entropy, and the weighted distances of the attention maps from the teacher's."""
        context, s, teacher = self.context, self.settings, state.networks[TEACHER]
        assert isinstance(state.model, Classifier)
        assert isinstance(teacher, Classifier)
        maps, taught = collect_maps(state.model, s.layers), collect_maps(teacher, s.layers)

        def loss(inputs: Tensor, index: Tensor, count: int) -> Tensor:
            """Return this rank's part of the loss."""
            losses = image_losses(context, state.parallel, inputs, index)  # (b,)
            with torch.no_grad(), context.machine.autocast():
                teacher.eval()(inputs)
            for name, beta in zip(s.layers, s.betas, strict=True):
                losses = losses + beta * attention_distance(maps.pop(name), taught.pop(name))
            return losses.sum() / count

        return loss

    def train_epoch(self, state: State, epoch: int) -> dict[str, float]:
        """Train one pass over the stage's images; return the mean of its loss."""
        stage = self.context.config.stage(epoch)
        if stage == UNDEFENDED_STAGE:
            return train_undefended(self.context, state, epoch)
        draws = draw_supervised(self.context.config.seed.seed, "nad", epoch, len(self.given), self.context.train_transform)
        part = self.teacher if stage == TEACHER else state
        part.model.train()
        return {"loss": train_supervised(self.context, part, stage, draws.of(self.given), self.settings.batch_size)}
