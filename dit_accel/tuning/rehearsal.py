"""One run of a pipeline in which every step is tried out, its actions decided, and then taken."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dit_accel.kernels.block_sparse.backends import Backend
from dit_accel.layout import TokenLayout
from dit_accel.methods.actions import Action, Assignment, Course, course_of
from dit_accel.methods.assigned import AssignedAttention
from dit_accel.methods.base import AttnMethod
from dit_accel.pipelines.families import denoisers_of
from dit_accel.plugin import apply
from dit_accel.runtime import Denoiser, denoiser_of
from dit_accel.state import DenoisingState, bind_arguments


class Searched(NamedTuple):
    """What a search found.

    Args:
        assignment: the actions, with one row for each step of the run.
        losses: what was measured of each action taken, float64 [steps, blocks, heads or 1]; 0 for full attention.
        forwards: of the denoisers, those of the run itself included.
        seconds: the run took.
    """

    assignment: Assignment
    losses: Tensor
    forwards: int
    seconds: float


class Decision(NamedTuple):
    """The actions of a step, indices [blocks, heads or 1], and the loss of each."""

    row: Tensor
    losses: Tensor


class Step:
    """A step that a denoiser is about to take: it can be tried with any actions, and nothing is kept of a trial.

    Args:
        index: of the step.
        num_blocks: of the denoiser.
        groups: heads that choose for themselves, or 1.
    """

    def __init__(self, search: _Search, model: nn.Module, denoiser: Denoiser, calls: Sequence[_Call]) -> None:
        self._search, self._model, self._denoiser, self._calls = search, model, denoiser, calls
        self.index = denoiser.state.step
        self.num_blocks, self.groups = search.assignment.blocks, search.assignment.groups

    def output(self, row: Tensor) -> Tensor:
        """The denoiser's output with the actions ``row``, float32, both branches of guidance one after the other."""
        self._search.take(self.index, row, keep=False)
        with self._denoiser.rehearsal():
            return torch.cat([self._forward(call) for call in self._calls])

    def allowed(self) -> Tensor:
        """Which actions have something to take at this step, bool [actions, blocks, heads or 1]."""
        assignment, max_age = self._search.assignment, self._search.max_age
        found = []
        for number, action in enumerate(assignment.actions):
            table = assignment.table.clone()
            table[self.index] = number
            course = course_of(Assignment(assignment.actions, table), len(table), max_age=max_age)
            found.append((course.table[self.index] == number) & (self._denoiser.guided or not action.share))
        return torch.stack(found)

    def _forward(self, call: _Call) -> Tensor:
        vars(self._denoiser.state).update(vars(call.state))
        self._search.count()
        output: Tensor = self._model.forward(**call.arguments)[0]
        return output.float()


Decide = Callable[[Step], Decision]
Attention = Callable[[TokenLayout, torch.device, Callable[[int, int], Course], Sequence[AttnMethod]], AssignedAttention]


def plain_attention(
    layout: TokenLayout, device: torch.device, course: Callable[[int, int], Course], methods: Sequence[AttnMethod]
) -> AssignedAttention:
    """The assignment's own attention, which keeps tensors as they are."""
    return AssignedAttention(layout, device, course, methods, "device")


def search_steps(
    pipe: Any,
    run: Callable[[], Any],
    actions: tuple[Action, ...],
    decide: Decide,
    *,
    per_head: bool = False,
    max_age: int | None = None,
    backend: Backend = "auto",
    attention: Attention = plain_attention,
) -> Searched:
    """Have ``decide`` choose the actions of each step of a run, from what the steps before have made of it.

    The first step of each denoiser is full attention. Then, before the first call of a step, ``decide`` may try it; the
    run goes on with what it decides. Where guidance makes a second call, a trial makes it too: with what is the same in
    both calls from the first one, and the rest, the text, as the second call had it at its first step.

    Args:
        pipe: a pipeline without a method.
        run: generates the calibration prompts, by one call of the pipeline.
        actions: what there is to choose from, full attention first.
        decide: a step's actions.
        per_head: every head chooses, not only every layer.
        max_age: steps that a kept tensor may serve. Default None: any number.
        backend: of the operator.
        attention: makes the attention of the run. Default: the assignment's.

    Raises:
        ValueError: a pipeline with a method, tokens that are no regular grid, or anything but one run.
    """
    models = denoisers_of(pipe)
    if any(denoiser_of(model) for model, _ in models):
        raise ValueError("a search needs the pipeline's own attention, got one with a method; call dit_accel.restore.")
    heads = models[0][1].shape(models[0][0].config)["heads"]
    begin = time.perf_counter()
    with tqdm(desc="search", unit="step", miniters=0, mininterval=1.0) as bar, ExitStack() as stack:
        search = _Search(actions, heads if per_head else 1, decide, max_age, bar)
        stack.enter_context(apply(pipe, _SearchAttnMethod(search=search, attention_of=attention), backend=backend))
        for model, _ in models:
            stack.callback(model.register_forward_pre_hook(search.before, with_kwargs=True).remove)
        run()
    if search.losses is None:
        raise ValueError("a search needs a run of the pipeline, got none; pass a function that calls it once.")
    return Searched(search.assignment, search.losses, search.forwards, time.perf_counter() - begin)


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of a denoiser: its arguments by name and what the runtime read from them."""

    arguments: dict[str, Any]
    state: DenoisingState

    def apart_from(self, other: _Call) -> _Call:
        """The same with those arguments alone that differ from another call's."""
        own = {name: value for name, value in self.arguments.items() if not _same(value, other.arguments.get(name))}
        return _Call(own, self.state)

    def at(self, first: _Call) -> _Call:
        """The call at the step of ``first``, which tells what both have in common."""
        state = replace(self.state, step=first.state.step)
        return _Call(first.arguments | self.arguments, state)


@dataclass(eq=False)
class _Progress:
    """Where a denoiser is: its latest step, the first call of it, and how calls of other branches differ from that."""

    step: int = -1
    first: _Call | None = None
    others: dict[str | None, _Call] = field(default_factory=dict)


@dataclass(eq=False)
class _Search:
    """A search under way.

    Args:
        actions, decide, max_age: as in ``search_steps``.
        groups: heads that choose for themselves, or 1.
        bar: shows the steps decided and the forwards done.
    """

    actions: tuple[Action, ...]
    groups: int
    decide: Decide
    max_age: int | None
    bar: Any
    forwards: int = 0
    losses: Tensor | None = None
    _course: Course | None = None
    _progress: dict[nn.Module, _Progress] = field(default_factory=dict)

    @property
    def assignment(self) -> Assignment:
        """What has been decided so far, full attention for the rest."""
        assert self._course is not None, "begun"
        return self._course.assignment

    def course(self, num_steps: int, num_blocks: int) -> Course:
        """What the layers do now; a run begins with full attention."""
        if self._course is None:
            with torch.inference_mode(False):  # written to later, and kept
                table = torch.zeros(num_steps, num_blocks, self.groups, dtype=torch.int16)
                self.losses = torch.zeros(table.shape, dtype=torch.float64)
            self._course = self._of_step(Assignment(self.actions, table), 0, table[0], keep=True)
            self.bar.total = num_steps
        return self._course

    def take(self, step: int, row: Tensor, *, keep: bool) -> None:
        """Have the layers take the actions ``row``, and keep whatever a later step could need, or nothing."""
        self._course = self._of_step(self.assignment, step, row, keep)

    def count(self) -> None:
        self.forwards += 1
        self.bar.set_postfix(forwards=self.forwards, refresh=False)
        self.bar.update(0)

    @torch.compiler.disable
    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Decide the step that the call begins, if it does, and note the call."""
        self.count()
        denoiser = denoiser_of(model)
        assert denoiser is not None and self.losses is not None, "applied, and asked for its course before"
        state, progress = replace(denoiser.state), self._progress.setdefault(model, _Progress())
        _check(state, progress)
        arguments = {name: value for name, value in bind_arguments(model, args, kwargs).items() if name != "self"}
        call = _Call(arguments, state)
        if state.step == progress.step:
            assert progress.first is not None, "of this step"
            if state.branch not in (progress.first.state.branch, *progress.others):
                progress.others[state.branch] = call.apart_from(progress.first)
            return
        decided = Decision(torch.zeros_like(self.assignment.table[0]), torch.zeros_like(self.losses[0]))
        if progress.first is not None:
            calls = [call, *(other.at(call) for other in progress.others.values())]
            decided = self.decide(Step(self, model, denoiser, calls))
        progress.step, progress.first = state.step, call
        self.assignment.table[state.step] = decided.row
        self.losses[state.step] = decided.losses
        self.take(state.step, decided.row, keep=True)
        self.bar.update()

    def _of_step(self, assignment: Assignment, step: int, row: Tensor, keep: bool) -> Course:
        table = assignment.table.clone()
        table[step] = row
        whole = assignment.flags(table, lambda action: action.reuse).all(-1)
        heads = torch.full_like(table, keep and self.groups > 1, dtype=torch.bool)
        methods = dict.fromkeys(
            action.method for action in self.actions if action.method is not None and action.residual
        )
        residuals = [[[tuple(methods) if keep else ()] * self.groups] * table.shape[1]] * table.shape[0]
        return Course(assignment, table, whole, torch.full_like(whole, keep), heads, residuals)


@dataclass(frozen=True, kw_only=True, eq=False)
class _SearchAttnMethod(AttnMethod):
    """What is applied to the pipeline during a search."""

    name: ClassVar[str] = "search"
    whole_modules: ClassVar[bool] = True

    search: _Search
    attention_of: Attention

    def bind(self, layout: TokenLayout, device: torch.device) -> AssignedAttention:
        methods = dict.fromkeys(action.method for action in self.search.actions if action.method is not None)
        return self.attention_of(layout, device, self.search.course, tuple(methods))

    def ideal_density(self, layout: TokenLayout) -> float:
        return 1.0


def _check(state: DenoisingState, progress: _Progress) -> None:
    """Raise a ValueError where a call is not of the one run that a search needs."""
    if state.layout is None:
        raise ValueError("a search needs tokens on a regular grid, got a call that runs dense; choose another prompt.")
    if state.step < progress.step:
        raise ValueError(
            f"a search needs one run of the pipeline, got step {state.step} after step {progress.step}; "
            "generate all prompts of it in one call."
        )


def _same(value: Any, other: Any) -> bool:
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        return value is other or torch.equal(value, other)
    return value is other
