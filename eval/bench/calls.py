"""Whole attention calls of methods, what they choose their keys by included, against dense attention."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from dit_accel.eval.bench.operators import Operator, every_pair
from dit_accel.eval.bench.run import Effort, working_bytes
from dit_accel.eval.report.tables import MISSING, format_table
from dit_accel.eval.speed import measure_in_turns
from dit_accel.kernels.block_sparse.inputs import Inputs

AttendTensors = Callable[[Tensor, Tensor, Tensor], Tensor]

# Of the output's norm: two backends sum in another order, and may choose otherwise where scores are equal but for that.
ALLOWED_EPS = 6.0


@dataclass(frozen=True)
class CallCase:
    """One method on one shape.

    Args:
        name: unique among the cases.
        operator: the method, as tables call it.
        group: cases of one group differ in tokens only and make one curve of the picture; "" for a case by itself.
        batch, tokens, heads, head_dim: of q, k and v.
        attend: the call, from q, k and v [B, L, H, D].
        check: the same by another backend, for its output to be held to; None where that would not fit in memory.
        density: share of all pairs that a call computes.
        training: forward and backward instead of forward.
        against_dense: whether dense attention is timed too.
    """

    name: str
    operator: str
    batch: int
    tokens: int
    heads: int
    head_dim: int
    attend: AttendTensors
    check: AttendTensors | None
    density: float
    group: str = ""
    training: bool = False
    against_dense: bool = True


class CallRow(TypedDict):
    """One operator on one case. A result that is not there is None."""

    case: str
    group: str
    operator: str
    dense: bool
    training: bool
    batch: int
    tokens: int
    heads: int
    head_dim: int
    dtype: str
    density: float  # share of all pairs that are computed
    refused: str | None  # why there is no speed
    error: float | None  # of the output against the other backend's, ||got - other|| / ||other||
    seconds: float | None  # median of the turns
    seconds_iqr: float | None
    graph_seconds: float | None  # the same of calls replayed from a CUDA graph, where the host launches nothing
    rounds: int | None
    warmup_seconds: float | None  # compilation in it
    speedup: float | None  # against the fastest dense operator of the case
    best_dense: str | None
    working_bytes: int | None  # allocated during a call, the output included


def bench_call(
    case: CallCase, dense: Iterable[Operator], device: torch.device, dtype: torch.dtype, effort: Effort
) -> list[CallRow]:
    """The method's row, and those of the dense operators that can run the shape."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (3, case.batch, case.tokens, case.heads, case.head_dim)
    q, k, v = torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype).unbind()
    leaves = tuple(x.clone().requires_grad_(case.training) for x in (q, k, v))
    inputs = Inputs(q, k, v, every_pair(case.tokens, device), case.head_dim**-0.5, gradients=case.training)
    able = [operator for operator in dense if case.against_dense and operator.needs(inputs) is None]
    rows, steps = [], {}
    for operator in (None, *able):
        row = _empty_row(case, operator, dtype)
        rows.append(row)
        attend = case.attend if operator is None else _dense(operator, inputs)
        try:
            if operator is None and case.check is not None:
                row["error"] = _error(case.attend(q, k, v), case.check(q, k, v))
            step = _step(attend, leaves, case.training)
            row["working_bytes"] = working_bytes(step)
        except Exception as error:  # a peer may raise anything, and the others are still to be measured
            row["refused"] = f"it failed with {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            continue
        if row["error"] is not None and not row["error"] <= ALLOWED_EPS * torch.finfo(dtype).eps:
            row["refused"] = f"its output is {row['error']:.1e} away from another backend's"
        else:
            steps[row["operator"]] = step
    if not case.training and case.operator in steps and (graph := graph_of(steps[case.operator], device)):
        steps[f"{case.operator}, graph"] = graph
    times = measure_in_turns(steps, rounds=effort.rounds, turn_seconds=effort.turn_seconds, device=device)
    best = min(
        ((times[operator.name].median, operator.name) for operator in able if operator.name in times), default=None
    )
    for row in rows:
        if row["operator"] in times:
            timing = times[row["operator"]]
            row["seconds"], row["seconds_iqr"], row["rounds"] = timing.median, timing.iqr, len(timing.runs)
            row["warmup_seconds"] = timing.warmup_seconds
            replayed = times.get(f"{row['operator']}, graph")
            row["graph_seconds"] = None if replayed is None else replayed.median
            if best is not None:
                row["speedup"], row["best_dense"] = best[0] / timing.median, best[1]
    return rows


def graph_of(step: Callable[[], object], device: torch.device) -> Callable[[], object] | None:
    """A call as a CUDA graph, for small ones are bound by the host that launches them; None where there can be none."""
    if device.type != "cuda":
        return None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream()):
        step()
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError:  # it waits for the device, which a graph cannot
        return None
    return graph.replay


def _dense(operator: Operator, inputs: Inputs) -> AttendTensors:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return operator.attend(replace(inputs, q=q, k=k, v=v))

    return attend


def _step(attend: AttendTensors, leaves: tuple[Tensor, ...], training: bool) -> Callable[[], object]:
    if not training:

        def forward() -> Tensor:
            with torch.no_grad():
                return attend(*leaves)

        return forward
    upstream = torch.randn_like(leaves[0])
    return lambda: torch.autograd.grad(attend(*leaves), leaves, upstream)


@torch.no_grad()
def _error(got: Tensor, other: Tensor) -> float:
    return float((got.float() - other.float()).norm() / other.float().norm())


def _empty_row(case: CallCase, dense: Operator | None, dtype: torch.dtype) -> CallRow:
    return CallRow(
        case=case.name,
        group=case.group,
        operator=case.operator if dense is None else dense.name,
        dense=dense is not None,
        training=case.training,
        batch=case.batch,
        tokens=case.tokens,
        heads=case.heads,
        head_dim=case.head_dim,
        dtype=str(dtype).removeprefix("torch."),
        density=case.density if dense is None else 1.0,
        refused=None,
        error=None,
        seconds=None,
        seconds_iqr=None,
        graph_seconds=None,
        rounds=None,
        warmup_seconds=None,
        speedup=None,
        best_dense=None,
        working_bytes=None,
    )


def call_table(rows: Sequence[CallRow]) -> str:
    """The operators of one case; those without a speed are listed below with the reason."""
    without = [f"  {row['operator']}: no speed, {row['refused']}" for row in rows if row["refused"] is not None]
    shown = [
        {
            "operator": row["operator"],
            "density": f"{row['density']:.4f}",
            "ms": f"{row['seconds'] * 1e3:.3f}",
            "graph ms": MISSING if row["graph_seconds"] is None else f"{row['graph_seconds'] * 1e3:.3f}",
            "± %": f"{50 * (row['seconds_iqr'] or 0) / row['seconds']:.1f}",
            "× dense": MISSING if row["speedup"] is None else f"{row['speedup']:.2f}",
            "GiB": MISSING if row["working_bytes"] is None else f"{row['working_bytes'] / 2**30:.2f}",
        }
        for row in rows
        if row["seconds"] is not None
    ]
    return "\n".join([*([format_table(shown)] if shown else []), *without])


def plot_growth(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Seconds against tokens on logarithmic axes, with what growth by N and by N log N up to the last point would be.

    Raises:
        ValueError: when no group has two sizes with a speed, or matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the picture needs the package matplotlib; pip install 'dit-accel[eval]'.")
    from matplotlib.figure import Figure

    timed = [row for row in rows if row["group"] and row["seconds"] is not None]
    groups = list(dict.fromkeys(row["group"] for row in timed))
    if len({row["tokens"] for row in timed}) < 2:
        raise ValueError("the records hold no group of two sizes; run `dit-accel bench methods` first.")
    figure = Figure(figsize=(6.5 * len(groups), 4.5), layout="constrained")
    for number, group in enumerate(groups):
        panel = figure.add_subplot(1, len(groups), number + 1)
        own = [row for row in timed if row["group"] == group]
        for operator in dict.fromkeys(row["operator"] for row in own):
            points = sorted((row["tokens"], _device_ms(row)) for row in own if row["operator"] == operator)
            panel.plot(*zip(*points, strict=True), marker="o", label=operator)
            if not next(row["dense"] for row in own if row["operator"] == operator):
                _guides(panel, points)
        panel.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms", title=group)
        panel.legend(fontsize=7)
    figure.suptitle(timed[0]["machine"].get("gpu", timed[0]["machine"]["cpu"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _device_ms(row: Mapping[str, Any]) -> float:
    """Without what the host takes to launch, where that was measured."""
    return 1e3 * float(row["graph_seconds"] or row["seconds"])


def _guides(panel: Any, points: Sequence[tuple[int, float]]) -> None:
    """N and N log N through the last point."""
    last, seconds = points[-1]
    tokens = [count for count, _ in points]
    panel.plot(tokens, [seconds * count / last for count in tokens], color="0.6", linestyle=":", label="N")
    scaled = [seconds * count * math.log(count) / (last * math.log(last)) for count in tokens]
    panel.plot(tokens, scaled, color="0.6", linestyle="--", label="N log N")
