"""What one attention layer does at one denoising step, and which action each step, block and head of a run takes."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dit_accel.methods.base import AttnMethod


@dataclass(frozen=True)
class Action:
    """One way to answer the attention of a layer, or of one of its heads, at one step (arXiv 2406.08552).

    Args:
        method: the sparse method that attends; None: full attention.
        residual: add what the method lacked at the latest full step of this layer, full minus sparse output, per head
            and before the output projection (WA-RS). Needs a method.
        share: compute the conditional half of the guidance alone and take it for the other half too (ASC).
        reuse: the layer's output of the step before again, projections skipped, or that of a head (AST). Excludes the
            others.
    """

    method: AttnMethod | None = None
    residual: bool = False
    share: bool = False
    reuse: bool = False

    def __post_init__(self) -> None:
        if self.reuse and (self.method is not None or self.residual or self.share):
            raise ValueError(f"an action that reuses computes nothing, got {self}; leave the rest out.")
        if self.residual and self.method is None:
            raise ValueError("an action with a residual needs a sparse method to add it to, got none; name a method.")
        if self.method is not None:
            check_method(self.method)

    @property
    def full(self) -> bool:
        """Whether every pair is computed, if only for one half."""
        return self.method is None and not self.reuse

    def __str__(self) -> str:
        if self.reuse:
            return "reuse"
        attends = "full"
        if self.method is not None:
            options = ", ".join(f"{name}={value!r}" for name, value in self.method.options().items())
            attends = f"{self.method.name}({options})" if options else self.method.name
        return attends + "+residual" * self.residual + "+share" * self.share


def check_method(method: AttnMethod) -> None:
    """Raise a ValueError for a method that brings a schedule of its own into a plan, or none that is sparse."""
    scheduled = [name for name in ("start_percent", "end_percent", "dense_blocks") if name in method.options()]
    if method.whole_modules or method.name == "dense":
        raise ValueError(f"a plan is made of sparse methods, got {method.name}; name actions such as full/reuse.")
    if scheduled:
        raise ValueError(f"a plan decides by itself when {method.name} runs, got {scheduled[0]}; leave it out.")


FULL = Action()
REUSE = Action(reuse=True)


class Part(NamedTuple):
    """Heads of a layer that take the same action at a step.

    Args:
        action: what they do.
        groups: their indices in the assignment's last axis.
    """

    action: Action
    groups: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Assignment:
    """Which action each step, block and head of a run takes.

    Args:
        actions: what there is to choose from; the first is full attention.
        table: index of the action taken, integers [steps, blocks, heads or 1] on the CPU. Steps are equal shares of a
            run, so that a run of another number of steps takes the row that its step falls in.

    Raises:
        ValueError: no full attention first, indices out of range, or heads of one layer that share while others do not.
    """

    actions: tuple[Action, ...]
    table: Tensor

    def __post_init__(self) -> None:
        if not self.actions or self.actions[0] != FULL:
            raise ValueError(f"the first action must be full attention, got {self.actions[:1]}.")
        if self.table.ndim != 3 or not self.table.numel() or self.table.is_floating_point():
            raise ValueError(
                f"the table must be integers [steps, blocks, heads or 1], got {self.table.dtype} "
                f"{list(self.table.shape)}."
            )
        low, high = int(self.table.min()), int(self.table.max())
        if low < 0 or high >= len(self.actions):
            raise ValueError(f"the table must name {len(self.actions)} actions from 0 on, got {low} to {high}.")
        shares = self.flags(self.table, lambda action: action.share)
        if bool((shares.any(-1) != shares.all(-1)).any()):
            raise ValueError("all heads of a layer share across guidance at a step, or none; got a layer with both.")

    def __repr__(self) -> str:
        digest = hashlib.sha256(self.table.short().numpy().tobytes()).hexdigest()[:12]
        return f"<{self.steps} steps of {self.blocks} blocks: {', '.join(map(str, self.actions))}; {digest}>"

    @property
    def steps(self) -> int:
        return self.table.shape[0]

    @property
    def blocks(self) -> int:
        return self.table.shape[1]

    @property
    def groups(self) -> int:
        """Heads that choose for themselves, or 1 where a layer chooses as a whole."""
        return self.table.shape[2]

    def flags(self, table: Tensor, fact: Callable[[Action], bool]) -> Tensor:
        """Which entries of a table have an action of which ``fact`` holds, bool of its shape."""
        return torch.tensor([fact(action) for action in self.actions])[table.long()]

    def rows(self, num_steps: int) -> Tensor:
        """The table for a run of so many steps, [num_steps, blocks, heads or 1]."""
        middle = (torch.arange(num_steps, dtype=torch.float64) + 0.5) / num_steps
        return self.table[(middle * self.steps).long()]


@dataclass(frozen=True, eq=False)
class Course:
    """An assignment on a run of so many steps, and what has to be kept on the way.

    A reuse or a residual without anything to take, or with something older than ``max_age`` steps, is full attention
    here.

    Args:
        assignment: the actions.
        table: index of the action really taken, [steps, blocks, groups].
        whole: all heads reuse, so that the layer's whole output is taken again, bool [steps, blocks].
        keep_module: the layer's whole output is needed after this step, bool [steps, blocks].
        keep_heads: the output of these heads is needed after this step, bool [steps, blocks, groups].
        keep_residuals: the methods whose residual a head needs after this step, up to its next full one, each once; by
            step, block and group.
    """

    assignment: Assignment
    table: Tensor
    whole: Tensor
    keep_module: Tensor
    keep_heads: Tensor
    keep_residuals: Sequence[Sequence[Sequence[tuple[AttnMethod, ...]]]]

    @property
    def steps(self) -> int:
        return self.table.shape[0]

    def parts(self, step: int, block: int) -> tuple[Part, ...]:
        """The heads of a layer by the action they take at a step."""
        return self._parts[step][block]

    def shares(self, step: int, block: int) -> bool:
        """Whether the layer computes the conditional half alone at a step; never at the first one.

        Only the second call of a kind tells guidance's halves from two items that begin with the same noise.
        """
        return bool(self._shares[step, block])

    @functools.cached_property
    def _parts(self) -> list[list[tuple[Part, ...]]]:
        return [[self._parts_of(heads) for heads in blocks] for blocks in self.table.tolist()]

    def _parts_of(self, heads: Sequence[int]) -> tuple[Part, ...]:
        taken: dict[int, list[int]] = {}
        for group, index in enumerate(heads):
            taken.setdefault(index, []).append(group)
        return tuple(Part(self.assignment.actions[index], tuple(groups)) for index, groups in taken.items())

    @functools.cached_property
    def _shares(self) -> Tensor:
        """Which layers share, bool [steps, blocks]; none does where one head had to become full."""
        shares = self.assignment.flags(self.table, lambda action: action.share).all(-1)
        shares[0] = False
        return shares

    def peak(self, module: float, heads: float, *, guided: bool = False, separate: bool = False) -> float:
        """The most that is kept at any moment of a run.

        Args:
            module: what the output of a layer takes in one call, in any unit.
            heads: what the output of all its heads takes, before the projection.
            guided: the run has an unconditional half; what it shares with the conditional one is kept once.
            separate: the halves are calls of their own, whose mean this is; shared outputs wait for the second one.
        """
        fulls = self.assignment.flags(self.table, lambda action: action.full)
        computed = ~self.assignment.flags(self.table, lambda action: action.reuse)
        counts = torch.tensor([[[len(found) for found in groups] for groups in row] for row in self.keep_residuals])
        size = heads / self.assignment.groups
        kinds = [  # how much is kept after each step, and whether it was made at this step
            (self.keep_module[..., None] * module, ~self.whole[..., None]),
            (self.keep_heads * size, computed),
            (counts * size, fulls),
        ]
        alone = sum(kept.double().sum(-1) for kept, _ in kinds)
        shared = sum((kept * self._made_shared(made)).double().sum(-1) for kept, made in kinds)
        assert isinstance(alone, Tensor) and isinstance(shared, Tensor)
        after = alone - shared / 2 if guided else alone
        states = [after]
        if guided and separate:  # between the calls: the conditional one has new tensors, the other one those before
            lasting = sum((kept * self._made_shared(made) * ~made).double().sum(-1) for kept, made in kinds)
            waiting = (self._shares & ~self.keep_module) * module
            states = [(alone + _before(alone) - lasting + waiting) / 2, after]
        last, most = _before(after), 0.0
        for state in states:
            moments = state.cumsum(1) + last.sum(1, keepdim=True) - last.cumsum(1)
            last, most = state, max(most, float(moments.max()))
        return most

    def _made_shared(self, made: Tensor) -> Tensor:
        """Whether what was made last, at or before each step, was made by a layer that shares; bool like ``made``."""
        steps = torch.arange(self.steps)[:, None, None]
        latest = torch.where(made, steps, 0).cummax(0).values
        return self._shares[..., None].expand_as(made).gather(0, latest)


def _before(kept: Tensor) -> Tensor:
    """What was kept one step before, [steps, blocks]."""
    return torch.cat([torch.zeros_like(kept[:1]), kept[:-1]])


def course_of(
    assignment: Assignment,
    num_steps: int,
    *,
    full: Callable[[int, int], bool] = lambda block, step: False,
    max_age: int | None = None,
) -> Course:
    """An assignment on a run.

    Args:
        assignment: the actions.
        num_steps: steps of the run.
        full: whether a block is to attend in full at a step whatever the table says.
        max_age: steps that a kept output or residual may serve; None: any number.
    """
    table = assignment.rows(num_steps).clone()
    for step in range(num_steps):
        for block in range(assignment.blocks):
            if full(block, step):
                table[step, block] = 0
    limit = num_steps if max_age is None else max_age
    never = num_steps + limit
    age, residual_age = (torch.full(table.shape[1:], never) for _ in range(2))
    reuses = assignment.flags(table, lambda action: action.reuse)
    residuals = assignment.flags(table, lambda action: action.residual)
    for step in range(num_steps):
        age, residual_age = age + 1, residual_age + 1
        stale = (reuses[step] & (age > limit)) | (residuals[step] & (residual_age > limit))
        table[step] = torch.where(stale, 0, table[step])
        reuses[step] &= ~stale
        computes_all = assignment.flags(table[step], lambda action: action.full)
        age = torch.where(reuses[step], age, 0)
        residual_age = torch.where(computes_all, 0, residual_age)
    return _with_needs(assignment, table)


def _with_needs(assignment: Assignment, table: Tensor) -> Course:
    """A table with what each step has to keep for later ones, found from the last step backwards."""
    reuses = assignment.flags(table, lambda action: action.reuse)
    whole = reuses.all(-1)
    keep_module = torch.cat([whole[1:], torch.zeros_like(whole[:1])])
    keep_heads, out_needed = torch.zeros_like(reuses), torch.zeros_like(reuses[0])
    for step in reversed(range(len(table))):
        keep_heads[step] = out_needed
        out_needed = (reuses[step] & ~whole[step, :, None]) | (out_needed & reuses[step])
    return Course(assignment, table, whole, keep_module, keep_heads, _residuals_needed(assignment, table))


def _residuals_needed(assignment: Assignment, table: Tensor) -> list[list[list[tuple[AttnMethod, ...]]]]:
    """The methods whose residual each head needs after each step, [steps][blocks][groups]."""
    _, blocks, groups = table.shape
    needed: list[list[tuple[AttnMethod, ...]]] = [[()] * groups for _ in range(blocks)]
    found = []
    for rows in reversed(table.tolist()):
        found.append(needed)
        needed = [
            [_needed_before(assignment.actions[index], later) for index, later in zip(*pair, strict=True)]
            for pair in zip(rows, needed, strict=True)
        ]
    return found[::-1]


def _needed_before(action: Action, later: tuple[AttnMethod, ...]) -> tuple[AttnMethod, ...]:
    """The methods whose residual a head needs before an action, from those that it needs after it."""
    if action.full:
        return ()
    if action.residual and action.method is not None and action.method not in later:
        return (action.method, *later)
    return later
