"""The defenses against slow references of their losses and schedules, and the rules that hold for all of them."""

from __future__ import annotations

import contextlib
import json
import math
import re
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from torch import Tensor, nn
from training import SMALL, last, same, small, train_here

import ASD
from data.batches import SupervisedDraws
from data.pools import Pools
from data.seeds import draw_seed_samples
from data.sets import GroundTruth, TestSets
from defenses import _start, abl, cbd, dbd, fp, none, reference_filter, reference_split
from defenses._start import split_clean
from engine import session
from engine.context import Context
from engine.defense import DefenseBase
from engine.evaluation import Evaluation, evaluate
from engine.session import Session, start
from engine.supervised import train_supervised
from loss.attention import attention_distance, attention_map
from loss.contrastive import nt_xent
from loss.mixmatch import ramp_up
from loss.supervised import cross_entropy
from model.classifier import Classifier
from utils import config, plugins
from utils.checkpoint import State
from utils.config.compatibility import refuse_other_settings
from utils.config.schema import as_dict
from utils.config.settings import SGD, Adam, CosineAnnealing, MultiStep
from utils.config.stages import Stage, locate, schedule_length
from utils.errors import UserError
from utils.reporting.confusion import FILE as CONFUSION
from utils.run import locate as locate_run
from utils.run import open_run
from utils.runtime.machine import Machine

FIGURES = ("clean_accuracy", "attack_success_rate", "robust_accuracy", "clean_as_target")
every_defense = pytest.mark.parametrize("name", SMALL)


def test_every_defense_is_tested() -> None:
    """The tests below run every file of the folder."""
    assert set(SMALL) == set(plugins.names("defenses"))


@pytest.mark.parametrize("path", sorted((REPOSITORY / "config" / "table1").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configurations_of_the_table_load(path: Path) -> None:
    """Every row of the paper's table has the network, the poisoned set, and the seed of ASD's own configuration."""
    own, row = config.load(REPOSITORY / "config/baseline_asd.yaml"), config.load(path)
    for key in ("network", "backdoor", "seed", "dataset"):
        assert getattr(own, key) == getattr(row, key), key
    assert row.epochs >= 74
    assert (own.transform == row.transform) != path.stem.endswith("_authors")
    assert own.transform.test == row.transform.test and own.transform.train.remaining == row.transform.train.remaining


def box(lr: float) -> SGD:
    """The optimizer of BackdoorBox."""
    return SGD(lr=lr, momentum=0.9, weight_decay=5e-4)


def theirs(lr: float) -> SGD:
    """The optimizer in the code of ABL's, NAD's and CBD's authors."""
    return SGD(lr=lr, momentum=0.9, weight_decay=1e-4, nesterov=True)


TRAINED = ("undefended", 200, box(0.1), MultiStep(milestones=(0.5, 0.75)))
# Name of a YAML -> its stages as published: epochs, optimizer, schedule.
PUBLISHED: dict[str, list[tuple[str, int, Any, Any]]] = {
    "abl": [
        ("isolation", 20, box(0.1), None),
        ("finetune", 70, box(0.1), MultiStep(milestones=(30, 55))),
        ("unlearn", 5, box(5e-4), None),
    ],
    "abl_authors": [
        ("isolation", 10, theirs(0.1), None),
        ("finetune", 60, theirs(0.1), MultiStep(milestones=(40,))),
        ("unlearn", 4, theirs(5e-4), None),
    ],
    "nad": [TRAINED, ("teacher", 10, box(0.01), None), ("student", 20, box(0.01), MultiStep(milestones=(2, 4, 6, 8)))],
    "nad_authors": [TRAINED, ("teacher", 10, theirs(0.01), None), ("student", 20, theirs(0.1), MultiStep(milestones=(2,)))],
    "finetune": [TRAINED, ("teacher", 0, box(0.01), None), ("student", 20, box(0.01), MultiStep(milestones=(2, 4, 6, 8)))],
    "fp": [TRAINED, ("pruned", 1, box(0.01), None), ("finetune", 10, box(0.01), None)],
    "cbd": [("biased", 5, theirs(0.1), None), ("clean", 100, theirs(0.1), MultiStep(milestones=(20, 70)))],
    "dbd": [
        ("simclr", 100, SGD(lr=0.4, momentum=0.9, weight_decay=1e-4), CosineAnnealing(T_max=1000)),
        ("head", 10, Adam(lr=0.002), None),
        ("mixmatch", 190, Adam(lr=0.002), None),
    ],
}
DETAILS: dict[str, dict[str, Any]] = {
    "abl": {"gamma": 0.5, "isolation_ratio": 0.01, "batch_size": 128},
    "abl_authors": {"gamma": 0.5, "isolation_ratio": 0.01, "batch_size": 128, "augmented": ("finetune",)},
    "nad": {"layers": ("layer2", "layer3", "layer4"), "betas": (500.0, 500.0, 500.0), "batch_size": 64},
    "nad_authors": {"layers": ("layer2", "layer3", "layer4"), "betas": (500.0, 1000.0, 1000.0), "batch_size": 64},
    "finetune": {"betas": (0.0, 0.0, 0.0), "batch_size": 64},
    "fp": {"accuracy_drop": 0.04, "batch_size": 128},
    "cbd": {"batch_size": 64},
    "dbd": {"simclr_batch_size": 512, "temperature": 0.5, "projection_dim": 128, "head_batch_size": 128, "rampup_length": 190},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_configurations_of_the_table_are_those_published(name: str) -> None:
    """Each stage of a row has the published epochs, optimizer and schedule, and the defense its published constants; those
    of the authors' code have its augmentation, too."""
    row = config.load(REPOSITORY / f"config/table1/{name}.yaml")
    plans = [
        (stage.name, stage.epochs, stage.optimizer.settings, stage.lr_scheduler and stage.lr_scheduler.settings)
        for stage in row.stages
    ]
    assert plans == PUBLISHED[name]
    for key, value in DETAILS[name].items():
        assert getattr(row.defense.settings, key) == value, key
    if name.endswith("_authors"):
        crop, flip, holes = (step.settings for step in row.transform.train.primary)
        assert (crop.size, crop.padding, crop.padding_mode, flip.p) == (32, 4, "constant", 0.5)
        assert (holes.holes, holes.length) == (1, 3)


@pytest.mark.slow
@every_defense
def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Stopped after any epoch, between stages too, and resumed: weights, optimizer, networks, sets and rows are equal."""
    settings, path = small(tmp_path, name, "run=whole")
    train_here(settings, path)
    whole = last(tmp_path, "whole")
    assert [row["stage"] for row in whole["history"]] == [settings.stage(e) for e in range(settings.epochs)]
    assert {row["defense"] for row in whole["history"]} == {name}
    finish = Session.finish_epoch

    def interrupted(session: Session, losses: dict[str, float]) -> None:
        finish(session, losses)
        session.writer.wait()
        raise KeyboardInterrupt

    cut, _ = small(tmp_path, name, "run=cut")
    with monkeypatch.context() as patch:
        patch.setattr(Session, "finish_epoch", interrupted)
        for _ in range(settings.epochs - 1):
            with pytest.raises(KeyboardInterrupt):
                train_here(cut, path)
    train_here(cut, path)
    resumed = last(tmp_path, "cut")
    for key in whole.keys() - {"config"}:
        assert same(whole[key], resumed[key]), key


@pytest.mark.parametrize("name", ["cbd", "nad"])
def test_a_model_that_stays_as_it_is_is_evaluated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """While another network is trained, the figures of the first epoch are those of the stage, and the matrices are kept."""
    settings, path = small(tmp_path, name, f"run={name}")
    calls: list[str] = []

    def counted(context: Context, model: nn.Module, tests: TestSets) -> Evaluation:
        calls.append("evaluated")
        return evaluate(context, model, tests)

    monkeypatch.setattr(session, "evaluate", counted)
    train_here(settings, path)
    assert len(calls) == settings.epochs - 1
    rows = last(tmp_path, name)["history"]
    kept = {tuple(row[key] for key in FIGURES) for row in rows if row["stage"] in ("biased", "teacher")}
    assert len(kept) == 1
    assert len({row["clean_accuracy"] for row in rows}) > 1
    confusion = locate_run(settings).log / CONFUSION
    assert json.loads(confusion.read_text())["epoch"] == settings.epochs - 1


@pytest.mark.slow
def test_an_extended_run_equals_one_of_that_length(tmp_path: Path) -> None:
    """With rates that do not depend on it, num_epochs may be raised when a run is finished: the result is that of a run that
    had it from the start, bit for bit."""
    rates = "lr_scheduler={multi_step: {milestones: [2], gamma: 0.25}}"
    longer = (rates, "num_epochs=5", "global.epoch_third=5")
    train_here(*small(tmp_path, "asd", "run=whole", *longer))
    train_here(*small(tmp_path, "asd", "run=extended", rates, "num_epochs=3", "global.epoch_third=3"))
    train_here(*small(tmp_path, "asd", "run=extended", *longer))
    whole, extended = last(tmp_path, "whole"), last(tmp_path, "extended")
    for key in whole.keys() - {"config"}:
        assert same(whole[key], extended[key]), key


OTHER = {
    "optimizer": "{SGD: {lr: 0.3}}", "lr_scheduler": "{multi_step: {milestones: [1], gamma: 0.1}}", "meta.epoch": 2,
    "semi.loader.batch_size": 4, "semi.criterion.mixmatch.lambda_u": 75, "semi.mixmatch.alpha": 0.3,
    "semi.mixmatch.train_iteration": 2, "semi.mixmatch.temperature": 0.9, "global.epoch_first": 2, "global.epoch_second": 3,
    "global.t": 3, "global.n": 1, "global.epsilon": 0.3, "global.keep_seeds": True,
    "undefended.batch_size": 32, "undefended.optimizer": "{Adam: {lr: 0.01}}", "undefended.lr_scheduler": None,
}  # fmt: skip


@pytest.mark.slow
@every_defense
def test_settings_that_a_defense_does_not_read_may_change(tmp_path: Path, name: str) -> None:
    """With other values of all of them a run has the same weights and rows, so a run may be resumed with them."""
    settings, path = small(tmp_path, name, "run=before")
    below = {key: [k for k in OTHER if k == key or k.startswith(f"{key}.")] for key in settings.defense.settings.unread}
    assert all(below.values())
    others = [f"{key}={'null' if OTHER[key] is None else OTHER[key]}" for keys in below.values() for key in keys]
    train_here(settings, path)
    train_here(*small(tmp_path, name, "run=after", *others))
    before, after = last(tmp_path, "before"), last(tmp_path, "after")
    for key in before.keys() - {"config"}:
        assert same(before[key], after[key]), key
    train_here(*small(tmp_path, name, "run=before", *others))
    with pytest.raises(UserError, match=r"loader\.batch_size"):
        train_here(*small(tmp_path, name, "run=before", "loader.batch_size=32"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nad", "fp"])
def test_repair_defenses_start_from_the_undefended_network(tmp_path: Path, name: str) -> None:
    """Its first stage is `defense: none` bit for bit; a finished run without a defense may be named instead."""
    train_here(*small(tmp_path, "none", "run=plain"))
    train_here(*small(tmp_path, name, "run=whole"))
    plain, whole = last(tmp_path, "plain"), last(tmp_path, "whole")
    rows = [[row | {"defense": None} for row in saved["history"][:3]] for saved in (plain, whole)]
    assert same(*rows)
    train_here(*small(tmp_path, name, "run=short", f"defense.{name}.start_run=plain"))
    short = last(tmp_path, "short")
    assert len(short["history"]) == len(whole["history"]) - 3
    with pytest.raises(UserError, match="other"):
        train_here(*small(tmp_path, name, "run=other", f"defense.{name}.start_run=plain", "backdoor.poison_ratio=0.2"))
    other = "{to_tensor: true, normalize: {mean: [0.9, 0.9, 0.9], std: [0.1, 0.1, 0.1]}}"
    for part in ("train", "test"):
        with pytest.raises(UserError, match=rf"start_run: plain: its transform\.{part}\.remaining is another one"):
            given = ("run=normalized", f"defense.{name}.start_run=plain", f"transform.{part}.remaining={other}")
            train_here(*small(tmp_path, name, *given))
    with pytest.raises(UserError, match=r"start_run: plain: its transform\.test\.primary is another one"):
        given = ("run=resized", f"defense.{name}.start_run=plain", "transform.test.primary={resize: {size: 16}}")
        train_here(*small(tmp_path, name, *given))
    clean = tmp_path / "clean.txt"
    poisoned = np.load(tmp_path / "saved" / "plain" / "poison_idx.npy")
    clean.write_text("".join(f"{i}\n" for i in np.flatnonzero(poisoned == 0)[:60]))
    train_here(*small(tmp_path, name, "run=named", f"defense.{name}.start_run=plain", f"seed_samples={clean}"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nad", "fp"])
def test_only_a_finished_run_without_a_defense_provides_the_weights(tmp_path: Path, name: str) -> None:
    """Any other run is refused in one line that names the key and says what is wrong with it."""
    train_here(*small(tmp_path, "none", "run=short"))
    train_here(*small(tmp_path, "asd", "run=defended"))
    checkpoint = tmp_path / "storage" / "short" / "checkpoint/latest_model.pt"
    saved = torch.load(checkpoint, weights_only=True)
    torch.save(saved | {"epoch": 1}, checkpoint)
    for run, reason in (("nowhere", "no such run"), ("defended", "has defense: asd"), ("short", "has finished 2 of 3 epochs")):
        with pytest.raises(UserError, match=rf"defense\.{name}\.start_run: {run}: {reason}") as caught:
            train_here(*small(tmp_path, name, "run=repaired", f"defense.{name}.start_run={run}"))
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_another_length_may_not_move_finished_epochs_to_another_stage(tmp_path: Path) -> None:
    """`num_epochs` may change on resuming only as long as every finished epoch stays in its stage; of NAD it is the length of
    the first of three."""
    rates = "undefended.lr_scheduler=null"
    train_here(*small(tmp_path, "nad", "run=whole", rates))
    with pytest.raises(UserError, match="num_epochs: 3, but the configuration has 4, and finished epochs"):
        train_here(*small(tmp_path, "nad", "run=whole", rates, "num_epochs=4"))
    saved = last(tmp_path, "whole")
    now = as_dict(small(tmp_path, "nad", rates, "num_epochs=4")[0])
    refuse_other_settings(tmp_path, saved | {"epoch": 2}, now)  # within the first stage
    with pytest.raises(UserError, match="num_epochs"):
        refuse_other_settings(tmp_path, saved | {"epoch": 3}, now)


@pytest.mark.parametrize(("name", "others"), [("cbd", 4), ("nad", 4), ("asd", 1)])
def test_the_statistics_of_every_network_are_averaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, others: int
) -> None:
    """On several processes not only the model is the same on all of them at the end of an epoch, but also the biased network,
    the teacher (in each epoch that they exist), and the virtual model before it splits."""
    averaged: list[int] = []
    monkeypatch.setattr(Machine, "average_buffers", lambda _, network: averaged.append(id(network)))
    settings, path = small(tmp_path, name, f"run={name}")
    train_here(settings, path)
    assert len(averaged) == settings.epochs + others and len(set(averaged)) == 2


@pytest.mark.parametrize(
    ("name", "setting", "expected"),
    [
        ("abl", "defense.abl.isolation_ratio=0.001", "isolates 0 of 200 images, but a training step needs 2"),
        ("nad", "global.seed_num=0", "nad needs clean images"),
        ("fp", "global.seed_num=0", "fp needs clean images"),
        ("nad", "defense.nad.layers=[layer2, layer3, layer7]", "the network has no such part; did you mean layer"),
        ("nad", "defense.nad.layers=[layer2, layer3, layer4.0.bn1.weight]", "the network has no such part"),
        ("nad", "runtime.compile=true", "does not show nad its feature maps"),
        (
            "reference_filter",
            "defense.reference_filter={keeps_cover: true, removes: random}",
            "has no effect with removes: random",
        ),
        ("reference_filter", "backdoor={badnets: {}, poison_ratio: 1, target_shift: 1}", "keeps 0 of 200 images, too few"),
        ("reference_split", "global.epsilon=0.004", "the clean pool of epoch 1 would be empty"),
    ],
)
def test_what_a_defense_cannot_work_with_is_refused_at_the_start(
    tmp_path: Path, name: str, setting: str, expected: str
) -> None:
    """In one line that names the key, before anything is trained, and not after the stages before."""
    key = "defense" if setting.startswith("backdoor") else setting.partition("=")[0]
    with pytest.raises(UserError, match=rf"{re.escape(key)}.*: .*{expected}") as caught:
        train_here(*small(tmp_path, name, setting))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.pt"))


def test_nad_refuses_maps_of_one_position(tmp_path: Path) -> None:
    """The attention of a 1 x 1 map is 1 whatever the image, as in the layer after pooling that BackdoorBench compares."""
    given = (
        "network={resnet18: {blocks: [1, 1, 1, 1]}}",
        "defense.nad.layers=[layer1, layer4]",
        "defense.nad.betas=[1.0, 1.0]",
    )
    with pytest.raises(UserError, match=r"defense\.nad\.layers: layer4: gives a map of 1 x 1 for these images"):
        train_here(*small(tmp_path, "nad", *given))
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize(
    ("part", "found"),
    [
        ("encoder.layers.encoder_layer_0", r"\[1, 5, 8\] for an image"),
        ("encoder.layers.encoder_layer_0.self_attention", "no single"),
    ],
)
def test_nad_needs_feature_maps(tmp_path: Path, part: str, found: str) -> None:
    """A part of a transformer has tokens, not rows and columns: the undefended network is not trained in vain."""
    vit = "{vit_b_16: {image_size: 32, patch_size: 16, layers: 2, heads: 2, hidden_dim: 8, mlp_dim: 8}}"
    given = (f"network={vit}", f"defense.nad.layers=[{part}]", "defense.nad.betas=[1.0]")
    with pytest.raises(UserError, match=rf"defense\.nad\.layers: {re.escape(part)}: gives {found}") as caught:
        train_here(*small(tmp_path, "nad", *given))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.pt"))


BEFORE = {"abl": ("isolation", "finetune"), "nad": ("undefended", "teacher"), "fp": ("undefended",), "cbd": ("biased",),
          "dbd": ("simclr", "head")}  # fmt: skip


@every_defense
def test_the_best_model_is_one_that_the_defense_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A network that is not repaired yet often has the highest ACC, and the backdoor: it is not the best model. Without the
    stage that repairs, e.g. ABL without unlearning, the one before counts."""
    figures = iter(range(99, 0, -1))

    def falling(context: Context, model: nn.Module, tests: TestSets) -> Evaluation:
        found = evaluate(context, model, tests)
        return found._replace(shares=found.shares | {"clean_accuracy": next(figures) / 100})

    monkeypatch.setattr(session, "evaluate", falling)
    train_here(*small(tmp_path, name, "run=whole"))
    saved = last(tmp_path, "whole")
    first = [row["stage"] in BEFORE.get(name, ()) for row in saved["history"]].index(False)
    assert saved["best_epoch"] == first + 1 and saved["best_acc"] == saved["history"][first]["clean_accuracy"]
    best = torch.load(tmp_path / "storage/whole/checkpoint/best_model.pt", weights_only=True)
    assert best["epoch"] == first
    if name == "abl":
        train_here(*small(tmp_path, name, "run=short", "defense.abl.unlearn_epochs=0"))
        assert last(tmp_path, "short")["best_epoch"] == 3


def test_dbd_has_its_published_augmentation_and_ramp_with_any_configuration() -> None:
    """`defense: dbd` in a YAML that was not written for it: crops of the images' size, color jitter, blur; a ramp of 190."""
    found = config.load(REPOSITORY / "config/gtsrb.yaml", ["defense=dbd"]).defense.settings
    assert found == config.load(REPOSITORY / "config/table1/dbd.yaml").defense.settings
    assert found.rampup_length == 190
    assert as_dict(dbd.published_views(224)) == {
        "random_resize_crop": {"size": 224, "scale": [0.2, 1.0], "ratio": [3 / 4, 4 / 3]},
        "random_horizontal_flip": {"p": 0.5},
        "random_color_jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "p": 0.8},
        "random_grayscale": {"p": 0.2},
        "gaussian_blur": {"sigma": [0.1, 2.0], "p": 0.5},
    }


def test_stages_and_schedules() -> None:
    """An epoch belongs to the stage that its number falls into; a schedule lasts until the next new optimizer."""
    parts = [Stage("a", 2, None), Stage("b", 0, None), Stage("c", 3, None), Stage("d", 4, None, new_optimizer=False)]  # type: ignore[arg-type]
    assert [locate(parts, e)[0].name for e in range(9)] == [*"aacccdddd"] and [locate(parts, e)[1] for e in range(5)] == [
        0,
        1,
        0,
        1,
        2,
    ]
    assert [schedule_length(parts, stage) for stage in parts] == [2, 0, 7, 7]
    with pytest.raises(IndexError):
        locate(parts, 9)


def world(logits: Tensor, labels: Tensor) -> Any:
    """What a loss needs of a context, for given logits: a model that returns them."""
    context = SimpleNamespace(machine=Machine(torch.device("cpu")), train_set=SimpleNamespace(labels=labels))
    return context, SimpleNamespace(parallel=lambda inputs: logits)


@pytest.mark.parametrize("shift", [0.0, 8.0])
def test_local_gradient_ascent_is_flooding(shift: float) -> None:
    """Above and below gamma the gradient is that of `|m - gamma| + gamma`; by example each image has its own sign."""
    torch.manual_seed(0)
    labels, index = torch.randint(0, 4, (20,)), torch.arange(20)
    logits = torch.randn(20, 4, dtype=torch.float64)
    logits[index, labels] += shift
    logits.requires_grad_()
    mean = cross_entropy(logits, labels).mean()
    (flooding,) = torch.autograd.grad((mean - 0.5).abs() + 0.5, logits)
    context, state = world(logits, labels)
    loss = abl.ascent_below(context, state, abl.Settings())(torch.zeros(0), index, 20)
    assert torch.allclose(torch.autograd.grad(loss, logits)[0], flooding)
    loss = abl.ascent_below(context, state, abl.Settings(unit="example"))(torch.zeros(0), index, 20)
    slow = sum((1 if x > 0.5 else -1) * x for x in cross_entropy(logits, labels)) / 20
    assert float(loss.detach()) == pytest.approx(float(slow.detach()))


def test_the_isolated_images_have_the_lowest_losses(tmp_path: Path) -> None:
    """ABL isolates the `int(N p)` images with the lowest cross-entropy, compared with a plain sort."""
    run = train_here(*small(tmp_path, "abl", "run=whole"))
    settings, _ = small(tmp_path, "abl", "run=whole", "defense.abl.finetune_epochs=0", "defense.abl.unlearn_epochs=0")
    train_here(*small(tmp_path, "abl", "run=first", "defense.abl.finetune_epochs=0", "defense.abl.unlearn_epochs=0"))
    found, network = last(tmp_path, "whole")["sets"]["isolated"], last(tmp_path, "first")["model_state_dict"]
    assert run.saved.exists() and settings.epochs == 2
    from data.sources import prepare
    from model.classifier import build_classifier, new_classifier

    data = prepare(settings, tmp_path / "fresh", new_classifier=new_classifier)
    model = build_classifier(settings.network, 10, 7).eval()
    model.load_state_dict(network)
    from engine.context import build_transforms

    plain = build_transforms(settings, data.train)[1]
    with torch.no_grad():
        losses = [
            float(cross_entropy(model(plain(data.train.images[i : i + 1], torch.zeros(1, 0))), data.train.labels[i : i + 1]))
            for i in range(200)
        ]
    cut = sorted(losses)[20]
    assert len(found) == 20 and all(losses[i] <= cut + 1e-4 for i in found.tolist())
    row = last(tmp_path, "whole")["history"][-1]
    assert row["isolated_size"] == 20 and 0 <= row["poisoned_in_isolated"] <= 20


def test_simclr_is_a_loop_over_pairs() -> None:
    """Each first view against its partner and all other views of the batch."""
    torch.manual_seed(0)
    first, second = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    views = [v / v.norm() for v in [*first, *second]]
    for i, loss in enumerate(nt_xent(first, second, 0.5).tolist()):
        similar = [float(views[i] @ view) / 0.5 for view in views]
        below = torch.tensor([s for k, s in enumerate(similar) if k != i]).exp().sum().log()
        assert loss == pytest.approx(float(below) - similar[i + 5], abs=1e-5)


def test_the_ramp_of_dbd() -> None:
    """lambda_u is 0.79 when MixMatch begins after 10 epochs of the linear layer, and 15 in its last 10 epochs."""
    starts = [float(ramp_up(10 + e, 4, 15, 190)[0]) for e in (0, 90, 180, 189)]
    assert starts == pytest.approx([15 * 10 / 190, 15 * 100 / 190, 15, 15])


def test_attention_maps() -> None:
    """Maps have length 1 whatever the scale of the features; equal maps, and maps of one pixel, are at distance 0."""
    torch.manual_seed(0)
    one, two = torch.randn(3, 4, 5, 6), torch.randn(3, 7, 5, 6)
    assert torch.allclose(attention_map(one).norm(dim=1), torch.ones(3)) and torch.allclose(
        attention_map(one), attention_map(9 * one), atol=1e-6
    )
    assert (
        attention_distance(one, 2 * one).abs().max() < 1e-10
        and attention_distance(one[:, :, :1, :1], one[:, :, 1:2, :1]).max() < 1e-9
    )
    slow = []
    for a, b in zip(one, two, strict=True):
        maps = [sum(channel**2 for channel in f).flatten() for f in (a, b)]
        maps = [m / (m.norm() + 1e-6) for m in maps]
        slow.append(float(((maps[0] - maps[1]) ** 2).mean()))
    assert attention_distance(one, two).tolist() == pytest.approx(slow)


def test_pruning_respects_the_allowed_accuracy_drop() -> None:
    """k is the largest for which the network without the first k channels loses at most the allowed share, by a slow loop."""
    torch.manual_seed(0)
    features, linear = torch.rand(60, 12), nn.Linear(12, 4)
    labels = linear(features).argmax(1)
    labels[:6] = (labels[:6] + 1) % 4
    order = torch.randperm(12)
    for drop in (0.0, 0.05, 0.2, 1.0):
        allowed = []
        for k in range(13):
            masked = features.clone()
            masked[:, order[:k]] = 0
            if (linear(masked).argmax(1) == labels).float().mean() >= 0.9 - drop - 1e-6:
                allowed.append(k)
        assert fp.prunable(features, labels, linear, order, drop) == max(allowed)
    assert fp.prunable(features, labels, linear, order, 1.0) == 12


def test_a_drop_of_exactly_the_allowed_share_is_kept() -> None:
    """Pruning the first of two channels costs 50 of 1,250 images, which are 4 %: it is pruned, the second one is not."""
    features = torch.zeros(1250, 2)
    features[:50, 0], features[50:, 1] = 1, 1
    linear = nn.Linear(2, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))
        linear.bias.copy_(torch.tensor([0.5, 0.0]))
    labels = torch.ones(1250, dtype=torch.int64)
    assert fp.prunable(features, labels, linear, torch.arange(2), 0.04) == 1
    assert fp.prunable(features, labels, linear, torch.arange(2), 0.039) == 0


def test_the_weights_of_cbd() -> None:
    """`CE_b / (CE_b + CE + 1e-8)`, scaled to a mean of 1, are constants of the gradient."""
    torch.manual_seed(0)
    labels, index = torch.randint(0, 4, (12,)), torch.arange(12)
    logits, biased = torch.randn(12, 4, requires_grad=True), torch.randn(12, 4)
    context, state = world(logits, labels)
    state.networks = {"biased": SimpleNamespace(eval=lambda: lambda inputs: biased)}
    defense = SimpleNamespace(context=context)
    loss = cbd.Defense.deconfounded(defense, state)(torch.zeros(0), index, 12)  # type: ignore[arg-type]
    own, known = cross_entropy(logits, labels), cross_entropy(biased, labels)
    weights = [float(b / (b + c + 1e-8)) for b, c in zip(known, own, strict=True)]
    mean = sum(weights) / 12
    slow = sum(w / mean * c for w, c in zip(weights, own, strict=True)) / 12
    assert float(loss) == pytest.approx(float(slow), rel=1e-5)
    assert torch.allclose(*(torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, slow)), atol=1e-6)


def test_oracle_baselines_select_by_ground_truth(tmp_path: Path) -> None:
    """The perfect filter leaves out the poisoned images and nothing else, the random one as many; a pool is half of the set."""
    flags = torch.tensor([0, 1, 0, 2, 0, 0, 1, 0, 0, 0] * 4, dtype=torch.uint8)

    def chosen(module: Any, name: str, **settings: Any) -> list[int]:
        c, _ = small(tmp_path, name, *(f"defense.{name}.{key}={value}" for key, value in settings.items()))
        found: list[int] = module.reference_images(c, flags).tolist()
        return found

    assert chosen(reference_filter, "reference_filter") == [i for i in range(40) if flags[i] == 0]
    assert chosen(reference_filter, "reference_filter", keeps_cover="true") == [i for i in range(40) if flags[i] != 1]
    random = chosen(reference_filter, "reference_filter", removes="random")
    assert len(random) == 32 and sorted(set(random)) == random and any(flags[i] == 1 for i in random)
    pool = chosen(reference_split, "reference_split")
    assert len(pool) == 20 and sorted(set(pool)) == pool and all(flags[i] == 0 for i in pool)
    assert any(flags[i] for i in chosen(reference_split, "reference_split", pool="random"))
    for module, name, setting in (
        (reference_filter, "reference_filter", "removes=random"),
        (reference_split, "reference_split", "pool=clean"),
    ):
        one, two = (
            module.reference_images(small(tmp_path, name, f"defense.{name}.{setting}", f"seed.seed={seed}")[0], flags).tolist()
            for seed in (7, 8)
        )
        assert one != two


@pytest.mark.parametrize("removes", ["poisoned", "random"])
def test_the_filter_trains_on_what_it_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removes: str) -> None:
    """Each epoch is one pass over the kept images and no others; without the poisoned ones there are only clean ones."""
    seen: list[Tensor] = []

    def recorded(context: Context, state: State, purpose: str, draws: SupervisedDraws, batch_size: int) -> float:
        seen.append(draws.order)
        return train_supervised(context, state, purpose, draws, batch_size)

    monkeypatch.setattr(_start, "train_supervised", recorded)
    settings, path = small(tmp_path, "reference_filter", f"defense.reference_filter.removes={removes}")
    train_here(settings, path)
    saved = last(tmp_path, "reference_filter")
    kept, row = saved["sets"]["kept"], saved["history"][-1]
    assert row["kept_size"] == len(kept) < 200 and (row["poisoned_in_kept"] == 0) == (removes == "poisoned")
    assert len(seen) == settings.epochs
    for order in seen:
        assert torch.equal(order.sort().values, kept)


@pytest.mark.parametrize("pool", ["clean", "random"])
def test_the_fixed_pool_is_trained_on_as_asd_does(tmp_path: Path, pool: str) -> None:
    """Every epoch uses the same pool, and lambda_u rises as with ASD."""
    settings, path = small(tmp_path, "reference_split", f"defense.reference_split.pool={pool}")
    train_here(settings, path)
    saved = last(tmp_path, "reference_split")
    assert set(saved["epochs_in_clean_pool"].tolist()) == {0, settings.epochs}
    rows = saved["history"]
    assert len({(row["clean_pool_size"], row["poisoned_in_clean_pool"]) for row in rows}) == 1
    assert (rows[0]["poisoned_in_clean_pool"] == 0) == (pool == "clean")
    semi = settings.semi
    expected = [
        float(ramp_up(e, 3, semi.criterion.mixmatch.lambda_u, semi.criterion.mixmatch.rampup_length).mean()) for e in range(3)
    ]
    assert [row["lambda_u"] for row in rows] == pytest.approx(expected) and expected[0] < expected[1] < expected[2]


def test_larger_clean_sets_hold_the_smaller_ones() -> None:
    """The clean images of NAD and fine-pruning include ASD's seed samples; the two halves share no image."""
    labels, flags = torch.arange(400) % 4, torch.zeros(400, dtype=torch.uint8)
    few, many = (draw_seed_samples(labels, GroundTruth(flags, labels), 4, n, 7).tolist() for n in (3, 20))
    assert set(few) < set(many) and len(many) == 80
    one, two = split_clean(torch.tensor(many), 7)
    assert len(one) == len(two) == 40 and set(one.tolist()) | set(two.tolist()) == set(many)


@pytest.mark.parametrize("name", ["dbd", "reference_split"])
@pytest.mark.parametrize(("epsilon", "pool"), [(0.02, "clean"), (0.98, "polluted")])
def test_a_pool_that_is_smaller_than_a_batch_is_refused(tmp_path: Path, name: str, epsilon: float, pool: str) -> None:
    """As with ASD, one line names key, pool and batch size, before anything is trained."""
    more = "backdoor.poison_ratio=0.01" if name == "reference_split" else "global.seed_num=2"
    with pytest.raises(UserError, match=rf"global\.epsilon: {epsilon}: the {pool} pool .*batch_size: 8") as caught:
        train_here(*small(tmp_path, name, f"global.epsilon={epsilon}", more))
    assert "\n" not in str(caught.value)


def test_cbd_with_a_biased_network_without_any_loss(tmp_path: Path) -> None:
    """If the biased network's loss is exactly 0 on a whole batch, its images have no weight; nothing becomes NaN."""
    config, path = small(tmp_path, "cbd")
    run = train_here(config, path)
    with open_run(run, config, True), ExitStack() as stack:
        session = start(config, run, Machine(torch.device("cpu")), None, stack)
        assert session is not None
        session.defense.build(session.state, config.stages[1])
        with torch.no_grad():
            session.state.networks["biased"].linear.weight.zero_()
            session.state.networks["biased"].linear.bias.copy_(torch.tensor([200.0] + [0.0] * (config.num_classes - 1)))
        index = torch.nonzero(session.context.train_set.labels == 0).squeeze(1)[:2]
        loss = session.defense.deconfounded(session.state)(session.context.train_set.images[index].float() / 255, index, 2)
        loss.backward()
        assert loss == 0 and all(torch.isfinite(p.grad).all() for p in session.state.model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["asd", "dbd", "reference_split"])
def test_mixmatch_uses_the_labels_of_the_pool_that_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The pool that an epoch reports is the one whose labels its MixMatch steps use; all other images are the polluted pool."""
    kept: list[Tensor] = []
    used: list[Pools] = []
    keep, draw = State.keep_split, ASD.draw_mixmatch

    def keep_split(state: State, clean_pool: Tensor, values: Tensor | None) -> None:
        kept.append(clean_pool)
        keep(state, clean_pool, values)

    def draw_mixmatch(settings: Any, epoch: int, pools: Pools, *rest: Any) -> Any:
        used.append(pools)
        return draw(settings, epoch, pools, *rest)

    monkeypatch.setattr(State, "keep_split", keep_split)
    monkeypatch.setattr(ASD, "draw_mixmatch", draw_mixmatch)
    settings, path = small(tmp_path, name)
    train_here(settings, path)
    assert len(kept) == len(used) == sum(settings.stage(e) not in ("simclr", "head") for e in range(settings.epochs))
    for pool, pools in zip(kept, used, strict=True):
        assert torch.equal(pools.clean, pool) and len(pools.polluted) == 200 - len(pool)


# -- Several processes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["abl", "cbd"])
def test_the_parts_of_two_processes_add_up_to_the_loss_of_one(name: str) -> None:
    """What the whole batch decides (the sign of the ascent, the mean of the weights) is not decided by a part of it."""
    torch.manual_seed(0)
    labels, logits, biased = torch.randint(0, 4, (12,)), torch.randn(12, 4), torch.randn(12, 4)
    own, known = cross_entropy(logits, labels), cross_entropy(biased, labels)
    together = own.mean() if name == "abl" else (known / (known + own + 1e-8)).sum()
    gamma = float(0.75 * own.mean())  # above the share of either process

    def part(rows: slice, machine: Any = None) -> float:
        context, state = world(logits[rows], labels)
        context.machine = machine or context.machine
        state.networks = {"biased": SimpleNamespace(eval=lambda: lambda inputs: biased[rows])}
        if name == "abl":
            loss = abl.ascent_below(context, state, abl.Settings(gamma=gamma))
        else:
            loss = cbd.Defense.deconfounded(SimpleNamespace(context=context), state)  # type: ignore[arg-type]
        return float(loss(torch.zeros(0), torch.arange(12)[rows], 12))

    two = SimpleNamespace(autocast=contextlib.nullcontext, all_reduce=lambda value: together)
    assert part(slice(5), two) + part(slice(5, 12), two) == pytest.approx(part(slice(12)), rel=1e-5)


def test_each_process_has_a_part_of_the_loss_of_simclr_and_the_whole_gradient() -> None:
    """Of two processes each returns half of the value, but all of the gradient of its rows."""
    torch.manual_seed(0)
    views = torch.randn(10, 3, dtype=torch.float64, requires_grad=True)
    machine = SimpleNamespace(world_size=2, autocast=contextlib.nullcontext, all_gather=lambda rows, count: rows)
    place: Any = SimpleNamespace(
        context=SimpleNamespace(machine=machine),
        settings=SimpleNamespace(temperature=0.5),
        simclr=SimpleNamespace(parallel=lambda inputs: inputs),
    )
    part, whole = dbd.Defense.contrast(place, views, torch.arange(5), 5), nt_xent(*views.chunk(2), 0.5).mean()
    assert float(part) == pytest.approx(float(whole) / 2)
    assert torch.allclose(*(torch.autograd.grad(loss, views)[0] for loss in (part, whole)))


@pytest.mark.parametrize("which", ["model", "biased"])
def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, which: str) -> None:
    """Neither those of the model nor those of a network beside it, although the loss is finite."""
    settings, path = small(tmp_path, "cbd")
    run = locate_run(settings, path)
    with open_run(run, settings, False), ExitStack() as stack:
        session = start(settings, run, Machine(torch.device("cpu")), None, stack)
        assert session is not None
        session.defense.begin_epoch(session.state, 0)
        network: Any = session.state.model if which == "model" else session.state.networks["biased"]
        with torch.no_grad():
            network.linear.bias[0] = torch.inf
        with pytest.raises(UserError, match=r"epoch 1: the weights are not finite: .* defense\.cbd\.optimizer"):
            session.finish_epoch({"loss": 1.0})
    assert not list(tmp_path.rglob("*.pt"))


def test_channels_are_ranked_by_their_absolute_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The features of a transformer may be negative: a channel at -3 is not the least active one."""
    monkeypatch.setattr(fp, "infer", lambda *_: torch.tensor([[-3.0, 0.1, 1.0]]).repeat(4, 1))
    backbone: Any = nn.Identity()
    backbone.feature_dim = 3
    images = SimpleNamespace(labels=torch.zeros(4, dtype=torch.int64), chosen=lambda index: index)
    place: Any = SimpleNamespace(context=SimpleNamespace(train_set=images), settings=SimpleNamespace(accuracy_drop=1.0))
    state: Any = SimpleNamespace(model=Classifier(backbone, 2))
    assert fp.Defense.choose(place, state, torch.arange(2), torch.arange(2, 4)).tolist() == [1, 2, 0]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (3.5, r"returned 3\.5: return a dictionary"),
        ({}, r"returned \{\}: return a dictionary"),
        ({"loss": None}, "return a dictionary"),
        ({"loss": 1.0, "kept": "all"}, "kept: 'all': must be a number, or None"),
        ({"loss": torch.zeros(2)}, r"loss: tensor\(\[0\., 0\.\]\): must be a number"),
        ({"loss": 1.0, "clean_accuracy": 0.99}, "clean_accuracy: is measured by the run itself"),
        ({"loss": 1.0, "epoch": 7}, "epoch: is measured by the run itself"),
        ({"loss": math.nan}, "the training loss is not finite"),
    ],
)
def test_figures_that_a_defense_may_not_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: object, line: str) -> None:
    """What could not be stored, or would replace what the run measures, ends the epoch before anything is written."""
    monkeypatch.setattr(none.Defense, "train_epoch", lambda self, state, epoch: given)
    with pytest.raises(UserError, match=line) as error:
        train_here(*small(tmp_path, "none"))
    assert "\n" not in str(error.value) and not list(tmp_path.rglob("*.pt"))
    assert not [path for path in tmp_path.rglob("metrics.jsonl") if path.read_text()]


def test_figures_of_a_defense_become_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scalars of numpy and torch are stored as numbers, counts as counts, and a further figure may be unknown."""
    given = {"loss": torch.tensor(0.5), "loss_x": np.float32(0.25), "images": 12, "purity": math.nan, "rate": None}
    monkeypatch.setattr(none.Defense, "train_epoch", lambda self, state, epoch: given)
    train_here(*small(tmp_path, "none", "run=whole"))
    row = last(tmp_path, "whole")["history"][-1]
    wanted = {"loss": 0.5, "loss_x": 0.25, "loss_u": None, "images": 12, "purity": None, "rate": None}
    assert {key: row[key] for key in wanted} == wanted and isinstance(row["images"], int)


@pytest.mark.parametrize(
    ("part", "value", "line"),
    [
        ("sets", torch.ones(5, dtype=torch.bool), r"state\.sets\['kept'\]: must be int64 indices .* is torch\.bool \(5,\)"),
        ("sets", torch.arange(3, dtype=torch.int32), r"is torch\.int32 \(3,\)"),
        ("sets", torch.tensor([-1]), r"is torch\.int64 \(1,\)"),
        ("sets", [1, 2], "is list"),
        ("tables", np.zeros(3), r"state\.tables\['kept'\]: must be a tensor, is ndarray"),
        ("networks", nn.Linear(2, 2), r"state\.networks\['kept'\]: must be added in `build`"),
    ],
)
def test_what_a_checkpoint_could_not_restore_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, value: object, line: str
) -> None:
    """Index sets and tables of another kind, and networks that a resumed run would not have, are refused in the first epoch
    that has them, not when the run is resumed."""

    def train_epoch(self: DefenseBase, state: State, epoch: int) -> dict[str, float]:
        getattr(state, part)["kept"] = value
        return {"loss": 1.0}

    monkeypatch.setattr(none.Defense, "train_epoch", train_epoch)
    with pytest.raises(UserError, match=rf"defenses/none\.py: .*{line}"):
        train_here(*small(tmp_path, "none"))
    assert not list(tmp_path.rglob("*.pt"))


def test_no_network_of_a_checkpoint_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that has a network which `build` does not add in that stage is refused; with the network it is resumed."""

    def build(self: DefenseBase, state: State, stage: Stage) -> None:
        state.networks["teacher"] = nn.Linear(2, 2)
        DefenseBase.build(self, state, stage)

    same_run = ("run=whole", "undefended.lr_scheduler=null")
    longer = small(tmp_path, "none", "num_epochs=4", *same_run)
    with monkeypatch.context() as patch:
        patch.setattr(none.Defense, "build", build)
        train_here(*small(tmp_path, "none", *same_run))
    with pytest.raises(UserError, match="adds no network teacher in this stage"):
        train_here(*longer)
    monkeypatch.setattr(none.Defense, "build", build)
    train_here(*longer)
    assert last(tmp_path, "whole")["epoch"] == 3
