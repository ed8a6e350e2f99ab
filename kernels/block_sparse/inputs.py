"""What every backend of the operator is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from dit_accel.kernels.block_sparse.plan import BlockPlan, PooledKeys

Precision = Literal["native", "fp8", "int8"]


@dataclass(frozen=True, eq=False)
class Inputs:
    """One call of the operator, checked and on one device.

    Args:
        q, k, v: [B, L, H, D], any strides.
        plan: tiles and lists.
        scale: factor on the scores.
        text_lengths: valid text tokens per batch item, int32 [B]; None: all of them.
        pooled: the keys that the plan's pooled tiles name.
        with_lse: whether the caller wants the LSE.
        gradients: whether the caller may ask for gradients; these need the LSE.
        precision: "native" computes in the dtype of q, k and v; "fp8" and "int8" round them to 8 bits on the way in.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    plan: BlockPlan
    scale: float
    text_lengths: Tensor | None = None
    pooled: PooledKeys | None = None
    with_lse: bool = True
    gradients: bool = False
    precision: Precision = "native"

    @property
    def text_start(self) -> int:
        """Position of the first text token."""
        return 0 if self.plan.prefix else self.plan.tiles.num_tokens

    @property
    def text(self) -> int:
        """Text tokens, padding included."""
        return self.plan.prefix + self.plan.suffix


class Gradients(NamedTuple):
    """Of q, k and v, and of the pooled k and v if there are any, in the dtype of the inputs."""

    q: Tensor
    k: Tensor
    v: Tensor
    pooled_k: Tensor | None = None
    pooled_v: Tensor | None = None
