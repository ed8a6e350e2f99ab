"""Dense attention as a method, so that it can stand beside the others in a comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dit_accel.kernels.block_sparse.plan import BlockPlan
from dit_accel.layout import TokenLayout
from dit_accel.methods.base import StaticMethod


@dataclass(frozen=True, kw_only=True)
class DenseAttnProcessor(StaticMethod):
    """Every query sees every key, computed by the host's own kernel: O = softmax(Q K^T / sqrt(head dim)) V.

    It has no options of its own; the schedule options of every method are accepted and change nothing.

    Raises:
        ValueError: ``density`` below 1, which dense attention cannot keep.
    """

    name: ClassVar[str] = "dense"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.density not in (None, 1.0):
            raise ValueError(f"dense computes every pair and got density={self.density}; choose a sparse method.")

    def plan(self, layout: TokenLayout) -> BlockPlan | None:
        """None: dense on every layout."""
        return None

    def ideal_density(self, layout: TokenLayout) -> float:
        """1.0 on every layout."""
        return 1.0
