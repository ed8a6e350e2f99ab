"""Seconds of actions on this machine, and of a run made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import linear

from dit_accel.eval.speed import measure_in_turns
from dit_accel.kernels.block_sparse.plan import Triple
from dit_accel.layout import TokenLayout
from dit_accel.methods.actions import Action
from dit_accel.methods.attention import AttnCall, torch_dense
from dit_accel.methods.base import AttnMethod
from dit_accel.tuning.candidates import Candidate
from dit_accel.tuning.runner import Facts

# Query-key pairs of one head that a call is measured on at most: more would take seconds a call.
PAIRS = {"cpu": 4096**2, "cuda": 1 << 40}
PRODUCTS = {"cpu": 1 << 32, "cuda": 1 << 60}  # multiplications of a projection, likewise
ROUNDS = 3


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of one call of an attention layer.

    Args:
        dense: full attention.
        methods: sparse methods, their choice of keys included; dense ones where a method is dense.
        projections: what an attention module computes besides, from and to the hidden states.
        measured: tokens and heads that it was measured on; the seconds are scaled up from fewer pairs.
    """

    dense: float
    methods: Mapping[AttnMethod, float]
    projections: float
    measured: tuple[int, int]

    def of(self, action: Action) -> float:
        """Seconds of a call by an action; half of the calls of a guided run where it shares."""
        if action.reuse:
            return 0.0
        attends = self.dense if action.method is None else self.methods[action.method]
        return (self.projections + attends) * (0.5 if action.share else 1.0)

    def of_group(self, candidate: Candidate, steps: int) -> float:
        """Seconds of so many calls in a row, with the sparse calls beside full ones that residuals need."""
        seconds = 0.0
        for place in range(steps):
            action = candidate.at(place)
            seconds += self.of(action)
            if action.full:
                half = 0.5 if action.share else 1.0
                seconds += half * sum(self.methods[method] for method in _residuals_after(candidate, place, steps))
        return seconds

    def scaled(self, factor: float) -> LayerTimes:
        """The same with attention slower or faster by a factor."""
        methods = {method: factor * seconds for method, seconds in self.methods.items()}
        return replace(self, dense=factor * self.dense, methods=methods)


@dataclass(frozen=True)
class RunTimes:
    """Seconds of the denoising loop.

    Args:
        layers: of one call of each attention layer, by block.
        calls: of each layer at one step.
        rest: of a whole run, everything outside the attention modules.
    """

    layers: Sequence[LayerTimes]
    calls: int
    rest: float

    def table(self, candidates: Sequence[Candidate], groups: Sequence[range]) -> Tensor:
        """Seconds of each choice, float64 [groups, blocks, candidates]; with ``rest`` they add up to a run."""
        rows: dict[tuple[int, int], list[float]] = {}  # blocks of one kind have one object
        for layer in self.layers:
            for steps in {len(group) for group in groups}:
                if (id(layer), steps) not in rows:
                    rows[id(layer), steps] = [self.calls * layer.of_group(candidate, steps) for candidate in candidates]
        return torch.tensor(
            [[rows[id(layer), len(group)] for layer in self.layers] for group in groups], dtype=torch.float64
        )


def _residuals_after(candidate: Candidate, place: int, steps: int) -> set[AttnMethod]:
    """The methods whose residual is taken after a full step and before the next one."""
    taken = set()
    for later in range(place + 1, steps):
        action = candidate.at(later)
        if action.full:
            break
        if action.residual and action.method is not None:
            taken.add(action.method)
    return taken


def measure_layers(
    facts: Facts, candidates: Sequence[Candidate], dense: Callable[[AttnCall], Tensor] = torch_dense
) -> list[LayerTimes]:
    """Times of each block, measured once for each layout among them.

    Args:
        facts: the model at its size.
        candidates: whose methods are measured.
        dense: full attention. Default torch's.
    """
    by_layout: dict[TokenLayout, LayerTimes] = {}
    for block in range(facts.blocks):
        layout = facts.layout_of(block)
        if layout not in by_layout:
            by_layout[layout] = measure_layer(facts, layout, candidates, dense)
    return [by_layout[facts.layout_of(block)] for block in range(facts.blocks)]


def measure_layer(
    facts: Facts, layout: TokenLayout, candidates: Sequence[Candidate], dense: Callable[[AttnCall], Tensor]
) -> LayerTimes:
    """Times of one layer on random queries and keys.

    Where a dense call would take seconds, fewer heads and then a smaller grid of the same proportions are measured and
    scaled by the pairs that are computed.
    """
    small, heads = _measurable(layout, facts)
    shape = (facts.batch, small.num_tokens, heads, facts.head_dim)
    generator = torch.Generator(facts.device).manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator, device=facts.device, dtype=facts.dtype) for _ in range(3))
    methods = dict.fromkeys(method for candidate in candidates for method in candidate.methods)
    full = {method: method.attention(layout) for method in methods}  # on the CPU: for its density
    bound = {method: method.attention(small, facts.device) for method in methods}
    call = AttnCall(q, k, v, backend=facts.backend)
    project, projections = _projections(facts, layout)
    fns: dict[str, Callable[[], object]] = {"dense": lambda: dense(call), "projections": project}
    for number, attention in enumerate(bound.values()):
        if attention is not None:
            fns[str(number)] = lambda attention=attention: attention.attend(call)  # type: ignore[misc]
    with torch.no_grad():
        times = {
            name: timing.median for name, timing in measure_in_turns(fns, rounds=ROUNDS, device=facts.device).items()
        }
    scale = facts.heads * layout.num_tokens**2 / (heads * small.num_tokens**2)
    seconds = {}
    for number, (method, attention) in enumerate(bound.items()):
        whole = full[method]
        if attention is None or whole is None:
            seconds[method] = scale * times["dense"]
        else:
            seconds[method] = scale * times[str(number)] * whole.density / attention.density
    return LayerTimes(scale * times["dense"], seconds, projections * times["projections"], (small.num_tokens, heads))


def _measurable(layout: TokenLayout, facts: Facts) -> tuple[TokenLayout, int]:
    """The layout and heads to measure: all, or as many pairs as ``PAIRS`` has."""
    limit = PAIRS[facts.device.type]
    heads = max(1, min(facts.heads, limit // layout.num_tokens**2))
    if layout.num_tokens**2 * heads <= limit:
        return layout, heads
    shrink = math.sqrt(limit) / layout.num_tokens
    frames, rows, columns = layout.grid
    side = shrink ** (1 / 2 if frames == 1 else 1 / 3)
    grid: Triple = (max(1, round(frames * side)), max(1, round(rows * side)), max(1, round(columns * side)))
    return replace(layout, grid=grid, text_tokens=round(layout.text_tokens * shrink)), 1


def _projections(facts: Facts, layout: TokenLayout) -> tuple[Callable[[], object], float]:
    """A product of an attention module with its weights, and how often a module makes it.

    A module makes four; where they take seconds, fewer tokens are measured.
    """
    width, tokens = facts.heads * facts.head_dim, facts.batch * layout.num_tokens
    measured = max(1, min(tokens, PRODUCTS[facts.device.type] // width**2))
    x, weight = (torch.randn(size, width, device=facts.device, dtype=facts.dtype) for size in (measured, width))
    return lambda: linear(x, weight), 4 * tokens / measured
