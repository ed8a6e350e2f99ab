"""The random checks of list attention and log-linear attention, in small on the CPU: they pass, and faults are seen."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dit_accel.eval import list_check
from dit_accel.eval.list_cases import (
    FAMILY,
    NOT_READ,
    ListCase,
    LogLinearCall,
    LogLinearCase,
    build_lists_call,
    build_log_linear_call,
    case_of,
)
from dit_accel.eval.list_check import Results, main, record_of, run_case
from dit_accel.eval.list_judge import choice_of, expect_best, weighted_attention
from dit_accel.kernels.pyramid.lists import ListInputs

SEEDS = range(0, 900, 37)
LISTS = ListCase(
    seed=3, head_dim=16, dtype="float16", block=16, rows=(64, 16), hidden=True, pooled=2, batch=2, heads=2, tokens=77,
    off_curve=3, scattered=True, list_shape=(True, True), kept=0.5, style="fused", scale=0.25, gradients=True,
)  # fmt: skip
LOG_LINEAR = LogLinearCase(
    seed=3, head_dim=16, dtype="float16", block=16, levels=2, top_k=2, exclude_covered=True, batch=2, heads=2,
    grid=(2, 5, 13), prefix=2, suffix=5, text_lengths=True, style="fused", gradients=True,
)  # fmt: skip


@pytest.mark.parametrize("seed", SEEDS)
def test_random_cases_pass_on_torch(seed: int) -> None:
    record = record_of(seed, "cpu", ["torch"], largest=90)
    assert record["passed"], record


@pytest.mark.parametrize("case", [LISTS, LOG_LINEAR], ids=["lists", "log-linear"])
def test_cases_pass_on_triton(case: ListCase | LogLinearCase) -> None:
    small = replace(case, batch=1, heads=1)
    forward, gradients = run_case(small, "cuda" if torch.cuda.is_available() else "cpu", "triton")
    assert forward.every_row_passed() and gradients is not None and gradients.every_row_passed(3)


def test_families_share_what_kernels_are_compiled_for() -> None:
    kinds = set()
    for family in range(60):
        cases = [case_of(seed) for seed in range(FAMILY * family, FAMILY * (family + 1))]
        shared = {(x.operator, x.head_dim, x.dtype, x.block, getattr(x, "rows", None)) for x in cases}
        assert len(shared) == 1
        kinds |= shared
    assert {rows for *_, rows in kinds} >= {(128, 16), (64, 16), (16,), None}
    assert {dtype for _, _, dtype, *_ in kinds} == {"bfloat16", "float16", "float32"}


def test_what_must_not_be_read_is_poisoned() -> None:
    inputs = build_lists_call(LISTS, "cpu")
    off_curve = torch.ones(inputs.q.shape[1], dtype=torch.bool).index_fill(0, inputs.order.long(), False)
    assert bool(inputs.k[:, off_curve].isnan().all()) and bool(inputs.k[:, ~off_curve].isfinite().all())
    assert bool((inputs.lists[0].indices == NOT_READ).any()) and bool((inputs.lists[0].counts == 0).any())


# ---- faults of a kernel


def wrong_row(out: Tensor, lse: Tensor) -> None:
    out[-1, -1, -1] *= 1.1


def forgotten_row(out: Tensor, lse: Tensor) -> None:
    out[0, -3] = torch.nan


def shifted_lse(out: Tensor, lse: Tensor) -> None:
    lse += 2e-3


def written_empty_row(out: Tensor, lse: Tensor) -> None:
    out.transpose(1, 2)[lse == -torch.inf] = 1e-6


def faulty(run: Callable[..., Results], fault: Callable[[Tensor, Tensor], None]) -> Callable[..., Results]:
    def attend(*arguments: object) -> Results:
        out, lse = run(*arguments)
        out, lse = out.clone(), lse.clone()
        fault(out, lse)
        return out, lse

    return attend


@pytest.mark.parametrize("fault", [wrong_row, forgotten_row, shifted_lse, written_empty_row])
def test_a_fault_of_list_attention_is_seen(
    fault: Callable[[Tensor, Tensor], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = replace(LISTS, gradients=False, off_curve=0)
    outcome = run_case(case, "cpu", "torch")[0]
    assert outcome.every_row_passed() and outcome.empty_rows
    monkeypatch.setattr(list_check, "attend_lists", faulty(list_check.attend_lists, fault))
    assert not run_case(case, "cpu", "torch")[0].every_row_passed()


@pytest.mark.parametrize("fault", [wrong_row, forgotten_row, shifted_lse])
def test_a_fault_of_log_linear_attention_is_seen(
    fault: Callable[[Tensor, Tensor], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = replace(LOG_LINEAR, gradients=False)
    assert run_case(case, "cpu", "torch")[0].every_row_passed()
    monkeypatch.setattr(list_check, "attend_log_linear", faulty(list_check.attend_log_linear, fault))
    assert not run_case(case, "cpu", "torch")[0].every_row_passed()


def test_published_and_exclusive_rules_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    right = list_check.attend_log_linear

    def other_rule(case: LogLinearCase, call: LogLinearCall, backend: str) -> Results:
        return right(replace(case, exclude_covered=not case.exclude_covered), call, backend)

    monkeypatch.setattr(list_check, "attend_log_linear", other_rule)
    assert not run_case(LOG_LINEAR, "cpu", "torch")[0].passed


def test_a_wrong_gradient_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, gradients = run_case(LISTS, "cpu", "torch")
    assert forward.every_row_passed() and gradients is not None and gradients.every_row_passed(3)
    right = list_check.attend_lists

    def without_lse_gradient(inputs: ListInputs, backend: str) -> Results:
        out, lse = right(inputs, backend)
        return out, lse.detach() + 0 * out.nan_to_num().sum()

    monkeypatch.setattr(list_check, "attend_lists", without_lse_gradient)
    forward, gradients = run_case(LISTS, "cpu", "torch")
    assert forward.passed and gradients is not None and not gradients.passed


def test_a_call_that_does_not_repeat_is_a_failed_record(monkeypatch: pytest.MonkeyPatch) -> None:
    def drifting(out: Tensor, lse: Tensor) -> None:
        out += 1e-3 * torch.rand_like(out)

    monkeypatch.setattr(list_check, "attend_lists", faulty(list_check.attend_lists, drifting))
    seed = next(seed for seed in range(FAMILY) if not case_of(seed).gradients)
    record = record_of(seed, "cpu", ["torch"], largest=40)
    assert not record["passed"] and "different bits" in record["raised"]


def test_a_block_that_is_not_best_is_seen_and_a_tie_is_not() -> None:
    choice = choice_of(LOG_LINEAR, build_log_linear_call(LOG_LINEAR, "cpu"))
    expect_best(choice, LOG_LINEAR)
    scores = choice.queries[1].transpose(1, 2) @ choice.keys[1].transpose(1, 2).mT
    assert choice.chosen[1].shape[-1] == scores.shape[-1] == 1  # one block on top, so that all is allowed below
    scores = choice.queries[0].transpose(1, 2).double() @ choice.keys[0].transpose(1, 2).double().mT
    worst = scores.argsort(-1)[..., :2].sort(-1).values.int()
    with pytest.raises(AssertionError, match="level 1 chose what is not best"):
        expect_best(choice._replace(chosen=[worst, choice.chosen[1]]), LOG_LINEAR)
    equal = [torch.ones_like(x) for x in choice.keys]
    expect_best(choice._replace(chosen=[worst, choice.chosen[1]], keys=equal), LOG_LINEAR)


def test_the_measuring_stick_does_not_round_log_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 40, 1, 8, generator=generator).to(torch.bfloat16)
    weights = torch.arange(1, 41).float().log()[None, None]
    everything = torch.ones(1, 1, 40, 40, dtype=torch.bool)
    out, lse = weighted_attention(q, k, v, everything, weights, 0.3)
    scores = 0.3 * (q.double().transpose(1, 2) @ k.double().transpose(1, 2).mT) + weights.double()[:, :, None]
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=0, atol=2e-6)
    exact = (scores.softmax(-1) @ v.double().transpose(1, 2)).transpose(1, 2)
    assert float((out.double() - exact).norm() / exact.norm()) < 3e-3


# ---- the command


def test_the_command_writes_a_record_per_case(tmp_path: Path) -> None:
    first = next(seed for seed in range(2000) if case_of(seed).tokens < 30 and case_of(seed + 1).tokens < 30)
    assert (
        main(["--output", str(tmp_path / "cases"), "--first", str(first), "--cases", "2", "--backends", "torch"]) == 0
    )
    head, *records, last = map(json.loads, (tmp_path / "cases").read_text().splitlines())
    assert {"machine", "versions", "source"} <= head.keys()
    assert sorted(record["seed"] for record in records) == [first, first + 1]
    assert all(record["passed"] for record in records) and last["summary"]["passed"] == 2


def test_a_case_that_raises_makes_the_command_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(list_check, "missing", lambda backend, device: None)
    monkeypatch.setattr(list_check, "BACKENDS", ("none such",))
    assert main(["--output", str(tmp_path / "cases"), "--cases", "1", "--backends", "none such"]) == 1
    assert "backend must be one of" in (tmp_path / "cases").read_text()
