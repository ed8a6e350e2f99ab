"""PixArt-alpha and PixArt-Sigma: self-attention over the image alone, text by cross-attention."""

from __future__ import annotations

from dit_accel.pipelines.families.family import Family
from dit_accel.pipelines.families.images import read_image, sized_shape

PIXART = Family(
    name="pixart",
    models=("PixArtTransformer2DModel",),
    targets=(r"transformer_blocks\.\d+\.attn1",),
    read=read_image,
    shape=sized_shape,
    guidance="batched",
)
