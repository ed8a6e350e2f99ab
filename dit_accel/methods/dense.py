"""Dense attention as a method, so that it can stand beside the others in a comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dit_accel.kernels.block_sparse.plan import BlockPlan
from dit_accel.layout import TokenLayout
from dit_accel.methods.base import AttnMethod, StaticMethod


@dataclass(frozen=True, kw_only=True)
class DenseAttnProcessor(StaticMethod):
    """Every query sees every key, computed by the host's own kernel: O = softmax(Q K^T / sqrt(head dim)) V.

    The schedule options of every method are accepted and change nothing.

    Args:
        kernel: what computes it while it is applied: the name of one of diffusers' attention backends that is installed
            (``native``, ``_native_cudnn``, ``_native_math``, ``xformers``, ...) or ``fa4``, FlashAttention-4 of the
            package flash-attn-4. Default None: the backend that the pipeline has.

    Raises:
        ValueError: ``density`` below 1, which dense attention cannot keep.
    """

    name: ClassVar[str] = "dense"

    kernel: str | None = None

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


def kernel_of(method: AttnMethod) -> str | None:
    """The kernel that a dense method names; None for any other."""
    return method.kernel if isinstance(method, DenseAttnProcessor) else None
