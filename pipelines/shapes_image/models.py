"""The parts of the embedded pipeline of images, small and untrained, and how training calls them."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from dit_accel.kernels.block_sparse.plan import Triple
from dit_accel.pipelines.shapes.kit import Kit, build_tokenizer, pad_tokens
from dit_accel.pipelines.shapes.models import TEXT_ENCODER, narrow_posterior
from dit_accel.pipelines.shapes.scenes import IMAGES

LATENT_CHANNELS = 4
PACKED = 2  # latent rows and columns of a token
_CLIP_TOKENS = 32
# The sampler's shift is exp(mu), mu linear in the tokens between these two points: 2.6 at 512x512, 6 at 1024x1024.
_TOKENS, _MU = (256, 16_384), (0.7, 1.8)


def build_clip_encoder() -> CLIPTextModel:
    """A two-layer CLIP encoder of width 96: what a caption says in one vector."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=64,
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=_CLIP_TOKENS,
            bos_token_id=2,
            eos_token_id=1,
            pad_token_id=0,
        )
    )


def build_t5_encoder() -> T5EncoderModel:
    """A two-layer T5 encoder of width 128."""
    return T5EncoderModel(T5Config(**TEXT_ENCODER))


def build_transformer(num_layers: int = 2, num_single_layers: int = 5) -> FluxTransformer2DModel:
    """A Flux transformer of width 192; modulations and output start at zero, so that every block starts as nothing."""
    transformer = FluxTransformer2DModel(
        in_channels=LATENT_CHANNELS * PACKED**2,
        num_layers=num_layers,
        num_single_layers=num_single_layers,
        attention_head_dim=64,
        num_attention_heads=3,
        joint_attention_dim=128,
        pooled_projection_dim=96,
        guidance_embeds=False,
        axes_dims_rope=(16, 24, 24),
    )
    double = [norm for block in transformer.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    single = [block.norm for block in transformer.single_transformer_blocks]
    outputs: list[Any] = [*(norm.linear for norm in double + single), transformer.norm_out.linear, transformer.proj_out]
    for layer in outputs:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return transformer


def build_vae() -> AutoencoderKL:
    """A VAE that compresses 4x4 pixels to 4 channels, without attention, so that it takes images of any size."""
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=16,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    narrow_posterior(vae.quant_conv)
    return vae


def build_pipeline(num_layers: int = 2, num_single_layers: int = 5) -> FluxPipeline:
    """A stock pipeline of all parts, with fresh weights."""
    return FluxPipeline(
        tokenizer=build_tokenizer(IMAGES, _CLIP_TOKENS),
        text_encoder=build_clip_encoder().eval(),
        tokenizer_2=build_tokenizer(IMAGES),
        text_encoder_2=build_t5_encoder().eval(),
        transformer=build_transformer(num_layers, num_single_layers),
        vae=build_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_image_seq_len=_TOKENS[0],
            max_image_seq_len=_TOKENS[1],
            base_shift=_MU[0],
            max_shift=_MU[1],
        ),
    )


def encode_images(vae: AutoencoderKL, clips: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance [B, 4, h, w] of clips [B, 3, 1, H, W] in [-1, 1]."""
    mean, logvar = vae.quant_conv(vae.encoder(clips[:, :, 0])).chunk(2, 1)
    return mean, logvar


def decode_images(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Clips [B, 3, 1, H, W], not clamped, of latents [B, 4, h, w]."""
    images: Tensor = vae.decoder(vae.post_quant_conv(latents))
    return images[:, :, None]


@torch.no_grad()
def standardise(vae: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Folds mean and deviation [4] of the latents into the layers around them, in place.

    A FluxPipeline scales all channels alike; afterwards every channel has mean 0 and deviation 1 by itself.
    """
    before, after = vae.quant_conv, vae.post_quant_conv
    offset, scale = torch.cat([mean, 2 * std.log()]), torch.cat([std, torch.ones_like(std)])
    before.weight /= scale.view(-1, 1, 1, 1)
    before.bias.copy_((before.bias - offset) / scale)
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= std.view(1, -1, 1, 1)


def pack(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Tokens [B, rows * columns, 16] of latents [B, 4, h, w], as ``FluxPipeline`` packs them."""
    batch, channels, height, width = latents.shape
    cells = latents.view(batch, channels, height // PACKED, PACKED, width // PACKED, PACKED)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PACKED**2)


def embed(encoder: T5EncoderModel, ids: Tensor, length: int) -> Tensor:
    """Text states [B, length, 128], padding included and attended to, as ``FluxPipeline.encode_prompt`` makes them."""
    states: Tensor = encoder(pad_tokens(ids, length)).last_hidden_state
    return states


def conditions(pipeline: FluxPipeline, ids: Tensor, length: int, grid: Triple) -> dict[str, Tensor]:
    """The transformer's arguments besides latents and time."""
    _, rows, columns = grid
    positions = torch.zeros(rows, columns, 3, device=ids.device)
    positions[..., 1] += torch.arange(rows, device=ids.device)[:, None]
    positions[..., 2] += torch.arange(columns, device=ids.device)
    return {
        "encoder_hidden_states": embed(pipeline.text_encoder_2, ids, length),
        "pooled_projections": pipeline.text_encoder(pad_tokens(ids, _CLIP_TOKENS)).pooler_output,
        "txt_ids": torch.zeros(length, 3, device=ids.device),
        "img_ids": positions.view(-1, 3),
    }


def image_shift(tokens: int) -> float:
    """How far the pipeline's scheduler shifts times towards noise at so many tokens."""
    slope = (_MU[1] - _MU[0]) / (_TOKENS[1] - _TOKENS[0])
    return math.exp(_MU[0] + slope * (tokens - _TOKENS[0]))


KIT = Kit(
    language=IMAGES,
    pipeline=FluxPipeline,
    build=build_pipeline,
    text_encoders=("text_encoder_2", "text_encoder"),
    passes=nullcontext,
    encode=encode_images,
    decode=decode_images,
    standardise=standardise,
    latent_shape=lambda grid: (math.prod(grid), LATENT_CHANNELS * PACKED**2),
    clean=pack,
    embed=embed,
    conditions=conditions,
    shift=image_shift,
    last_time=1.0,
    gpu_attention="_native_flash",  # cuDNN's backward fails at batches of several hundred (torch 2.11)
    compiles=False,  # inductor of torch 2.11 fails on Flux blocks of dynamic shapes
)
