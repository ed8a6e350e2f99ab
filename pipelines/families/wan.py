"""Wan 2.1 and 2.2, text and image to video: self-attention over the video alone, text by cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dit_accel.layout import TokenLayout
from dit_accel.pipelines.families.family import Family
from dit_accel.state import CallTokens


def read(arguments: Mapping[str, Any], config: Any) -> CallTokens:
    """Latents [B, C, F, H, W], cut into patches of config.patch_size."""
    batch, _, *latent = arguments["hidden_states"].shape
    frames, rows, columns = (size // patch for size, patch in zip(latent, config.patch_size, strict=True))
    return CallTokens(TokenLayout((frames, rows, columns)), batch)


WAN = Family(
    name="wan",
    models=("WanTransformer3DModel",),
    targets=(r"blocks\.\d+\.attn1",),
    read=read,
    shape=lambda config: {
        "heads": config.num_attention_heads,
        "head_dim": config.attention_head_dim,
        "blocks": config.num_layers,
        "ffn_dim": config.ffn_dim,
        "patch": tuple(config.patch_size),
    },
    guidance="separate",
)
