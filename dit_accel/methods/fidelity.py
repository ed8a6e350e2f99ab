"""How far sparse attention is from dense attention, measured on a few queries: in the softmax and in the output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dit_accel.methods.attention import AttnCall, AttnResult, BoundAttention, QueryGroups
from dit_accel.methods.correction import dense_anchors, discarded_mass

_GOLDEN = 40503  # 2**16 over the golden ratio: its multiples fill [0, 2**16) evenly, however many they are


class OutputSums(NamedTuple):
    """What the distance of a sparse output s from a dense output d is read from; the sums of several calls add up.

    Each is a sum over queries and channels, one number per head. A dense output of zeros, which has no relative error,
    counts as met (error 0, cosine 1) by a sparse output of zeros and as missed (error infinite, cosine 0) by any other.

    Args:
        difference_l1, dense_l1: of |s - d| and of |d|.
        difference, dense, sparse: of (s - d)^2, d^2 and s^2.
        product: of s d.
    """

    difference_l1: Tensor
    dense_l1: Tensor
    difference: Tensor
    dense: Tensor
    sparse: Tensor
    product: Tensor

    @property
    def error(self) -> Tensor:
        """Relative L2 error ||s - d|| / ||d||."""
        return _ratio(self.difference.sqrt(), self.dense.sqrt())

    @property
    def error_l1(self) -> Tensor:
        """Relative L1 error: the sum of |s - d| over that of |d|."""
        return _ratio(self.difference_l1, self.dense_l1)

    @property
    def cosine(self) -> Tensor:
        """Cosine similarity of s and d, in [-1, 1]."""
        lengths = self.sparse.sqrt() * self.dense.sqrt()
        both_zero = (self.sparse == self.dense).to(lengths)
        return torch.where(lengths == 0, both_zero, self.product / lengths).clamp(-1, 1)


@dataclass(frozen=True, eq=False)
class ProbedCall:
    """What one sparse call left out and got wrong, as measured on one dense query of each group (``scattered``).

    Args:
        step, block, branch: the call.
        mass: softmax share of the keys that were left out, float32 [B, H, query groups] in [0, 1].
        sums: of the output and its distance from dense attention's, [B, H].
    """

    step: int
    block: int
    branch: str | None
    mass: Tensor
    sums: OutputSums

    @property
    def error(self) -> Tensor:
        """Relative L2 error of the output at the queries, [B, H]."""
        return self.sums.error

    @property
    def error_l1(self) -> Tensor:
        """Relative L1 error of the output at the queries, [B, H]."""
        return self.sums.error_l1

    @property
    def cosine(self) -> Tensor:
        """Cosine similarity of the output and dense attention's at the queries, [B, H]."""
        return self.sums.cosine


@torch.no_grad()
def probed_call(call: AttnCall, attention: BoundAttention, result: AttnResult, branch: str | None) -> ProbedCall:
    """Measures one sparse call, whose result must have its LSE; waits for no device.

    Args:
        call: what was asked.
        attention: the method that answered.
        result: its answer.
        branch: of guidance.
    """
    assert result.lse is not None, "asked for"
    anchors = dense_anchors(call, attention.layout, scattered(attention.groups()))
    sums = output_sums(result.out[:, anchors.positions], anchors.out)
    return ProbedCall(call.place.step, call.place.block, branch, discarded_mass(anchors, result.lse), sums)


def scattered(groups: QueryGroups) -> QueryGroups:
    """The groups with anchors all over them, group by group at another place, so that together they stand for all.

    Their middles would not: a tile's keys lie around its middle, and there a correction is exact.
    """
    members = groups.group_of.argsort(stable=True)
    numbers = torch.arange(len(groups.anchors), device=members.device)
    ends = torch.searchsorted(groups.group_of[members], numbers, right=True)
    starts = ends.roll(1).index_fill(0, numbers[:1], 0)
    places = numbers * _GOLDEN % 2**16 * (ends - starts) // 2**16
    return QueryGroups(members[starts + places], groups.group_of)


def output_sums(sparse: Tensor, dense: Tensor) -> OutputSums:
    """The sums of one call.

    Args:
        sparse, dense: outputs at the same queries, [B, R, H, D].

    Returns:
        Sums [B, H], float32 (float64 for float64 outputs).
    """
    compute = torch.promote_types(sparse.dtype, torch.float32)
    s, d = sparse.detach().to(compute), dense.detach().to(compute)
    difference = s - d
    terms = (difference.abs(), d.abs(), difference.square(), d.square(), s.square(), s * d)
    return OutputSums(*(term.sum((1, 3)) for term in terms))


def _ratio(distance: Tensor, length: Tensor) -> Tensor:
    return torch.where((distance == 0) & (length == 0), 0.0, distance / length)
