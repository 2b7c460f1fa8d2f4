"""ViT-B/16 (Dosovitskiy et al., ICLR 2021) from torchvision: for images of a fixed size, divided into patches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

from model.backbone import finish
from utils.config.schema import setting
from utils.errors import UserError


@dataclass(frozen=True)
class Settings:
    num_classes: int | None = setting(None, "must equal the top-level num_classes; null: the same", low=1)
    image_size: int = setting(224, "side of the images in pixels", low=1)
    patch_size: int = setting(16, "side of a patch in pixels; divides image_size, e.g. 4 for 32", low=1)
    layers: int = setting(12, "encoder layers", low=1)
    heads: int = setting(12, "attention heads; divides hidden_dim", low=1)
    hidden_dim: int = setting(768, "features of a patch", low=1)
    mlp_dim: int = setting(3072, "hidden units of each layer's perceptron", low=1)
    dropout: float = setting(0.0, "share of the hidden units set to 0 in training", low=0, below=1)
    last_parts: tuple[str, ...] | None = setting(
        None, "what the virtual model trains; null: the second half of encoder.layers, and encoder.ln"
    )


def build(settings: Settings) -> nn.Module:
    """Return the backbone with fresh weights: (B, 3, image_size, image_size) to the class token's (B, hidden_dim)."""
    s = settings
    if s.image_size % s.patch_size:
        raise UserError(f"vit_b_16.patch_size: {s.patch_size}: must divide image_size ({s.image_size})")
    if s.hidden_dim % s.heads:
        raise UserError(f"vit_b_16.heads: {s.heads}: must divide hidden_dim ({s.hidden_dim})")
    backbone = VisionTransformer(
        s.image_size, s.patch_size, s.layers, s.heads, s.hidden_dim, s.mlp_dim, dropout=s.dropout, num_classes=1
    )
    backbone.heads = nn.Identity()
    backbone.register_forward_pre_hook(partial(refuse_other_size, s.image_size))
    last = [f"encoder.layers.encoder_layer_{i}" for i in range(s.layers // 2, s.layers)]
    return finish("vit_b_16", backbone, s.hidden_dim, s.last_parts, (*last, "encoder.ln"))


def refuse_other_size(size: int, backbone: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Raise `UserError` if the position embedding does not fit images (B, 3, H, W)."""
    height, width = inputs[0].shape[2:]
    if (height, width) != (size, size):
        raise UserError(
            f"network.vit_b_16.image_size: {size}: the images are {height} x {width}: give their side length (and a "
            "patch_size that divides it, e.g. 4 for 32), or resize them"
        )
