"""Probabilities of a key tile as packed float8 words, from float16 or float32 scores, for the 8-bit Hopper kernel.

Probabilities are stored as 2^8 p, because e4m3 ends at 448. An int32 of four of them is the word that one lane feeds
to wgmma, so a loop carries P as it is and nothing is shuffled: the four are the columns (0, 1) and (8, 9) of 16, and
values are stored with their keys in that order.

Exponentials are the bottleneck, so most avoid the special function unit: 2^x interpolated linearly between powers of
two is a shift of a float's bits, off by at most 3 % where e4m3 rounds by up to 6 %.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dit_accel.kernels.block_sparse.gluon_tools import exp2

P_SHIFT = gl.constexpr(8.0)
# A row that has met no key yet has this for its maximum, in log2 units: far below real scores, well inside float16.
NO_KEY = gl.constexpr(-40000.0)
# x + this, in float16 between 32 and 64, has five bits of fraction; shifted left by five it is 2^x, interpolated. The
# same in float32 between 512 and 1024. A little below the exact 47 and 639, which centres the error of interpolation.
BIAS_16 = gl.constexpr(46.9375)
BIAS_32 = gl.constexpr(638.9425)


@gluon.jit
def along(row, x):
    """[M] -> [M, 1] in the layout of x [M, N]; no data moves."""
    return gl.convert_layout(row, gl.SliceLayout(1, x.type.layout), assert_trivial=True)[:, None]


@gluon.jit
def _word2(asm: gl.constexpr, a, b):
    return gl.inline_asm_elementwise(asm, "=r,r,r", [a, b], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _pair(x):
    """A float32 as both halves of a float16 pair."""
    return gl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $1, $1;", "=r,f", [x], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _half(x, low: gl.constexpr):
    part: gl.constexpr = "a" if low else "b"
    return gl.inline_asm_elementwise(
        "{ .reg .b16 a, b; mov.b32 {a, b}, $1; cvt.f32.f16 $0, " + part + "; }",
        "=f,r",
        [x],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def joined(s):
    """float16 [M, N] -> its pairs as int32 [M, N / 2], as soon as wgmma is done.

    Where halves of the accumulator are used one by one, ptxas may take them apart before the wait, and then it
    serialises all wgmmas of the kernel.
    """
    a, b = gl.split(s.reshape([s.shape[0], s.shape[1] // 2, 2]))
    return gl.inline_asm_elementwise("mov.b32 $0, {$1, $2};", "=r,h,h", [a, b], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def parted(t, layout: gl.constexpr):
    """The inverse of ``joined``."""
    a, b = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [t], dtype=(gl.float16, gl.float16), is_pure=True, pack=1
    )
    return gl.convert_layout(gl.join(a, b).reshape([t.shape[0], t.shape[1] * 2]), layout, assert_trivial=True)


@gluon.jit
def _max_pairs(x):
    """Maxima of float16 pairs, int32 [M, n, 4] -> [M, 4]; n is a power of two."""
    M: gl.constexpr = x.shape[0]
    n: gl.constexpr = x.shape[1]
    if n == 1:
        return x.reshape([M, 4])
    else:
        a, b = gl.split(x.reshape([M, 2, n // 2, 4]).permute(0, 2, 3, 1))
        return _max_pairs(_word2("max.f16x2 $0, $1, $2;", a, b))


@gluon.jit
def _from_float16(t, m, c, first: gl.constexpr, guard: gl.constexpr):
    M: gl.constexpr = t.shape[0]
    N: gl.constexpr = t.shape[1] * 2
    factor = _pair(c)
    c = _half(factor, True)  # the maximum has to know the factor as it is rounded
    top = _max_pairs(t.reshape([M, N // 8, 4]))
    new_m = gl.max(gl.maximum(_half(top, True), _half(top, False)), 1) * c
    new_m = gl.convert_layout(new_m, m.type.layout, assert_trivial=True)
    if guard:
        new_m = gl.maximum(new_m, NO_KEY)
    if not first:
        new_m = gl.maximum(m, new_m)
    # the maximum is what its float16 offset says, so that all tiles of a row subtract the same
    offset = _pair((P_SHIFT + BIAS_16) - new_m)
    new_m = (P_SHIFT + BIAS_16) - _half(offset, True)
    z = gl.inline_asm_elementwise(
        "{ .reg .b32 z, low; mov.b32 low, 0x50005000; fma.rn.f16x2 z, $1, $2, $3; max.f16x2 z, z, low; "
        "shl.b32 $0, z, 5; }",
        "=r,r,r,r",
        [t, factor, along(offset, t)],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )
    lo, hi = gl.split(z.reshape([M, N // 32, 2, 2, 4]).permute(0, 1, 2, 4, 3))
    px = _word2(
        "{ .reg .b16 a, b; cvt.rn.satfinite.e4m3x2.f16x2 a, $1; cvt.rn.satfinite.e4m3x2.f16x2 b, $2; "
        "mov.b32 $0, {a, b}; }",
        lo.reshape([M, N // 4]),
        hi.reshape([M, N // 4]),
    )
    return px, new_m


@gluon.jit
def _linear_exp2(z):
    asm: gl.constexpr = "{ .reg .f32 t; max.f32 t, $1, 0f44000000; shl.b32 $0, t, 9; }"
    return gl.inline_asm_elementwise(asm, "=f,f", [z], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _from_float32(s, m, c, first: gl.constexpr, guard: gl.constexpr):
    M: gl.constexpr = s.shape[0]
    N: gl.constexpr = s.shape[1]
    new_m = gl.max(s, 1) * c
    if guard:
        new_m = gl.maximum(new_m, NO_KEY)
    if not first:
        new_m = gl.maximum(m, new_m)
    offset = P_SHIFT - new_m
    # columns are (32 keys, a, c, lane, pair); a word is the four (c, pair) of one (32 keys, a)
    lo, hi = gl.split(s.reshape([M, N // 32, 2, 2, 4, 2]).permute(0, 1, 2, 4, 5, 3))
    a, b = gl.split(lo.reshape([M, N // 4, 2]))
    d, e = gl.split(hi.reshape([M, N // 4, 2]))
    p0 = exp2(a * c + along(offset, a))
    p1 = exp2(b * c + along(offset, b))
    p2 = _linear_exp2(d * c + along(offset + BIAS_32, d))
    p3 = _linear_exp2(e * c + along(offset + BIAS_32, e))
    px = gl.inline_asm_elementwise(
        "{ .reg .b16 a, b; cvt.rn.satfinite.e4m3x2.f32 a, $2, $1; cvt.rn.satfinite.e4m3x2.f32 b, $4, $3; "
        "mov.b32 $0, {a, b}; }",
        "=r,f,f,f,f",
        [p0, p1, p2, p3],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )
    return px, new_m


@gluon.jit
def probabilities(s, m, c, first: gl.constexpr, guard: gl.constexpr):
    """Scores of a key tile -> (2^8 P as packed e4m3, running maximum).

    Args:
        s: float16 pairs as int32 [M, 64], or float32 [M, 128].
        m: maximum of the row so far in log2 units, float32 [M]; only its layout is used in the first tile of a row.
        c: factor on the scores, to log2 units.
        first: this is the first tile of a row.
        guard: whole rows may be hidden.
    """
    if s.dtype == gl.int32:
        return _from_float16(s, m, c, first, guard)
    else:
        return _from_float32(s, m, c, first, guard)
