"""What every candidate would do wrong in every layer, measured beside one dense run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse.backends import Backend
from dit_accel.kernels.block_sparse.plan import Triple
from dit_accel.layout import TokenLayout
from dit_accel.methods.actions import Action
from dit_accel.methods.attention import AttnCall, AttnResult, BoundAttention, Place, QueryGroups, torch_dense
from dit_accel.methods.base import AttnMethod
from dit_accel.methods.correction import dense_anchors, discarded_mass
from dit_accel.tuning.candidates import Candidate
from dit_accel.tuning.runner import Facts, Runner, Sample

QUERIES = 512  # of the grid, drawn once, that outputs are compared at
# Keys of what a layer keeps from one sampled step to the next: the rows of its heads.
_OUT, _RESIDUAL = "profiled output", "profiled residual"


@dataclass(frozen=True, eq=False)
class Profile:
    """Local errors of candidates.

    Args:
        error: squared error of a head's output as a share of its layer's squared dense output, the mean over the steps
            of a group, guidance branches and prompts; float64 [groups, blocks, heads, candidates]. Over heads it sums
            up to the relative squared error of the layer.
        mass: share of the softmax that the keys of a candidate hold, the mean likewise; NaN for one that reuses or
            shares. Same shape.
    """

    error: Tensor
    mass: Tensor


def profile(
    runner: Runner, candidates: Sequence[Candidate], groups: Sequence[range], prompts: int = 1
) -> tuple[Profile, list[Sample]]:
    """Runs the first prompts densely, with every candidate beside it at a few steps in the middle of each group.

    Nothing is read from the device before the end.
    """
    tables = _Tables(candidates, groups, runner.facts)
    method = ProfilingMethod(tables=tables)
    samples = [runner.generate(number, method) for number in range(prompts)]
    return tables.read(), samples


def onlooker(facts: Facts) -> ProfilingMethod:
    """Dense attention that computes nothing beside it; ``tables.dense`` is then the pipeline's own attention."""
    return ProfilingMethod(tables=_Tables((), (), facts))


class _Tables:
    """Sums over the calls of a run, on the device.

    A candidate is followed through one turn of its cycle. The steps of a turn count as often as the group has steps
    like them.
    """

    def __init__(self, candidates: Sequence[Candidate], groups: Sequence[range], facts: Facts) -> None:
        self.candidates, self._facts = candidates, facts
        shape = (len(groups), facts.blocks, facts.heads, len(candidates))
        self.error, self.mass = (torch.zeros(shape, device=facts.device) for _ in range(2))
        self.calls = torch.zeros(shape[:2], dtype=torch.int64)
        self.phases: dict[int, tuple[int, int]] = {}  # step -> its group, and how far it is in the turn
        self.dense: Callable[[AttnCall], Tensor] = torch_dense  # the pipeline's own, once a call has come
        self._lengths = [len(steps) for steps in groups]
        turn = max((len(candidate.cycle) for candidate in candidates), default=1)
        for number, steps in enumerate(groups):
            sampled = min(turn, len(steps))
            first = steps.start + (len(steps) - sampled) // 2
            self.phases |= {first + phase: (number, phase) for phase in range(sampled)}

    def share(self, candidate: Candidate, group: int, phase: int) -> float:
        """Share of a group's steps at which a candidate is so far in its turn."""
        length, turn = self._lengths[group], len(candidate.cycle)
        return len(range(phase, length, turn)) / length

    def read(self) -> Profile:
        """The means; waits for the device."""
        calls = self.calls[..., None, None].clamp(min=1)
        mass = self.mass.double().cpu() / calls
        for index, candidate in enumerate(self.candidates):
            if any(action.reuse or action.share for action in candidate.cycle):
                mass[..., index] = torch.nan
        return Profile(self.error.double().cpu() / calls, mass)


@dataclass(frozen=True, kw_only=True, eq=False)
class ProfilingMethod(AttnMethod):
    """Dense attention that computes candidates beside it."""

    name: ClassVar[str] = "profile"

    tables: _Tables = field(repr=False)

    def bind(self, layout: TokenLayout, device: torch.device) -> BoundAttention:
        return _ProfilingAttention(layout, device, self.tables)

    def ideal_density(self, layout: TokenLayout) -> float:
        return 1.0

    def options(self) -> dict[str, Any]:
        return {}


class _ProfilingAttention(BoundAttention):
    splits_guidance = True

    def __init__(self, layout: TokenLayout, device: torch.device, tables: _Tables) -> None:
        self.layout, self.density, self._tables = layout, 1.0, tables
        self.tile: Triple = (1, 1, 1)
        methods = dict.fromkeys(method for candidate in tables.candidates for method in candidate.methods)
        self._bound = {method: method.attention(layout, device) for method in methods}
        drawn = torch.randperm(layout.visual_tokens, generator=torch.Generator().manual_seed(0))[:QUERIES]
        self._queries = QueryGroups(drawn.sort().values.to(device), drawn[:0].to(device))

    def attend(self, call: AttnCall) -> AttnResult:
        self._tables.dense = call.dense
        out = call.dense(call)
        if call.place.step in self._tables.phases:
            with torch.no_grad():
                _Sampling(self._tables, self._bound, self._queries, call, out, self.layout).add()
        return AttnResult(out, None, 1.0)

    def groups(self) -> QueryGroups:
        raise ValueError("a profile has no query groups of its own; measure the methods it compares by themselves.")

    def check(self, q: Tensor, backend: Backend) -> None:
        for bound in self._bound.values():
            if bound is not None:
                bound.check(q, backend)


class _Sampling:
    """One sampled call: the rows of every candidate, compared with the dense ones."""

    def __init__(
        self,
        tables: _Tables,
        bound: dict[AttnMethod, BoundAttention | None],
        queries: QueryGroups,
        call: AttnCall,
        out: Tensor,
        layout: TokenLayout,
    ) -> None:
        self._tables, self._bound, self._call = tables, bound, call
        self._group, self._phase = tables.phases[call.place.step]
        self._anchors = dense_anchors(call, layout, queries)
        self._dense = out[:, self._anchors.positions]
        self._sparse: dict[AttnMethod, tuple[Tensor, Tensor | float]] = {}

    def add(self) -> None:
        """Add the call to the tables."""
        tables, place = self._tables, self._call.place
        energy = self._dense.float().square().sum().clamp(min=torch.finfo(torch.float32).tiny)
        for index, candidate in enumerate(tables.candidates):
            if self._phase >= len(candidate.cycle):
                continue
            action = candidate.at(self._phase)
            rows, mass = self._answer(index, action)
            share = tables.share(candidate, self._group, self._phase)
            cell = (self._group, place.block, slice(None), index)
            tables.error[cell] += share * (rows.float() - self._dense.float()).square().sum((0, 1, 3)) / energy
            tables.mass[cell] += share * mass
            self._keep(index, candidate, action, rows)
        if self._phase == 0:
            tables.calls[self._group, place.block] += 1

    def _answer(self, index: int, action: Action) -> tuple[Tensor, Tensor | float]:
        """Rows of a candidate [B, queries, H, D], and the softmax share of their keys per head."""
        memory = self._call.place.memory
        if action.reuse:
            return memory[_OUT, index], 1.0
        rows, mass = (self._dense, 1.0) if action.method is None else self._of_method(action.method)
        if action.residual:
            rows = rows + memory[_RESIDUAL, action.method]
        return (self._shared(index, rows), mass) if action.share else (rows, mass)

    def _of_method(self, method: AttnMethod) -> tuple[Tensor, Tensor | float]:
        """Rows of a sparse method and its mass, computed once for all candidates that name it."""
        if method not in self._sparse:
            bound, place = self._bound[method], self._call.place
            if bound is None:
                return self._dense, 1.0
            result = bound.attend(replace(self._call, with_lse=True, place=Place(place.block, place.step)))
            assert result.lse is not None, "asked for"
            left_out = discarded_mass(self._anchors, result.lse)
            self._sparse[method] = result.out[:, self._anchors.positions], 1 - left_out.mean((0, 2))
        return self._sparse[method]

    def _shared(self, index: int, rows: Tensor) -> Tensor:
        """Rows as sharing across guidance would have them."""
        place = self._call.place
        if place.conditional is not None:
            return torch.cat([rows[place.conditional]] * 2)
        if place.of_conditional is not None:
            shared: Tensor = place.of_conditional.get((_OUT, index), rows)
            return shared
        return rows

    def _keep(self, index: int, candidate: Candidate, action: Action, rows: Tensor) -> None:
        """Keep what the next action of the candidate, or the other guidance branch, takes."""
        memory, later = self._call.place.memory, candidate.cycle[self._phase + 1 :]
        if action.share or (later and later[0].reuse):
            memory[_OUT, index] = rows
        if action.full:
            for method in {action.method for action in later if action.residual and action.method is not None}:
                memory[_RESIDUAL, method] = self._dense - self._of_method(method)[0]
