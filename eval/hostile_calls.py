"""What the checks of ``hostile_check`` share: their sizes, ordinary calls, and how results are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dit_accel.eval.kernel_check import attend
from dit_accel.eval.row_check import row_reference, sample_rows
from dit_accel.kernels import BlockPlan
from dit_accel.kernels.block_sparse.inputs import Inputs
from dit_accel.kernels.block_sparse.plan import Triple
from dit_accel.layout import TokenLayout
from dit_accel.plan import plan_from_tile_mask

Shape = tuple[int, Triple, Triple, int, int]  # batch, grid, tile, heads, head dim


@dataclass(frozen=True)
class Sizes:
    """How large the checks are; ``TINY`` is for trying out the checks themselves on a CPU.

    Args:
        fused: a projection to 56 heads whose rows lie further than 2^31 elements apart.
        apart: tokens, and elements from one to the next.
        elements: q, k and v of more than 2^31 elements each.
        list_width: entries per list, most of them unused, of 40 lists.
        many_heads: more than 65,535 (batch item, head) pairs.
        many_tiles: more query tiles than that.
        ordinary: what the other checks run.
        repeats: of one call.
    """

    device: str = "cuda"
    fused: Shape = (1, (49, 32, 64), (4, 4, 8), 56, 128)
    apart: tuple[int, int] = (1024, 2**22 + 64)
    elements: Shape = (2, (1, 375, 400), (1, 8, 16), 56, 128)
    list_width: int = 2**26
    many_heads: Shape = (1366, (1, 10, 13), (1, 8, 16), 48, 64)
    many_tiles: int = 65_540
    ordinary: Shape = (2, (5, 18, 22), (4, 4, 8), 4, 128)
    repeats: int = 200


FULL = Sizes()
TINY = Sizes(
    device="cpu",
    fused=(1, (1, 3, 5), (1, 2, 4), 2, 8),
    apart=(20, 64),
    elements=(2, (1, 3, 5), (1, 2, 4), 2, 8),
    list_width=50,
    many_heads=(3, (1, 3, 5), (1, 2, 4), 2, 8),
    many_tiles=5,
    ordinary=(2, (1, 3, 5), (1, 2, 4), 2, 8),
    repeats=3,
)


def sparse_plan(shape: Shape, device: str, text: int = 0) -> BlockPlan:
    """Each query tile sees itself, another one, and the last tile of the grid; text stands before the grid."""
    layout = TokenLayout(shape[1], text, "prefix" if text else "none")
    tiles = layout.boxes(shape[2])
    tile = torch.arange(tiles.num_tiles)
    keep = torch.zeros(tiles.num_tiles, tiles.num_tiles, dtype=torch.bool)
    for seen in (tile, (7 * tile + 3) % tiles.num_tiles, torch.full_like(tile, tiles.num_tiles - 1)):
        keep[tile, seen] = True
    return plan_from_tile_mask(layout, tiles, keep).to(device)


def normal(*size: int, device: str, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.empty(size, device=device, dtype=dtype).normal_(generator=generator)


def call_of(shape: Shape, sizes: Sizes, text: int = 0, gradients: bool = False) -> Inputs:
    """An ordinary call: views of a fused projection in half precision."""
    plan = sparse_plan(shape, sizes.device, text)
    fused = normal(shape[0], plan.num_tokens, 3, *shape[3:], device=sizes.device, dtype=torch.float16)
    q, k, v = fused.unbind(2)
    return Inputs(q, k, v, plan, shape[-1] ** -0.5, gradients=gradients)


def results(inputs: Inputs, backend: str) -> list[Tensor]:
    """Output and LSE; with ``inputs.gradients`` also the gradients of the outputs' sum of squares."""
    if not inputs.gradients:
        return list(attend(inputs, backend))
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    out, lse = attend(replace(inputs, q=leaves[0], k=leaves[1], v=leaves[2]), backend)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, out.detach())]


def expect_equal(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    names = ("output", "LSE", "gradient of q", "gradient of k", "gradient of v")
    for name, mine, yours in zip(names, got, want, strict=False):
        if not torch.equal(mine, yours):
            differs = int((mine != yours).sum())
            raise AssertionError(f"{differs} of {mine.numel()} elements of the {name} differ")


def expect_right(inputs: Inputs, out: Tensor, lse: Tensor) -> None:
    """Some rows of the first and the last head against float64."""
    heads = slice(None, None, inputs.q.shape[2] - 1)
    part = replace(inputs, q=inputs.q[-1:, :, heads], k=inputs.k[-1:, :, heads], v=inputs.v[-1:, :, heads])
    rows = sample_rows(out.shape[1], inputs.plan, torch.Generator().manual_seed(0)).to(out.device)
    reference = row_reference(part, rows)
    outcome = reference.judge(out[-1:, :, heads], reference.dense_error(), lse[-1:, heads])
    if not outcome.passed:
        raise AssertionError(str(outcome))


def alone(inputs: Inputs) -> Inputs:
    """The last head of the last batch item."""
    q, k, v = (x[-1:, :, -1:].contiguous() for x in (inputs.q, inputs.k, inputs.v))
    return replace(inputs, q=q, k=k, v=v)


def last(found: Sequence[Tensor]) -> list[Tensor]:
    """What ``alone`` has to give, from the results of all."""
    return [found[0][-1:, :, -1:], found[1][-1:, -1:], *(x[-1:, :, -1:] for x in found[2:])]


def contiguous(inputs: Inputs) -> Inputs:
    return replace(inputs, q=inputs.q.contiguous(), k=inputs.k.contiguous(), v=inputs.v.contiguous())
