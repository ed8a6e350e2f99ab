"""What a sparse output lacks, measured on one dense query per group: to correct the output, or to be reported."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels.block_sparse.backends import Backend
from dit_accel.kernels.block_sparse.dense_rows import dense_rows
from dit_accel.kernels.pyramid.text import text_padding
from dit_accel.layout import TokenLayout
from dit_accel.methods.attention import AttnCall, AttnResult, BoundAttention, QueryGroups

Correction = Literal["add", "merge"]


class Anchors(NamedTuple):
    """Dense attention at the anchors of the query groups.

    Args:
        positions: of the anchors in the sequence, int64 [groups].
        out: [B, groups, H, D].
        lse: [B, H, groups].
    """

    positions: Tensor
    out: Tensor
    lse: Tensor


def dense_anchors(call: AttnCall, layout: TokenLayout, groups: QueryGroups) -> Anchors:
    """Dense attention of one query in the middle of each group."""
    positions = groups.anchors + layout.prefix
    hidden = None
    if call.text_lengths is not None:
        on_grid = (0, layout.visual_tokens) if layout.prefix else (layout.visual_tokens, 0)
        hidden = F.pad(text_padding(layout.text_tokens, call.text_lengths), on_grid)
    out, lse = dense_rows(call.q[:, positions], call.k, call.v, scale=call.scale, hidden=hidden)
    return Anchors(positions, out, lse)


def discarded_mass(anchors: Anchors, lse: Tensor) -> Tensor:
    """Share tau of the softmax that a sparse call left out: 1 - exp(LSE of its keys - LSE of all), per group.

    Args:
        anchors: the dense ones.
        lse: of the sparse call, [B, H, L].

    Returns:
        float32 [B, H, groups] in [0, 1]; rounding below 0 is cut off. Like the dense LSE it carries no gradient.
    """
    return -torch.expm1(lse[..., anchors.positions].detach().float() - anchors.lse.float()).clamp(max=0)


class CorrectedAttention(BoundAttention):
    """A sparse attention whose output is moved by what its anchors show to be missing (arXiv 2505.11254).

    With o the dense and s the sparse output, a the anchor of query i's group and tau the mass that the sparse call left
    out at a:

        "add":    o_i ~ s_i + (o_a - s_a)
        "merge":  o_i ~ (1 - tau) s_i + (o_a - (1 - tau) s_a)

    "merge" takes what was left out to be one key with the softmax share tau, and so stays a weighted mean of values.
    At the anchors both are dense attention; where nothing was left out both change nothing. Gradients take tau for a
    constant.
    """

    def __init__(self, inner: BoundAttention, kind: Correction) -> None:
        self._inner, self._kind = inner, kind
        self.layout, self.tile = inner.layout, inner.tile
        self._groups = inner.groups()
        self._anchors_share = len(self._groups.anchors) / self.layout.num_tokens
        self.density = min(1.0, inner.density + self._anchors_share)

    def attend(self, call: AttnCall) -> AttnResult:
        out, lse, density = self._inner.attend(replace(call, with_lse=call.with_lse or self._kind == "merge"))
        anchors = dense_anchors(call, self.layout, self._groups)
        kept: float | Tensor = 1.0
        if self._kind == "merge":
            assert lse is not None, "asked for"
            kept = (1 - discarded_mass(anchors, lse)).transpose(1, 2)[..., None].to(out.dtype)
        missing = anchors.out - kept * out[:, anchors.positions]
        group = self._groups.group_of
        on_grid = slice(self.layout.prefix, self.layout.prefix + self.layout.visual_tokens)
        kept_rows = kept if isinstance(kept, float) else kept[:, group]
        corrected = missing[:, group] + kept_rows * out[:, on_grid]
        parts = [out[:, : self.layout.prefix], corrected, out[:, on_grid.stop :]]
        return AttnResult(torch.cat(parts, 1), lse if call.with_lse else None, density + self._anchors_share)

    def groups(self) -> QueryGroups:
        return self._groups

    def check(self, q: Tensor, backend: Backend) -> None:
        self._inner.check(q, backend)
