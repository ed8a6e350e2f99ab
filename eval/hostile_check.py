"""Calls that have broken other attention kernels, tried on this machine's GPU.

    python -m dit_accel.eval.hostile_check --output eval/results/hostile-check.json

Sizes beyond 32-bit indices, launches beyond 65,535 blocks, streams, graphs, threads on a cold cache, another GPU,
extreme numbers. The full run needs about 40 GiB of GPU memory. Prints one line per check and backend.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dit_accel.eval.hostile_calls import (
    FULL,
    Shape,
    Sizes,
    alone,
    call_of,
    contiguous,
    expect_equal,
    expect_right,
    last,
    normal,
    results,
    sparse_plan,
)
from dit_accel.eval.kernel_cases import BACKENDS
from dit_accel.eval.kernel_check import attend
from dit_accel.eval.machine import machine, source_version, versions
from dit_accel.kernels import BlockPlan, TileGrid, block_sparse_attention
from dit_accel.kernels.block_sparse import backends
from dit_accel.kernels.block_sparse.inputs import Inputs
from dit_accel.layout import TokenLayout
from dit_accel.plan import plan_from_tile_mask

Check = Callable[[str, Sizes], None]  # backend, sizes; raises where something is wrong


class NotHere(Exception):
    """A check that this machine has no means for."""


def fused_views_past_32_bits(backend: str, sizes: Sizes) -> None:
    """Views into one projection reach further than 2^31 elements, forward and gradients."""
    batch, _, _, heads, dim = sizes.fused
    plan = sparse_plan(sizes.fused, sizes.device)
    fused = normal(batch, plan.num_tokens, 3 * heads * dim, device=sizes.device, dtype=torch.bfloat16)
    if sizes.device == "cpu":
        fused = fused.half()  # Triton's interpreter multiplies no bfloat16
    q, k, v = (x.unflatten(-1, (heads, dim)) for x in fused.chunk(3, -1))
    inputs = Inputs(q, k, v, plan, dim**-0.5, gradients=True)
    found = results(inputs, backend)
    expect_right(inputs, found[0], found[1])
    expect_equal(found, results(contiguous(inputs), backend))


def tokens_far_apart(backend: str, sizes: Sizes) -> None:
    tokens, stride = sizes.apart
    shape: Shape = (1, (1, 1, tokens), (1, 1, 128), 2, 8 if sizes.device == "cpu" else 128)
    wide = torch.empty(tokens, stride, device=sizes.device, dtype=torch.float16)
    channels = shape[3] * shape[4]
    wide[:, : 3 * channels] = normal(tokens, 3 * channels, device=sizes.device, dtype=torch.float16)
    q, k, v = (wide[None, :, i * channels : (i + 1) * channels].unflatten(-1, shape[3:]) for i in range(3))
    inputs = Inputs(q, k, v, sparse_plan(shape, sizes.device), shape[4] ** -0.5, gradients=True)
    expect_equal(results(inputs, backend), results(contiguous(inputs), backend))


def tensors_past_32_bits(backend: str, sizes: Sizes) -> None:
    batch, _, _, heads, dim = sizes.elements
    plan = sparse_plan(sizes.elements, sizes.device)
    shape = (batch, plan.num_tokens, heads, dim)
    q, k, v = (normal(*shape, device=sizes.device, dtype=torch.float16, seed=seed) for seed in range(3))
    inputs = Inputs(q, k, v, plan, dim**-0.5, gradients=True)
    found = results(inputs, backend)
    expect_right(inputs, found[0], found[1])
    expect_equal(last(found), results(alone(inputs), backend))


def lists_past_32_bits(backend: str, sizes: Sizes) -> None:
    """Lists so wide that the last one starts beyond 2^31 entries."""
    inputs = call_of((1, (1, 1, 20 * 128 - 5), (1, 1, 128), 2, sizes.ordinary[4]), sizes)
    plan = inputs.plan
    wide = torch.zeros(1, 2, plan.tiles.num_tiles, sizes.list_width, dtype=torch.int32, device=sizes.device)
    wide[..., : plan.indices.shape[-1]] = plan.indices
    counts, partial = (x.expand(1, 2, -1).contiguous() for x in (plan.counts, plan.partial))
    padded = replace(plan, counts=counts, partial=partial, indices=wide)
    expect_equal(results(replace(inputs, plan=padded), backend), results(inputs, backend))


def many_heads(backend: str, sizes: Sizes) -> None:
    inputs = call_of(sizes.many_heads, sizes, gradients=True)
    found = results(inputs, backend)
    expect_right(inputs, found[0], found[1])
    expect_equal(last(found), results(alone(inputs), backend))


def many_tiles(backend: str, sizes: Sizes) -> None:
    """Each query tile sees the first tile and itself: what the last one gives, it gives in a sequence of the two."""
    tokens = 128 * sizes.many_tiles - 5

    def of(tokens: int, q: Tensor, k: Tensor, v: Tensor) -> Inputs:
        tiles = TileGrid((1, 1, tokens), (1, 1, 128))
        own = torch.arange(tiles.num_tiles, device=sizes.device, dtype=torch.int32)
        indices = torch.stack([own, own * 0], -1)[None, None]
        ragged = (own == tiles.num_tiles - 1).int()[None, None]
        plan = BlockPlan(tiles, 1 + (own > 0).int()[None, None], ragged, indices)
        return Inputs(q, k, v, plan, 0.125, gradients=True)

    q, k, v = normal(1, tokens, 3, 1, 64, device=sizes.device, dtype=torch.float16).unbind(2)
    pair = [torch.cat([x[:, :128], x[:, -123:]], 1) for x in (q, k, v)]
    found = results(of(tokens, q, k, v), backend)
    want = results(of(128 + 123, *pair), backend)
    expect_equal(
        [found[0][:, -123:], found[1][..., -123:], found[2][:, -123:]],
        [want[0][:, -123:], want[1][..., -123:], want[2][:, -123:]],
    )


def repeats(backend: str, sizes: Sizes) -> None:
    inputs = call_of(sizes.ordinary, sizes, text=77, gradients=True)
    first = results(inputs, backend)
    for _ in range(sizes.repeats):
        expect_equal(results(inputs, backend), first)


def repeats_of_head_dims(backend: str, sizes: Sizes) -> None:
    """Channels that fill no power of two are masked in every load."""
    for dim in (40, 72, 96, 120) if backend != "gluon" else (64,):
        inputs = call_of((*sizes.ordinary[:4], dim), sizes, text=77)
        first = results(inputs, backend)
        expect_right(inputs, *first)
        for _ in range(sizes.repeats):
            expect_equal(results(inputs, backend), first)


def nan_in_text_padding(backend: str, sizes: Sizes) -> None:
    """Keys and values of the text's padding may be anything."""
    inputs = call_of(sizes.ordinary, sizes, text=77, gradients=True)
    lengths = torch.tensor([77, 5], dtype=torch.int32, device=sizes.device)
    inputs = contiguous(replace(inputs, text_lengths=lengths))
    want = results(inputs, backend)
    for x in (inputs.k, inputs.v):
        x[1, 5:77] = torch.nan
    expect_equal(results(inputs, backend), want)


def without_lse(backend: str, sizes: Sizes) -> None:
    inputs = call_of(sizes.ordinary, sizes, text=77)
    out = block_sparse_attention(inputs.q, inputs.k, inputs.v, inputs.plan, backend=backend)  # type: ignore[call-overload]
    expect_equal([out], results(inputs, backend)[:1])


def another_stream(backend: str, sizes: Sizes) -> None:
    """Inputs that are written late on a stream are read after that, and by no other stream."""
    _need_cuda(sizes)
    inputs = call_of(sizes.ordinary, sizes, text=77, gradients=True)
    want = results(inputs, backend)
    late = torch.full_like(inputs.q, torch.nan)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)
        late.copy_(inputs.q)
        found = results(replace(inputs, q=late), backend)
        torch.cuda.current_stream().synchronize()
    expect_equal(found, want)


def graph_replay(backend: str, sizes: Sizes) -> None:
    """A captured call, gradients included, follows inputs and text lengths that change in place."""
    _need_cuda(sizes)
    inputs = call_of(sizes.ordinary, sizes, text=77, gradients=True)
    lengths = torch.tensor([77, 5], dtype=torch.int32, device=sizes.device)
    inputs = replace(inputs, text_lengths=lengths)
    results(inputs, backend)  # kernels are compiled and loaded before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(inputs, backend)
    for seed in range(3):
        inputs.q.normal_(generator=torch.Generator(sizes.device).manual_seed(seed))
        lengths.copy_(torch.tensor([seed, 70 - seed]))
        graph.replay()
        torch.cuda.synchronize()
        expect_equal(captured, results(inputs, backend))


def second_gpu(backend: str, sizes: Sizes) -> None:
    """A call on the GPU that is not the current one."""
    _need_cuda(sizes)
    if torch.cuda.device_count() < 2:
        raise NotHere("one GPU")
    inputs = call_of(sizes.ordinary, sizes, text=77, gradients=True)
    there = replace(inputs, q=inputs.q.to("cuda:1"), k=inputs.k.to("cuda:1"), v=inputs.v.to("cuda:1"))
    found = results(replace(there, plan=inputs.plan.to("cuda:1")), backend)
    assert torch.cuda.current_device() == 0 and all(x.device.index == 1 for x in found)
    expect_equal([x.to("cuda:0") for x in found], results(contiguous(inputs), backend))


def cold_threads(backend: str, sizes: Sizes) -> None:
    """Two threads compile the same kernels at once, in a process with an empty cache."""
    _need_cuda(sizes)
    code = f"from dit_accel.eval import hostile_check as h; h.in_two_threads({backend!r}, h.FULL)"
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TRITON_CACHE_DIR": cache}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(done.stderr.strip()[-400:])


def in_two_threads(backend: str, sizes: Sizes) -> None:
    """The first calls of a process, two at once, give what later ones give."""
    inputs = call_of(sizes.ordinary, sizes, text=77, gradients=True)
    together, found = threading.Barrier(2), {}

    def run(number: int) -> None:
        together.wait()
        found[number] = results(inputs, backend)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    later = results(inputs, backend)
    for number in range(2):
        expect_equal(found[number], later)


def equal_inputs(backend: str, sizes: Sizes) -> None:
    """Ones everywhere at scale 1: the output is one, the LSE is the head dim plus the log of how many keys are seen."""
    inputs = call_of(sizes.ordinary, sizes, text=1)
    ones = torch.ones_like(inputs.q)
    inputs = replace(inputs, q=ones, k=ones, v=ones, scale=1.0)
    out, lse = results(inputs, backend)
    expect_equal([out], [ones])
    sizes_of = inputs.plan.tiles.tile_tokens(out.device).double()
    seen = (inputs.plan.tile_mask()[0, 0].double() @ sizes_of)[inputs.plan.tiles.token_tile(out.device)] + 1
    torch.testing.assert_close(lse[0, 0, 1:].double(), seen.log() + out.shape[-1], rtol=1e-6, atol=0)


def large_numbers(backend: str, sizes: Sizes) -> None:
    """Values near float16's largest, and scores in the hundreds."""
    inputs = call_of(sizes.ordinary, sizes, text=77, gradients=True)
    signs = torch.where(inputs.v > 0, 6e4, -6e4).half()
    inputs = replace(inputs, q=4 * inputs.q, k=16 * inputs.k, v=signs)
    out, lse = attend(inputs, backend)
    expect_right(inputs, out, lse)
    assert bool(out.isfinite().all())


def largest_numbers(backend: str, sizes: Sizes) -> None:
    """Values near float16's largest and scores of ten million, beyond which float32 has no fraction left."""
    inputs = call_of(sizes.ordinary, sizes, text=77)
    largest = 1e7 / (inputs.scale * inputs.q.shape[-1])
    q, k, v = (torch.where(x > 0, 1.0, -1.0) for x in (inputs.q, inputs.k, inputs.v))
    inputs = replace(inputs, q=(q * largest**0.5).half(), k=(k * largest**0.5).half(), v=(v * 6e4).half())
    out, lse = attend(inputs, backend)
    assert bool(out.isfinite().all()) and bool(lse.isfinite().all())
    assert float(out.abs().max()) <= 6e4


def unseen_nan(backend: str, sizes: Sizes) -> None:
    """Keys and values that no query sees may be anything."""
    inputs = call_of(sizes.ordinary, sizes)
    plan = inputs.plan
    keep = torch.zeros(plan.tiles.num_tiles, plan.tiles.num_tiles, dtype=torch.bool)
    keep[:, 1::2] = True
    layout = TokenLayout(plan.tiles.grid)
    inputs = replace(inputs, plan=plan_from_tile_mask(layout, plan.tiles, keep).to(sizes.device))
    want = results(contiguous(inputs), backend)
    for x in (inputs.k, inputs.v):
        x[:, plan.tiles.token_tile(x.device) % 2 == 0] = torch.nan
    expect_equal(results(contiguous(inputs), backend), want)


def _need_cuda(sizes: Sizes) -> None:
    if sizes.device == "cpu":
        raise NotHere("no GPU")


CHECKS: tuple[Check, ...] = (
    equal_inputs, large_numbers, largest_numbers, unseen_nan, nan_in_text_padding, without_lse, repeats,
    repeats_of_head_dims, another_stream, graph_replay, cold_threads, second_gpu, many_heads, many_tiles,
    tokens_far_apart, lists_past_32_bits, fused_views_past_32_bits, tensors_past_32_bits,
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    check: str
    backend: str
    result: str  # "PASS", "FAIL" or "SKIP"
    note: str
    seconds: float


def try_check(check: Check, backend: str, sizes: Sizes) -> Result:
    started, result, note = time.perf_counter(), "PASS", ""
    try:
        check(backend, sizes)
        if sizes.device != "cpu":
            torch.cuda.synchronize()
    except NotHere as reason:
        result, note = "SKIP", str(reason)
    except Exception as error:  # a kernel may fail in any way, and the others are still to be tried
        result, note = "FAIL", f"{type(error).__name__}: {str(error).strip()[:400]}"
    gc.collect()
    return Result(check.__name__.replace("_", " "), backend, result, note, round(time.perf_counter() - started, 2))


def run_checks(sizes: Sizes, backend: str, only: str = "") -> list[Result]:
    found = []
    for check in CHECKS:
        if only in check.__name__:
            row = try_check(check, backend, sizes)
            print(f"{row.result} {row.backend}: {row.check} ({row.seconds:.1f} s) {row.note}".strip(), flush=True)
            found.append(row)
            torch.cuda.empty_cache()
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON; rewritten")
    parser.add_argument("--only", default="", help="checks whose name holds this, as graph_replay")
    parser.add_argument("--backends", nargs="+", default=BACKENDS, help=f"default {' '.join(BACKENDS)}")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("hostile_check needs an NVIDIA GPU, and torch sees none.")
        return 2
    rows = []
    for backend in options.backends:
        clause = backends.missing(backend, call_of(FULL.ordinary, FULL))
        if clause is None:
            rows += run_checks(FULL, backend, options.only)
        else:
            print(f"SKIP {backend}: it needs {clause}")
    facts = {"machine": machine(), "versions": versions(), "source": source_version()}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(facts | {"checks": [asdict(row) for row in rows]}, indent=1) + "\n")
    return 1 if any(row.result == "FAIL" for row in rows) or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
