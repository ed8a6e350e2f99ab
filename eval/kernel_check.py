"""Thousands of random calls of the block-sparse kernels against float64 on this machine's GPU, one record per case.

    python -m dit_accel.eval.kernel_check --output eval/results/kernel-check.jsonl --cases 1000 --processes 12

dit_accel.eval.kernel_cases draws the calls, dit_accel.eval.row_check says when one passes. The first line of the file
holds the facts of the machine, the last one the totals. A seed is a case: `--first 4711 --cases 1` runs one again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import sys
import time
import warnings
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_accel.eval.kernel_cases import BACKENDS, FAMILY, Case, build, case_of
from dit_accel.eval.machine import machine, source_version, versions
from dit_accel.eval.row_check import Outcome, judge_gradients, row_reference, sample_rows
from dit_accel.kernels import block_sparse_attention
from dit_accel.kernels.block_sparse import backends
from dit_accel.kernels.block_sparse.inputs import Inputs

Record = dict[str, Any]
# Rows of a gradient may be off by three times dense attention's, as in flash-attention's own tests: the kernels'
# output, rounded to 16 bits, enters them once more.
GRADIENT_ROWS = 3.0
ERRORS = ("error", "dense_error", "row_error", "dense_row_error")


def attend(inputs: Inputs, backend: str) -> tuple[Tensor, Tensor]:
    """Output and LSE by the public operator."""
    out, lse = block_sparse_attention(  # type: ignore[call-overload]
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.plan,
        scale=inputs.scale,
        text_lengths=inputs.text_lengths,
        pooled=inputs.pooled,
        backend=backend,
        return_lse=True,
    )
    return out, lse


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Uninitialised tensors hold NaN, or the largest integer, so that what a kernel forgets to write shows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deterministic mode warns of operations that have no such form
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def run_case(case: Case, device: str) -> tuple[Outcome, Outcome | None]:
    """The forward's outcome, and that of the gradients where the case asks for them."""
    inputs = build(case, device)
    rows = sample_rows(inputs.plan.num_tokens, inputs.plan, torch.Generator().manual_seed(case.seed)).to(device)
    # No query sees the padding's values, but the reference would multiply them by zero.
    clean = replace(inputs, k=inputs.k.nan_to_num(), v=inputs.v.nan_to_num()) if case.nan_padding else inputs
    reference = row_reference(clean, rows)
    with poisoned_memory():
        out, lse = attend(inputs, case.backend)
    forward = reference.judge(out, reference.dense_error(), lse)
    if not case.gradients:
        return forward, None

    def kernel(call: Inputs) -> Tensor:
        if case.nan_padding:  # gradients are asked of the clean keys
            pairs = ((call.k, inputs.k), (call.v, inputs.v))
            k, v = (x.masked_fill(given.isnan(), torch.nan) for x, given in pairs)
            call = replace(call, k=k, v=v)
        return attend(call, case.backend)[0]

    with poisoned_memory():
        return forward, judge_gradients(kernel, clean, rows)


def record_of(case: Case, device: str) -> Record:
    """A record of any outcome; a case that raises has failed, with what it raised."""
    row: Record = asdict(case) | {"tokens": case.layout.num_tokens}
    try:
        forward, gradients = run_case(case, device)
    except Exception as error:  # a kernel may fail in any way, and the record is to say so
        return row | {"passed": False, "raised": f"{type(error).__name__}: {str(error).strip()[:400]}"}
    row |= asdict(forward) | {"passed": forward.every_row_passed()}
    if gradients is not None:
        row |= {f"gradient_{name}": getattr(gradients, name) for name in ERRORS}
        row["passed"] = forward.every_row_passed() and gradients.every_row_passed(GRADIENT_ROWS)
    return row


def run_family(seeds: range, device: str, deadline: float, largest: int | None = None) -> list[Record]:
    """Cases that share their kernels; none that would start after ``deadline``, nor after a fault of the GPU."""
    torch.set_num_threads(1)
    rows: list[Record] = []
    for seed in seeds:
        if time.time() > deadline or (rows and "raised" in rows[-1]):
            break
        rows.append(record_of(case_of(seed, largest), device))
    return rows


def families_of(seeds: range, usable: Collection[str]) -> list[range]:
    """The seeds cut where a family ends, without those of backends that this machine cannot run."""
    cuts = [seeds.start, *range((seeds.start // FAMILY + 1) * FAMILY, seeds.stop, FAMILY), seeds.stop]
    families = (range(first, end) for first, end in itertools.pairwise(cuts))
    return [family for family in families if case_of(family.start).backend in usable]


def run_all(families: Sequence[range], device: str, processes: int, seconds: float) -> Iterator[list[Record]]:
    """The records of families as they finish, each in a process of its own: a GPU's fault ends with its process."""
    deadline = time.time() + seconds
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "dit_accel.eval.kernel_cases"])
    with ProcessPoolExecutor(processes, mp_context=context, max_tasks_per_child=1) as pool:
        running = {pool.submit(run_family, family, device, deadline): family for family in families}
        for done in as_completed(running):
            error = done.exception()
            lost = {"seed": running[done].start, "passed": False, "raised": repr(error)}
            yield [lost] if error else done.result()


def summary_of(rows: list[Record], asked: int) -> Record:
    """Totals, and each backend's worst errors as multiples of those of torch's dense attention."""
    worst: dict[str, float] = {}
    for row, gradient, part in itertools.product(rows, ("", "gradient_"), ("", "row_")):
        dense = row.get(f"{gradient}dense_{part}error", 0.0)
        if dense > 1e-5:  # of float32 nothing but the order of summation is left
            name = f"{row['backend']} {gradient}{part}error"
            worst[name] = max(worst.get(name, 0.0), round(row[f"{gradient}{part}error"] / dense, 3))
    failed = [row["seed"] for row in rows if not row["passed"]]
    passed = len(rows) - len(failed)
    return {"asked": asked, "passed": passed, "failed": failed, "not_run": asked - len(rows), "over_dense": worst}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON lines; rewritten")
    parser.add_argument("--cases", type=int, default=1000, help="how many seeds (default 1000)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (default 0)")
    parser.add_argument("--processes", type=int, default=1, help="processes that share the GPU (default 1)")
    parser.add_argument("--seconds", type=float, default=600.0, help="start no case after this long (default 600)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if not torch.cuda.is_available():
        print("kernel_check needs an NVIDIA GPU, and torch sees none; the CPU tests run the kernels' interpreter.")
        return 2
    plain = build(replace(case_of(0, largest=100), head_dim=64, dtype="bfloat16", tile=(1, 8, 16)), "cuda")
    unavailable = {name: clause for name in BACKENDS if (clause := backends.missing(name, plain)) is not None}
    families = families_of(range(options.first, options.first + options.cases), set(BACKENDS) - set(unavailable))
    started, rows = time.time(), []
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w") as file:
        head = {"machine": machine(), "versions": versions(), "source": source_version(), "unavailable": unavailable}
        file.write(json.dumps(head) + "\n")
        for finished in run_all(families, "cuda", options.processes, options.seconds):
            for row in finished:
                rows.append(row)
                file.write(json.dumps(row) + "\n")
                if not row["passed"]:
                    print("FAILED", json.dumps(row)[:600], flush=True)
            file.flush()
        summary = summary_of(rows, sum(map(len, families))) | {"seconds": round(time.time() - started)}
        file.write(json.dumps({"summary": summary}) + "\n")
    print(json.dumps(summary))
    return 1 if summary["failed"] or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
