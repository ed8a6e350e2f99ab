"""Random calls of list attention and log-linear attention against float64, one record per case.

    python -m dit_accel.eval.list_check --output eval/results/list-check.jsonl --cases 600 --processes 12

dit_accel.eval.list_cases draws the calls, dit_accel.eval.list_judge says what is right and how far torch's dense
attention is from that, dit_accel.eval.case_runs runs them and writes the file. An error passes as in
dit_accel.eval.kernel_check. A seed is a case: `--first 4711 --cases 1` runs one again.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from dit_accel.eval.case_runs import Record, families_of, judged_record, parser_of, poisoned_memory, write_records
from dit_accel.eval.list_cases import (
    FAMILY,
    LARGEST,
    ListCase,
    LogLinearCall,
    LogLinearCase,
    build_lists_call,
    build_log_linear_call,
    case_of,
)
from dit_accel.eval.list_judge import (
    along_sequence,
    choice_of,
    expect_best,
    lists_dense,
    lists_exact,
    log_linear_dense,
    log_linear_exact,
)
from dit_accel.eval.row_check import Outcome, judge_all, judge_rows
from dit_accel.kernels import PooledKeys
from dit_accel.kernels.pyramid.attend import list_attention
from dit_accel.kernels.pyramid.lists import ListInputs
from dit_accel.kernels.pyramid.log_linear import log_linear_attention

BACKENDS = ("triton", "torch")
Results = tuple[Tensor, Tensor]  # output [B, L, H, D] and LSE [B, H, L] in the order of the sequence
Attend = Callable[..., Results]  # of q, k, v and, where there are any, the pooled k and v


def attend_lists(inputs: ListInputs, backend: Any) -> Results:
    """Output and LSE of ``list_attention``."""
    out, lse = list_attention(
        inputs.q, inputs.k, inputs.v, inputs.lists, order=inputs.order, pooled=inputs.pooled, scale=inputs.scale,
        backend=backend, return_lse=True,
    )  # fmt: skip
    return out, along_sequence(lse, inputs)


def attend_log_linear(case: LogLinearCase, call: LogLinearCall, backend: Any) -> Results:
    """Output and LSE of ``log_linear_attention``."""
    return log_linear_attention(
        call.q, call.k, call.v, order=call.order, top_k=case.top_k, block=case.block, levels=case.levels,
        exclude_covered=case.exclude_covered, prefix=case.prefix, text_lengths=call.text_lengths, backend=backend,
        return_lse=True,
    )  # fmt: skip


def run_case(case: ListCase | LogLinearCase, device: str, backend: str) -> tuple[Outcome, Outcome | None]:
    """The forward's outcome, and that of the gradients where the case asks for them."""
    if isinstance(case, ListCase):
        return _run_lists(case, build_lists_call(case, device), backend)
    return _run_log_linear(case, build_log_linear_call(case, device), backend)


def _run_lists(case: ListCase, inputs: ListInputs, backend: str) -> tuple[Outcome, Outcome | None]:
    def on(run: Callable[[ListInputs], Results]) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor, *rows: Tensor) -> Results:
            pooled = inputs.pooled and PooledKeys(rows[0], rows[1], inputs.pooled.log_weights)
            return run(replace(inputs, q=q, k=k, v=v, pooled=pooled))

        return attend

    tensors = [inputs.q, inputs.k, inputs.v, *(inputs.pooled[:2] if inputs.pooled else ())]
    kernel = on(lambda call: attend_lists(call, backend))
    return _judge(tensors, kernel, on(lists_exact), on(lists_dense), case.gradients, lse_gradient=True)


def _run_log_linear(case: LogLinearCase, call: LogLinearCall, backend: str) -> tuple[Outcome, Outcome | None]:
    choice = choice_of(case, call)
    expect_best(choice, case)

    def on(run: Callable[[LogLinearCall], Results]) -> Attend:
        return lambda q, k, v: run(replace(call, q=q, k=k, v=v))

    kernel = on(lambda given: attend_log_linear(case, given, backend))
    exact = on(lambda given: log_linear_exact(case, given, choice.chosen))
    dense = on(lambda given: log_linear_dense(case, given, choice.chosen))
    return _judge([call.q, call.k, call.v], kernel, exact, dense, case.gradients, lse_gradient=False)


def _judge(
    tensors: Sequence[Tensor], kernel: Attend, exact: Attend, dense: Attend, gradients: bool, lse_gradient: bool
) -> tuple[Outcome, Outcome | None]:
    """Outcomes of a kernel; twice the same call has to give the same bits."""
    doubles = [x.double() for x in tensors]
    want, want_lse = exact(*doubles)
    stick, stick_lse = dense(*tensors)
    with poisoned_memory():
        got, lse = kernel(*tensors)
        again = kernel(*tensors)
    forward = judge_rows(got, want, stick, want_lse, lse)
    seen = want_lse > -torch.inf
    stick_error = float((stick_lse.double() - want_lse)[seen].abs().max()) if bool(seen.any()) else 0.0
    forward = replace(forward, dense_lse_error=stick_error)
    if not gradients:
        _expect_equal((got, lse), again)
        return forward, None

    generator = torch.Generator(got.device).manual_seed(0)
    upstream = torch.randn(got.shape, generator=generator, device=got.device, dtype=got.dtype)
    of_lse = torch.randn(lse.shape, generator=generator, device=lse.device) * seen if lse_gradient else None
    with poisoned_memory():
        found = _gradients(kernel, tensors, upstream, of_lse)
        _expect_equal((got, lse, *found), (*again, *_gradients(kernel, tensors, upstream, of_lse)))
    wanted = _gradients(exact, doubles, upstream.double(), None if of_lse is None else of_lse.double())
    return forward, judge_all(found, wanted, _gradients(dense, tensors, upstream, of_lse))


def _gradients(attend: Attend, tensors: Sequence[Tensor], upstream: Tensor, of_lse: Tensor | None) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, lse = attend(*leaves)
    ends, given = ([out], [upstream]) if of_lse is None else ([out, lse], [upstream, of_lse.to(lse.dtype)])
    return list(torch.autograd.grad(ends, leaves, given, allow_unused=True, materialize_grads=True))


def _expect_equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    if not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second, strict=True)):
        raise AssertionError("two equal calls gave different bits")


def record_of(seed: int, device: str, backends: Sequence[str], largest: int = LARGEST) -> Record:
    """The record of a seed's case, of ``largest`` tokens at most; families take the backends in turn."""
    case, backend = case_of(seed, largest), backends[seed // FAMILY % len(backends)]
    row: Record = asdict(case) | {"tokens": case.tokens, "backend": backend}
    return judged_record(row, lambda: run_case(case, device, backend))


def missing(backend: str, device: str) -> str | None:
    """Why a backend cannot run a small call here; None if it can."""
    case = replace(next(x for x in map(case_of, range(FAMILY)) if isinstance(x, ListCase)), head_dim=64, tokens=17)
    try:
        attend_lists(build_lists_call(case, device), backend)
    except ValueError as refused:
        return str(refused)
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__, cases=600)
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=["triton"], help="default triton")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    unavailable = {name: clause for name in options.backends if (clause := missing(name, device)) is not None}
    usable = [name for name in options.backends if name not in unavailable]
    if not usable:
        print(f"list_check has no backend to run: {'; '.join(unavailable.values())}")
        return 2
    families = families_of(range(options.first, options.first + options.cases), FAMILY)
    run = functools.partial(record_of, device=device, backends=usable)
    return write_records(options, families, run, unavailable)


if __name__ == "__main__":
    sys.exit(main())
