"""The parts of the embedded pipeline of clips, small and untrained, and how training calls them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers.models.autoencoders.autoencoder_kl_wan as wan_vae
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from dit_accel.kernels.block_sparse.plan import Triple
from dit_accel.pipelines.shapes.kit import SPATIAL_RATIO, Kit, build_tokenizer, pad_tokens
from dit_accel.pipelines.shapes.scenes import CLIPS

FLOW_SHIFT = 3.0
LATENT_CHANNELS = 16
TEXT_ENCODER: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 256,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
}
_DEFAULT_TOKENS = 5376  # of the default clip, 192x256x25


def build_text_encoder() -> UMT5EncoderModel:
    """A two-layer T5 encoder of width 128."""
    return UMT5EncoderModel(UMT5Config(**TEXT_ENCODER))


def build_transformer(num_layers: int = 8) -> WanTransformer3DModel:
    """A Wan transformer of width 256 on single latent cells; its output layer starts at zero."""
    transformer = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=4,
        attention_head_dim=64,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=128,
        freq_dim=256,
        ffn_dim=960,
        num_layers=num_layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=256,
    )
    torch.nn.init.zeros_(transformer.proj_out.weight)
    torch.nn.init.zeros_(transformer.proj_out.bias)
    return transformer


def build_vae() -> AutoencoderKLWan:
    """A residual, patchified Wan VAE that compresses 8x8 pixels and 4 frames; the first frame stands alone."""
    vae = AutoencoderKLWan(
        base_dim=32,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        scale_factor_spatial=SPATIAL_RATIO,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        is_residual=True,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )
    narrow_posterior(vae.quant_conv)
    return vae


@torch.no_grad()
def narrow_posterior(moments: Any) -> None:
    """Makes the posterior narrow that this layer of means, then log-variances, gives at first, in place.

    One as wide as the prior would drown the small latents of an untrained encoder in noise.
    """
    channels = len(moments.bias) // 2
    moments.bias[channels:] = -6
    moments.weight[channels:] *= 0.2


def build_pipeline(num_layers: int = 8) -> WanPipeline:
    """A stock pipeline of all parts, with fresh weights."""
    return WanPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=build_text_encoder(),
        transformer=build_transformer(num_layers),
        vae=build_vae(),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT
        ),
    )


def _resample_whole_clip(module: Any, x: Tensor, feat_cache: Any = None, feat_idx: Any = None) -> Tensor:
    """``WanResample.forward`` for all frames at once; the first frame is resampled in space only."""
    batch, channels, frames, height, width = x.shape
    if module.mode == "upsample3d" and frames > 1:
        doubled = module.time_conv(x[:, :, 1:]).reshape(batch, 2, channels, frames - 1, height, width)
        doubled = doubled.permute(0, 2, 3, 1, 4, 5).reshape(batch, channels, 2 * (frames - 1), height, width)
        x = torch.cat([x[:, :, :1], doubled], 2)
        frames = x.shape[2]
    x = x.transpose(1, 2).reshape(batch * frames, channels, height, width)
    resampled: Tensor = module.resample(x)
    x = resampled.view(batch, frames, *resampled.shape[1:]).transpose(1, 2)
    if module.mode == "downsample3d" and frames > 1:
        x = torch.cat([x[:, :, :1], module.time_conv(x)], 2)
    return x


def _rms_norm(module: Any, x: Tensor) -> Tensor:
    """``WanRMS_norm.forward`` in fewer passes over memory."""
    axis = 1 if module.channel_first else -1
    scale = torch.rsqrt(x.float().square().mean(axis, keepdim=True) + 1e-12).to(x.dtype)
    normalised: Tensor = x * scale * module.gamma.to(x.dtype) + module.bias
    return normalised


@contextmanager
def whole_clip_passes() -> Iterator[None]:
    """Within, ``encode_clips`` and ``decode_latents`` work: the VAE classes resample whole clips without a cache.

    The stock passes loop over chunks of four frames; the results are equal.  The classes are restored on leaving.
    """
    stock = wan_vae.WanResample.forward, wan_vae.WanRMS_norm.forward
    wan_vae.WanResample.forward, wan_vae.WanRMS_norm.forward = _resample_whole_clip, _rms_norm
    try:
        yield
    finally:
        wan_vae.WanResample.forward, wan_vae.WanRMS_norm.forward = stock


def encode_clips(vae: AutoencoderKLWan, clips: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance [B, 16, t, h, w] of clips [B, 3, T, H, W] in [-1, 1], within ``whole_clip_passes``."""
    patches = wan_vae.patchify(clips, vae.config.patch_size)
    mean, logvar = vae.quant_conv(vae.encoder(patches)).chunk(2, 1)
    return mean, logvar


def decode_latents(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Clips [B, 3, T, H, W], not clamped, of unscaled latents, within ``whole_clip_passes``."""
    patches: Tensor = vae.decoder(vae.post_quant_conv(latents), first_chunk=True)
    clips: Tensor = wan_vae.unpatchify(patches, vae.config.patch_size)
    return clips


def latent_statistics(vae: AutoencoderKLWan, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [1, 16, 1, 1, 1] that the VAE's config records."""
    mean, std = (
        torch.tensor(values, device=device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std


def record_statistics(vae: AutoencoderKLWan, mean: Tensor, std: Tensor) -> None:
    """Writes mean and deviation [16] of the latents into the VAE's config."""
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())


def normalised(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Latents [B, 16, t, h, w] of mean 0 and deviation 1."""
    mean, std = latent_statistics(vae, latents.device)
    return (latents - mean) / std


def embed(encoder: UMT5EncoderModel, ids: Tensor, length: int) -> Tensor:
    """Text states [B, length, 128], zero where padded, as ``WanPipeline.encode_prompt`` makes them."""
    mask = ids > 0
    return pad_tokens(encoder(ids, mask.long()).last_hidden_state * mask[..., None], length)


def conditions(pipeline: WanPipeline, ids: Tensor, length: int, grid: Triple) -> dict[str, Tensor]:
    """The transformer's arguments besides latents and time."""
    return {"encoder_hidden_states": embed(pipeline.text_encoder, ids, length)}


def clip_shift(tokens: int) -> float:
    """How much more noise a clip's size needs in training, around the sampler's own shift at the default size."""
    return FLOW_SHIFT * min(2.0, max(2 / 3, math.sqrt(tokens / _DEFAULT_TOKENS)))


KIT = Kit(
    language=CLIPS,
    pipeline=WanPipeline,
    build=build_pipeline,
    text_encoders=("text_encoder",),
    passes=whole_clip_passes,
    encode=encode_clips,
    decode=decode_latents,
    standardise=record_statistics,
    latent_shape=lambda grid: (LATENT_CHANNELS, *grid),
    clean=normalised,
    embed=embed,
    conditions=conditions,
    shift=clip_shift,
    last_time=1000.0,
)
