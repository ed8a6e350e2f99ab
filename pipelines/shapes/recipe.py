"""The numbers of a training run: clip sizes, batch sizes, rates, and how wall-clock time is shared among them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dit_accel.kernels.block_sparse.plan import Triple
from dit_accel.pipelines.shapes.kit import SPATIAL_RATIO, TEMPORAL_RATIO


@dataclass(frozen=True)
class ClipSize:
    """A clip size and its pool of encoded clips: ``feed`` clips are rendered at once, ``pool`` are kept."""

    height: int
    width: int
    frames: int
    feed: int
    pool: int
    initial: int
    two_objects: float

    @property
    def grid(self) -> Triple:
        """Frames, rows and columns of tokens."""
        return (self.frames - 1) // TEMPORAL_RATIO + 1, self.height // SPATIAL_RATIO, self.width // SPATIAL_RATIO

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)


@dataclass(frozen=True)
class Phase:
    """From ``start`` (share of the denoiser's time) on, each clip size gets this share of the time."""

    start: float
    shares: dict[str, float]


@dataclass(frozen=True)
class VaeRecipe:
    """Clip sizes as (height, width, frames, batch); only the first one until ``first_share`` of the time."""

    sizes: tuple[tuple[int, int, int, int], ...]
    first_share: float
    learning_rate: float
    evaluation: tuple[int, int, int, int]
    evaluation_batches: int


@dataclass(frozen=True)
class DenoiserRecipe:
    sizes: dict[str, ClipSize]
    phases: tuple[Phase, ...]
    tokens_per_step: int
    learning_rate: float
    warmup_steps: int
    decay_start: float  # share of the time at which the learning rate begins to fall
    reuse: float  # draws of a pooled clip, on average, before a fresh one takes its place
    long_text_share: float  # of the steps after the first phase, at the pipeline's default text length
    text_steps: int  # of the text encoder's own training, before the denoiser's
    text_batch: int


@dataclass(frozen=True)
class Recipe:
    layers: tuple[int, ...]  # of the transformer, as the kit's ``build`` takes them
    vae: VaeRecipe
    denoiser: DenoiserRecipe
    check_every: int  # steps between looks at the clock
    log_every: int  # steps between losses written
    save_every: float  # seconds between checkpoints


FULL = Recipe(
    layers=(8,),
    vae=VaeRecipe(
        sizes=((64, 64, 9, 48), (128, 128, 9, 20), (128, 128, 17, 10), (192, 192, 9, 8)),
        first_share=0.35,
        learning_rate=2e-3,
        evaluation=(192, 256, 25, 4),
        evaluation_batches=8,
    ),
    denoiser=DenoiserRecipe(
        sizes={
            "small": ClipSize(128, 128, 9, feed=160, pool=80_000, initial=8_000, two_objects=0.55),
            "middle": ClipSize(160, 208, 17, feed=40, pool=24_000, initial=2_000, two_objects=0.65),
            "default": ClipSize(192, 256, 25, feed=16, pool=32_000, initial=2_000, two_objects=0.65),
            "portrait": ClipSize(256, 192, 25, feed=16, pool=8_000, initial=800, two_objects=0.65),
            "big": ClipSize(384, 512, 37, feed=3, pool=3_000, initial=300, two_objects=0.65),
        },
        phases=(
            Phase(0.00, {"small": 1.0}),
            Phase(0.22, {"small": 0.35, "middle": 0.40, "default": 0.25}),
            Phase(0.40, {"small": 0.10, "middle": 0.20, "default": 0.60, "portrait": 0.10}),
            Phase(0.70, {"small": 0.03, "middle": 0.07, "default": 0.55, "portrait": 0.07, "big": 0.28}),
        ),
        tokens_per_step=150_000,
        learning_rate=1.2e-3,
        warmup_steps=150,
        decay_start=0.5,
        reuse=6.0,
        long_text_share=0.1,
        text_steps=500,
        text_batch=256,
    ),
    check_every=20,
    log_every=100,
    save_every=120.0,
)

# Every stage at toy size, for a processor: nothing is learnt.
TINY = Recipe(
    layers=(2,),
    vae=VaeRecipe(
        sizes=((32, 32, 5, 2), (64, 48, 5, 1)),
        first_share=0.5,
        learning_rate=2e-3,
        evaluation=(64, 48, 5, 1),
        evaluation_batches=1,
    ),
    denoiser=DenoiserRecipe(
        sizes={
            "small": ClipSize(32, 48, 5, feed=4, pool=8, initial=4, two_objects=0.5),
            "default": ClipSize(64, 48, 5, feed=4, pool=8, initial=4, two_objects=0.5),
        },
        phases=(Phase(0.0, {"small": 1.0}), Phase(0.4, {"small": 0.5, "default": 0.5})),
        tokens_per_step=256,
        learning_rate=1e-3,
        warmup_steps=2,
        decay_start=0.5,
        reuse=2.0,
        long_text_share=0.5,
        text_steps=3,
        text_batch=8,
    ),
    check_every=1,
    log_every=2,
    save_every=1.0,
)
