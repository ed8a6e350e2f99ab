"""DiT: self-attention over an image of one class."""

from __future__ import annotations

from dit_accel.pipelines.families.family import Family
from dit_accel.pipelines.families.images import read_image, sized_shape

DIT = Family(
    name="dit",
    models=("DiTTransformer2DModel",),
    targets=(r"transformer_blocks\.\d+\.attn1",),
    read=read_image,
    shape=sized_shape,
    guidance="batched",
    cond_half="first",
)
