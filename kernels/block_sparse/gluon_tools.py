"""Pieces shared by the Hopper kernels: packed probabilities, the queue of query tiles, coordinates of tiles."""

from __future__ import annotations

from dataclasses import dataclass

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

# Names that changed between releases of Gluon.
thread_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
view = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

TILE = gl.constexpr(128)
# Score of a hidden pair, a power of two so that its product with the scale is exact: a row that has met only hidden
# keys has p = exp2(0) = 1 for them, and the first key it sees wipes that out with a factor of exp2(-huge) = 0.
HIDDEN = gl.constexpr(-(2.0**100))
LN_2 = gl.constexpr(0.6931471805599453)


@dataclass(frozen=True)
class Spec:
    """What a kernel is compiled for.

    Args:
        tile: tokens of a tile per axis; their product is 128, all powers of two.
        half: where the second consumer's 64 rows start inside the tile.
        flat: the grid is one row of tokens, read through descriptors of three dimensions.
        dim: head dim, 64 or 128.
        hold_queries: consumers keep their queries in registers, else in shared memory.
        heads_inside: heads lie side by side in the last dimension of the descriptors, else in the first.
        masked: some tile may need a mask.
        ragged: some tile may stick out of the grid.
        window, union, dilated, disc: the rule inside partial tiles.
        text, text_lengths: there is a text span, with lengths per batch item.
        pooled: lists may name pooled keys.
    """

    tile: tuple[int, int, int]
    half: tuple[int, int, int]
    flat: bool
    dim: int
    hold_queries: bool
    heads_inside: bool
    ragged: bool
    window: bool
    union: bool
    dilated: bool
    disc: bool
    text: bool
    text_lengths: bool
    pooled: bool

    @property
    def masked(self) -> bool:
        return self.ragged or self.window or self.text or self.pooled


# 32 accumulators of a thread times the factors of their rows, skipped by a warp whose factors are all 1. In a thread's
# share of a wgmma accumulator elements 0 and 1 lie in one row, 2 and 3 in another, and so on in turn.
_SCALE_32 = gl.constexpr(
    "{ .reg .pred moved; setp.neu.f32 moved, $64, 0f3F800000; setp.neu.or.f32 moved, $66, 0f3F800000, moved; "
    "vote.sync.any.pred moved, moved, 0xffffffff; @!moved bra Lsame; "
    + " ".join(f"mul.f32 ${i}, ${i}, ${64 + i};" for i in range(32))
    + " Lsame: }"
)
_IN_PLACE_32 = gl.constexpr(",".join(["=f"] * 32 + [str(i) for i in range(32)] + ["f"] * 32))


@gluon.jit
def rescale(acc, factor):
    """``acc`` [M, N] times a factor per row, which is 1 for most tiles: see ``raised``."""
    factor = gl.convert_layout(factor, gl.SliceLayout(1, acc.type.layout))[:, None]
    return gl.inline_asm_elementwise(_SCALE_32, _IN_PLACE_32, [acc, factor], dtype=gl.float32, is_pure=True, pack=32)


@gluon.jit
def raised(m, top):
    # The shift of the softmax follows the row maximum only when that has grown by a factor of 2^8: probabilities up to
    # 256 are as exact in 16 bits, and accumulators are then rarely rescaled, which saves power.
    return gl.where(top > m + 8.0, top, m)


@gluon.jit
def exp2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def block_boundary(x):
    # x >= 0 always. ptxas hoists a wgmma wait above arithmetic that does not depend on it (here the whole softmax that
    # should hide P V), but not above a branch; this is the cheapest branch that it cannot prove away.
    gl.inline_asm_elementwise(
        "{ .reg .pred P; .reg .s32 t; mov.b32 t, $1; Lagain: setp.ge.s32 P, t, 0; @P bra Ldone; nanosleep.u32 t; "
        "add.s32 t, t, 1; bra Lagain; Ldone: mov.b32 $0, t; }",
        "=r,r",
        [x],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def pack(p, dtype: gl.constexpr):
    # float32 [M, N] -> int32 [M, N / 2] of 16-bit pairs: a loop carries these as whole registers, where 16-bit tensors
    # are taken apart and put together again with byte permutes
    a, b = gl.split(p.reshape([p.shape[0], p.shape[1] // 2, 2]))
    if dtype == gl.bfloat16:
        packed = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [a, b], dtype=gl.int32, is_pure=True, pack=1
        )
    else:
        packed = gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [a, b], dtype=gl.int32, is_pure=True, pack=1
        )
    return packed


@gluon.jit
def unpack(x, dtype: gl.constexpr, layout: gl.constexpr):
    a = x.to(gl.int16).to(dtype, bitcast=True)
    b = (x >> 16).to(gl.int16).to(dtype, bitcast=True)
    return gl.convert_layout(gl.join(a, b).reshape([x.shape[0], x.shape[1] * 2]), layout)


@gluon.jit
def row_sum(p):
    # sums only what one thread holds, [M, N] -> [M, 4]; the four lanes of a quad are added once per query tile
    x = p.reshape([p.shape[0], p.shape[1] // 8, 4, 2])
    return gl.sum(gl.sum(x, 1), 2)


@gluon.jit
def draw(queue):
    # one lane draws the next number; the others learn it in _drawn, a query tile later
    return gl.inline_asm_elementwise(
        "{ .reg .pred P; .reg .u32 lane; mov.u32 lane, %laneid; setp.eq.u32 P, lane, 0; mov.u32 $0, 0; "
        "@P atom.global.add.u32 $0, [$1], 1; }",
        "=&r,l",
        [queue.to(gl.int64)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def drawn(ticket):
    first = gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;", "=r,r", [ticket], dtype=gl.int32, is_pure=False, pack=1
    )
    return first + gl.num_programs(0)


@gluon.jit
def locate(work, sizes, S: gl.constexpr):
    """Item, head, row of tiles, and whether it is a row of the text; text rows come first, they run longest."""
    heads, num_tiles, text_tiles, text_items = sizes
    is_text = work != work
    rest = work
    rows = num_tiles
    if S.text:
        is_text = work < text_items
        rest = gl.where(is_text, work, work - text_items)
        rows = gl.where(is_text, text_tiles, num_tiles)
    pair = rest // rows
    return pair // heads, pair % heads, rest % rows, is_text


@gluon.jit
def origin(tile, grid, S: gl.constexpr):
    """Coordinates of a tile's first token. Division by float: exact for the few tiles a grid has, and short."""
    if S.flat:
        return 0, 0, tile * S.tile[2]
    tiles_h, tiles_w, per_frame, per_row = grid[3], grid[4], grid[5], grid[6]
    t = ((tile.to(gl.float32) + 0.5) * per_frame).to(gl.int32)
    rest = tile - t * (tiles_h * tiles_w)
    h = ((rest.to(gl.float32) + 0.5) * per_row).to(gl.int32)
    w = rest - h * tiles_w
    return t * S.tile[0], h * S.tile[1], w * S.tile[2]


@gluon.jit
def scalar(x):
    """The one element of a tensor that every thread holds."""
    return gl.sum(x, 0)


@gluon.jit
def read_order(orders, slot):
    """The query tile's work number, steps, masked steps, and valid keys of the ragged text tile."""
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    x = orders.index(slot).load(layout).reshape([2, 2])
    even, odd = gl.split(x)
    a, c = gl.split(even.reshape([1, 2]))
    b, d = gl.split(odd.reshape([1, 2]))
    return scalar(a), scalar(b), scalar(c), scalar(d)
