"""What list attention and log-linear attention should give, and torch's dense attention as the measuring stick."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.eval.list_cases import LogLinearCall, LogLinearCase
from dit_accel.eval.row_check import ROUNDINGS, worst_row
from dit_accel.kernels.pyramid import list_reference
from dit_accel.kernels.pyramid.hierarchy import hierarchical_top_k
from dit_accel.kernels.pyramid.lists import ListInputs
from dit_accel.kernels.pyramid.log_linear_reference import log_linear_reference, seen_weights
from dit_accel.kernels.pyramid.means import Levels, coarser, curve_means


class Choice(NamedTuple):
    """What blocks chose on each level, [B, H, n_l, K_l] from level 1 on, and the means [B, n_l, H, D] they chose by."""

    chosen: list[Tensor]
    queries: list[Tensor]
    keys: list[Tensor]
    mean_error: float  # of the worst mean, against float64


def lists_exact(inputs: ListInputs) -> tuple[Tensor, Tensor]:
    """Output and LSE in the order of the sequence, in float64 for float64 inputs."""
    out, lse = list_reference.forward(inputs)
    return out, along_sequence(lse, inputs)


def along_sequence(lse: Tensor, inputs: ListInputs) -> Tensor:
    """The LSE [B, H, N] along the curve as [B, H, L], -inf off the curve."""
    empty = lse.new_full((*lse.shape[:2], inputs.q.shape[1]), -torch.inf)
    return empty.index_copy(2, inputs.order.long(), lse)


def lists_dense(inputs: ListInputs) -> tuple[Tensor, Tensor]:
    """The same by torch's dense attention; the keys come once for each pass, as a pass may name what another does."""
    order = inputs.order.long()
    q, k, v = (x[:, order] for x in (inputs.q, inputs.k, inputs.v))
    weights = q.new_zeros(1, 1, len(order), dtype=torch.float32)
    if inputs.pooled is not None:
        k, v = torch.cat([k, inputs.pooled.k], 1), torch.cat([v, inputs.pooled.v], 1)
        of_pooled = inputs.pooled.log_weights[:, :, 0]
        weights = torch.cat([weights.expand(*of_pooled.shape[:2], -1), of_pooled], -1)
    masks = torch.broadcast_tensors(*(list_reference.named(inputs, lists) > 0 for lists in inputs.lists))
    k, v, weights = (torch.cat([x] * len(masks), dim) for x, dim in ((k, 1), (v, 1), (weights, 2)))
    out, lse = weighted_attention(q, k, v, torch.cat(masks, -1), weights, inputs.scale)
    return torch.zeros_like(inputs.q).index_copy(1, order, out), along_sequence(lse, inputs)


def weighted_attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, log_weights: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Torch's dense attention with a number added to each key's scores: output [B, R, H, D] and LSE [B, H, R].

    A mask of 16 bits would round the numbers to three digits. So they ride on three more channels, in parts that leave
    nothing to round, where the queries hold ones.

    Args:
        q: [B, R, H, D].
        k, v: [B, K, H, D].
        seen: bool [B or 1, H or 1, R, K].
        log_weights: float32 [B or 1, H or 1, K], added to the scaled scores; -inf hides a key.
        scale: factor on the scores.
    """
    batch, keys, heads, dim = k.shape
    seen = (seen & (log_weights > -torch.inf)[:, :, None]).expand(batch, heads, -1, -1)
    rest = torch.where(log_weights > -torch.inf, log_weights / scale, 0.0).expand(batch, heads, keys)
    parts = []
    for _ in range(3):
        parts.append(rest.to(k.dtype))
        rest = rest - parts[-1].float()
    channels = torch.stack(parts, -1).transpose(1, 2)
    spare = 3 + (-dim - 3) % 8  # whole groups of eight channels, for torch's fast kernels
    q = torch.cat([q, q.new_ones(*q.shape[:3], 3), q.new_zeros(*q.shape[:3], spare - 3)], -1)
    k = F.pad(torch.cat([k, channels], -1), (0, spare - 3))
    q, k, v = (x.transpose(1, 2) for x in (q, k, F.pad(v, (0, spare))))
    any_seen = seen.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen | ~any_seen, scale=scale)[..., :dim]
    scores = (q.float() @ k.float().mT * scale).masked_fill(~seen, -torch.inf)
    if scores.requires_grad:  # kernels round the gradient of the scores before it meets q and k
        scores.register_hook(lambda gradient: gradient.to(q.dtype).float())
    lse = scores.logsumexp(-1)
    return torch.where(any_seen, out, 0.0).transpose(1, 2), lse


def choice_of(case: LogLinearCase, call: LogLinearCall) -> Choice:
    """The choice that ``log_linear_attention`` makes."""
    levels = Levels(case.tokens, case.block, case.levels, case.prefix + case.suffix)
    tensors = tuple(x.detach() for x in (call.q, call.k, call.v))
    means = curve_means(tensors, call.order, levels, case.prefix)
    exact = curve_means([x.double() for x in tensors], call.order, levels, case.prefix)
    errors = [worst_row(*pair) for mean, want in zip(means, exact, strict=True)
              for pair in zip(levels.split(mean), levels.split(want), strict=True)]  # fmt: skip
    queries, keys = levels.split(means[0]), levels.split(means[1])
    return Choice(hierarchical_top_k(queries, keys, case.top_k, case.block), queries, keys, max(errors))


def expect_best(choice: Choice, case: LogLinearCase) -> None:
    """Raise where a mean is off by more than its roundings, or a block left out one that scores higher."""
    if choice.mean_error > case.levels * torch.finfo(choice.keys[0].dtype).eps + 16 * ROUNDINGS:
        raise AssertionError(f"a mean is off by {choice.mean_error:.1e}")
    parents = None
    for level in range(case.levels, 0, -1):
        q, k = (x[level - 1].transpose(1, 2).double() for x in (choice.queries, choice.keys))
        chosen = choice.chosen[level - 1]
        blocks = k.shape[2]
        if chosen.shape != (*k.shape[:3], min(case.top_k, blocks)) or bool((chosen.diff(dim=-1) <= 0).any()):
            raise AssertionError(f"level {level} chose {list(chosen.shape)}, or not in ascending order")
        taken = _mask(chosen, blocks)
        allowed = torch.ones_like(taken)
        if parents is not None:
            index = torch.arange(blocks, device=k.device) // case.block
            allowed = parents[:, :, index][..., index]
        scores = q @ k.mT
        least = scores.masked_fill(~taken, torch.inf).amin(-1)
        best_left = scores.masked_fill(taken | ~allowed, -torch.inf).amax(-1)
        tie = 2 * k.shape[3] * torch.finfo(torch.float32).eps * (q.abs() @ k.abs().mT).amax(-1)  # float32 sums
        if bool((taken & ~allowed).any()) or bool((least < best_left - tie).any()):
            raise AssertionError(f"level {level} chose what is not best")
        parents = taken


def log_linear_exact(case: LogLinearCase, call: LogLinearCall, chosen: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Output [B, L, H, D] and LSE [B, H, L] from the formulas, given the choice."""
    return log_linear_reference(
        call.q, call.k, call.v, order=call.order, top_k=case.top_k, block=case.block, levels=case.levels,
        exclude_covered=case.exclude_covered, prefix=case.prefix, text_lengths=call.text_lengths, chosen=chosen,
    )  # fmt: skip


def log_linear_dense(case: LogLinearCase, call: LogLinearCall, chosen: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The same by torch's dense attention over tokens, text and means, which have the dtype of tokens."""
    length, tokens = call.q.shape[1], case.tokens
    position = torch.arange(length, device=call.q.device)
    rows = torch.cat([call.order.long(), position[: case.prefix], position[case.prefix + tokens :]])
    q, k, v = (x[:, rows] for x in (call.q, call.k, call.v))
    masks = [_mask(x, x.shape[2]) for x in chosen]
    weights = seen_weights(masks, tokens, case.block, case.exclude_covered)
    seen = torch.ones(*masks[0].shape[:2], length, length, dtype=torch.bool, device=q.device)
    seen[:, :, :tokens, :tokens] = weights[..., :tokens] > 0
    if call.text_lengths is not None:
        valid = torch.arange(length - tokens, device=q.device) < call.text_lengths[:, None]
        seen[..., tokens:] = valid[:, None, None]
    of_means = F.pad(weights[..., tokens:] > 0, (0, 0, 0, length - tokens))
    log_weights = [torch.zeros(length, device=q.device)]
    for (mean_k, stands_for), (mean_v, _) in zip(_means(case, k), _means(case, v), strict=True):
        k, v = torch.cat([k, mean_k], 1), torch.cat([v, mean_v], 1)
        log_weights.append(stands_for.float().log())
    seen, scale = torch.cat([seen, of_means], -1), case.head_dim**-0.5
    out, lse = weighted_attention(q, k, v, seen, torch.cat(log_weights)[None, None], scale)
    places = rows.argsort()
    return out[:, places], lse[:, :, places]


def _means(case: LogLinearCase, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Of rows along the curve, text after them: the means of each level and how many tokens each stands for."""
    fine, stands_for = rows[:, : case.tokens], torch.ones(case.tokens, dtype=torch.long, device=rows.device)
    for _ in range(case.levels):
        fine, stands_for = coarser(fine, stands_for, case.block)
        yield fine, stands_for


def _mask(chosen: Tensor, blocks: int) -> Tensor:
    """Indices [B, H, n, K] as a mask [B, H, n, blocks]."""
    return chosen.new_zeros(*chosen.shape[:3], blocks, dtype=torch.bool).scatter_(-1, chosen.long(), True)
