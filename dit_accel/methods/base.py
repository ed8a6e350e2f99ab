"""What every method shares: the vocabulary of options, when it is dense, and how ``density=`` is solved."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

from dit_accel.kernels.block_sparse.plan import BlockPlan
from dit_accel.layout import TokenLayout


@dataclass(frozen=True, kw_only=True)
class AttnMethod(ABC):
    """One way to make attention sparse, described by data; subclasses answer which tiles a query tile sees.

    Args:
        density: share of the grid's query-key pairs to compute, in (0, 1]; replaces the method's own knobs, which
            are solved for on each layout: the most pairs that stay within ``density``, or the method's least where
            that is more. 1.0 keeps every pair. None (default) uses the knobs as given.
        start_percent: share of the denoising steps, from the first, that stay dense. Default 0.
        end_percent: share of the denoising steps after which attention is dense again. Default 1.
        dense_blocks: the first n transformer blocks stay dense, or a tuple of block indices. Default 0.
        min_tokens: sequences shorter than this stay dense. Default 0.
    """

    name: ClassVar[str]

    density: float | None = None
    start_percent: float = 0.0
    end_percent: float = 1.0
    dense_blocks: int | tuple[int, ...] = 0
    min_tokens: int = 0

    def __post_init__(self) -> None:
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"density must be in (0, 1], got {self.density}.")
        if not 0 <= self.start_percent <= self.end_percent <= 1:
            raise ValueError(
                "start_percent and end_percent must satisfy 0 <= start_percent <= end_percent <= 1, "
                f"got {self.start_percent} and {self.end_percent}."
            )
        if isinstance(self.dense_blocks, int) and self.dense_blocks < 0:
            raise ValueError(f"dense_blocks must be a number of blocks or a tuple of indices, got {self.dense_blocks}.")
        if self.min_tokens < 0:
            raise ValueError(f"min_tokens must be at least 0, got {self.min_tokens}.")

    @abstractmethod
    def plan(self, layout: TokenLayout) -> BlockPlan | None:
        """The tiles to compute on ``layout``, on the CPU; None where the method is dense there."""

    def plan_or_dense(self, layout: TokenLayout) -> BlockPlan | None:
        """``plan``, or None where the sequence is shorter than ``min_tokens``."""
        return None if layout.num_tokens < self.min_tokens else self.plan(layout)

    @abstractmethod
    def ideal_density(self, layout: TokenLayout) -> float:
        """Share of the grid's pairs the exact rule keeps, before it is rounded to tiles."""

    def is_dense_at(self, *, block: int, step: int, num_steps: int, num_tokens: int) -> bool:
        """Whether this call is left dense by the schedule."""
        if num_tokens < self.min_tokens:
            return True
        blocks = range(self.dense_blocks) if isinstance(self.dense_blocks, int) else self.dense_blocks
        return block in blocks or not self.start_percent * num_steps <= step < self.end_percent * num_steps

    def sparse_share(self, *, num_blocks: int, num_steps: int) -> float:
        """Share of a run's attention calls that are sparse."""
        calls = [
            not self.is_dense_at(block=block, step=step, num_steps=num_steps, num_tokens=self.min_tokens)
            for block in range(num_blocks)
            for step in range(num_steps)
        ]
        return sum(calls) / len(calls)

    def options(self) -> dict[str, Any]:
        """The options that differ from their defaults, for records and pictures."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} describes a method and is not a diffusers processor by itself; "
            "use dit_accel.apply(model, processor) or pipe.set_attn_processor(processor)."
        )


def largest_within(target: float, candidates: int, density_of: Callable[[int], float]) -> int:
    """The last of ``candidates`` (ordered by density) whose density stays within ``target``, or within the first's."""
    target = max(target, density_of(0))
    low, high = 0, candidates - 1
    while low < high:
        middle = (low + high + 1) // 2
        if density_of(middle) <= target + 1e-12:
            low = middle
        else:
            high = middle - 1
    return low


def check_triple(name: str, value: object, *, also: int | None = None) -> None:
    """Refuse anything but three sizes of at least 1, one per axis; ``also`` is one more value to allow."""
    if not (
        isinstance(value, tuple)
        and len(value) == 3
        and all(isinstance(size, int) and (size >= 1 or size == also) for size in value)
    ):
        least = "at least 1" if also is None else f"at least 1 or {also}"
        raise ValueError(f"{name} must be three integers of {least} (frame, row, column), got {value!r}.")
