"""Tiny random denoisers and pipelines of every family, built from code alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor, nn

from dit_accel.kernels import BlockPlan
from dit_accel.layout import TokenLayout
from dit_accel.methods.base import StaticMethod
from dit_accel.pipelines.pixels.model import PixelDiT
from dit_accel.pipelines.pixels.pipeline import PixelDiTPipeline
from dit_accel.plan import plan_from_tile_mask

TARGETS = 2  # targeted attention modules of each model
TEXT_TOKENS = 6


@dataclass(frozen=True, kw_only=True)
class Tiles(StaticMethod):
    """Every tile, or each query tile's own."""

    name: ClassVar[str] = "tiles"

    everything: bool = True

    def plan(self, layout: TokenLayout) -> BlockPlan:
        tiles = layout.boxes((2, 2, 3))
        keep = torch.eye(tiles.num_tiles) > 0
        return plan_from_tile_mask(layout, tiles, torch.ones_like(keep) if self.everything else keep)

    def ideal_density(self, layout: TokenLayout) -> float:
        return self.plan(layout).visual_density


def wan_model(layers: int = 2, **config: Any) -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
        **config,
    ).eval()


def hunyuan_video_model(layers: int = 1, **config: Any) -> HunyuanVideoTransformer3DModel:
    torch.manual_seed(0)
    return HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=layers,
        num_single_layers=layers,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 6, 8),
        **config,
    ).eval()


def flux_model(layers: int = 1) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=layers,
        num_single_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    ).eval()


def dit_model(layers: int = 2) -> DiTTransformer2DModel:
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        sample_size=8,
        patch_size=2,
        norm_num_groups=1,
    ).eval()


def pixart_model(layers: int = 2) -> PixArtTransformer2DModel:
    torch.manual_seed(0)
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        cross_attention_dim=32,
        sample_size=8,
        patch_size=2,
        norm_num_groups=1,
        caption_channels=32,
        use_additional_conditions=False,
    ).eval()


def sd3_model(layers: int = 1, qk_norm: str | None = "rms_norm", dual: tuple[int, ...] = (0,)) -> SD3Transformer2DModel:
    """As 3.5 medium; its last block, the only one by default, gives no text on."""
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        dual_attention_layers=dual,
        qk_norm=qk_norm,
    ).eval()


def pixel_dit_model(layers: int = 2, num_classes: int | None = 5) -> PixelDiT:
    """With a velocity of its own, where a fresh one predicts 0."""
    torch.manual_seed(0)
    model = PixelDiT(
        num_attention_heads=2, attention_head_dim=12, num_layers=layers, ffn_dim=32, num_classes=num_classes
    )
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


MODELS = {
    "wan": wan_model,
    "hunyuan_video": hunyuan_video_model,
    "flux": flux_model,
    "dit": dit_model,
    "pixart": pixart_model,
    "sd3": sd3_model,
    "pixel_dit": pixel_dit_model,
}
# Latent grids after patchify, (frames, rows, columns), none of them square; DiT needs a square number of tokens.
GRIDS = {
    "wan": (3, 4, 5),
    "hunyuan_video": (3, 4, 5),
    "flux": (1, 6, 5),
    "dit": (1, 4, 9),
    "pixart": (1, 6, 5),
    "sd3": (1, 6, 5),
    "pixel_dit": (1, 5, 7),
}
TEXT_POSITIONS = {"hunyuan_video": "suffix", "flux": "prefix", "sd3": "suffix"}  # none for the others
BATCHED = ("dit", "pixart", "sd3", "pixel_dit")  # both guidance branches in one call


def branches(family: str) -> tuple[str, ...]:
    """Calls of a step, by guidance branch."""
    return ("batched",) if family in BATCHED else ("cond", "uncond")


def model(family: str, **config: Any) -> Any:
    return MODELS[family](**config)


def position_ids(rows: int, columns: int) -> Tensor:
    grid = torch.cartesian_prod(torch.zeros(1), torch.arange(rows).float(), torch.arange(columns).float())
    return grid.reshape(-1, 3)


def inputs(family: str, batch: int = 1, grid: tuple[int, int, int] | None = None) -> dict[str, Any]:
    """Arguments of one call of the tiny denoiser; its tokens have ``grid``."""
    make = torch.Generator().manual_seed(1)
    frames, rows, columns = grid or GRIDS[family]

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make)

    if family == "flux":
        return {
            "hidden_states": noise(batch, rows * columns, 4),
            "encoder_hidden_states": noise(batch, TEXT_TOKENS, 32),
            "pooled_projections": noise(batch, 32),
            "timestep": torch.full((batch,), 0.5),
            "img_ids": position_ids(rows, columns),
            "txt_ids": torch.zeros(TEXT_TOKENS, 3),
            "return_dict": False,
        }
    if family == "pixel_dit":
        return {
            "hidden_states": noise(batch, 3, rows, columns),
            "timestep": torch.full((batch,), 5.0),
            "class_labels": torch.arange(batch),
            "return_dict": False,
        }
    if family in ("dit", "pixart", "sd3"):
        shared = {
            "hidden_states": noise(batch, 4, 2 * rows, 2 * columns),
            "timestep": torch.full((batch,), 5.0),
            "return_dict": False,
        }
        if family == "dit":
            return shared | {"class_labels": torch.arange(batch)}
        shared["encoder_hidden_states"] = noise(batch, TEXT_TOKENS, 32)
        return shared | ({"pooled_projections": noise(batch, 32)} if family == "sd3" else {})
    shared = {
        "hidden_states": noise(batch, 4, frames, 2 * rows, 2 * columns),
        "timestep": torch.full((batch,), 5.0),
        "encoder_hidden_states": noise(batch, TEXT_TOKENS, 16),
        "return_dict": False,
    }
    if family == "wan":
        return shared
    valid = torch.tensor([4, 2, 6])[:batch]
    return shared | {
        "encoder_attention_mask": (torch.arange(TEXT_TOKENS) < valid[:, None]).long(),
        "pooled_projections": noise(batch, 8),
        "guidance": torch.full((batch,), 6000.0),
    }


def forward(denoiser: nn.Module, arguments: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        output: Tensor = denoiser(**arguments)[0]
    return output


def wan_pipeline(two: bool = False) -> WanPipeline:
    return WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=wan_model(),
        transformer_2=wan_model() if two else None,
        boundary_ratio=0.9 if two else None,
    )


def hunyuan_video_pipeline() -> HunyuanVideoPipeline:
    return HunyuanVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=hunyuan_video_model(),
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=None,
        tokenizer_2=None,
    )


def flux_pipeline() -> FluxPipeline:
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=flux_model(),
    )


def dit_pipeline() -> DiTPipeline:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=1,
    )
    return DiTPipeline(dit_model(), vae.eval(), DDIMScheduler())


def pixart_pipeline() -> PixArtAlphaPipeline:
    return PixArtAlphaPipeline(None, None, None, pixart_model(), DPMSolverMultistepScheduler())


def sd3_pipeline(**config: Any) -> StableDiffusion3Pipeline:
    encoders = dict.fromkeys(f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3"))
    return StableDiffusion3Pipeline(sd3_model(**config), FlowMatchEulerDiscreteScheduler(), vae=None, **encoders)


def pixel_dit_pipeline() -> PixelDiTPipeline:
    return PixelDiTPipeline(pixel_dit_model(), FlowMatchEulerDiscreteScheduler())


PIPELINES = {
    "wan": wan_pipeline,
    "hunyuan_video": hunyuan_video_pipeline,
    "flux": flux_pipeline,
    "dit": dit_pipeline,
    "pixart": pixart_pipeline,
    "sd3": sd3_pipeline,
    "pixel_dit": pixel_dit_pipeline,
}


def pipeline(family: str, **options: Any) -> Any:
    pipe = PIPELINES[family](**options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, steps: int = 4, height: int = 64, width: int = 80, frames: int = 9, **changes: Any) -> Tensor:
    """Latents of one seeded run with guidance; of DiT, which has one size, the image."""
    make = torch.Generator().manual_seed(2)
    texts, pooled = torch.randn(2, 1, TEXT_TOKENS, 32, generator=make), torch.randn(2, 1, 32, generator=make)
    arguments: dict[str, Any] = {
        "height": height,
        "width": width,
        "num_inference_steps": steps,
        "output_type": "latent",
        "return_dict": False,
        "generator": torch.Generator().manual_seed(3),
    }
    if isinstance(pipe, PixelDiTPipeline):
        return pipe(**(arguments | {"class_labels": 3, "guidance_scale": 2.0} | changes))[0]
    if isinstance(pipe, DiTPipeline):
        arguments = {name: value for name, value in arguments.items() if name not in ("height", "width")}
        return pipe(**(arguments | {"class_labels": [3], "output_type": "pt"} | changes))[0]
    if isinstance(pipe, PixArtAlphaPipeline):
        valid = (torch.arange(TEXT_TOKENS) < 4).float()[None]
        arguments |= {"prompt_attention_mask": valid, "negative_prompt_attention_mask": valid}
        arguments |= {"negative_prompt": None, "use_resolution_binning": False}
    elif isinstance(pipe, StableDiffusion3Pipeline):
        arguments |= {"pooled_prompt_embeds": pooled[0], "negative_pooled_prompt_embeds": pooled[1]}
    elif isinstance(pipe, FluxPipeline):
        arguments |= {"true_cfg_scale": 2.0, "pooled_prompt_embeds": pooled[0]}
        arguments |= {"negative_pooled_prompt_embeds": pooled[1]}
    else:
        arguments["num_frames"] = frames
        texts = texts[..., :16]
    if isinstance(pipe, HunyuanVideoPipeline):
        valid = (torch.arange(TEXT_TOKENS) < 4).float()[None]
        arguments |= {"true_cfg_scale": 2.0, "prompt_attention_mask": valid, "negative_prompt_attention_mask": valid}
        arguments |= {"pooled_prompt_embeds": pooled[0, :, :8], "negative_pooled_prompt_embeds": pooled[1, :, :8]}
    arguments |= {"prompt_embeds": texts[0], "negative_prompt_embeds": texts[1]}
    output: Tensor = pipe(**(arguments | changes))[0]
    return output
