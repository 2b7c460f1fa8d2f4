"""Batch normalization with the statistics of the whole batch over all processes (`sync_bn: true`), also on CPUs.

torch.nn.SyncBatchNorm supports CUDA only; on CPUs the sums are exchanged by a differentiable all-reduce.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class SumOverProcesses(torch.autograd.Function):
    """Sum a tensor over all processes; the gradient is the sum of their gradients.

    torch's own version is deprecated in favor of a private module.
    """

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        """Return the sum, a new tensor."""
        total = local.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        """Return the sum of the gradients: each process's value enters the sums of all processes."""
        return SumOverProcesses.forward(ctx, gradient)


class CpuSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalization with statistics over the rows of all processes."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (B, C, ...) by the statistics of the whole batch."""
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        values = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        count = values.new_full((1,), values.numel() / values.shape[1])
        others, channels = (0, *range(2, x.ndim)), (-1, *(1,) * (x.ndim - 2))
        local = torch.cat([values.sum(others), (values * values).sum(others), count])  # (2C + 1,)
        total = SumOverProcesses.apply(local)
        n = total[-1]
        mean, square = (total[:-1] / n).chunk(2)  # (C,), (C,)
        variance = (square - mean * mean).clamp(min=0)
        with torch.no_grad():
            self.num_batches_tracked += 1
            momentum = 0.1 if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), momentum)
            self.running_var.lerp_((variance.detach() * n / (n - 1)).to(self.running_var.dtype), momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        out = values * scale.view(channels) + (self.bias - mean * scale).view(channels)
        return out.to(x.dtype)


class CpuSyncBatchNorm1d(CpuSyncBatchNorm, nn.BatchNorm1d):
    """Of features (B, C)."""


class CpuSyncBatchNorm2d(CpuSyncBatchNorm, nn.BatchNorm2d):
    """Of feature maps (B, C, H, W)."""


def synchronize(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model with synchronized BN; the keys of its state_dict do not change."""
    if device.type == "cuda":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return converted
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, (nn.BatchNorm1d, nn.BatchNorm2d)) and not isinstance(child, CpuSyncBatchNorm):
                kind = CpuSyncBatchNorm1d if isinstance(child, nn.BatchNorm1d) else CpuSyncBatchNorm2d
                twin = kind(child.num_features, child.eps, child.momentum)
                twin.load_state_dict(child.state_dict())
                setattr(parent, name, twin.to(child.weight.device, child.weight.dtype))
    return model
