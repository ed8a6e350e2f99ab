"""What is known of a model without its weights: shapes, and the work of one forward."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from dit_accel.kernels.block_sparse.plan import Triple
from dit_accel.layout import TextPosition, TokenLayout
from dit_accel.pipelines.families import denoisers_of


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The shape of a denoiser and of what it is run on by default.

    Args:
        name: as commands call it.
        family: name of its family.
        heads, head_dim: of its self- or joint-attention; their product is the hidden size.
        blocks: transformer blocks; double-stream ones where there are two kinds.
        single_blocks: single-stream blocks after them.
        visual_blocks: blocks with a second attention, of the grid to itself, in a model whose first one sees text.
        ffn_dim: hidden size of the feed-forward.
        height, width, num_frames, steps: default output in pixels, frames (1: an image) and denoising steps.
        guidance: default guidance scale.
        guidance_calls: forwards per step.
        denoisers: models that share the steps among them.
        vae: compression per axis (frame, row, column).
        patch: latent positions per token and axis.
        multiple: pixels that the pipeline wants sides to be a multiple of, where VAE and patch would do with less.
        text_tokens, text_position: text in the self- or joint-attention, padding included.
        cross_tokens: text tokens of its cross-attention, 0 without one.
    """

    name: str
    family: str
    heads: int
    head_dim: int
    blocks: int
    ffn_dim: int
    height: int
    width: int
    num_frames: int
    steps: int
    guidance: float
    single_blocks: int = 0
    visual_blocks: int = 0
    guidance_calls: int = 1
    denoisers: int = 1
    vae: Triple = (4, 8, 8)
    patch: Triple = (1, 2, 2)
    multiple: int = 16
    text_tokens: int = 0
    text_position: TextPosition = "none"
    cross_tokens: int = 0

    @property
    def hidden_dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def num_blocks(self) -> int:
        """Attention layers that a method can replace."""
        return self.blocks + self.single_blocks + self.visual_blocks

    def layout(self, height: int | None = None, width: int | None = None, num_frames: int | None = None) -> TokenLayout:
        """Tokens of one forward.

        Args:
            height, width: of the output in pixels; default the model's.
            num_frames: frames of the output; default the model's.

        Raises:
            ValueError: a size that VAE and patch cannot make, with the nearest that they can.
        """
        rows = self._tokens("height", self.height if height is None else height, 1)
        columns = self._tokens("width", self.width if width is None else width, 2)
        frames = self._frames(self.num_frames if num_frames is None else num_frames)
        return TokenLayout((frames, rows, columns), self.text_tokens, self.text_position)

    def _tokens(self, side: str, pixels: int, axis: int) -> int:
        token = self.vae[axis] * self.patch[axis]
        step = math.lcm(token, self.multiple)
        if pixels < step or pixels % step:
            raise ValueError(
                f"{self.name} makes sides that are multiples of {step} pixels, got {side}={pixels}; "
                f"use {max(1, round(pixels / step)) * step}."
            )
        return pixels // token

    def _frames(self, num_frames: int) -> int:
        if self.num_frames == 1:
            if num_frames != 1:
                raise ValueError(f"{self.name} makes images, got num_frames={num_frames}; use 1.")
            return 1
        step = self.vae[0] * self.patch[0]
        if num_frames < 1 or (num_frames - 1) % step:
            raise ValueError(
                f"{self.name} makes {step}k + 1 frames, got num_frames={num_frames}; "
                f"use {max(0, round((num_frames - 1) / step)) * step + 1}."
            )
        return (num_frames - 1) // step + 1

    def attention_flops(self, layout: TokenLayout, density: float = 1.0) -> float:
        """Floating-point operations of the self- or joint-attention of one forward at batch 1: QK^T and PV.

        Args:
            layout: its tokens.
            density: share of the query-key pairs, text included, that are computed.
        """
        pairs = (self.num_blocks - self.visual_blocks) * layout.num_tokens**2
        return 4.0 * (pairs + self.visual_blocks * layout.visual_tokens**2) * self.hidden_dim * density

    def linear_flops(self, layout: TokenLayout) -> float:
        """Floating-point operations of the rest of one forward at batch 1.

        Per block the projections of attention (four), the feed-forward (two) and the whole of cross-attention;
        embeddings, modulation, norms and text refiners are left out.
        """
        dim, tokens, text = self.hidden_dim, layout.num_tokens, self.cross_tokens
        joint = 2 * tokens * (4 * dim**2 + 2 * dim * self.ffn_dim)
        cross = 2 * (tokens + text) * 2 * dim**2 + 4 * tokens * text * dim if text else 0
        visual = 2 * layout.visual_tokens * 4 * dim**2
        return float((self.num_blocks - self.visual_blocks) * (joint + cross) + self.visual_blocks * visual)


_WAN_14B = ModelSpec(
    name="wan2.1-14b",
    family="wan",
    heads=40,
    head_dim=128,
    blocks=40,
    ffn_dim=13824,
    height=720,
    width=1280,
    num_frames=81,
    steps=50,
    guidance=5.0,
    guidance_calls=2,
    cross_tokens=512,
)

_PIXART = ModelSpec(
    name="pixart-sigma-1k",
    family="pixart",
    heads=16,
    head_dim=72,
    blocks=28,
    ffn_dim=4608,
    height=1024,
    width=1024,
    num_frames=1,
    steps=20,
    guidance=4.5,
    vae=(1, 8, 8),
    cross_tokens=300,
)

_SD3 = ModelSpec(
    name="sd3-medium",
    family="sd3",
    heads=24,
    head_dim=64,
    blocks=24,
    ffn_dim=6144,
    height=1024,
    width=1024,
    num_frames=1,
    steps=28,
    guidance=7.0,
    vae=(1, 8, 8),
    text_tokens=333,  # 77 of CLIP, 256 of T5
    text_position="suffix",
)

SPECS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec(
            name="shapes",
            family="wan",
            heads=4,
            head_dim=64,
            blocks=8,
            ffn_dim=960,
            height=192,
            width=256,
            num_frames=25,
            steps=16,
            guidance=4.0,
            guidance_calls=2,
            patch=(1, 1, 1),
            cross_tokens=32,
        ),
        ModelSpec(
            name="shapes-image",
            family="flux",
            heads=3,
            head_dim=64,
            blocks=2,
            single_blocks=5,
            ffn_dim=768,
            height=512,
            width=512,
            num_frames=1,
            steps=16,
            guidance=3.5,
            guidance_calls=2,
            vae=(1, 4, 4),
            multiple=8,
            text_tokens=32,
            text_position="prefix",
        ),
        ModelSpec(
            name="wan2.1-1.3b",
            family="wan",
            heads=12,
            head_dim=128,
            blocks=30,
            ffn_dim=8960,
            height=480,
            width=832,
            num_frames=81,
            steps=50,
            guidance=5.0,
            guidance_calls=2,
            cross_tokens=512,
        ),
        _WAN_14B,
        replace(_WAN_14B, name="wan2.2-a14b", steps=40, guidance=4.0, denoisers=2),
        ModelSpec(
            name="hunyuanvideo",
            family="hunyuan_video",
            heads=24,
            head_dim=128,
            blocks=20,
            single_blocks=40,
            ffn_dim=12288,
            height=720,
            width=1280,
            num_frames=129,
            steps=50,
            guidance=6.0,
            text_tokens=256,
            text_position="suffix",
        ),
        ModelSpec(
            name="flux.1-dev",
            family="flux",
            heads=24,
            head_dim=128,
            blocks=19,
            single_blocks=38,
            ffn_dim=12288,
            height=1024,
            width=1024,
            num_frames=1,
            steps=28,
            guidance=3.5,
            vae=(1, 8, 8),
            text_tokens=512,
            text_position="prefix",
        ),
        ModelSpec(
            name="dit-xl-2-512",
            family="dit",
            heads=16,
            head_dim=72,
            blocks=28,
            ffn_dim=4608,
            height=512,
            width=512,
            num_frames=1,
            steps=50,
            guidance=4.0,
            vae=(1, 8, 8),
        ),
        _PIXART,
        replace(_PIXART, name="pixart-sigma-2k", height=2048, width=2048),
        _SD3,
        replace(_SD3, name="sd3.5-medium", steps=40, guidance=4.5, visual_blocks=13),
        replace(_SD3, name="sd3.5-large", heads=38, blocks=38, ffn_dim=9728, guidance=3.5),
        ModelSpec(
            name="pixel-dit-s",
            family="pixel_dit",
            heads=6,
            head_dim=64,
            blocks=12,
            ffn_dim=1536,
            height=256,
            width=256,
            num_frames=1,
            steps=20,
            guidance=3.0,
            vae=(1, 1, 1),
            patch=(1, 1, 1),
            multiple=1,
        ),
    )
}


def find_spec(name: str) -> ModelSpec:
    """A model's spec by name; a ValueError lists the names."""
    if name not in SPECS:
        raise ValueError(f"there is no model spec {name!r}; choose one of {', '.join(SPECS)}.")
    return SPECS[name]


def spec_of(pipe: Any) -> ModelSpec:
    """The spec of a loaded pipeline: its denoiser's own shape, run by default as the known model nearest in size.

    Raises:
        ValueError: no supported denoiser.
    """
    denoisers = denoisers_of(pipe)
    model, family = denoisers[0]
    shape = family.shape(model.config) | {"denoisers": len(denoisers)}
    hidden_dim, spatial = shape["heads"] * shape["head_dim"], _spatial_compression(pipe)
    vae = (getattr(pipe, "vae_scale_factor_temporal", 1), spatial, spatial)

    def distance(spec: ModelSpec) -> tuple[int, int]:
        return abs(spec.hidden_dim - hidden_dim), sum(getattr(spec, name) != value for name, value in shape.items())

    nearest = min((spec for spec in SPECS.values() if spec.family == family.name), key=distance)
    own = replace(nearest, vae=vae, **shape)
    return own if own == nearest else replace(own, name=type(pipe).__name__)


def _spatial_compression(pipe: Any) -> int:
    """Pixels per latent position, by the names under which pipelines keep it; DiT's keeps none."""
    for name in ("vae_scale_factor_spatial", "vae_scale_factor"):
        if factor := getattr(pipe, name, None):
            return int(factor)
    return int(2 ** (len(pipe.vae.config.block_out_channels) - 1))
