"""PixelDiT: self-attention over the pixels of an image, one token each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dit_accel.layout import TokenLayout
from dit_accel.pipelines.families.family import Family
from dit_accel.state import CallTokens


def read(arguments: Mapping[str, Any], config: Any) -> CallTokens:
    """Images [B, C, H, W]."""
    batch, _, rows, columns = arguments["hidden_states"].shape
    return CallTokens(TokenLayout((1, rows, columns)), batch)


PIXEL_DIT = Family(
    name="pixel_dit",
    models=("PixelDiT",),
    targets=(r"blocks\.\d+\.attn",),
    read=read,
    shape=lambda config: {
        "heads": config.num_attention_heads,
        "head_dim": config.attention_head_dim,
        "blocks": config.num_layers,
        "ffn_dim": config.ffn_dim,
        "patch": (1, 1, 1),
    },
    guidance="batched",
    cond_half="first",
)
