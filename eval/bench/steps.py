"""One forward of a whole denoiser under each method, beside dense attention by exact kernels."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypedDict

import torch
from torch import Tensor

from dit_accel.eval.power import during, power_log
from dit_accel.eval.report.tables import MISSING, format_table
from dit_accel.eval.speed import Timing, measure, measure_in_turns


class Tally(Protocol):
    """What was counted of attention while forwards ran."""

    @property
    def attention_seconds(self) -> float: ...

    @property
    def density(self) -> float: ...


class Forwards(NamedTuple):
    """The last output of some forwards, and what their attention was."""

    output: Tensor
    tally: Tally


@dataclass(frozen=True)
class Candidate:
    """One way of attention in one denoiser.

    Args:
        name: as ``--method`` takes it.
        dense: whether it is a baseline.
        run: ``forwards`` forwards in a row, one step of denoising each.
        warm: the same through few of the blocks, for compilation, tuning and plans.
        forwards: more than one where steps differ: a full one and those that live on it.
        attention_only: whether all that it saves is products of queries, keys and values.
    """

    name: str
    dense: bool
    run: Callable[[], Forwards]
    warm: Callable[[], object]
    forwards: int = 1
    attention_only: bool = True


@dataclass(frozen=True)
class StepCase:
    """One denoiser at one size.

    Args:
        name: unique among those measured.
        model: name of its spec.
        batch, tokens, text_tokens, heads, head_dim, dtype: of its attention calls.
        blocks, model_blocks: attention layers that were made, and those of the model.
        model_bytes: of its weights.
        warm_share: share of the blocks that a warm-up runs.
        candidates: the first one is what outputs are compared with.
    """

    name: str
    model: str
    batch: int
    tokens: int
    text_tokens: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    blocks: int
    model_blocks: int
    model_bytes: int
    warm_share: float
    candidates: Sequence[Candidate]


@dataclass(frozen=True)
class Rounds:
    """How often a case is timed: as often as fits in the seconds, within bounds."""

    fewest: int
    most: int
    seconds: float

    def of(self, round_seconds: float) -> int:
        return max(self.fewest, min(self.most, int(self.seconds / round_seconds)))


class StepRow(TypedDict):
    """One candidate in one case; seconds are of one forward. A result that is not there is None."""

    case: str
    model: str
    operator: str
    dense: bool
    batch: int
    tokens: int
    text_tokens: int
    heads: int
    head_dim: int
    dtype: str
    blocks: int
    model_blocks: int
    forwards: int  # steps that seconds are the mean of
    refused: str | None  # why there is no speed
    density: float | None  # share of the query-key pairs that were computed, the mean over all layers
    rounds: int | None
    seconds: float | None  # median of the rounds
    seconds_iqr: float | None
    attention_seconds: float | None  # median of what went by in the attention calls
    rest_seconds: float | None
    speedup: float | None  # against the fastest dense candidate of the case
    best_dense: str | None
    bound: float | None  # of the speed-up at this density, if attention took no more than its share of pairs
    output_difference: float | None  # ||got - dense|| / ||dense|| with random weights: nothing about quality
    warmup_seconds: float | None
    working_bytes: int | None  # allocated during its forwards beyond what was there before, what steps keep included
    model_bytes: int
    clock_mhz: float | None
    power_w: float | None


def upper_bound(attention_share: float, density: float) -> float:
    """The speed-up if attention, that share of a dense step, took its density's share of the time and all else as long.

    1 / (1 - a + a d).
    """
    return 1.0 / (1.0 - attention_share + attention_share * density)


@torch.no_grad()
def bench_step(case: StepCase, device: torch.device, effort: Rounds) -> list[StepRow]:
    """The rows of one case, in the order of its candidates; one that fails or is not finite has no speed."""
    rows, warm = {candidate.name: _row(case, candidate) for candidate in case.candidates}, {}
    for candidate in case.candidates:
        try:
            warm[candidate.name] = measure(candidate.warm, warmup=1, runs=1, device=device)
        except Exception as error:  # a kernel may raise anything, and the others are still to be measured
            rows[candidate.name]["refused"] = _failure(error)
    able = {candidate.name: candidate for candidate in case.candidates if candidate.name in warm}
    if not able:
        return [*rows.values()]
    results: dict[str, list[_Result]] = {name: [] for name in able}
    spans: dict[str, list[tuple[float, float]]] = {name: [] for name in able}
    with power_log(device) as samples:
        times = measure_in_turns(
            {name: _watched(candidate, rows[name], results[name], device) for name, candidate in able.items()},
            rounds=effort.of(sum(timing.median for timing in warm.values()) / case.warm_share),
            warmup=0,
            device=device,
            on_turn=lambda name, begin, end: spans[name].append((begin, end)),
        )
    first = results.get(case.candidates[0].name)
    reference = first[-1].forwards.output if first else None
    for name, candidate in able.items():
        row = rows[name]
        if row["refused"] is None:
            _fill(row, candidate, times[name], results[name], reference)
            row["warmup_seconds"] = warm[name].warmup_seconds
            row["clock_mhz"], row["power_w"] = during(samples, spans[name]) or (None, None)
    _compare([*rows.values()], {name for name, candidate in able.items() if candidate.attention_only})
    return [*rows.values()]


class _Result(NamedTuple):
    forwards: Forwards
    working_bytes: int | None


def _failure(error: Exception) -> str:
    return f"it failed with {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _watched(candidate: Candidate, row: StepRow, results: list[_Result], device: torch.device) -> Callable[[], None]:
    """A run that notes its output and the memory it took, and does not wait for the device; none after a failure."""
    cuda = device.type == "cuda"

    def run() -> None:
        if row["refused"] is not None:
            return
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device) if cuda else 0
        try:
            forwards = candidate.run()
        except Exception as error:  # such as too little memory for all blocks; the others go on
            row["refused"] = _failure(error)
            return
        results.append(_Result(forwards, torch.cuda.max_memory_allocated(device) - before if cuda else None))

    return run


def _fill(
    row: StepRow, candidate: Candidate, timing: Timing, results: Sequence[_Result], reference: Tensor | None
) -> None:
    output = results[-1].forwards.output
    if not all(bool(result.forwards.output.isfinite().all()) for result in results):
        row["refused"] = "its output is not finite"
        return
    if reference is not None:
        row["output_difference"] = float((output.float() - reference.float()).norm() / reference.float().norm())
    tallies = [result.forwards.tally for result in results]
    seconds = timing.median / candidate.forwards
    attention = statistics.median(tally.attention_seconds for tally in tallies) / candidate.forwards
    row["seconds"], row["attention_seconds"], row["rest_seconds"] = seconds, attention, seconds - attention
    row["seconds_iqr"], row["rounds"] = timing.iqr / candidate.forwards, len(results)
    row["density"] = tallies[-1].density
    row["working_bytes"] = results[-1].working_bytes


def _compare(rows: Sequence[StepRow], bounded: set[str]) -> None:
    """Speed-ups against the fastest dense row, and for those of ``bounded`` what its share of attention allows."""
    dense = [row for row in rows if row["dense"] and row["seconds"] is not None]
    best = min(dense, key=_seconds, default=None)
    if best is None:
        return
    share = (best["attention_seconds"] or 0.0) / _seconds(best)
    for row in rows:
        if row["seconds"] is not None and row["density"] is not None:
            row["speedup"], row["best_dense"] = _seconds(best) / row["seconds"], best["operator"]
            row["bound"] = upper_bound(share, row["density"]) if row["operator"] in bounded else None


def _seconds(row: StepRow) -> float:
    assert row["seconds"] is not None, "asked of rows with a speed"
    return row["seconds"]


def _row(case: StepCase, candidate: Candidate) -> StepRow:
    return StepRow(
        case=case.name,
        model=case.model,
        operator=candidate.name,
        dense=candidate.dense,
        batch=case.batch,
        tokens=case.tokens,
        text_tokens=case.text_tokens,
        heads=case.heads,
        head_dim=case.head_dim,
        dtype=str(case.dtype).removeprefix("torch."),
        blocks=case.blocks,
        model_blocks=case.model_blocks,
        forwards=candidate.forwards,
        refused=None,
        density=None,
        rounds=None,
        seconds=None,
        seconds_iqr=None,
        attention_seconds=None,
        rest_seconds=None,
        speedup=None,
        best_dense=None,
        bound=None,
        output_difference=None,
        warmup_seconds=None,
        working_bytes=None,
        model_bytes=case.model_bytes,
        clock_mhz=None,
        power_w=None,
    )


def step_table(rows: Sequence[StepRow]) -> str:
    """The candidates of one case; those without a speed are listed below with the reason."""
    without = [f"  {row['operator']}: no speed, {row['refused']}" for row in rows if row["refused"] is not None]
    shown = [_cells(row) for row in rows if row["seconds"] is not None]
    return "\n".join([*([format_table(shown)] if shown else []), *without])


def _cells(row: StepRow) -> dict[str, str]:
    def text(value: float | None, style: str) -> str:
        return MISSING if value is None else f"{value:{style}}"

    seconds = _seconds(row)
    return {
        "attention": row["operator"],
        "ms": f"{seconds * 1e3:.1f}",
        "± %": f"{50 * (row['seconds_iqr'] or 0) / seconds:.1f}",
        "attention ms": f"{(row['attention_seconds'] or 0) * 1e3:.1f}",
        "rest ms": f"{(row['rest_seconds'] or 0) * 1e3:.1f}",
        "density": text(row["density"], ".3f"),
        "× dense": text(row["speedup"], ".2f"),
        "bound": text(row["bound"], ".2f"),
        "runs": text(row["rounds"], "d"),
        "GiB": text(None if row["working_bytes"] is None else row["working_bytes"] / 2**30, ".2f"),
        "MHz": text(row["clock_mhz"], ".0f"),
        "W": text(row["power_w"], ".0f"),
    }
