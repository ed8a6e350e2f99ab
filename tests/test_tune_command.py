"""`dit-accel tune` as a user meets it: a plan that runs, a curve, predictions without weights, refusals."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_accel.cli import main
from dit_accel.commands.models import Generation, generate
from dit_accel.pipelines.shapes.models import build_pipeline
from dit_accel.pipelines.shapes.train import save_pipeline
from dit_accel.tuned_plan import TunedPlan

SIZE = ["--height", "32", "--width", "48", "--num-frames", "5", "--steps", "4"]
METHODS = ["--methods", "draft(density=0.2)", "full/reuse", "full/band(share=0.1)+residual", "full+share"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete small WanPipeline on disk, with a velocity of its own where a fresh one predicts 0."""
    path = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    pipe = build_pipeline(num_layers=2)
    for parameter in pipe.transformer.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    save_pipeline(pipe, path)
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n")
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["tune", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def with_slow_dense_attention(*arguments: Any, **options: Any) -> Generation:
    """On a model this small nothing is faster than dense attention, or only by chance."""
    done = generate(*arguments, **options)
    factor = 10 if arguments[2].name == "dense" else 1
    return replace(done, denoise=factor * done.denoise, attention=factor * done.attention)


def test_a_plan_is_written_with_its_curve_and_runs(
    folder: Path,
    prompts: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dit_accel.commands.tune.generate", with_slow_dense_attention)
    path = tmp_path / "plan.json"
    Path(prompts).write_text("a cat\n\na dog\n")
    arguments = ["--model", str(folder), *SIZE, *METHODS, "--prompts", prompts, "--output", str(path)]
    code, text, error = run(capsys, *arguments, "--budget", "relative_error=0.9")
    assert code == 0, error
    plan = TunedPlan.load(path)
    assert plan.assignment.table.shape == (4, 2, 1)
    assert plan.metric == ("relative_error", 0.9)
    assert plan.measured["relative_error"] <= 0.9
    assert plan.measured["prompts"] == ["a cat", "a dog"]
    lines = [json.loads(line) for line in (tmp_path / "plan.curve.jsonl").read_text().splitlines()]
    assert sum(line["plan"] for line in lines) == 1
    assert all(line["predicted"]["seconds"] > 0 and line["measured"]["seconds"] > 0 for line in lines)
    assert (tmp_path / "plan.curve.png").stat().st_size > 0
    assert "predicted speed-up" in text
    assert "of the query-key pairs computed" in text
    size = [*SIZE, "--prompt", "a cat", "--output", str(tmp_path / "clip.mp4")]
    assert main(["generate", "--model", str(folder), *size, "--method", str(path)]) == 0


@pytest.mark.parametrize("search", ["greedy-signed", "per_head"])
def test_published_searches_end_in_plans_too(
    folder: Path, prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], search: str
) -> None:
    path = tmp_path / "plan.json"
    arguments = ["--model", str(folder), *SIZE, "--prompts", prompts, "--output", str(path), "--delta", "0.5"]
    code, text, error = run(capsys, *arguments, "--search", search)
    assert code == 0, error
    plan = TunedPlan.load(path)
    assert plan.metric == (search, 0.5)
    assert len(plan.assignment.actions) > 1
    assert "searched by" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--budget", "relative_error=1e-6"], "no plan keeps relative_error=1e-06"),
        (["--budget", "psnr"], "--budget is written like"),
        (["--minutes", "0"], "--minutes must be above 0"),
        (["--minutes", "1e-5"], "one plan takes about .* pass more --minutes"),
        (["--groups", "0"], "--groups must be at least 1"),
        (["--methods", "draft+half"], "may end in"),
        (["--output", "nowhere/plan.json"], "--output must be a .json file"),
    ],
    ids=lambda value: value[0].removeprefix("--") if isinstance(value, list) else "",
)
def test_refusals_are_one_sentence_and_write_nothing(
    folder: Path,
    prompts: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: list[str],
    message: str,
) -> None:
    path = tmp_path / "plan.json"
    arguments = ["--model", str(folder), *SIZE, "--methods", "draft(density=0.2)", "full/reuse", "--prompts", prompts]
    code, _, error = run(capsys, *arguments, "--output", str(path), *changes)
    lines = [line for line in error.splitlines() if line.startswith("dit-accel tune:")]
    assert code == 2
    assert len(lines) == 1
    assert re.search(message, lines[0])
    assert [found.name for found in tmp_path.iterdir()] == ["prompts.txt"]


@pytest.mark.parametrize("model", ["wan2.1-14b", "sd3.5-medium"])
def test_a_dry_run_needs_no_weights(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.setattr("dit_accel.tuning.times.PAIRS", {"cpu": 512**2})
    monkeypatch.setattr("dit_accel.tuning.times.PRODUCTS", {"cpu": 1 << 26})
    code, text, error = run(capsys, "--model", model, "--dry-run", "--methods", "radial(density=0.2)", "full/reuse")
    assert code == 0, error
    assert [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")][2:] == [
        "full",
        "radial(density=0.2)",
        "full/reuse",
    ]
    assert "scaled up by the pairs" in text
    assert "dense attention" in text
    assert "A search would take up to" in text
