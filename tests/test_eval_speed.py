"""Timing, the step clock, rates of a machine: what is counted, never how long it took."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dit_accel import marks
from dit_accel.eval.machine import machine, source_version, versions
from dit_accel.eval.rates import Rates, attention_flops, rates
from dit_accel.eval.speed import StepClock, measure


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock whose readings are 0, 1, 3, 6, 10, 15, ... seconds."""
    readings = itertools.accumulate(itertools.count())
    monkeypatch.setattr(marks.time, "perf_counter", lambda: float(next(readings)))


@pytest.mark.usefixtures("ticks")
def test_warm_up_is_kept_apart_from_the_timed_runs() -> None:
    calls: list[int] = []
    timing = measure(lambda: calls.append(1), warmup=2, runs=3)
    assert len(calls) == 5
    assert timing.warmup_seconds == 1 + 3
    assert timing.runs == (5, 7, 9)
    assert (timing.median, timing.iqr) == (7, 2)
    assert timing.peak_memory is None


@pytest.mark.usefixtures("ticks")
def test_one_run_has_no_spread() -> None:
    timing = measure(lambda: None, warmup=0, runs=1)
    assert (timing.median, timing.iqr, timing.warmup_seconds) == (1, 0, 0)


@pytest.mark.parametrize(("warmup", "runs"), [(0, 0), (-1, 3)])
def test_impossible_run_counts_are_refused(warmup: int, runs: int) -> None:
    with pytest.raises(ValueError, match=f"got {runs} and {warmup}"):
        measure(lambda: None, warmup=warmup, runs=runs)


@pytest.mark.usefixtures("ticks")
def test_step_clock_starts_once_and_reads_each_step() -> None:
    clock = StepClock()
    for step in range(3):
        clock.start("a module", ("its inputs",))
        kwargs = {"latents": step}
        assert clock(object(), step, 999 - step, kwargs) is kwargs
    assert clock.step_seconds == (1, 2, 3)
    assert clock.denoise_seconds == 6


def test_step_clock_serves_as_pre_hook_and_callback() -> None:
    clock, module = StepClock(), torch.nn.Identity()
    module.register_forward_pre_hook(clock.start)
    time.sleep(0.001)
    module(torch.zeros(1))
    clock(object(), 0, 999, {})
    assert len(clock.step_seconds) == 1


def test_step_clock_without_a_start_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"end of step 4 before start\(\)"):
        StepClock()(object(), 4, 0, {})


def test_rates_measure_the_sparse_operator_on_the_length_it_was_made_for() -> None:
    lengths = []

    def make_sparse(tokens: int) -> tuple[object, float]:
        def half(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            lengths.append((tokens, *q.shape))
            key, value = (x[:, : tokens // 2].transpose(1, 2) for x in (k, v))
            return scaled_dot_product_attention(q.transpose(1, 2), key, value).transpose(1, 2)

        return half, 0.5

    measured = rates("cpu", torch.float32, 16, make_sparse)  # type: ignore[arg-type]
    assert min(measured.matmul, measured.dense, measured.sparse) > 0
    assert measured.density == 0.5
    assert set(lengths) == {(measured.tokens, 1, measured.tokens, 2, 16)}


def test_predicted_seconds_add_up() -> None:
    rate = Rates(matmul=100.0, dense=50.0, sparse=20.0, tokens=1, density=0.5)
    assert rate.seconds(matmul=200, dense=50, sparse=10) == pytest.approx(2 + 1 + 0.5)
    assert rate.seconds() == 0


def test_attention_flops_count_both_products() -> None:
    tokens, heads, head_dim = 7, 3, 5
    assert attention_flops(tokens, heads, head_dim) == 2 * heads * (2 * tokens * tokens * head_dim)
    assert attention_flops(tokens, heads, head_dim, 0.25) == attention_flops(tokens, heads, head_dim) / 4


def test_rates_refuse_other_devices() -> None:
    with pytest.raises(ValueError, match="cpu and cuda devices, got meta"):
        rates("meta", torch.float32, 16, lambda tokens: pytest.fail("not reached"))


def test_machine_and_versions_are_named() -> None:
    assert {"cpu", "cores", "platform"} <= machine().keys()
    assert int(machine()["cores"]) >= 1
    assert versions()["torch"] == torch.__version__ or torch.__version__.startswith(versions()["torch"])
    assert all(isinstance(fact, str) and fact for fact in (machine() | versions()).values())
    assert source_version()
