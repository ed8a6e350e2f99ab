"""One case: every operator checked, then those that are right timed in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, TypedDict

import torch

from dit_accel.eval.bench.cases import Case
from dit_accel.eval.bench.operators import Operator
from dit_accel.eval.power import during, power_log
from dit_accel.eval.rates import attention_flops
from dit_accel.eval.row_check import Outcome, RowReference, judge_gradients, poison, row_reference, sample_rows
from dit_accel.eval.speed import Timing, measure_in_turns
from dit_accel.kernels.block_sparse.inputs import Inputs

Counted = Literal["every pair", "listed tiles", "exact rule"]

TRAINING_FACTOR = 3.5  # forward has two products, backward five


@dataclass(frozen=True)
class Effort:
    """How long a case is measured.

    Args:
        rounds: turns of each operator.
        turn_seconds: how long a turn lasts at least.
    """

    rounds: int
    turn_seconds: float


class Row(TypedDict):
    """One operator on one case. A result that is not there is None."""

    case: str
    group: str
    operator: str
    dense: bool
    training: bool
    tokens: int
    text_tokens: int
    heads: int
    head_dim: int
    dtype: str
    tile: list[int]
    counted: Counted  # which pairs are useful
    density: float  # share of useful pairs, of all
    listed_density: float  # share of pairs in the plan's listed tiles
    refused: str | None  # why there is no speed
    error: float | None  # against float64, ||got - exact|| / ||exact||
    dense_error: float | None  # the same of torch's dense attention
    seconds: float | None  # median of the turns
    seconds_iqr: float | None
    rounds: int | None
    warmup_seconds: float | None  # compilation and tuning in it
    tflops: float | None  # useful operations per second, 1e12
    speedup: float | None  # against the fastest dense operator of the case
    best_dense: str | None
    working_bytes: int | None  # allocated during a call, the output included
    clock_mhz: float | None
    power_w: float | None


def bench_case(
    case: Case, operators: Iterable[Operator], device: torch.device, dtype: torch.dtype, effort: Effort
) -> list[Row]:
    """The rows of one case, in the order of ``operators``. An operator that is wrong has no speed."""
    inputs = _inputs(case, device, dtype)
    with torch.set_grad_enabled(case.training):
        rows, calls = _check(case, operators, inputs)
        spans: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
        with power_log(device) as samples:
            times = measure_in_turns(
                calls,
                rounds=effort.rounds,
                turn_seconds=effort.turn_seconds,
                device=device,
                on_turn=lambda name, begin, end: spans[name].append((begin, end)),
            )
    flops = attention_flops(inputs.q.shape[1], case.heads, case.head_dim) * (TRAINING_FACTOR if case.training else 1)
    dense = [
        (times[row["operator"]].median, row["operator"]) for row in rows if row["dense"] and row["refused"] is None
    ]
    for row in rows:
        if row["refused"] is None:
            _fill(row, times[row["operator"]], flops, min(dense, default=None))
            row["clock_mhz"], row["power_w"] = during(samples, spans[row["operator"]]) or (None, None)
    return rows


def _inputs(case: Case, device: torch.device, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    shape = (3, 1, case.layout.num_tokens, case.heads, case.head_dim)
    q, k, v = torch.randn(shape, generator=generator, device=device).to(dtype).unbind()
    if case.training:
        q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    return Inputs(q, k, v, case.make_plan(device), case.head_dim**-0.5, gradients=case.training)


def _check(
    case: Case, operators: Iterable[Operator], inputs: Inputs
) -> tuple[list[Row], dict[str, Callable[[], object]]]:
    """A row for each operator, and the calls of those that may be timed."""
    sampled = sample_rows(inputs.q.shape[1], inputs.plan, torch.Generator().manual_seed(0)).to(inputs.q.device)
    references: dict[bool, RowReference] = {}
    rows, calls = [], {}
    for operator in operators:
        row = _empty_row(case, operator, inputs)
        rows.append(row)
        call = operator.inputs(inputs)
        row["refused"] = _needs(operator, inputs)
        if row["refused"] is not None:
            continue
        try:
            if case.training:
                outcome = judge_gradients(operator.attend, call, sampled)
            else:
                if operator.dense not in references:
                    references[operator.dense] = row_reference(call, sampled)
                outcome = _judge(operator, call, references[operator.dense])
            row["working_bytes"] = working_bytes(step := _step(operator, call))
        except Exception as error:  # a peer may raise anything, and the others are still to be measured
            row["refused"] = f"it failed with {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            continue
        row["error"], row["dense_error"] = outcome.error, outcome.dense_error
        if outcome.passed:
            calls[operator.name] = step
        else:
            row["refused"] = f"its error is {outcome.error:.1e}, torch's dense attention has {outcome.dense_error:.1e}"
    return rows, calls


def _needs(operator: Operator, inputs: Inputs) -> str | None:
    clause = operator.needs(inputs)
    return clause and f"it needs {clause}"


def _judge(operator: Operator, call: Inputs, reference: RowReference) -> Outcome:
    poison(call.q)
    out = operator.attend(call)
    return reference.judge(out, reference.dense_error(operator.measuring_stick(call)))


def _step(operator: Operator, call: Inputs) -> Callable[[], object]:
    """What is timed: the call, and for training its gradients too."""
    if not call.q.requires_grad:
        return lambda: operator.attend(call)
    upstream = torch.randn_like(call.q)
    leaves = (call.q, call.k, call.v)
    return lambda: torch.autograd.grad(operator.attend(call), leaves, upstream)


def working_bytes(step: Callable[[], object]) -> int | None:
    """Most bytes allocated during a call beyond those before it; the check's call has filled the caches."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def _useful(case: Case, operator: Operator, inputs: Inputs) -> tuple[Counted, float]:
    """Which pairs are useful, and their share; where no window cuts tiles, all of their pairs are asked for."""
    if operator.dense:
        return "every pair", 1.0
    if inputs.plan.window is None or case.density is None:
        return "listed tiles", inputs.plan.density
    return "exact rule", case.density


def _empty_row(case: Case, operator: Operator, inputs: Inputs) -> Row:
    counted, density = _useful(case, operator, inputs)
    return Row(
        case=case.name,
        group=case.group,
        operator=operator.name,
        dense=operator.dense,
        training=case.training,
        tokens=case.layout.num_tokens,
        text_tokens=case.layout.text_tokens,
        heads=case.heads,
        head_dim=case.head_dim,
        dtype=str(inputs.q.dtype).removeprefix("torch."),
        tile=list(inputs.plan.tiles.tile),
        counted=counted,
        density=density,
        listed_density=inputs.plan.density,
        refused=None,
        error=None,
        dense_error=None,
        seconds=None,
        seconds_iqr=None,
        rounds=None,
        warmup_seconds=None,
        tflops=None,
        speedup=None,
        best_dense=None,
        working_bytes=None,
        clock_mhz=None,
        power_w=None,
    )


def _fill(row: Row, timing: Timing, flops: float, best_dense: tuple[float, str] | None) -> None:
    row["seconds"], row["seconds_iqr"], row["rounds"] = timing.median, timing.iqr, len(timing.runs)
    row["warmup_seconds"] = timing.warmup_seconds
    row["tflops"] = flops * row["density"] / timing.median / 1e12
    if best_dense is not None:
        seconds, row["best_dense"] = best_dense
        row["speedup"] = seconds / timing.median
