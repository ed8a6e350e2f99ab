"""The training loop: its mathematics, its checkpoints, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import dit_accel
from dit_accel import DraftAttnProcessor
from dit_accel.cli import main
from dit_accel.pipelines import shapes
from dit_accel.pipelines.flow import FlowBatch
from dit_accel.pipelines.pixels.pipeline import PixelDiTPipeline
from dit_accel.pipelines.shapes.batches import LatentPool
from dit_accel.pipelines.shapes.models import KIT
from dit_accel.pipelines.shapes.recipe import ClipSize
from dit_accel.pipelines.training.loop import losses, train
from dit_accel.pipelines.training.parameters import choose_parameters
from dit_accel.pipelines.training.pixels import CLASSES, PIXELS
from dit_accel.pipelines.training.settings import Settings
from dit_accel.pipelines.training.task import Feed
from dit_accel.pipelines.training.tasks import TASKS

SIZE = {"height": 11, "width": 14}


@pytest.fixture(scope="module")
def start(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline of random weights to start from."""
    folder = tmp_path_factory.mktemp("start")
    scheduler = tiny.pipeline("pixel_dit").scheduler
    PixelDiTPipeline(tiny.pixel_dit_model(num_classes=len(CLASSES)), scheduler).save_pretrained(folder)
    return folder


def nothing(denoiser: nn.Module) -> None:
    """Attaches no method."""


def settings(out: Path, start: Path, **changes: Any) -> Settings:
    values = {"batch": 2, "max_steps": 4, "warmup_steps": 2, "learning_rate": 1e-2, "log_steps": 2, **SIZE}
    return Settings(**(values | {"task": "pixels", "out": out, "pretrained": str(start)} | changes))


def weights(checkpoint: Path, part: str = "state/model") -> dict[str, Tensor]:
    return load_file(checkpoint / f"{part}.safetensors")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]


def test_two_processes_train_like_one_with_their_joint_batch(tmp_path: Path, start: Path) -> None:
    words = ["-m", "dit_accel.cli", "train", "--task=pixels", f"--pretrained={start}", "--height=11", "--width=14"]
    words += ["--batch=2", "--max-steps=3", "--warmup-steps=1", "--learning-rate=1e-2", "--log-steps=2"]
    words += [f"--out={tmp_path / 'two'}"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run([*launch, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    one = train(PIXELS, settings(tmp_path / "one", start, accumulation=2, max_steps=3, warmup_steps=1), nothing)
    assert one is not None
    two = {name.removeprefix("module."): value for name, value in weights(tmp_path / "two" / one.name).items()}
    moved = weights(start, "transformer/diffusion_pytorch_model")
    for name, value in weights(one).items():
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=1e-4)
        assert not torch.equal(value, moved[name])
    losses = [[line["loss"] for line in lines(tmp_path / run)] for run in ("one", "two")]
    assert len(losses[1]) == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("loss", ["flow", "distill"])
def test_a_resumed_run_is_the_run_that_was_never_stopped(tmp_path: Path, start: Path, loss: str) -> None:
    def attach(denoiser: nn.Module) -> None:
        dit_accel.apply(denoiser, "neighborhood", window=(1, 5, 5))

    method = {"loss": loss, "method": "neighborhood(window=(1, 5, 5))"}
    whole = train(PIXELS, settings(tmp_path / "whole", start, max_steps=5, **method), attach)
    train(PIXELS, settings(tmp_path / "parts", start, max_steps=2, **method), attach)
    parts = train(PIXELS, settings(tmp_path / "parts", start, max_steps=5, **method), attach, resume=True)
    assert whole is not None and parts is not None
    for part in ("state/model", "pipeline/transformer/diffusion_pytorch_model"):
        assert same(weights(whole, part), weights(parts, part))
    assert lines(tmp_path / "whole")[-1]["loss"] == lines(tmp_path / "parts")[-1]["loss"]


@pytest.mark.parametrize(
    ("change", "named"),
    [({"batch": 3}, "batch=2, not 3"), ({"height": 12}, "height=11, not 12"), ({"method": "grat"}, "not 'grat'")],
    ids=["batch", "size", "method"],
)
def test_a_checkpoint_of_another_run_is_refused_and_kept(
    tmp_path: Path, start: Path, change: dict[str, Any], named: str
) -> None:
    done = train(PIXELS, settings(tmp_path, start, max_steps=1), nothing)
    assert done is not None
    before = weights(done)
    with pytest.raises(ValueError, match=named):
        train(PIXELS, settings(tmp_path, start, **change), nothing, resume=True)
    with pytest.raises(ValueError, match="pass --resume or another --out"):
        train(PIXELS, settings(tmp_path, start), nothing)
    assert same(weights(done), before)


def test_there_is_nothing_to_resume_in_an_empty_folder(tmp_path: Path, start: Path) -> None:
    with pytest.raises(ValueError, match="holds no checkpoint"):
        train(PIXELS, settings(tmp_path, start), nothing, resume=True)


def test_the_last_two_checkpoints_are_kept_and_none_is_half_written(tmp_path: Path, start: Path) -> None:
    (tmp_path / ".unfinished-3").mkdir()  # of a run that was killed
    train(PIXELS, settings(tmp_path, start, max_steps=5, save_steps=1), nothing)
    assert sorted(path.name for path in tmp_path.glob("*")) == ["checkpoint-4", "checkpoint-5", "journal.jsonl"]


def test_time_ends_a_session_with_a_checkpoint(tmp_path: Path, start: Path) -> None:
    done = train(PIXELS, settings(tmp_path, start, max_steps=1000, max_seconds=0.0), nothing)
    assert done == tmp_path / "checkpoint-2"


def one_batch(pipeline: Any, feed: Feed) -> Any:
    batch = PIXELS.feed(pipeline, feed)(0)
    return lambda number: batch


def test_one_batch_is_learnt_and_the_saved_average_draws(tmp_path: Path, start: Path) -> None:
    task = dataclasses.replace(PIXELS, feed=one_batch)
    run = settings(tmp_path, start, max_steps=60, log_steps=10, ema_decay=0.9, learning_rate=5e-3)
    done = train(task, run, nothing)
    assert done is not None
    journal = lines(tmp_path)
    assert [line["step"] for line in journal] == [10, 20, 30, 40, 50, 60]
    assert journal[-1]["loss"] < 0.5 * journal[0]["loss"]
    assert journal[0]["tokens_per_second"] > 0 and journal[-1]["learning_rate"] == 5e-3
    averaged = weights(done, "pipeline/transformer/diffusion_pytorch_model")
    assert not same(averaged, weights(done))
    pipe = PixelDiTPipeline.from_pretrained(done / "pipeline", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    batch = one_batch(None, Feed((1, 11, 14), 2, 0, torch.device("cpu"), 0, 1))(0)
    with torch.no_grad():
        loss = losses(batch, batch.predicted_by(pipe.transformer), None, 0.0)["loss"]
    assert loss < 0.5 * journal[0]["loss"]
    assert pipe([7, 9], **SIZE, num_inference_steps=2, output_type="np").images.shape == (2, 11, 14, 3)


def sparse(denoiser: nn.Module) -> None:
    dit_accel.apply(denoiser, "radial", density=0.5)


def test_distillation_brings_a_sparse_student_nearer_to_its_dense_self(tmp_path: Path, start: Path) -> None:
    size = {"height": 24, "width": 20, "method": "radial(density=0.5)"}
    run = settings(tmp_path, start, **size, loss="distill", flow_weight=0.0, train="attention", ema_decay=0.9)
    done = train(
        dataclasses.replace(PIXELS, feed=one_batch),
        dataclasses.replace(run, max_steps=50, learning_rate=1e-3),
        sparse,
    )
    assert done is not None
    teacher, before, after = (
        PixelDiTPipeline.from_pretrained(folder, dtype=torch.float32).transformer
        for folder in (start, start, done / "pipeline")
    )
    sparse(before)
    sparse(after)
    batch = one_batch(None, Feed((1, 24, 20), 2, 0, torch.device("cpu"), 0, 1))(0)
    with torch.no_grad():
        taught, first, last = (batch.predicted_by(denoiser) for denoiser in (teacher, before, after))
    assert (last - taught).norm() < 0.4 * (first - taught).norm()
    assert all(line["loss"] == line["distill"] for line in lines(tmp_path))
    stock, trained = weights(start, "transformer/diffusion_pytorch_model"), weights(done)
    changed = {name for name, value in trained.items() if not torch.equal(value, stock[name])}
    assert changed == {name for name in stock if ".attn." in name}


def test_the_loss_of_a_student_is_its_distance_and_a_share_of_flow_matching() -> None:
    clean, noise, predicted, taught = torch.randn(4, 2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).unbind()
    batch = FlowBatch(clean, noise, torch.rand(2), {})
    found = losses(batch, predicted, taught, flow_weight=0.25)
    expected = (predicted - taught).square().mean() + 0.25 * (predicted - (noise - clean)).square().mean()
    torch.testing.assert_close(found["loss"], expected)
    assert losses(batch, batch.velocity, None, 0.5)["loss"] == 0


def detach(denoiser: Any) -> None:
    """Attention that autograd does not see."""
    for block in denoiser.blocks:
        block.attn.register_forward_hook(lambda module, args, out: out.detach())


def test_attention_without_gradients_is_refused_before_the_first_step(tmp_path: Path, start: Path) -> None:
    with pytest.raises(ValueError, match=r"radial cannot be trained because no gradient reaches blocks\.0\.attn"):
        train(PIXELS, settings(tmp_path, start, method="radial"), detach)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task=pixels", "--loss=distill"], "distill needs a trained model, got none for pixels; pass --pretrained."),
        (["--task=pixels", "--pretrained=nowhere"], "nowhere is no pipeline folder"),
        (["--task=shapes", "--height=100"], "multiples of 16 pixels, got height=100; use 96."),
        (["--task=pixels", "--method=radiall"], "did you mean 'radial'"),
        (["--task=pixels", "--batch=0"], "batch must be at least 1, got 0."),
        (["--task=pixels", "--method=radial(start_percent=0.5)", *(f"--{k}={v}" for k, v in SIZE.items())], "steps"),
    ],
    ids=["no teacher", "no folder", "size", "method", "batch", "schedule"],
)
def test_a_run_that_cannot_be_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["train", f"--out={tmp_path / 'out'}", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("dit-accel train: ")
    assert not list(tmp_path.glob("out/*"))


def test_autocast_reaches_the_methods_attention(tiny: ModuleType) -> None:
    model, arguments = tiny.model("pixel_dit").train(), tiny.inputs("pixel_dit")
    dense = tiny.forward(model, arguments)
    dit_accel.apply(model, tiny.Tiles())
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**arguments)[0]
    out.float().square().sum().backward()
    assert (out.float() - dense).norm() < 0.05 * dense.norm()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_autocast_leaves_the_methods_own_products_alone(tiny: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft in bfloat16 would have ties where there are none."""
    model, dtypes, select = tiny.model("pixel_dit"), [], DraftAttnProcessor.select

    def noting(method: Any, layout: Any, q: Tensor, k: Tensor) -> Any:
        dtypes.append((q.dtype, (q.float() @ k.float().mT).dtype))
        return select(method, layout, q, k)

    monkeypatch.setattr(DraftAttnProcessor, "select", noting)
    dit_accel.apply(model, "draft", region=(1, 2, 2))
    with torch.autocast("cpu", torch.bfloat16):
        tiny.forward(model, tiny.inputs("pixel_dit"))
    assert set(dtypes) == {(torch.bfloat16, torch.float32)}


@pytest.mark.parametrize("method", ["radial", "draft", "log_linear", "pyramid"])
def test_one_handle_serves_inference_mode_and_gradients(tiny: ModuleType, method: str) -> None:
    model, arguments = tiny.model("pixel_dit"), tiny.inputs("pixel_dit")
    handle = dit_accel.apply(model, method, delta="merge")
    with torch.inference_mode():
        model(**arguments)
    model(**arguments)[0].square().sum().backward()
    assert handle.tally.sparse_calls == handle.tally.calls == 2 * tiny.TARGETS
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("family", ["wan", "pixel_dit", "flux"])
def test_attention_parameters_are_those_of_the_modules_that_a_method_enters(tiny: ModuleType, family: str) -> None:
    model = tiny.model(family)
    chosen = choose_parameters(model, "attention")
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(names) == len(chosen) > 0
    assert all(".attn" in name and ".attn2." not in name for name in names)
    assert len(choose_parameters(model, "all")) == len(list(model.parameters()))


def test_a_pool_holds_the_same_clips_whenever_it_is_first_drawn_from() -> None:
    pipe = shapes.load()
    size = ClipSize(32, 48, 5, feed=2, pool=6, initial=2, two_objects=0.5)
    early, late = (LatentPool(KIT, size, pipe.vae, pipe.tokenizer, seed=1, reuse=0.5) for _ in range(2))
    for before in range(0, 8, 2):
        drawn = early.draw(2, before, torch.Generator().manual_seed(before))
    again = late.draw(2, 6, torch.Generator().manual_seed(6))
    assert torch.equal(drawn[0], again[0]) and torch.equal(drawn[1], again[1])
    assert not torch.equal(late.draw(2, 8, torch.Generator().manual_seed(6))[0], again[0])


def test_clips_are_trained_on_with_their_captions(tmp_path: Path) -> None:
    run = Settings(task="shapes", out=tmp_path, height=32, width=48, num_frames=5, batch=2, max_steps=2)
    done = train(TASKS["shapes"], run, nothing)
    assert done is not None
    fresh = shapes.load().transformer.state_dict()
    assert {name for name, value in weights(done).items() if not torch.equal(value, fresh[name])}
    assert lines(tmp_path)[0]["loss"] < 1  # a beginner has 2: the variances of noise and latents
