"""Principal components of features, and their plot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.classifier import Features, build_classifier
from model.networks.resnet18_cifar import Settings
from utils.config.schema import Named
from utils.reporting import plots
from utils.reporting.projection import principal_components


def powers(features: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """The first two principal components by power iteration with deflation, (N, 2), and their shares of the variance."""
    rest = features.astype(np.float64) - features.mean(0)
    total, columns, shares = (rest**2).sum(), [], []
    for _ in range(2):
        axis = np.random.default_rng(0).normal(size=rest.shape[1])
        for _ in range(3000):
            axis = rest.T @ (rest @ axis)
            axis /= np.linalg.norm(axis)
        column = rest @ axis
        columns.append(column * np.sign(column[abs(column).argmax()]))
        shares.append(float((column**2).sum() / total))
        rest = rest - np.outer(column, axis)
    return np.stack(columns, 1), shares


@pytest.mark.parametrize("shape", [(60, 5), (4, 9), (30, 2)])
def test_the_components_are_those_of_power_iteration(shape: tuple[int, int]) -> None:
    """Coordinates and shares equal those of a slow method, more dimensions than images included."""
    features = np.random.default_rng(1).normal(size=shape) * np.linspace(4, 0.5, shape[1]) + 7
    expected, parts = powers(features)
    plane, shares = principal_components(torch.from_numpy(features).float())
    assert plane.numpy() == pytest.approx(expected, abs=1e-3) and shares.tolist() == pytest.approx(parts, abs=1e-4)


def test_two_clouds_stay_apart() -> None:
    """The first axis separates two clusters, wherever they are, and has nearly all of the variance."""
    cloud = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    plane, shares = principal_components(torch.cat([cloud, cloud + 50]) + 1e4)
    assert (plane[:40, 0] > 0).all() != (plane[40:, 0] > 0).all() and shares[0] > 0.95


@pytest.mark.parametrize("features", [torch.ones(5, 3), torch.arange(4.0)[:, None], torch.zeros(1, 8)])
def test_degenerate_features_have_a_plane(features: torch.Tensor, tmp_path: Path) -> None:
    """Features that are all equal, of one dimension, or of one image give finite coordinates and a plot."""
    plane, shares = principal_components(features)
    assert plane.shape == (len(features), 2) and shares.shape == (2,)
    assert torch.isfinite(plane).all() and torch.isfinite(shares).all()
    plots.draw_features(tmp_path / "f.png", features, {}, "run $x")
    assert (tmp_path / "f.png").stat().st_size > 1000


def test_the_features_are_what_the_linear_layer_sees() -> None:
    """`Features` returns the input of the linear layer and shares the classifier's weights."""
    model = build_classifier(Named("resnet18_cifar", Settings(width=2, blocks=1)), 3, 0).eval()
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(model.linear(Features(model)(images)), model(images))
    assert {id(p) for p in Features(model).parameters()} == {id(p) for p in model.parameters()}


def test_the_picture_shows_each_group_in_its_color(tmp_path: Path) -> None:
    """Poisoned images are red, and only on the first panel; a group without images is skipped without a warning."""
    features = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    poisoned = np.arange(50) < 10
    truth = {"clean": ~poisoned, "poisoned": poisoned, "cover": np.zeros(50, bool)}
    pools = {"clean pool": poisoned, "polluted pool": ~poisoned}
    plots.draw_features(tmp_path / "f.png", features, {"ground truth": truth, "last split": pools}, "run")
    with Image.open(tmp_path / "f.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    reddish = (pixels[..., 0] - pixels[..., 2]) > 60
    assert reddish[:, : pixels.shape[1] // 2].sum() > 50 and not reddish[:, pixels.shape[1] // 2 :].any()
