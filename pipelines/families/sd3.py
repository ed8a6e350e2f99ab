"""Stable Diffusion 3 and 3.5: joint attention over the image and, after it, the text.

Some blocks of 3.5 medium have a second attention, over the image alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dit_accel.layout import TokenLayout
from dit_accel.pipelines.families.family import Family
from dit_accel.pipelines.families.images import image_shape, patches
from dit_accel.state import CallTokens


def read(arguments: Mapping[str, Any], config: Any) -> CallTokens:
    """Latents [B, C, H, W]; the model masks no text padding."""
    latents, text = arguments["hidden_states"], arguments["encoder_hidden_states"]
    return CallTokens(TokenLayout(patches(latents, config), text.shape[1], "suffix"), len(latents))


SD3 = Family(
    name="sd3",
    models=("SD3Transformer2DModel",),
    targets=(r"transformer_blocks\.\d+\.attn",),
    visual_targets=(r"transformer_blocks\.\d+\.attn2",),
    read=read,
    shape=lambda config: image_shape(config) | {"visual_blocks": len(config.dual_attention_layers)},
    guidance="batched",
)
