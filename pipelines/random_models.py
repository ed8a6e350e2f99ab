"""Denoisers of known shapes with random weights: what a step of them costs is exact, what they make says nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
)
from torch import Tensor, nn

from dit_accel.kernels.block_sparse.plan import Triple
from dit_accel.layout import TokenLayout
from dit_accel.pipelines.families import family_named
from dit_accel.pipelines.pixels.model import PixelDiT
from dit_accel.pipelines.specs import ModelSpec

TEXT_CHANNELS = 4096  # of T5 and of Llama, which all of them read
VALID_TEXT = 64  # tokens of a prompt of some fifty words, where models mask the padding after it


@dataclass(frozen=True)
class _Shapes:
    """Tensors of one call: latents of the grid's size, and random numbers of it."""

    batch: int
    latent: Triple
    grid: Triple
    text_tokens: int
    noise: Callable[..., Tensor]

    def full(self, value: float) -> Tensor:
        return torch.full_like(self.noise(self.batch), value, dtype=torch.float32)

    def latents(self, channels: int, *sides: int) -> Tensor:
        """One latent, repeated for both branches of guidance."""
        return torch.cat([self.noise(1, channels, *sides)] * self.batch)

    def text(self) -> Tensor:
        return self.noise(self.batch, self.text_tokens, TEXT_CHANNELS)

    def text_mask(self) -> Tensor:
        """int64 [batch, text tokens], the first ``VALID_TEXT`` ones."""
        valid = torch.arange(self.text_tokens, device=self.noise(1).device) < VALID_TEXT
        return valid.long().expand(self.batch, -1)


@dataclass(frozen=True)
class _Recipe:
    """How a family's denoiser is made and called."""

    model: Any
    config: Callable[[ModelSpec], dict[str, Any]]
    call: Callable[[_Shapes], dict[str, Any]]


def _attention(spec: ModelSpec) -> dict[str, int]:
    return {
        "num_attention_heads": spec.heads,
        "attention_head_dim": spec.head_dim,
        "num_layers": spec.blocks,
    }


def _rotary_axes(spec: ModelSpec) -> Triple:
    """Channels of a head that turn with the frame, row and column; (16, 56, 56) of 128."""
    side = 2 * (7 * spec.head_dim // 32)
    return spec.head_dim - 2 * side, side, side


def _square_side(spec: ModelSpec) -> int:
    return spec.height // spec.vae[1]


def _wan_call(shapes: _Shapes) -> dict[str, Any]:
    return {
        "hidden_states": shapes.latents(16, *shapes.latent),
        "timestep": shapes.full(500),
        "encoder_hidden_states": shapes.text(),
    }


def _hunyuan_video_call(shapes: _Shapes) -> dict[str, Any]:
    return _wan_call(shapes) | {
        "encoder_attention_mask": shapes.text_mask(),
        "pooled_projections": shapes.noise(shapes.batch, 768),
        "guidance": shapes.full(6000),
    }


def _flux_call(shapes: _Shapes) -> dict[str, Any]:
    _, rows, columns = shapes.grid
    text = shapes.text()
    positions = [torch.arange(size, device=text.device).float() for size in (1, rows, columns)]
    return {
        "hidden_states": shapes.noise(shapes.batch, rows * columns, 64),
        "encoder_hidden_states": text,
        "pooled_projections": shapes.noise(shapes.batch, 768),
        "timestep": shapes.full(0.5),
        "guidance": shapes.full(3.5),
        "img_ids": torch.cartesian_prod(*positions),
        "txt_ids": torch.zeros(shapes.text_tokens, 3, device=text.device),
    }


def _sd3_call(shapes: _Shapes) -> dict[str, Any]:
    return {
        "hidden_states": shapes.latents(16, *shapes.latent[1:]),
        "encoder_hidden_states": shapes.text(),
        "pooled_projections": shapes.noise(shapes.batch, 2048),
        "timestep": shapes.full(500),
    }


def _pixart_call(shapes: _Shapes) -> dict[str, Any]:
    return {
        "hidden_states": shapes.latents(4, *shapes.latent[1:]),
        "encoder_hidden_states": shapes.text(),
        "encoder_attention_mask": shapes.text_mask(),
        "timestep": shapes.full(500),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _class_call(channels: int) -> Callable[[_Shapes], dict[str, Any]]:
    def call(shapes: _Shapes) -> dict[str, Any]:
        latents = shapes.latents(channels, *shapes.latent[1:])
        labels = torch.arange(shapes.batch, device=latents.device)
        return {"hidden_states": latents, "timestep": shapes.full(500), "class_labels": labels}

    return call


_RECIPES: dict[str, _Recipe] = {
    "wan": _Recipe(
        WanTransformer3DModel,
        lambda spec: _attention(spec) | {"patch_size": spec.patch, "ffn_dim": spec.ffn_dim},
        _wan_call,
    ),
    "hunyuan_video": _Recipe(
        HunyuanVideoTransformer3DModel,
        lambda spec: _attention(spec) | {"num_single_layers": spec.single_blocks, "rope_axes_dim": _rotary_axes(spec)},
        _hunyuan_video_call,
    ),
    "flux": _Recipe(
        FluxTransformer2DModel,
        lambda spec: (
            _attention(spec)
            | {
                "num_single_layers": spec.single_blocks,
                "axes_dims_rope": _rotary_axes(spec),
                "joint_attention_dim": TEXT_CHANNELS,
                "guidance_embeds": True,
            }
        ),
        _flux_call,
    ),
    "sd3": _Recipe(
        SD3Transformer2DModel,
        lambda spec: (
            _attention(spec)
            | {
                "caption_projection_dim": spec.hidden_dim,
                "joint_attention_dim": TEXT_CHANNELS,
                "pos_embed_max_size": 384,
                "dual_attention_layers": tuple(range(spec.visual_blocks)),
                "qk_norm": None if spec.name == "sd3-medium" else "rms_norm",
            }
        ),
        _sd3_call,
    ),
    "pixart": _Recipe(
        PixArtTransformer2DModel,
        lambda spec: (
            _attention(spec)
            | {
                "cross_attention_dim": spec.hidden_dim,
                "caption_channels": TEXT_CHANNELS,
                "sample_size": _square_side(spec),
                "use_additional_conditions": False,
            }
        ),
        _pixart_call,
    ),
    "dit": _Recipe(
        DiTTransformer2DModel,
        lambda spec: _attention(spec) | {"in_channels": 4, "out_channels": 8, "sample_size": _square_side(spec)},
        _class_call(4),
    ),
    "pixel_dit": _Recipe(
        PixelDiT, lambda spec: _attention(spec) | {"ffn_dim": spec.ffn_dim, "num_classes": 1000}, _class_call(3)
    ),
}


def random_denoiser(spec: ModelSpec, device: torch.device, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """A denoiser of the spec's shape in eval mode, made where and as it is run: no other copy of its weights exists.

    Norms scale by 1, biases are 0 and every other weight is normal with a variance of 1 / fan-in, so that activations
    neither vanish nor overflow in a hundred blocks.

    Args:
        spec: the model.
        device, dtype: of its weights.
        seed: of the weights.
    """
    recipe = _RECIPES[spec.family]
    with device, _default_dtype(dtype):
        model: nn.Module = recipe.model(**recipe.config(spec)).eval()
    randomise(model, torch.Generator(device).manual_seed(seed))
    return model


@torch.no_grad()
def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Write every parameter of a model, as ``random_denoiser`` says."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def random_call(
    spec: ModelSpec, layout: TokenLayout, device: torch.device, dtype: torch.dtype, seed: int = 1
) -> dict[str, Any]:
    """Arguments of one call of the denoiser, as its pipeline makes it; both branches of guidance where it batches them.

    Args:
        spec: the model.
        layout: tokens of the call, by ``spec.layout``.
        device, dtype: of the tensors.
        seed: of the latents and texts.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    frames, rows, columns = (tokens * patch for tokens, patch in zip(layout.grid, spec.patch, strict=True))
    text_tokens = layout.text_tokens or spec.cross_tokens
    shapes = _Shapes(batch_of(spec), (frames, rows, columns), layout.grid, text_tokens, noise)
    return _RECIPES[spec.family].call(shapes) | {"return_dict": False}


def batch_of(spec: ModelSpec) -> int:
    """Samples in one call of the denoiser for one image or clip."""
    return 2 if family_named(spec.family).guidance == "batched" else 1


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
