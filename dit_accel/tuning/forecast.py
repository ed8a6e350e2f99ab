"""What candidates would give at a size, from a short measurement and without a model."""

from __future__ import annotations

from collections.abc import Sequence

from dit_accel.eval.report.tables import MISSING, format_table
from dit_accel.tuning.candidates import Candidate, candidates_for
from dit_accel.tuning.runner import Facts
from dit_accel.tuning.search import CURVE, ROUNDS, Options, profiling_seconds
from dit_accel.tuning.times import LayerTimes, RunTimes, measure_layers

WORTH = 1.05  # of a run: what saves less is not worth its error


def forecast(facts: Facts, options: Options, linear_seconds: float, prompts: int, name: str) -> str:
    """A table of candidates taken by every layer at every step, a verdict, and how long the search would take.

    Args:
        facts: the model at its size.
        options: what would be searched.
        linear_seconds: of a run's products with weights.
        prompts: calibration prompts.
        name: of the model.
    """
    groups = options.step_groups(facts.steps)
    candidates = candidates_for(options.methods, facts)
    layers = measure_layers(facts, candidates)
    projections = facts.calls * facts.steps * sum(layer.projections for layer in layers)
    times = RunTimes(layers, facts.calls, max(0.0, linear_seconds - projections))
    seconds = (times.rest + times.table(candidates, groups).sum((0, 1))).tolist()
    rows = [
        _row(candidate, layers[0], facts, total, seconds[0])
        for candidate, total in zip(candidates, seconds, strict=True)
    ]
    runs = len(groups) + 1, prompts * (4 + CURVE + ROUNDS)
    search = profiling_seconds(layers, candidates, facts.calls, len(groups)) + sum(runs) * seconds[0]
    tokens, heads = layers[0].measured
    reduced = (tokens, heads) != (facts.layout.num_tokens, facts.heads)
    scaled = f"; measured on {tokens:,} tokens and {heads} of the heads, scaled up by the pairs" if reduced else ""
    return "\n".join(
        [
            f"{name}: {facts.layout.num_tokens:,} tokens, {facts.blocks} blocks of {facts.heads} heads, {facts.steps} "
            f"steps, {facts.dtype} on {facts.device}{scaled}.",
            f"\n{format_table(rows)}\n",
            _verdict(candidates, seconds),
            f"A search would take up to {_duration(search)}: {sum(runs)} runs of at most {_duration(seconds[0])} in "
            f"the denoising loop, text encoder and VAE not counted, and a profile of {len(candidates)} candidates.",
        ]
    )


def _row(candidate: Candidate, layer: LayerTimes, facts: Facts, seconds: float, dense: float) -> dict[str, str]:
    attends = candidate.cycle[0].method if len(candidate.cycle) == 1 else None
    bound = None if attends is None else attends.attention(facts.layout)
    call = None if attends is None else layer.methods[attends]
    return {
        "candidate": str(candidate),
        "density": MISSING if bound is None else f"{bound.density:.1%}",
        "call": MISSING if call is None else _duration(call),
        "× dense call": MISSING if call is None else f"{layer.dense / call:.2f}",
        "run": _duration(seconds),
        "speed-up": f"{dense / seconds:.2f}×",
    }


def _verdict(candidates: Sequence[Candidate], seconds: Sequence[float]) -> str:
    """When dense attention is better, in a sentence."""
    poor = sum(seconds[0] < WORTH * total for total in seconds[1:])
    if poor == len(candidates) - 1:
        return "Use dense attention: no candidate would save a twentieth of a run here."
    best = min(range(len(seconds)), key=seconds.__getitem__)
    fastest = f"{candidates[best]} would be the fastest, {seconds[0] / seconds[best]:.2f} times dense attention"
    if poor:
        return (
            f"{fastest}; dense attention is better than {poor} of the {len(seconds) - 1}, which save next to nothing."
        )
    return f"{fastest}; how far a budget allows it, the search measures."


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1e3 * seconds:.2f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
