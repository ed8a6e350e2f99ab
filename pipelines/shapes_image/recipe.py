"""The numbers of the training of images: sizes, rates, and how wall-clock time is shared among them."""

from __future__ import annotations

from dit_accel.pipelines.shapes.recipe import ClipSize, DenoiserRecipe, Phase, Recipe, VaeRecipe

FULL = Recipe(
    layers=(2, 5),
    vae=VaeRecipe(
        sizes=((128, 128, 1, 64), (256, 256, 1, 24), (128, 128, 1, 64), (512, 512, 1, 6), (192, 320, 1, 24)),
        first_share=0.3,
        learning_rate=2e-3,
        evaluation=(512, 512, 1, 16),
        evaluation_batches=4,
    ),
    denoiser=DenoiserRecipe(
        sizes={
            "small": ClipSize(128, 128, 1, feed=512, pool=200_000, initial=12_000, two_objects=0.6),
            "middle": ClipSize(256, 256, 1, feed=128, pool=80_000, initial=4_000, two_objects=0.65),
            "default": ClipSize(512, 512, 1, feed=32, pool=24_000, initial=1_000, two_objects=0.65),
            "wide": ClipSize(384, 512, 1, feed=32, pool=8_000, initial=400, two_objects=0.65),
            "tall": ClipSize(512, 384, 1, feed=32, pool=8_000, initial=400, two_objects=0.65),
            "big": ClipSize(1024, 1024, 1, feed=8, pool=2_000, initial=120, two_objects=0.65),
        },
        phases=(
            Phase(0.00, {"small": 1.0}),
            Phase(0.36, {"small": 0.15, "middle": 0.5, "default": 0.35}),
            Phase(0.50, {"middle": 0.3, "default": 0.62, "wide": 0.04, "tall": 0.04}),
            Phase(0.70, {"middle": 0.12, "default": 0.58, "wide": 0.03, "tall": 0.03, "big": 0.24}),
        ),
        tokens_per_step=98_304,
        learning_rate=1.5e-3,
        warmup_steps=150,
        decay_start=0.5,
        reuse=6.0,
        long_text_share=0.06,
        text_steps=500,
        text_batch=256,
    ),
    check_every=20,
    log_every=100,
    save_every=60.0,
)

# Every stage at toy size, for a processor: nothing is learnt.
TINY = Recipe(
    layers=(1, 1),
    vae=VaeRecipe(
        sizes=((32, 32, 1, 2), (64, 48, 1, 1)),
        first_share=0.5,
        learning_rate=2e-3,
        evaluation=(64, 48, 1, 1),
        evaluation_batches=1,
    ),
    denoiser=DenoiserRecipe(
        sizes={
            "small": ClipSize(32, 48, 1, feed=4, pool=8, initial=4, two_objects=0.5),
            "default": ClipSize(64, 48, 1, feed=4, pool=8, initial=4, two_objects=0.5),
        },
        phases=(Phase(0.0, {"small": 1.0}), Phase(0.4, {"small": 0.5, "default": 0.5})),
        tokens_per_step=128,
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
