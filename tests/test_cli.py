"""The `dit-accel` command as a user meets it: results on disk, refusals in one sentence with exit code 2."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from dit_accel.cli import COMMANDS, main
from dit_accel.commands.arguments import parse_method
from dit_accel.methods.grat import GRATAttnProcessor
from dit_accel.methods.radial import RadialAttnProcessor
from dit_accel.pipelines.shapes.models import build_pipeline
from dit_accel.pipelines.shapes.train import save_pipeline

SIZE = ["--height", "32", "--width", "48", "--num-frames", "9", "--steps", "2", "--prompt", "a cat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete small WanPipeline with random weights on disk."""
    path = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    save_pipeline(build_pipeline(num_layers=1), path)
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_compare_writes_records_page_sheet_and_clips(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["compare", "--model", str(folder), *SIZE, "--density", "1", "--output", str(out)]
    code, text, _ = run(capsys, *arguments, "--method", "radial", "--method", "neighborhood(tile=(2, 2, 4))")
    assert code == 0
    rows = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows] == ["dense", "radial", "neighborhood"]
    assert rows[0]["baseline"] is None
    assert {row["baseline"] for row in rows[1:]} == {rows[0]["id"]}
    for row in rows[1:]:  # at density 1 the sparse operator computes what dense attention does
        assert row["densities"]["executed"] == row["densities"]["run"] == 1
        assert row["quality"]["ssim"]["value"] > 0.999
    assert all(row["timings"]["attention"] < row["timings"]["denoise"] for row in rows)
    assert rows[0]["quality"]["prompt_accuracy"]["skipped"]
    assert "data:video/mp4" in (out / "index.html").read_text()
    assert (out / "sheet.png").stat().st_size > 0
    assert len(list((out / "clips").glob("*.mp4"))) == 3
    assert "speed-up" in text

    before = (out / "records.jsonl").read_bytes()
    code, text, _ = run(capsys, *arguments, "--method", "radial", "--method", "grat")
    assert code == 0
    assert text.count("taken from") == 2  # dense and radial are kept, grat is new
    assert (out / "records.jsonl").read_bytes().startswith(before)


def test_an_interrupted_comparison_keeps_its_records_and_goes_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dit_accel.commands import compare

    arguments = ["compare", "--model", str(folder), *SIZE, "--method", "radial", "--output", str(tmp_path)]
    generate, calls = compare.generate, []

    def interrupted(*args: object) -> object:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(compare, "generate", interrupted)
    code, text, _ = run(capsys, *arguments)
    assert code == 130
    assert "1 of 2 records" in text
    assert "run the same command to go on" in text
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 1
    monkeypatch.setattr(compare, "generate", generate)
    assert run(capsys, *arguments)[0] == 0
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 2


def test_generate_writes_a_clip(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "clip.mp4"
    code, text, _ = run(capsys, "generate", "--model", str(folder), *SIZE, "--method", "grat", "--output", str(path))
    assert code == 0
    assert path.stat().st_size > 0
    assert "query-key pairs" in text


def test_explain_answers_from_the_shape_alone(capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--height", "768", "--width", "1280", "--num-frames", "69"]
    code, text, _ = run(capsys, "explain", "--model", "wan2.1-14b", "--method", "radial", *size, "--format", "json")
    assert code == 0
    figures = json.loads(text)
    assert figures["tokens"] == 69120
    assert figures["grid"] == [18, 48, 80]
    assert figures["tile"] == [1, 1, 128]
    assert figures["executed_density"] == pytest.approx(0.2871, abs=5e-5)
    assert figures["ideal_density"] == pytest.approx(0.2689, abs=5e-5)
    share = 39 / 40 * 38 / 50  # one dense block, 12 of 50 dense steps
    assert figures["run_density"] == pytest.approx(1 - share * (1 - figures["executed_density"]))


@pytest.mark.parametrize("method", ["draft", "log_linear", "pyramid"])
def test_explain_measures_a_method_that_chooses_with_its_choice(
    capsys: pytest.CaptureFixture[str], method: str
) -> None:
    asked = f"{method}(density=0.2, start_percent=0.25)"
    code, text, _ = run(capsys, "explain", "--model", "shapes", "--method", asked, "--format", "json")
    figures = json.loads(text)
    assert code == 0
    assert figures["executed_density"] == pytest.approx(0.2, abs=0.015)
    assert figures["run_density"] == pytest.approx(0.25 + 0.75 * figures["executed_density"])
    assert figures["predicted_speedup"] > 0


def test_explain_says_when_dense_is_better(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = run(capsys, "explain", "--model", "shapes", "--method", "radial(min_tokens=10000)")
    assert code == 0
    assert "Dense: the sequence is shorter than min_tokens=10000." in text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"example:\n  dit-accel {command}" in capsys.readouterr().out


def test_list_names_every_method_and_doctor_finds_the_torch_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert all(name in run(capsys, "list")[1] for name in ("radial", "neighborhood", "grat", "wan2.1-14b", "decay=1.0"))
    code, text, _ = run(capsys, "doctor")
    assert code == 0
    assert "torch         works" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        pytest.param(["explain", "--method", "radail"], "did you mean 'radial'", id="unknown method"),
        pytest.param(["explain", "--method", "radial(decya=1)"], "did you mean 'decay'", id="unknown option"),
        pytest.param(["explain", "--method", "radial(0.2)"], "name(option=value", id="not a method call"),
        pytest.param(["explain", "--density", "0"], "density must be in (0, 1], got 0.0", id="density"),
        pytest.param(["compare", "--density", "1.5"], "density must be in (0, 1], got 1.5", id="compare density"),
        pytest.param(["explain", "--num-frames", "24"], "makes 4k + 1 frames, got num_frames=24", id="frames"),
        pytest.param(["explain", "--height", "100"], "multiples of 16 pixels, got height=100", id="height"),
        pytest.param(["explain", "--steps", "0"], "steps must be at least 1, got 0", id="explain steps"),
        pytest.param(["compare", "--steps", "0"], "--steps must be at least 1, got 0", id="steps"),
        pytest.param(["generate", "--num-frames", "0"], "got num_frames=0", id="generate no frames"),
        pytest.param(["explain", "--height", "0"], "got height=0", id="no height"),
        pytest.param(
            ["explain", "--method", "neighborhood(window=(9, 9, 99))"], "does not fit", id="window larger than the grid"
        ),
        pytest.param(["explain", "--model", "shape"], "there is no model", id="unknown spec"),
        pytest.param(["compare", "--model", "shape"], "did you mean 'shapes'", id="unknown model"),
        pytest.param(["compare", "--device", "cuda"], "torch sees none", id="no gpu"),
        pytest.param(["compare", "--output", "/proc/none"], "cannot be written", id="output folder"),
        pytest.param(["generate", "--output", "nowhere/clip.mp4"], "does not exist", id="output file"),
    ],
)
def test_refusals_are_one_sentence_with_exit_code_2(
    arguments: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, _, error = run(capsys, *arguments)
    assert code == 2
    *progress, last = error.splitlines()
    assert last.startswith(f"dit-accel {arguments[0]}: ")
    assert sentence in last
    assert not any("Error" in line for line in progress)


def test_a_folder_without_a_pipeline_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    code, _, error = run(capsys, "compare", "--model", str(tmp_path / "empty"), *SIZE, "--output", str(tmp_path / "o"))
    assert code == 2
    assert "could not be loaded" in error


def test_a_pipeline_without_a_known_denoiser_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path / "unet")
    code, _, error = run(capsys, "compare", "--model", str(tmp_path / "unet"), *SIZE, "--output", str(tmp_path / "o"))
    assert code == 2
    assert "DDIMPipeline has no supported denoiser" in error


def test_a_hub_model_that_is_not_there_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, _, error = run(capsys, "compare", "--model", "nobody/nothing", *SIZE, "--output", str(tmp_path / "o"))
    assert code == 2
    assert "'nobody/nothing' could not be loaded" in error


def test_method_calls_parse_options_and_presets() -> None:
    assert parse_method("radial(decay=0.2, tile=64)", "shapes") == RadialAttnProcessor(decay=0.2, tile=64)
    assert parse_method("grat(group=(2, 8, 8))", "shapes", 0.5) == GRATAttnProcessor(group=(2, 8, 8), density=0.5)
    assert parse_method("radial", "wan2.1-14b").start_percent == 0.24
    assert parse_method("radial", "wan2.1-14b", 0.3) == RadialAttnProcessor(density=0.3)


def test_frames_are_what_the_pipeline_gave(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "compare", "--model", str(folder), *SIZE, "--method", "radial", "--output", str(tmp_path))
    clips = [np.load(path)["frames"] for path in sorted((tmp_path / "clips").glob("*.npz"))]
    assert [clip.shape for clip in clips] == [(9, 32, 48, 3)] * 2


def test_a_method_below_its_min_tokens_is_recorded_as_dense(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method = "radial(min_tokens=100000)"
    assert run(capsys, "compare", "--model", str(folder), *SIZE, "--method", method, "--output", str(tmp_path))[0] == 0
    row = json.loads((tmp_path / "records.jsonl").read_text().splitlines()[1])
    assert row["densities"] == {"executed": 1, "ideal": 1, "run": 1}
    assert row["quality"]["psnr"]["value"] == "inf"
