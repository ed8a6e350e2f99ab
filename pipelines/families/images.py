"""What families of images share that cut latents [B, C, H, W] into square patches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dit_accel.kernels.block_sparse.plan import Triple
from dit_accel.layout import TokenLayout
from dit_accel.state import CallTokens

_VAE = 8  # pixels of an image per latent position of all these models


def patches(latents: Any, config: Any) -> Triple:
    """Token grid of latents [B, C, H, W], cut into patches of config.patch_size."""
    rows, columns = (size // config.patch_size for size in latents.shape[-2:])
    return 1, rows, columns


def read_image(arguments: Mapping[str, Any], config: Any) -> CallTokens:
    """Latents [B, C, H, W] whose self-attention sees no text."""
    latents = arguments["hidden_states"]
    return CallTokens(TokenLayout(patches(latents, config)), len(latents))


def image_shape(config: Any) -> dict[str, Any]:
    """The fields of ``ModelSpec`` that the config tells."""
    dim = config.num_attention_heads * config.attention_head_dim
    return {
        "heads": config.num_attention_heads,
        "head_dim": config.attention_head_dim,
        "blocks": config.num_layers,
        "ffn_dim": 4 * dim,
        "patch": (1, config.patch_size, config.patch_size),
    }


def sized_shape(config: Any) -> dict[str, Any]:
    """The same for models trained for images of one size."""
    side = _VAE * config.sample_size
    return image_shape(config) | {"height": side, "width": side}
