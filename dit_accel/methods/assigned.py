"""An assignment at work on one layout: each call answered by the action of its step, block and heads."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse.backends import Backend
from dit_accel.kernels.block_sparse.plan import Triple
from dit_accel.layout import TokenLayout
from dit_accel.methods.actions import Course, Part
from dit_accel.methods.attention import AttnCall, AttnResult, BoundAttention, ModuleCall, Place, QueryGroups
from dit_accel.methods.base import AttnMethod
from dit_accel.methods.kept import Keep, Kept, bytes_of, put_by

# Keys of what a layer keeps: (_MODULE,) its whole output, (_SHARED,) the same for the other guidance branch,
# (_OUT, group), (_RESIDUAL, method, group), and (_METHOD, ...), what methods keep themselves.
_MODULE, _SHARED, _OUT, _RESIDUAL, _METHOD = "module", "shared", "out", "residual", "method"


class AssignedAttention(BoundAttention):
    """The actions of an assignment on one layout.

    Args:
        layout: the sequence.
        device: of the calls.
        course: the assignment on a run, from its number of steps and the model's number of blocks.
        methods: every sparse method that it names.
        keep: how tensors wait for later steps.
    """

    splits_guidance = True

    def __init__(
        self,
        layout: TokenLayout,
        device: torch.device,
        course: Callable[[int, int], Course],
        methods: Sequence[AttnMethod],
        keep: Keep,
    ) -> None:
        self.layout, self.course, self._keep = layout, course, keep
        # None where a method is dense on this layout.
        self._bound = {method: method.attention(layout, device) for method in methods}
        found = [bound for bound in self._bound.values() if bound is not None]
        self.tile: Triple = found[0].tile if found else (1, 1, 1)
        self.density = 1.0

    def attend(self, call: AttnCall) -> AttnResult:
        if call.with_lse:
            raise ValueError("a plan keeps no LSE of what it reuses; measure the methods it names by themselves.")
        place = call.place
        course = self.course(place.num_steps, place.num_blocks)
        parts = course.parts(place.step, place.block)
        if len(parts) == 1:
            out, density = self._take(call, course, parts[0])
        else:
            out, density = torch.empty_like(call.q), 0.0
            for part in parts:
                rows, share = self._take(call.of_heads(part.groups), course, part)
                out[:, :, list(part.groups)] = rows
                density = density + share * (len(part.groups) / course.assignment.groups)
        for part in parts:
            self._keep_heads(course, place, part, out)
        return AttnResult(out, None, density)

    def around(self, place: Place, module: ModuleCall) -> tuple[Any, bool]:
        """The output of a whole attention module, and whether any of it was computed."""
        course = self.course(place.num_steps, place.num_blocks)
        kept = place.memory.get((_MODULE,)) if course.whole[place.step, place.block] else None
        kept = kept or self._taken_over(course, place)
        out = self._computed(course, place, module) if kept is None else kept.restored()
        self._drop(course, place)
        return out, kept is None

    def _taken_over(self, course: Course, place: Place) -> KeptOutput | None:
        """What the conditional call of this step computed, and with it what it kept; None if it did not."""
        conditional = place.of_conditional
        if conditional is None or not course.shares(place.step, place.block):
            return None
        shared = conditional.pop((_SHARED,), None)
        if shared is None or shared.step != place.step:
            return None
        for key, kept in conditional.items():
            if _computed_now(course, place, key):
                place.memory[key] = kept  # the very same tensors
        output: KeptOutput = shared.output
        return output

    def _computed(self, course: Course, place: Place, module: ModuleCall) -> Any:
        """The module's output now, kept where it is needed again."""
        shares = course.shares(place.step, place.block)
        half = place.conditional if shares else None
        out = module() if half is None else module.of_items(half)
        lasts, waits = course.keep_module[place.step, place.block], shares and place.shared_later
        if lasts or waits:
            kept = KeptOutput.of(out, half is not None, self._keep)
            if lasts:
                place.memory[_MODULE,] = kept
            if waits:
                place.memory[_SHARED,] = _Shared(place.step, kept)
        return out if half is None else _doubled(out)

    @property
    def keeps_on_device(self) -> bool:
        return self._keep != "cpu"

    def check_heads(self, run: Run) -> None:
        """Raise a ValueError if the plan is for another number of heads or blocks."""
        groups = self.course(run.num_steps, run.num_blocks).assignment.groups
        if groups not in (1, run.heads):
            raise ValueError(f"the plan is for {groups} heads, the model has {run.heads}; tune one for this model.")

    def kept_bytes(self, run: Run, *, guided: bool = False, separate: bool = False) -> float:
        """The most that is kept at any moment of a run; of one guidance branch where they are ``separate`` calls."""
        rows = run.batch * self.layout.num_tokens
        module = bytes_of(rows, run.heads * run.head_dim, run.itemsize, self._keep)
        heads = bytes_of(rows * run.heads, run.head_dim, run.itemsize, self._keep)
        return self.course(run.num_steps, run.num_blocks).peak(module, heads, guided=guided, separate=separate)

    def groups(self) -> QueryGroups:
        raise ValueError("a plan has no query groups of its own; measure the methods it names by themselves.")

    def check(self, q: Tensor, backend: Backend) -> None:
        for bound in self._bound.values():
            if bound is not None:
                bound.check(q, backend)

    def _take(self, call: AttnCall, course: Course, part: Part) -> tuple[Tensor, float | Tensor]:
        """The output of some heads by their action, and the share of pairs computed; full where nothing is kept."""
        action, groups = part
        if action.reuse:
            kept = _kept_heads(call, [(_OUT, group) for group in groups])
            return self._full(call, course, groups) if kept is None else (kept, 0.0)
        if action.method is None:
            return self._full(call, course, groups)
        if not action.residual:
            return self._sparse(call, action.method, groups)
        residual = _kept_heads(call, [(_RESIDUAL, action.method, group) for group in groups])
        if residual is None:
            return self._full(call, course, groups)
        out, density = self._sparse(call, action.method, groups)
        return out + residual, density

    def _sparse(self, call: AttnCall, method: AttnMethod, groups: Sequence[int]) -> tuple[Tensor, float | Tensor]:
        bound = self._bound[method]
        if bound is None:
            return call.dense(call), 1.0
        memory = call.place.memory.setdefault((_METHOD, method, tuple(groups), len(call.q)), {})
        result = bound.attend(replace(call, place=replace(call.place, memory=memory)))
        return result.out, result.density

    def _full(self, call: AttnCall, course: Course, groups: Sequence[int]) -> tuple[Tensor, float | Tensor]:
        """Full attention, and the residuals that later steps need."""
        place, out = call.place, call.dense(call)
        density: float | Tensor = 1.0
        needs = {group: course.keep_residuals[place.step][place.block][group] for group in groups}
        for method in dict.fromkeys(itertools.chain.from_iterable(needs.values())):
            heads = [head for head, group in enumerate(groups) if method in needs[group]]
            users, every = [groups[head] for head in heads], len(heads) == len(groups)
            rows, share = self._sparse(call if every else call.of_heads(heads), method, users)
            density = density + share * (len(heads) / len(groups))
            for group, residual in _by_group((out if every else out[:, :, heads]) - rows, users):
                place.memory[_RESIDUAL, method, group] = put_by(residual, self._keep)
        return out, density

    def _keep_heads(self, course: Course, place: Place, part: Part, out: Tensor) -> None:
        """Keep what heads of a layer computed, where they alone take it again."""
        for group in part.groups:
            kept = (_OUT, group)
            if course.keep_heads[place.step, place.block, group] and not (part.action.reuse and kept in place.memory):
                place.memory[kept] = put_by(out[:, :, group : group + 1], self._keep)

    def _drop(self, course: Course, place: Place) -> None:
        """Forget what no later step needs."""
        for key in list(place.memory):
            if not _needed_later(course, place, key):
                del place.memory[key]


class Run(NamedTuple):
    """The size of a run: steps and blocks, items in a call, heads of a layer and bytes of a number."""

    num_steps: int
    num_blocks: int
    batch: int
    heads: int
    head_dim: int
    itemsize: int


class KeptOutput(NamedTuple):
    """The output of a whole attention module put by.

    Args:
        parts: its tensors.
        single: it was one tensor, not several.
        halved: it is that of one half of the batch and stands for both.
    """

    parts: tuple[Kept, ...]
    single: bool
    halved: bool

    @staticmethod
    def of(out: Any, halved: bool, keep: Keep) -> KeptOutput:
        single = isinstance(out, Tensor)
        return KeptOutput(tuple(put_by(x, keep) for x in ((out,) if single else out)), single, halved)

    def restored(self) -> Any:
        """The output again."""
        parts = tuple(part.restored() for part in self.parts)
        out = parts[0] if self.single else parts
        return _doubled(out) if self.halved else out


class _Shared(NamedTuple):
    """An output for the unconditional call of the same step."""

    step: int
    output: KeptOutput


def kept_tensors(memory: Mapping[Any, Any]) -> Iterator[Kept]:
    """Everything that a layer has put by."""
    for value in memory.values():
        value = value.output if isinstance(value, _Shared) else value
        yield from (value.parts if isinstance(value, KeptOutput) else (value,) if isinstance(value, Kept) else ())


def _doubled(out: Any) -> Any:
    """One half's output for both halves of the batch."""
    return torch.cat([out, out]) if isinstance(out, Tensor) else tuple(torch.cat([x, x]) for x in out)


def _needed_later(course: Course, place: Place, key: tuple[Any, ...]) -> bool:
    """Whether what a layer keeps under a key is needed after this call."""
    step, block = place.step, place.block
    kind, group = key[0], key[-1]
    if kind == _RESIDUAL:
        return key[1] in course.keep_residuals[step][block][group]
    if kind == _OUT:
        return bool(course.keep_heads[step, block, group])
    if kind == _MODULE:
        return bool(course.keep_module[step, block])
    return kind != _SHARED or bool(place.memory[key].step == step)


def _computed_now(course: Course, place: Place, key: tuple[Any, ...]) -> bool:
    """Whether a layer that is not reusing as a whole has just made what it keeps under a key."""
    if key[0] != _RESIDUAL:
        return key[0] in (_MODULE, _OUT)
    return course.assignment.actions[int(course.table[place.step, place.block, key[-1]])].full


def _kept_heads(call: AttnCall, keys: Sequence[Any]) -> Tensor | None:
    """What is kept of some heads, [B, L, H, D], for the items of this call; None unless all of it is."""
    kept = [call.place.memory.get(key) for key in keys]
    if None in kept:
        return None
    parts = [_of_batch(part.restored(), call) for part in kept if part is not None]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _by_group(rows: Tensor, groups: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """The heads of a layer by their group: all of them, where it chooses as a whole."""
    if len(groups) == 1:
        yield groups[0], rows
        return
    for place, group in enumerate(groups):
        yield group, rows[:, :, place : place + 1]


def _of_batch(kept: Tensor, call: AttnCall) -> Tensor:
    """What was kept for the items of this call: guidance's halves may come together or one for both."""
    if len(kept) == len(call.q):
        return kept
    if len(kept) < len(call.q):
        return torch.cat([kept, kept])
    return kept[call.place.conditional]
