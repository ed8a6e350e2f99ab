"""What a method would do to a model at a size: tokens, tiles, densities, and the speed-up to expect on this machine."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from dit_accel.eval.rates import Attention, Rates, rates
from dit_accel.kernels import block_sparse_attention
from dit_accel.kernels.block_sparse.plan import Triple
from dit_accel.layout import TokenLayout
from dit_accel.methods.attention import AttnCall
from dit_accel.methods.band import BandAttnProcessor
from dit_accel.methods.base import AttnMethod, StaticMethod
from dit_accel.methods.dit_fast_attn import DiTFastAttnProcessor
from dit_accel.pipelines.costs import Work, course_work, full_work, is_guided
from dit_accel.pipelines.specs import ModelSpec, spec_of
from dit_accel.plan import plan_from_tile_mask
from dit_accel.tuned_plan import Applicable, method_for

PROBE_DENSITY = 0.3


@dataclass(frozen=True)
class Explanation:
    """Figures of one method on one model and size.

    Args:
        model, method, options: what was asked.
        tokens: length of the self- or joint-attention sequence, text included.
        grid: latent grid after patchify, (frames, rows, columns).
        text_tokens: text tokens among ``tokens``.
        tile: tokens of one tile per axis; a raster tile is (1, 1, tokens). None where attention is dense.
        executed_density: share of the query-key pairs that a sparse call computes, whole tiles counted, text included;
            of a plan the mean over a run.
        ideal_density: the same for the exact rule, before it is rounded to tiles.
        run_density: over a whole run, with its dense steps and blocks.
        dense_flops, sparse_flops: of the attention of one forward at batch 1.
        model_flops: of the rest of that forward.
        predicted_speedup: of the denoising loop on ``device``, from rates measured there just now.
        device: where.
        advice: one sentence.
    """

    model: str
    method: str
    options: dict[str, Any]
    tokens: int
    grid: Triple
    text_tokens: int
    tile: Triple | None
    executed_density: float
    ideal_density: float
    run_density: float
    dense_flops: float
    sparse_flops: float
    model_flops: float
    predicted_speedup: float
    device: str
    advice: str

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        options = "".join(f", {name}={value}" for name, value in self.options.items())
        rows = {
            "model": self.model,
            "method": self.method + options,
            "tokens": f"{self.tokens:,}" + (f", {self.text_tokens} of them text" if self.text_tokens else ""),
            "grid": " x ".join(map(str, self.grid)),
            "tile": "none" if self.tile is None else " x ".join(map(str, self.tile)),
            "executed density": f"{self.executed_density:.4f}",
            "ideal density": f"{self.ideal_density:.4f}",
            "whole-run density": f"{self.run_density:.4f}",
            "attention per forward": f"{self.sparse_flops / 1e12:.3g} of {self.dense_flops / 1e12:.3g} TFLOP",
            "rest per forward": f"{self.model_flops / 1e12:.3g} TFLOP",
            "predicted speed-up": f"{self.predicted_speedup:.2f}x of the denoising loop on {self.device}",
        }
        return "\n".join([*(f"{name:22}{value}" for name, value in rows.items()), self.advice])


def explain(
    pipe: Any,
    method: Applicable,
    *,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    steps: int | None = None,
    **options: Any,
) -> Explanation:
    """What ``method`` would do to a pipeline, which is not run or changed.

    Args:
        pipe: a diffusers pipeline with a supported denoiser.
        method: a method's name, with ``options``, a processor object, or a tuned plan or its place.
        height, width: pixels; default the model's.
        num_frames: frames of a video; default the model's.
        steps: denoising steps; default the model's.

    Raises:
        ValueError: a size the model cannot make, an unknown method or option, or a method that cannot serve the size.
    """
    return explain_spec(
        spec_of(pipe),
        method_for(pipe, method, **options),
        height=height,
        width=width,
        num_frames=num_frames,
        steps=steps,
        device=str(pipe.device),
    )


def explain_spec(
    spec: ModelSpec,
    method: AttnMethod,
    *,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    steps: int | None = None,
    device: str = "cpu",
    measured: Rates | None = None,
) -> Explanation:
    """``explain`` for a model known by its shape alone; ``measured`` are the rates to predict by, if taken before."""
    steps = spec.steps if steps is None else steps
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}.")
    layout = spec.layout(height, width, num_frames)
    dense_below = layout.num_tokens < method.min_tokens
    bound = method.attention(layout)
    whole, rest = full_work(spec, layout), spec.linear_flops(layout)
    if bound is not None and isinstance(method, DiTFastAttnProcessor):
        course, guided = method.course(steps, spec.num_blocks), is_guided(spec)
        left = course_work(course, spec, layout, guided=guided, counted="tiles")
        exact = course_work(course, spec, layout, guided=guided, counted="rule")
        executed, ideal = ((work.dense + work.sparse) / whole.dense for work in (left, exact))
    else:
        executed = 1.0 if bound is None else bound.density
        ideal = 1.0 if bound is None else layout.joint_density(method.ideal_density(layout))
        share = method.sparse_share(num_blocks=spec.num_blocks, num_steps=steps) if bound else 0.0
        left = Work(whole.projections, whole.dense * (1 - share), whole.dense * executed * share)
    measured = measured or measure_rates(method, spec.head_dim, device)
    before = measured.seconds(matmul=rest, dense=whole.dense)
    spared = whole.projections - left.projections
    after = measured.seconds(matmul=rest - spared, dense=left.dense, sparse=left.sparse)
    return Explanation(
        model=spec.name,
        method=method.name,
        options=method.options(),
        tokens=layout.num_tokens,
        grid=layout.grid,
        text_tokens=layout.text_tokens,
        tile=None if bound is None else bound.tile,
        executed_density=executed,
        ideal_density=ideal,
        run_density=(left.dense + left.sparse) / whole.dense,
        dense_flops=whole.dense,
        sparse_flops=spec.attention_flops(layout, executed),
        model_flops=rest,
        predicted_speedup=before / after,
        device=device,
        advice=_advice(before / after, whole.dense / measured.dense / before, method, dense_below),
    )


def _advice(speedup: float, attention_share: float, method: AttnMethod, dense_below: bool) -> str:
    if dense_below:
        return f"Dense: the sequence is shorter than min_tokens={method.min_tokens}."
    if method.name == "dense":
        return f"Attention takes {attention_share:.0%} of the time here; no sparse method can save more."
    if speedup < 1.05:
        return (
            f"Use dense attention: it takes {attention_share:.0%} of the time at this size, and {method.name} "
            "would save next to nothing."
        )
    return f"Attention takes {attention_share:.0%} of the dense time here; {method.name} pays off."


def measure_rates(method: AttnMethod, head_dim: int, device: str) -> Rates:
    """This machine's rates: of a method that chooses its keys, the choice included, or of the operator.

    A plan stands for the first method that it names. All static methods have the same.
    """
    if isinstance(method, DiTFastAttnProcessor):
        method = next(iter(method.methods()), BandAttnProcessor())
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    return rates(device, dtype, head_dim, lambda tokens: _probe_call(method, tokens, device))


def _probe_call(method: AttnMethod, tokens: int, device: str) -> tuple[Attention, float]:
    """A call on so many tokens, and the share of pairs that it computes; for static methods one typical of them all."""
    if not isinstance(method, StaticMethod):
        layout = TokenLayout((1, math.isqrt(tokens), tokens // math.isqrt(tokens)))
        bound = dataclasses.replace(method, min_tokens=0).attention(layout, device)
        assert bound is not None, "it chooses on every layout"
        return lambda q, k, v: bound.attend(AttnCall(q, k, v)).out, bound.density
    layout = TokenLayout((1, 1, tokens))
    tiles = layout.raster(128)
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(tiles.num_tiles, tiles.num_tiles, generator=generator) < PROBE_DENSITY
    plan = plan_from_tile_mask(layout, tiles, keep).to(device)
    return lambda q, k, v: block_sparse_attention(q, k, v, plan), plan.density
