"""HunyuanVideo: joint attention over the video and, after it, the padded text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dit_accel.layout import TokenLayout
from dit_accel.pipelines.families.family import Family
from dit_accel.state import CallTokens


def read(arguments: Mapping[str, Any], config: Any) -> CallTokens:
    """Latents [B, C, F, H, W]; the model hides text from the number of valid tokens on, not from where they lie."""
    batch, _, frames, rows, columns = arguments["hidden_states"].shape
    if config.image_condition_type == "token_replace":
        return CallTokens(None, batch, irregular="the first frame's tokens are replaced by an image")
    grid = (frames // config.patch_size_t, rows // config.patch_size, columns // config.patch_size)
    layout = TokenLayout(grid, arguments["encoder_hidden_states"].shape[1], "suffix")
    return CallTokens(layout, batch, arguments["encoder_attention_mask"].sum(dim=1, dtype=torch.int32))


HUNYUAN_VIDEO = Family(
    name="hunyuan_video",
    models=("HunyuanVideoTransformer3DModel",),
    targets=(r"transformer_blocks\.\d+\.attn", r"single_transformer_blocks\.\d+\.attn"),
    read=read,
    shape=lambda config: {
        "heads": config.num_attention_heads,
        "head_dim": config.attention_head_dim,
        "blocks": config.num_layers,
        "single_blocks": config.num_single_layers,
        "ffn_dim": int(config.mlp_ratio * config.num_attention_heads * config.attention_head_dim),
        "patch": (config.patch_size_t, config.patch_size, config.patch_size),
    },
    guidance="separate",
    masks_text=True,
)
