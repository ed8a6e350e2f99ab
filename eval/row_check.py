"""Attention judged on some query rows against float64, where a full reference would not fit.

An output passes when its error is at most twice that of torch's dense attention in the same dtype under the same mask,
on the same inputs: a measuring stick that scales with the problem, not a tolerance picked by hand.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels import BlockPlan, PooledKeys
from dit_accel.kernels.block_sparse.inputs import Inputs
from dit_accel.kernels.block_sparse.reference import reference_attention, visible, visible_pooled

ROWS = 192  # query rows judged of a large sequence
ROUNDINGS = 4 * torch.finfo(torch.float32).eps  # what two orders of summation differ by in float32

Attend = Callable[[Inputs], Tensor]  # -> output [B, L, H, D]


@dataclass(frozen=True)
class Outcome:
    """Relative errors against float64, ||got - exact|| / ||exact||; NaN where what has to be exact is not.

    Args:
        error: of what is judged.
        dense_error: of torch's dense attention in the same dtype.
        lse_error: largest difference of the LSE; 0 where none was given.
        empty_rows: rows without keys among those judged.
        row_error: of the worst row; a row far shorter than the others is measured by their length.
        dense_row_error: of the worst row of torch's dense attention.
        dense_lse_error: largest difference of the LSE of the rounded keys, where rounding is part of the method.
    """

    error: float
    dense_error: float
    lse_error: float = 0.0
    empty_rows: int = 0
    row_error: float = 0.0
    dense_row_error: float = 0.0
    dense_lse_error: float = 0.0

    @property
    def passed(self) -> bool:
        right_lse = self.lse_error < 2 * self.dense_lse_error + 1e-3
        return self.error <= 2 * self.dense_error + ROUNDINGS and right_lse

    def every_row_passed(self, times: float = 2.0) -> bool:
        """The same of each single row: a few wrong ones among thousands hardly show in the error of all.

        Args:
            times: the allowed multiple of dense attention's worst row.
        """
        return self.passed and self.row_error <= times * self.dense_row_error + 16 * ROUNDINGS


@dataclass(frozen=True, eq=False)
class RowReference:
    """The exact result of some query rows.

    Args:
        inputs: the call.
        rows: positions of the queries, int64 [rows].
        exact: output in float64, [B, rows, H, D].
        exact_lse: [B, H, rows].
    """

    inputs: Inputs
    rows: Tensor
    exact: Tensor
    exact_lse: Tensor

    def dense_error(self, inputs: Inputs | None = None) -> float:
        """Error of torch's dense attention under the mask; ``inputs`` to judge it on rounded ones."""
        return relative(self.dense if inputs is None else dense_attention(inputs, self.rows), self.exact)

    def judge(self, out: Tensor, dense_error: float, lse: Tensor | None = None) -> Outcome:
        """The outcome of a full output [B, L, H, D] and LSE [B, H, L]; an empty row has to be zeros and -inf."""
        got_lse = None if lse is None else lse[:, :, self.rows]
        outcome = judge_rows(out[:, self.rows], self.exact, self.dense, self.exact_lse, got_lse)
        return replace(outcome, dense_error=dense_error)

    @functools.cached_property
    def dense(self) -> Tensor:
        """Torch's dense attention of the rows under the mask."""
        return dense_attention(self.inputs, self.rows)


def judge_rows(got: Tensor, exact: Tensor, dense: Tensor, exact_lse: Tensor, lse: Tensor | None = None) -> Outcome:
    """The outcome of rows [B, R, H, D] and LSE [B, H, R]; an empty row has to be zeros and -inf."""
    seen = exact_lse > -torch.inf
    right = not bool(got.transpose(1, 2)[~seen].any())
    lse_error = 0.0
    if lse is not None:
        right = right and bool((lse[~seen] == -torch.inf).all())
        lse_error = float((lse.double() - exact_lse)[seen].abs().max()) if bool(seen.any()) else 0.0
    return Outcome(
        relative(got, exact) if right else torch.nan,
        relative(dense, exact),
        lse_error,
        int((~seen).sum()),
        worst_row(got, exact),
        worst_row(dense, exact),
    )


def row_reference(inputs: Inputs, rows: Tensor) -> RowReference:
    """The exact output of the queries ``rows``."""
    return RowReference(inputs, rows, *reference_attention(_double(inputs), rows))


def dense_attention(inputs: Inputs, rows: Tensor) -> Tensor:
    """Torch's dense attention of the queries ``rows`` under the call's mask, [B, rows, H, D]; zeros without keys."""
    bias, k, v = visible(inputs, rows), inputs.k, inputs.v
    seen = bias.any(-1, keepdim=True)
    if inputs.pooled is not None:
        of_pooled, weights = visible_pooled(inputs, inputs.pooled, rows)
        weights = weights.masked_fill(~of_pooled, -torch.inf)
        seen = seen | of_pooled.any(-1, keepdim=True)
        lead = torch.broadcast_shapes(bias.shape[:2], of_pooled.shape[:2])
        parts = bias.new_zeros(bias.shape, dtype=k.dtype).masked_fill_(~bias, -torch.inf), weights.to(k.dtype)
        bias = torch.cat([part.expand(*lead, -1, -1) for part in parts], -1)
        k, v = torch.cat([k, inputs.pooled.k], 1), torch.cat([v, inputs.pooled.v], 1)
    bias = torch.where(seen, bias, bias.new_ones(()))  # an empty row sees everything here and is blanked below
    dim = k.shape[-1]
    # Whole groups of eight channels, so that torch takes a kernel that computes as those judged do.
    q, k, v = (F.pad(x, (0, -dim % 8)).transpose(1, 2) for x in (inputs.q[:, rows], k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=inputs.scale)[..., :dim]
    return torch.where(seen, out, 0.0).transpose(1, 2)


def sample_rows(length: int, plan: BlockPlan, generator: torch.Generator) -> Tensor:
    """All rows of a small case; of a large one both ends, both ends of the grid, and a random sample."""
    if length <= 2048:
        return torch.arange(length)
    end = plan.prefix + plan.tiles.num_tokens
    ends = [range(8), range(plan.prefix, plan.prefix + 8), range(end - 8, end), range(length - 8, length)]
    sample = torch.randint(0, length, (ROWS - 32,), generator=generator)
    rows: Tensor = torch.cat([sample, *(torch.tensor(list(part)) for part in ends)]).unique()
    return rows


def poison(q: Tensor) -> None:
    """Leave NaN in the block of memory that the allocator hands to the next output shaped like ``q``."""
    torch.full(q.shape, torch.nan, device=q.device, dtype=q.dtype)


def relative(got: Tensor, exact: Tensor, least: float = torch.finfo(torch.float64).tiny) -> float:
    """||got - exact|| / ||exact||, or / ``least`` if that is more."""
    return float((got.double() - exact).norm() / exact.norm().clamp(min=least))


def worst_row(got: Tensor, exact: Tensor, least: float = torch.finfo(torch.float64).tiny) -> float:
    """The largest relative error of a row [..., D]; one far shorter than the others is measured by their length.

    ``least`` is what ``relative`` takes, of all rows together.
    """
    length = exact.norm(dim=-1)
    usual = (length.square().mean().sqrt() / 4).clamp(min=least / length.numel() ** 0.5)
    return float(((got.double() - exact).norm(dim=-1) / torch.maximum(length, usual)).max())


def judge_gradients(attend: Attend, inputs: Inputs, rows: Tensor) -> Outcome:
    """The worst gradient, for an upstream gradient that is zero but on ``rows``.

    One far smaller than the others, as that of queries with a single key, is measured by their size.
    """
    generator = torch.Generator(inputs.q.device).manual_seed(0)
    part = inputs.q[:, rows]
    upstream = torch.randn(part.shape, generator=generator, device=part.device, dtype=part.dtype)
    whole = torch.zeros_like(inputs.q).index_copy_(1, rows, upstream)
    wanted = _gradients(lambda call: reference_attention(call, rows)[0], _double(inputs), upstream.double())
    dense = _gradients(lambda call: dense_attention(call, rows), inputs, upstream)
    return judge_all(_gradients(attend, inputs, whole), wanted, dense)


def judge_all(got: Sequence[Tensor], wanted: Sequence[Tensor], dense: Sequence[Tensor]) -> Outcome:
    """The worst of several gradients; one far smaller than the others is measured by their size."""
    least = float(torch.stack([want.norm() for want in wanted]).norm()) / 10 or torch.finfo(torch.float64).tiny

    def errors(found: Sequence[Tensor]) -> tuple[float, float]:
        pairs = list(zip(found, wanted, strict=True))
        return max(relative(*pair, least) for pair in pairs), max(worst_row(*pair, least) for pair in pairs)

    (error, row_error), (dense_error, dense_row_error) = errors(got), errors(dense)
    return Outcome(error, dense_error, row_error=row_error, dense_row_error=dense_row_error)


def _gradients(attend: Attend, inputs: Inputs, upstream: Tensor) -> tuple[Tensor, ...]:
    """Of q, k and v, and of the pooled k and v if there are any."""
    pooled = inputs.pooled
    rows = (inputs.q, inputs.k, inputs.v, *(pooled[:2] if pooled else ()))
    q, k, v, *of_pooled = leaves = [x.detach().requires_grad_() for x in rows]
    if pooled is not None:
        pooled = PooledKeys(of_pooled[0], of_pooled[1], pooled.log_weights)
    with torch.enable_grad():
        return torch.autograd.grad(attend(replace(inputs, q=q, k=k, v=v, pooled=pooled)), leaves, upstream)


def _double(inputs: Inputs) -> Inputs:
    pooled = inputs.pooled
    pooled = pooled and PooledKeys(pooled.k.double(), pooled.v.double(), pooled.log_weights)
    return replace(inputs, q=inputs.q.double(), k=inputs.k.double(), v=inputs.v.double(), pooled=pooled)
