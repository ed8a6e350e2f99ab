"""What every method shares: the vocabulary of options, when it is dense, and how ``density=`` is solved."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn, get_args

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse.plan import AxisWindows, BlockPlan, TileGrid
from dit_accel.layout import TokenLayout
from dit_accel.methods.attention import BoundAttention, PlannedAttention, SelectedAttention
from dit_accel.methods.correction import CorrectedAttention, Correction
from dit_accel.plan import plan_from_windows, windows_density


@dataclass(frozen=True, kw_only=True)
class AttnMethod(ABC):
    """One way to make attention sparse, described by data.

    Subclasses answer which tiles a query tile sees: ``StaticMethod`` from the layout alone, ``DynamicMethod`` from the
    queries and keys of each call; others bring an attention of their own.

    Args:
        density: share of the grid's query-key pairs to compute, in (0, 1]; replaces the method's own knobs, which
            are solved for on each layout: the most pairs that stay within ``density``, or the method's least where
            that is more. 1.0 keeps every pair. None (default) uses the knobs as given.
        start_percent: share of the denoising steps, from the first, that stay dense. Default 0.
        end_percent: share of the denoising steps after which attention is dense again. Default 1.
        dense_blocks: the first n transformer blocks stay dense, or a tuple of block indices. Default 0.
        min_tokens: sequences shorter than this stay dense. Default 0.
        delta: correction of the sparse output by one dense query per query tile (arXiv 2505.11254): what the tiles left
            out changes there is given to the whole tile, "add"ed as it is or "merge"d as the share of the softmax that
            was left out. Costs one query in a tile of dense attention. Default None, no correction.
    """

    name: ClassVar[str]
    # Whether it answers calls of whole attention modules too: they then run outside compiled graphs.
    whole_modules: ClassVar[bool] = False

    density: float | None = None
    start_percent: float = 0.0
    end_percent: float = 1.0
    dense_blocks: int | tuple[int, ...] = 0
    min_tokens: int = 0
    delta: Correction | None = None

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
        if self.delta is not None and self.delta not in get_args(Correction):
            raise ValueError(f"delta must be add, merge or None, got {self.delta!r}.")

    @abstractmethod
    def bind(self, layout: TokenLayout, device: torch.device) -> BoundAttention | None:
        """The method on ``layout``; None where it is dense there."""

    def attention(self, layout: TokenLayout, device: torch.device | str = "cpu") -> BoundAttention | None:
        """The method on ``layout``, corrected if ``delta`` says so; None where it is dense or below ``min_tokens``."""
        if layout.num_tokens < self.min_tokens:
            return None
        with torch.inference_mode(False):  # kept for calls that have gradients
            attention = self.bind(layout, torch.device(device))
            return attention if attention is None or self.delta is None else CorrectedAttention(attention, self.delta)

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


class StaticMethod(AttnMethod):
    """A method whose tiles follow from the layout alone."""

    @abstractmethod
    def plan(self, layout: TokenLayout) -> BlockPlan | None:
        """The tiles to compute on ``layout``, on the CPU; None where the method is dense there."""

    def bind(self, layout: TokenLayout, device: torch.device) -> BoundAttention | None:
        plan = self.plan(layout)
        return None if plan is None else PlannedAttention(layout, plan.to(device))


class WindowMethod(StaticMethod):
    """A static method with an exact rule of one interval of keys per axis and query coordinate."""

    @abstractmethod
    def boxes(self, layout: TokenLayout) -> TileGrid:
        """The grid cut into tiles, the same ones for every ``density``."""

    @abstractmethod
    def windows(self, layout: TokenLayout) -> AxisWindows:
        """The rule on ``layout``."""

    def plan(self, layout: TokenLayout) -> BlockPlan:
        """The boxes that the rule touches, and the rule itself inside those that it cuts."""
        return plan_from_windows(layout, self.boxes(layout), self.windows(layout))

    def ideal_density(self, layout: TokenLayout) -> float:
        """Share of the grid's pairs that the rule keeps."""
        return windows_density(layout.boxes((1, 1, 1)), self.windows(layout))


@dataclass(frozen=True, kw_only=True)
class DynamicMethod(AttnMethod):
    """A method that chooses tiles from the queries and keys of each call.

    Args:
        refresh: the tiles chosen at one step are kept for this many steps, per layer and guidance branch. Default 1:
            chosen anew at every step.
    """

    refresh: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.refresh < 1:
            raise ValueError(f"refresh must be at least 1 step, got {self.refresh}.")

    @abstractmethod
    def tiles(self, layout: TokenLayout) -> TileGrid:
        """The grid cut into the tiles that are chosen among."""

    @abstractmethod
    def select(self, layout: TokenLayout, q: Tensor, k: Tensor) -> BlockPlan:
        """The tiles of one call with queries and keys [B, L, H, D], on their device, without reading anything back."""

    def bind(self, layout: TokenLayout, device: torch.device) -> BoundAttention | None:
        def select(q: Tensor, k: Tensor) -> BlockPlan:
            return self.select(layout, q, k)

        density = layout.joint_density(self.ideal_density(layout))
        return SelectedAttention(layout, device, self.tiles(layout), density, select, self.refresh)


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
