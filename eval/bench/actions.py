"""One attention module under the actions of a plan, each against the module as diffusers has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from dit_accel.eval.bench.calls import ALLOWED_EPS, graph_of
from dit_accel.eval.bench.run import Effort, working_bytes
from dit_accel.eval.report.tables import MISSING, format_table
from dit_accel.eval.speed import Timing, measure_in_turns

Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Published:
    """Per cent of full attention's operations and seconds that an action keeps (arXiv 2406.08552, table 2)."""

    flops: int
    seconds: int


@dataclass(frozen=True)
class ActionCase:
    """One action at one size.

    Args:
        name: of the action.
        step: the module at a step that takes the action, output [B, N, C].
        rule_share, tile_share: of full attention's operations, by the exact rule and by the tiles computed.
        kept_bytes: what the module holds from step to step.
        published: of a table, if the case is in it.
    """

    name: str
    step: Step
    rule_share: float
    tile_share: float
    kept_bytes: int
    published: Published | None = None


class ActionRow(TypedDict):
    """One action of one module. A result that is not there is None."""

    case: str
    action: str
    batch: int
    tokens: int
    heads: int
    head_dim: int
    dtype: str
    refused: str | None  # why there is no speed
    error: float | None  # of the conditional half's output against the stock module's, ||got - stock|| / ||stock||
    seconds: float | None  # median of the turns
    seconds_iqr: float | None
    graph_seconds: float | None  # the same replayed from a CUDA graph, where the host launches nothing
    rounds: int | None
    share: float | None  # of the stock module's seconds
    graph_share: float | None  # the same of graphs
    rule_share: float | None  # of its operations, pairs of the exact rule; None for the stock module
    tile_share: float | None  # of its operations, pairs in the tiles computed
    published_flops: int | None  # per cent of operations, and of seconds, in the table of the paper
    published_seconds: int | None
    kept_bytes: int | None
    working_bytes: int | None  # allocated during a call, the output included


STOCK = "stock"


@dataclass(frozen=True)
class Module:
    """An attention module of one size.

    Args:
        name: unique among those measured.
        batch, tokens, heads, head_dim: of its calls.
        dtype: likewise.
        conditional: items of the batch that are guidance's conditional half.
        stock: the module as diffusers has it.
        cases: the actions.
    """

    name: str
    batch: int
    tokens: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    conditional: slice
    stock: Step
    cases: Sequence[ActionCase]


@torch.no_grad()
def bench_actions(module: Module, device: torch.device, effort: Effort) -> list[ActionRow]:
    """The stock module's row, then one for each action; an action whose output is wrong has no speed.

    All calls get the same input, so what an action takes from an earlier step is what it would compute itself.
    """
    want = module.stock()[module.conditional].float()
    rows, steps = [_row(module, None)], {STOCK: module.stock}
    for case in module.cases:
        row = _row(module, case)
        rows.append(row)
        try:
            error = row["error"] = float((case.step()[module.conditional].float() - want).norm() / want.norm())
        except RuntimeError as problem:  # of one action, out of memory or of a kernel; the others are still measured
            row["refused"] = f"it failed with {str(problem).strip().partition(chr(10))[0]}"
            continue
        if not error <= ALLOWED_EPS * torch.finfo(module.dtype).eps:
            row["refused"] = f"its output is {error:.1e} away from the stock module's"
            continue
        steps[case.name] = case.step
    allocated = {name: working_bytes(step) for name, step in steps.items()}
    graphs = {f"{name}, graph": graph for name, step in steps.items() if (graph := graph_of(step, device))}
    times = measure_in_turns(steps | graphs, rounds=effort.rounds, turn_seconds=effort.turn_seconds, device=device)
    for row in rows:
        if row["action"] in times:
            _fill(row, times, allocated)
    return rows


def _row(module: Module, case: ActionCase | None) -> ActionRow:
    published = None if case is None else case.published
    return ActionRow(
        case=module.name,
        action=STOCK if case is None else case.name,
        batch=module.batch,
        tokens=module.tokens,
        heads=module.heads,
        head_dim=module.head_dim,
        dtype=str(module.dtype).removeprefix("torch."),
        refused=None,
        error=None,
        seconds=None,
        seconds_iqr=None,
        graph_seconds=None,
        rounds=None,
        share=None,
        graph_share=None,
        rule_share=None if case is None else case.rule_share,
        tile_share=None if case is None else case.tile_share,
        published_flops=None if published is None else published.flops,
        published_seconds=None if published is None else published.seconds,
        kept_bytes=None if case is None else case.kept_bytes,
        working_bytes=None,
    )


def _fill(row: ActionRow, times: Mapping[str, Timing], allocated: Mapping[str, int | None]) -> None:
    timing, replayed, stock = times[row["action"]], times.get(f"{row['action']}, graph"), times.get(f"{STOCK}, graph")
    row["seconds"], row["seconds_iqr"], row["rounds"] = timing.median, timing.iqr, len(timing.runs)
    row["share"] = timing.median / times[STOCK].median
    row["working_bytes"] = allocated[row["action"]]
    if replayed is not None and stock is not None:
        row["graph_seconds"], row["graph_share"] = replayed.median, replayed.median / stock.median


def action_table(rows: Sequence[ActionRow]) -> str:
    """The actions of one module, in per cent of the stock module; those without a speed are listed below."""

    def percent(share: float | None) -> str:
        return MISSING if share is None else f"{share:.1%}"

    def published(value: int | None) -> str:
        return MISSING if value is None else f"{value}%"

    without = [f"  {row['action']}: no speed, {row['refused']}" for row in rows if row["refused"] is not None]
    shown = [
        {
            "action": row["action"],
            "ms": f"{row['seconds'] * 1e3:.3f}",
            "± %": f"{50 * (row['seconds_iqr'] or 0) / row['seconds']:.1f}",
            "time": percent(row["share"]),
            "graph ms": MISSING if row["graph_seconds"] is None else f"{row['graph_seconds'] * 1e3:.3f}",
            "graph time": percent(row["graph_share"]),
            "paper's time": published(row["published_seconds"]),
            "operations": percent(row["rule_share"]),
            "in tiles": percent(row["tile_share"]),
            "paper's": published(row["published_flops"]),
            "kept MiB": MISSING if row["kept_bytes"] is None else f"{row['kept_bytes'] / 2**20:.1f}",
        }
        for row in rows
        if row["seconds"] is not None
    ]
    return "\n".join([format_table(shown), *without])
