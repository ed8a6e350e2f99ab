"""Thousands of random calls of the block-sparse kernels against float64 on this machine's GPU, one record per case.

    python -m dit_accel.eval.kernel_check --output eval/results/kernel-check.jsonl --cases 1000 --processes 12

dit_accel.eval.kernel_cases draws the calls, dit_accel.eval.row_check says when one passes, dit_accel.eval.case_runs
runs them and writes the file. A seed is a case: `--first 4711 --cases 1` runs one again.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor

from dit_accel.eval.case_runs import Record, families_of, judged_record, parser_of, poisoned_memory, write_records
from dit_accel.eval.kernel_cases import BACKENDS, FAMILY, Case, build, case_of
from dit_accel.eval.row_check import Outcome, judge_gradients, row_reference, sample_rows
from dit_accel.kernels import block_sparse_attention
from dit_accel.kernels.block_sparse import backends
from dit_accel.kernels.block_sparse.inputs import Inputs


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


def record_of(seed: int, device: str, largest: int | None = None) -> Record:
    """The record of a seed's case, of ``largest`` tokens at most on its grid."""
    case = case_of(seed, largest)
    row: Record = asdict(case) | {"tokens": case.layout.num_tokens}
    return judged_record(row, lambda: run_case(case, device))


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser_of(__doc__, cases=1000).parse_args(arguments)
    if not torch.cuda.is_available():
        print("kernel_check needs an NVIDIA GPU, and torch sees none; the CPU tests run the kernels' interpreter.")
        return 2
    plain = build(replace(case_of(0, largest=100), head_dim=64, dtype="bfloat16", tile=(1, 8, 16)), "cuda")
    unavailable = {name: clause for name in BACKENDS if (clause := backends.missing(name, plain)) is not None}
    families = families_of(range(options.first, options.first + options.cases), FAMILY)
    families = [family for family in families if case_of(family.start).backend not in unavailable]
    return write_records(options, families, functools.partial(record_of, device="cuda"), unavailable)


if __name__ == "__main__":
    sys.exit(main())
