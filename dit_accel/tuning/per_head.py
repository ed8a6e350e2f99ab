"""The per-head search of DiTFastAttn v2: what saves most in a layer at a step within a budget of error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from dit_accel.kernels.block_sparse.backends import Backend
from dit_accel.layout import TokenLayout
from dit_accel.methods.actions import FULL, REUSE, Action, Course, Part
from dit_accel.methods.assigned import AssignedAttention
from dit_accel.methods.attention import AttnCall, AttnResult
from dit_accel.methods.band import BandAttnProcessor
from dit_accel.methods.base import AttnMethod
from dit_accel.tuning.rehearsal import Decision, Searched, Step, search_steps

WIDTHS = (8, 16, 32)


def search(
    pipe: Any,
    run: Callable[[], Any],
    *,
    delta: float,
    slack: float = 1.5,
    widths: Sequence[int] = WIDTHS,
    max_age: int | None = None,
    backend: Backend = "auto",
) -> Searched:
    """Find the actions of each head, layer and step by the search of DiTFastAttn v2 (arXiv 2503.22796).

    The first step is full attention. At every other one each layer computes, from inputs that the layers before it have
    already changed, full attention and each way to save: its heads' output of the step before (reuse), and bands along
    the flattened grid with text dense. ``choose`` takes the ways of its heads, and the layer goes on with them. Where
    guidance calls the denoiser twice, the error of a way is the larger one of the two calls.

    Args:
        pipe: a pipeline without a method.
        run: generates the calibration prompts, a batch of them, by one call of the pipeline.
        delta: budget of each layer and step, the sum of its heads' relative squared errors; published: 0.05 to 1.
        slack: a head's error must be below slack * delta / heads. Default 1.5, as published; 1 in its video code.
        widths: of the bands, a band of width f sees V / f of the V tokens of the grid, both sides together. Default
            (8, 16, 32), as published.
        max_age: steps that a kept output may serve. Default None, as published: any number.
        backend: of the operator. Default "auto".

    Returns:
        One action per head, layer and step; the losses are their relative squared errors.

    Raises:
        ValueError: a negative delta, a pipeline with a method, or anything but one run.
    """
    if not delta >= 0:
        raise ValueError(f"delta must be at least 0, got {delta}.")
    bands = (Action(BandAttnProcessor(share=1 / (2 * width))) for width in widths)
    actions = (FULL, *bands, REUSE)
    choice = _Choice(actions, delta, slack)

    def attention(
        layout: TokenLayout, device: torch.device, course: Callable[[int, int], Course], methods: Sequence[AttnMethod]
    ) -> AssignedAttention:
        return _ChoosingAttention(layout, device, course, methods, choice)

    def decide(step: Step) -> Decision:
        choice.begin(step.allowed())
        step.output(torch.zeros(step.num_blocks, step.groups, dtype=torch.int16))
        return choice.end()

    return search_steps(
        pipe, run, actions, decide, per_head=True, max_age=max_age, backend=backend, attention=attention
    )


def relative_squared_errors(out: Tensor, full: Tensor) -> Tensor:
    """mean((out - full)²) / mean((full - mean(full))²) of each head, over batch, tokens and channels.

    Args:
        out, full: [B, L, H, D].

    Returns:
        float32 [H].
    """
    out, full = out.float(), full.float()
    missed = (out - full).square().mean((0, 1, 3))
    return missed / (full - full.mean((0, 1, 3), keepdim=True)).square().mean((0, 1, 3))


def choose(errors: Tensor, gains: Tensor, delta: float, slack: float = 1.5) -> Tensor:
    """The way of each head that saves most while the errors of all heads together stay within ``delta``.

    A 0/1 programme: maximise the sum of gains, at most one way per head, sum of errors <= delta. A way is considered
    only if its error is below slack * delta / H.

    Args:
        errors: of each head's ways, [H, ways].
        gains: of each way, [ways].
        delta: the budget.
        slack: how far above its equal share of the budget a head may be.

    Returns:
        int64 [H], 0 for none of the ways, else 1 + its index.
    """
    heads = len(errors)
    admissible = errors < slack * delta / heads
    head, way = (index.numpy() for index in torch.nonzero(admissible, as_tuple=True))
    chosen = torch.zeros(heads, dtype=torch.int64)
    if not len(head):
        return chosen
    once = (head == np.arange(heads)[:, None]).astype(np.float64)
    spent = errors.double().numpy()[head, way] / delta
    found = milp(
        -gains.double().numpy()[way],
        constraints=LinearConstraint(np.vstack([once, spent]), ub=1.0),
        integrality=np.ones(len(head)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    taken = found.x > 0.5
    chosen[head[taken]] = torch.from_numpy(way[taken] + 1)
    return chosen


@dataclass(eq=False)
class _Choice:
    """What the layers of a step choose by, and what they have chosen.

    Args:
        actions: full attention, then the ways to save.
        delta, slack: as in ``search``.
        allowed: which actions each head of each block may take, bool [actions, blocks, heads]; None: nothing is chosen.
        errors: of each block's heads and ways, the largest of the step's calls so far, [H, ways].
        taken: the action of each block's heads, [H].
    """

    actions: tuple[Action, ...]
    delta: float
    slack: float
    allowed: Tensor | None = None
    errors: dict[int, Tensor] = field(default_factory=dict)
    taken: dict[int, Tensor] = field(default_factory=dict)

    def begin(self, allowed: Tensor) -> None:
        self.allowed = allowed
        self.errors.clear()

    def make(self, block: int, errors: Tensor, gains: Tensor) -> Tensor:
        """The actions of a block's heads from the errors in one call, [H, ways], and the gains, [ways]."""
        assert self.allowed is not None, "begun"
        errors = torch.where(self.allowed[1:, block].T, errors, torch.inf)
        self.errors[block] = torch.maximum(errors, self.errors.get(block, errors))
        self.taken[block] = choose(self.errors[block], gains, self.delta, self.slack)
        return self.taken[block]

    def end(self) -> Decision:
        """The actions that hold for all calls of the step."""
        self.allowed = None
        blocks = sorted(self.errors)
        losses = [F.pad(self.errors[block], (1, 0)).gather(1, self.taken[block][:, None]) for block in blocks]
        return Decision(torch.stack([self.taken[block] for block in blocks]), torch.cat(losses, 1).T)


class _ChoosingAttention(AssignedAttention):
    """Attention that tries every way, has a choice made and goes on with it; outside of trials, the assignment's."""

    def __init__(
        self,
        layout: TokenLayout,
        device: torch.device,
        course: Callable[[int, int], Course],
        methods: Sequence[AttnMethod],
        choice: _Choice,
    ) -> None:
        super().__init__(layout, device, course, methods, "device")
        self._choice = choice
        kept = (action.method.ideal_density(layout) if action.method else 0.0 for action in choice.actions[1:])
        # Text is dense in a band; what is taken again costs nothing.
        self._gains = torch.tensor([1 - layout.joint_density(share) if share else 1.0 for share in kept])

    def attend(self, call: AttnCall) -> AttnResult:
        if self._choice.allowed is None:
            return super().attend(call)
        place = call.place
        course, heads = self.course(place.num_steps, place.num_blocks), tuple(range(call.q.shape[2]))
        full, *ways = (self._take(call, course, Part(action, heads))[0] for action in self._choice.actions)
        errors = torch.stack([relative_squared_errors(way, full) for way in ways], 1)
        taken = self._choice.make(place.block, errors.cpu(), self._gains)
        for number, way in enumerate(ways, 1):
            users = (taken == number).nonzero().flatten().to(full.device)
            full[:, :, users] = way[:, :, users]
        return AttnResult(full, None, 1.0)
