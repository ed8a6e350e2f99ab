"""One call of the embedded pipeline with a method, timed or in a batch, watched step by step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dit_accel.cli import main
from dit_accel.commands.batches import sample
from dit_accel.commands.models import Model, Request, generate, load
from dit_accel.eval.quality.trajectory import trajectory
from dit_accel.eval.records import read_records
from dit_accel.methods import make_method
from dit_accel.methods.attention import AttnResult, PlannedAttention
from dit_accel.methods.radial import RadialAttnProcessor

PROMPTS = ("a red star moving up", "a green ring shrinking", "a blue square moving left")


@pytest.fixture(scope="module")
def model() -> Model:
    return load("shapes", "cpu")


def request_of(prompt: str = "a red star moving up", seed: int = 5) -> Request:
    return Request(prompt, seed, height=32, width=48, num_frames=5, steps=2, guidance=4.0)


def test_clips_do_not_depend_on_the_batch(model: Model) -> None:
    requests = [request_of(prompt, 5 + number) for number, prompt in enumerate(PROMPTS)]
    method = make_method("radial", tile=16)
    together = sample(model, requests, method, "auto")
    alone = [sample(model, [request], method, "auto") for request in requests]
    for clip, batch in zip(together.clips, alone, strict=True):
        assert np.abs(clip.astype(int) - batch.clips[0]).max() <= 2  # levels of 255: matrix products round differently
        assert batch.executed == together.executed
    assert np.abs(together.clips[0].astype(int) - together.clips[1]).max() > 50


@pytest.mark.parametrize("together", [False, True], ids=["generate", "sample"])
def test_a_hook_that_raises_leaves_the_pipeline_as_it_was(model: Model, together: bool) -> None:
    method, request = make_method("dit_fast_attn", every=2, between="reuse"), request_of()
    stock = [module.processor for module in model.pipe.transformer.modules() if hasattr(module, "processor")]
    before = generate(model, request, make_method("dense"), "auto", progress=False)
    seen: list[int] = []

    def cancel(step: int, latents: torch.Tensor) -> None:
        seen.append(step)
        raise InterruptedError(f"after {tuple(latents.shape)}")

    def run() -> object:
        if together:
            return sample(model, [request, request_of(seed=6)], method, "auto", cancel)
        return generate(model, request, method, "auto", progress=False, on_step=cancel)

    with pytest.raises(InterruptedError, match="after "):
        run()
    assert seen == [0]
    now = [module.processor for module in model.pipe.transformer.modules() if hasattr(module, "processor")]
    assert all(one is other for one, other in zip(now, stock, strict=True))
    assert not model.pipe.transformer._forward_pre_hooks
    after = generate(model, request, make_method("dense"), "auto", progress=False)
    assert np.array_equal(after.frames, before.frames)


def test_a_timed_run_builds_its_plan_before_it_is_timed(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    plan, encode = RadialAttnProcessor.plan, model.pipe.encode_prompt
    monkeypatch.setattr(RadialAttnProcessor, "plan", lambda *args: (events.append("plan"), plan(*args))[1])
    monkeypatch.setattr(model.pipe, "encode_prompt", lambda **args: (events.append("call"), encode(**args))[1])
    generate(model, request_of(), make_method("radial", tile=16), "auto", progress=False)
    assert events == ["plan", "call"]


def test_trajectory_is_the_relative_error_of_each_step() -> None:
    reference = np.array([[3.0, 4.0], [0.0, 2.0]], np.float32)
    found = trajectory(reference + np.array([[0.0, 1.0], [1.0, 0.0]], np.float32), reference)
    assert found.values == (0.2, 0.5) and found.value == 0.5


@pytest.mark.parametrize("command", ["generate", "compare"])
def test_frames_that_are_no_numbers_are_refused_by_name(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        PlannedAttention, "attend", lambda self, call: AttnResult(torch.full_like(call.q, torch.nan), None, 1.0)
    )
    size = ["--height", "32", "--width", "48", "--num-frames", "5", "--steps", "1"]
    output = tmp_path / ("clip.mp4" if command == "generate" else "compared")
    assert main([command, *size, "--method", "radial(tile=16)", "--output", str(output)]) == 2
    assert "the output of radial(tile=16) must not contain NaN, but frame 0 does." in capsys.readouterr().err
    assert not (tmp_path / "clip.mp4").exists()


def test_compare_measures_attention_in_a_run_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--height", "32", "--width", "48", "--num-frames", "5", "--steps", "2"]
    assert main(["compare", *size, "--method", "radial(tile=16)", "--output", str(tmp_path), "--attention"]) == 0
    dense, radial = read_records(tmp_path / "records.jsonl")
    assert "discarded_mass" not in dense["quality"]
    for name in ("discarded_mass", "attention_error", "attention_cosine"):
        assert len(radial["quality"][name]["values"]) == 8 * 4
        assert len(radial["quality"][f"{name}_by_step"]["values"]) == 2
    mean = radial["quality"]["discarded_mass"]["value"]
    assert 0 < mean < 1
    assert f"radial: softmax mass left out {mean:.1%}, most" in capsys.readouterr().out
    assert "Attention of radial beside dense attention" in (tmp_path / "index.html").read_text()
