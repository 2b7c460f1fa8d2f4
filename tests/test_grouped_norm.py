"""Grouped BN: one forward pass instead of several."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from model.grouped_norm import GroupedBatchNorm2d, group, rows_per_group


@pytest.mark.parametrize("momentum", [0.1, 0.3, None])
@pytest.mark.parametrize("groups", [1, 2, 5])
def test_grouped_normalization_is_one_pass_for_several(groups: int, momentum: float | None) -> None:
    """Outputs, gradients and running statistics of one grouped pass are those of BatchNorm2d called group by group."""
    torch.manual_seed(groups)
    plain = nn.BatchNorm2d(3, momentum=momentum).double()
    plain(torch.randn(4, 3, 2, 2, dtype=torch.float64))  # statistics of its own
    nn.init.uniform_(plain.weight)
    ours = group(copy.deepcopy(plain))
    assert isinstance(ours, GroupedBatchNorm2d)
    x = torch.randn(groups * 4, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    weights = torch.randn_like(x)
    with rows_per_group(ours, 4):
        out = ours(x)
    expected = torch.cat([plain(part) for part in y.split(4)])
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    assert torch.allclose(out, expected, rtol=0, atol=1e-12)
    assert x.grad is not None and y.grad is not None
    assert torch.allclose(x.grad, y.grad, rtol=0, atol=1e-12)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        assert torch.allclose(a.grad, b.grad, rtol=0, atol=1e-12)
    for name, buffer in plain.named_buffers():
        assert torch.allclose(ours.get_buffer(name).double(), buffer.double(), rtol=0, atol=1e-12), name


def test_grouped_normalization_outside_its_block_is_the_plain_one() -> None:
    """Inference and the virtual model use plain BN: the same keys, no groups, also in eval mode."""
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    ours = group(copy.deepcopy(plain))
    assert list(ours.state_dict()) == list(plain.state_dict())
    x = torch.randn(6, 3, 4, 4)
    assert torch.equal(ours(x), plain(x))
    with rows_per_group(ours, 2):
        assert torch.equal(ours.eval()(x), plain.eval()(x))
        with pytest.raises(ValueError, match="groups of 2"):
            ours.train()(x[:5])
    assert torch.equal(ours.eval()(x), plain(x).detach())
