"""What a layer may do at the steps of a group: actions in turn, with a text form."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from dit_accel.layout import TokenLayout
from dit_accel.methods import make_method, parse_method_call
from dit_accel.methods.actions import FULL, REUSE, Action, Assignment, check_method
from dit_accel.methods.base import AttnMethod
from dit_accel.tuning.runner import Facts

DENSITIES = (0.5, 0.3, 0.2, 0.1)
METHODS = ("neighborhood", "draft", "log_linear", "radial", "grat")
REUSING = ("full/reuse", "full/reuse/reuse", "full/band+residual", "full/band+residual/band+residual", "full+share")


@dataclass(frozen=True)
class Candidate:
    """Actions that a layer takes in turn, the first one at the first step of a group, over and over.

    Args:
        cycle: the actions; what reuses a step or adds a residual has a step to take it from in the same group.
    """

    cycle: tuple[Action, ...]

    def __post_init__(self) -> None:
        residual = [action for action in self.cycle if action.residual]
        if self.cycle[0].reuse or (residual and not self.cycle[0].full):
            raise ValueError(
                f"{self} has nothing to take at the first step of a group; begin with the action it takes from, "
                "such as full/reuse or full/band+residual."
            )

    def __str__(self) -> str:
        return "/".join(map(str, self.cycle))

    def at(self, place: int) -> Action:
        """The action at a step of the group, counted from 0."""
        return self.cycle[place % len(self.cycle)]

    @property
    def methods(self) -> tuple[AttnMethod, ...]:
        """The sparse methods it names, each once."""
        return tuple(dict.fromkeys(action.method for action in self.cycle if action.method is not None))


KEEP_FULL = Candidate((FULL,))


def parse_action(text: str) -> Action:
    """An action as it is written: ``full``, ``reuse``, a method call, with ``+residual`` or ``+share`` behind it.

    Raises:
        ValueError: anything else, and what ``make_method`` and ``Action`` refuse.
    """
    attends, *extras = text.replace(" + ", "+").split("+")
    unknown = set(extras) - {"residual", "share"}
    if unknown:
        raise ValueError(f"an action may end in +residual or +share, got {text!r}.")
    if attends.strip() == "reuse" and not extras:
        return REUSE
    method = None
    if attends.strip() != "full":
        name, options = parse_method_call(attends)
        method = make_method(name, **options)
    return Action(method, residual="residual" in extras, share="share" in extras)


def parse_candidates(text: str) -> list[Candidate]:
    """Candidates as they are written: actions in turn with ``/`` between them, such as ``full/reuse``.

    A bare method without any of this stands for itself at the densities 0.5, 0.3, 0.2 and 0.1.

    Raises:
        ValueError: what ``parse_action`` and ``Candidate`` refuse.
    """
    name = text.strip()
    if re.fullmatch(r"\w+", name) and name not in ("full", "reuse"):
        check_method(make_method(name))
        return [Candidate((Action(make_method(name, density=density)),)) for density in DENSITIES]
    return [Candidate(tuple(map(parse_action, re.split(r"/(?![^(]*\))", text))))]


def candidates_for(texts: Iterable[str], facts: Facts) -> list[Candidate]:
    """The candidates that differ on a model at its size, full attention first.

    Methods that are dense there go, and so do those of the same kind that compute the same share; sharing across
    guidance goes where there is no guidance.
    """
    found, seen = [KEEP_FULL], set[object]()
    for candidate in (candidate for text in texts for candidate in parse_candidates(text)):
        if any(action.share for action in candidate.cycle) and not facts.guided:
            continue
        kind = tuple(_kind(action, facts.layout) for action in candidate.cycle)
        dense = any(action.method is not None and density >= 1 for action, density in kind)
        if candidate == KEEP_FULL or dense or kind in seen:
            continue
        seen.add(kind)
        found.append(candidate)
    return found


def _kind(action: Action, layout: TokenLayout) -> tuple[Action, float]:
    """What tells actions apart on a layout: the density asked for replaced by the one that is computed."""
    if action.method is None:
        return action, 1.0
    bound = action.method.attention(layout)
    density = 1.0 if bound is None else round(bound.density, 6)
    return replace(action, method=replace(action.method, density=None)), density


def step_groups(steps: int, groups: int) -> list[range]:
    """The steps of a run cut into so many groups of nearly equal length, at most one per step."""
    groups = min(groups, steps)
    ends = [math.ceil(number * steps / groups) for number in range(groups + 1)]
    return [range(first, last) for first, last in pairwise(ends)]


def assignment_of(
    candidates: Sequence[Candidate],
    choice: Tensor,  # int64 [groups, blocks]: index into candidates
    groups: Sequence[range],
) -> Assignment:
    """The run in which each block takes the chosen candidate at the steps of each group."""
    actions = list(dict.fromkeys([FULL, *(action for candidate in candidates for action in candidate.cycle)]))
    number = {action: index for index, action in enumerate(actions)}
    rows = [
        [number[candidates[index].at(place)] for index in choice[group].tolist()]
        for group, steps in enumerate(groups)
        for place in range(len(steps))
    ]
    table = torch.tensor(rows, dtype=torch.int16)[..., None]
    used = [index for index in range(len(actions)) if index == 0 or bool((table == index).any())]
    renumbered = torch.tensor([used.index(index) if index in used else 0 for index in range(len(actions))])
    return Assignment(tuple(actions[index] for index in used), renumbered[table.long()].to(torch.int16))
