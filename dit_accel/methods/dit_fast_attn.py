"""DiTFastAttn: layers that take a window and a residual, share across guidance, or take their last output again."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from dit_accel.kernels.block_sparse.plan import Triple
from dit_accel.layout import TokenLayout
from dit_accel.methods.actions import FULL, REUSE, Action, Assignment, Course, course_of
from dit_accel.methods.assigned import AssignedAttention
from dit_accel.methods.band import BandAttnProcessor
from dit_accel.methods.base import AttnMethod
from dit_accel.methods.kept import KEEPS, Keep
from dit_accel.methods.neighborhood import NeighborhoodAttnProcessor


@dataclass(frozen=True, kw_only=True)
class DiTFastAttnProcessor(AttnMethod):
    """A plan of actions per step, layer and head (arXiv 2406.08552, 2503.22796): full attention, a window plus the kept
    residual of the latest full step (WA-RS), sharing across guidance (ASC), the last output again (AST).

    ``dit-accel tune`` finds a plan for a model. Without one every ``every``-th step of a run is full and the steps
    between take the window and the residual, or the last output, in every layer.

    Args:
        assignment: the plan. Default None: the fixed schedule.
        window: of the fixed schedule: half-width of a band along the flattened grid as a share of its tokens, as
            published (default 1/8), or a window per axis (frame, row, column) as in ``neighborhood``.
        every: of the fixed schedule: steps from one full one to the next, at least 1. Default 4.
        between: of the fixed schedule: the steps between take the window and its "residual" (default), or "reuse" the
            layer's last output.
        keep: where tensors wait for later steps: on the "device" (default), on the "cpu" or in "8bit".
        max_age: steps that a kept tensor may serve before the layer is full again. Default None: any number.
        density: of the window of the fixed schedule.

    Raises:
        ValueError: an option out of its range; ``delta``, which belongs to the methods of a plan.
    """

    name: ClassVar[str] = "dit_fast_attn"
    whole_modules: ClassVar[bool] = True

    assignment: Assignment | None = None
    window: float | Triple = 0.125
    every: int = 4
    between: Literal["residual", "reuse"] = "residual"
    keep: Keep = "device"
    max_age: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1:
            raise ValueError(f"every must be at least 1 step, got {self.every}.")
        if self.between not in ("residual", "reuse"):
            raise ValueError(f"between must be residual or reuse, got {self.between!r}.")
        if self.between == "reuse" and self.density is not None:
            raise ValueError(f"density is of a window, got {self.density} with between='reuse'; leave one out.")
        if self.keep not in KEEPS:
            raise ValueError(f"keep must be one of {', '.join(KEEPS)}, got {self.keep!r}.")
        if self.max_age is not None and self.max_age < 1:
            raise ValueError(f"max_age must be at least 1 step or None, got {self.max_age}.")
        if self.delta is not None:
            raise ValueError(f"delta corrects one method, got delta={self.delta!r} for a plan; give it to its methods.")
        if self.assignment is not None and self.density is not None:
            raise ValueError(f"density is of the fixed schedule's window, got {self.density} and a plan; leave one.")
        fixed = sorted({"window", "every", "between"} & AttnMethod.options(self).keys())
        if self.assignment is not None and fixed:
            raise ValueError(f"{fixed[0]} is of the fixed schedule, got it with a plan; leave one out.")
        self._window()

    def bind(self, layout: TokenLayout, device: torch.device) -> AssignedAttention:
        return AssignedAttention(layout, device, self.course, self.methods(), self.keep)

    def course(self, num_steps: int, num_blocks: int) -> Course:
        """What each layer does at each step of a run.

        Raises:
            ValueError: a plan for another number of blocks.
        """
        return _course(self, num_steps, num_blocks)

    def methods(self) -> tuple[AttnMethod, ...]:
        """The sparse methods that the plan names."""
        actions = (self._between(),) if self.assignment is None else self.assignment.actions
        return tuple(dict.fromkeys(action.method for action in actions if action.method is not None))

    def ideal_density(self, layout: TokenLayout) -> float:
        """Of the fixed schedule's window, or 1 where there is none or a plan decides."""
        window = None if self.assignment is not None else self._between().method
        return 1.0 if window is None else window.ideal_density(layout)

    def options(self) -> dict[str, Any]:
        """As for every method; a plan by its actions."""
        options = super().options()
        if self.assignment is not None:
            options["assignment"] = repr(self.assignment)
        return options

    def is_dense_at(self, *, block: int, step: int, num_steps: int, num_tokens: int) -> bool:
        """Below ``min_tokens`` only: full attention of a plan may have a residual to leave."""
        return num_tokens < self.min_tokens

    def _window(self) -> AttnMethod:
        if isinstance(self.window, tuple):
            return NeighborhoodAttnProcessor(window=self.window, density=self.density)
        return BandAttnProcessor(share=self.window, density=self.density)

    def _between(self) -> Action:
        """What the fixed schedule does between full steps."""
        return REUSE if self.between == "reuse" else Action(self._window(), residual=True)

    def _assignment(self, num_steps: int, num_blocks: int) -> Assignment:
        """The plan, or the fixed schedule."""
        if self.assignment is None:
            table = (torch.arange(num_steps) % self.every > 0).short()[:, None, None]
            return Assignment((FULL, self._between()), table.repeat(1, num_blocks, 1))
        if self.assignment.blocks != num_blocks:
            raise ValueError(
                f"the plan is for {self.assignment.blocks} blocks, the model has {num_blocks}; tune one for this model."
            )
        return self.assignment


@functools.lru_cache(maxsize=8)
def _course(method: DiTFastAttnProcessor, num_steps: int, num_blocks: int) -> Course:
    def full(block: int, step: int) -> bool:
        return AttnMethod.is_dense_at(method, block=block, step=step, num_steps=num_steps, num_tokens=method.min_tokens)

    return course_of(method._assignment(num_steps, num_blocks), num_steps, full=full, max_age=method.max_age)
