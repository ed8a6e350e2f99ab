"""`dit-accel eval` on the embedded pipeline, at a size and step count that say nothing of its quality."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dit_accel.cli import main
from dit_accel.commands import eval as command
from dit_accel.commands.batches import sample
from dit_accel.commands.models import Request, load
from dit_accel.eval.quality import Score
from dit_accel.eval.records import Job, Record, make_record
from dit_accel.eval.summary import summarise_methods, table_row
from dit_accel.methods import make_method
from dit_accel.pipelines.shapes.scenes import parse_caption

SIZE = ["--height", "32", "--width", "48", "--num-frames", "9", "--steps", "2"]
BROKEN = "neighborhood(window=(9, 9, 99))"  # larger than the grid
WEIGHTS = str(files("dit_accel.pipelines.shapes").joinpath("weights"))


def evaluate(output: Path, *arguments: str) -> int:
    return main(["eval", *SIZE, "--prompts", "2", "--output", str(output), *arguments])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("eval")
    methods = ["--method", "radial(tile=16)", "--method", BROKEN, "--method", "grat(density=1)", "--discarded"]
    assert evaluate(output, *methods) == 1, "one method failed"
    return output


def test_every_method_has_a_record_of_every_prompt_beside_dense(finished: Path) -> None:
    rows = lines(finished / "records.jsonl")
    assert [(row["method"], row["seed"]) for row in rows] == [
        (method, seed) for method in ("dense", "radial", "grat") for seed in (0, 1)
    ]
    dense = {row["prompt"]: row["id"] for row in rows[:2]}
    assert [row["baseline"] for row in rows] == [None, None, *[dense[row["prompt"]] for row in rows[2:]]]
    assert all(row["timings"] == {} for row in rows)
    assert {len(parse_caption(prompt)) for prompt in dense} == {1, 2}
    for row in rows[4:]:  # at density 1 the operator computes what dense attention does
        assert row["densities"] == {"executed": 1, "run": 1}
        assert row["quality"]["psnr"]["value"] > 50
    assert all(row["densities"]["executed"] == row["densities"]["run"] < 0.9 for row in rows[2:4])
    assert all(0 <= row["quality"]["prompt_accuracy"]["value"] <= 1 for row in rows)
    assert all(row["quality"]["clip_correct"]["value"] in (0, 1) for row in rows)


def test_a_method_that_fails_is_noted_and_tried_again(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "records.jsonl").read_bytes()
    assert evaluate(finished, "--method", "radial(tile=16)", "--method", BROKEN) == 1
    assert (finished / "records.jsonl").read_bytes() == before
    failures = lines(finished / "failures.jsonl")
    assert len(failures) == 2
    assert all("does not fit" in failure["error"] for failure in failures)
    assert "neighborhood(window=(9, 9, 99)) failed: ValueError" in capsys.readouterr().out


def test_summary_has_table_intervals_and_heat_maps(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods = ["--method", "radial(tile=16)", "--method", "grat(density=1)", "--discarded"]
    assert evaluate(finished, *methods) == 0
    text = (finished / "summary.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert "Nothing was timed" in text
    assert "The best mean PSNR is that of grat(density=1); it is compared with radial(tile=16)." in text
    summary = json.loads((finished / "summary.json").read_text())
    assert [method["label"] for method in summary["methods"]] == ["dense", "radial(tile=16)", "grat(density=1)"]
    dense, radial, grat = summary["methods"]
    assert dense["to_dense"] == {}
    assert dense["scores"].keys() >= {"prompt_accuracy", "clip_correct"}
    assert radial["best_other"] == "grat(density=1)"
    assert radial["to_best_other"]["difference"] < 0 < grat["to_best_other"]["difference"]
    low, high = radial["scores"]["psnr"]["interval"].values()
    assert low <= radial["scores"]["psnr"]["mean"] <= high
    assert radial["scores"]["psnr"]["count"] == radial["to_dense"]["prompt_accuracy"]["count"] == 2
    assert np.array(radial["discarded"]["by_head"]).shape == (8, 4)
    assert 0 < radial["discarded"]["mean"] < 1
    assert grat["discarded"]["mean"] == pytest.approx(0, abs=1e-4)
    assert (finished / "discarded-01.png").stat().st_size > 0


def test_a_longer_run_goes_on_with_the_prompts_of_a_shorter_one(finished: Path, tmp_path: Path) -> None:
    assert command.read_prompts("7", "shapes") == command.read_prompts("48", "shapes")[:7]


def test_clips_do_not_depend_on_the_batch() -> None:
    model = load("shapes", "cpu")
    prompts = command.read_prompts("3", "shapes")
    requests = [Request(prompt, 5 + seed, 32, 48, 9, 2, 4.0) for seed, prompt in enumerate(prompts)]
    method = make_method("radial", tile=16)
    together = sample(model, requests, method, "auto")
    alone = [sample(model, [request], method, "auto") for request in requests]
    for clip, batch in zip(together.clips, alone, strict=True):
        assert np.abs(clip.astype(int) - batch.clips[0]).max() <= 2  # levels of 255: matrix products round differently
        assert batch.executed == together.executed
    assert np.abs(together.clips[0].astype(int) - together.clips[1]).max() > 50


def test_a_method_runs_in_another_pipeline_against_the_same_dense_clips(tmp_path: Path) -> None:
    assert evaluate(tmp_path, "--method", f"dense@{WEIGHTS}", "--method", f"radial(tile=16)@{WEIGHTS}") == 0
    rows = lines(tmp_path / "records.jsonl")
    assert [row["model"] for row in rows] == ["shapes"] * 2 + [WEIGHTS] * 4
    assert [row["baseline"] for row in rows[2:4]] == [row["id"] for row in rows[:2]]
    assert {row["quality"]["psnr"]["value"] for row in rows[2:4]} == {"inf"}, "the same weights, noise and prompts"
    assert "identical" in (tmp_path / "summary.md").read_text()


def test_an_interrupted_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def interrupted(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sample(*arguments)

    monkeypatch.setattr(command, "sample", interrupted)
    assert evaluate(tmp_path, "--method", "radial(tile=16)", "--batch", "1") == 130
    assert "run the same command to go on" in capsys.readouterr().out
    before = (tmp_path / "records.jsonl").read_bytes()
    assert evaluate(tmp_path, "--method", "radial(tile=16)", "--batch", "2") == 0
    assert (tmp_path / "records.jsonl").read_bytes().startswith(before)
    assert len(calls) == 4, "the two clips that were missing, at once"
    assert len(lines(tmp_path / "records.jsonl")) == 4


def test_compare_measures_discarded_mass_in_a_run_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["compare", *SIZE, "--method", "radial(tile=16)", "--output", str(tmp_path)]
    assert main([*arguments, "--discarded"]) == 0
    dense, radial = lines(tmp_path / "records.jsonl")
    assert "discarded_mass" not in dense["quality"]
    assert len(radial["quality"]["discarded_mass"]["values"]) == 8 * 4
    assert len(radial["quality"]["discarded_mass_by_step"]["values"]) == 2
    mean = radial["quality"]["discarded_mass"]["value"]
    assert 0 < mean < 1
    assert f"radial leaves out softmax mass: mean {mean:.1%}, most" in capsys.readouterr().out
    assert "Discarded softmax mass of radial" in (tmp_path / "index.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        pytest.param(["--method", "radail"], "did you mean 'radial'", id="method"),
        pytest.param(["--method", "radial@nowhere"], "folder nowhere, which does not exist", id="folder"),
        pytest.param(["--method", "radial", "--prompts", "0"], "between 1 and 960, got 0", id="no prompts"),
        pytest.param(["--method", "radial", "--prompts", "none.txt"], "text file with a prompt a line", id="no file"),
        pytest.param(["--method", "radial", "--batch", "0"], "--batch must be at least 1, got 0", id="batch"),
        pytest.param(["--method", "radial", "--model", "a/b"], "has no prompts of its own", id="other model"),
    ],
)
def test_refusals_come_before_anything_runs(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["eval", *arguments, "--output", str(tmp_path)]) == 2
    assert sentence in capsys.readouterr().err


def record(method: str, number: int, psnr: float | None, shown: float) -> Record:
    job = Job(method=method, model="m", prompt=f"p{number}", seed=number, size=(1, 8, 8), steps=1, guidance=1.0)
    skipped = "no verifier" if shown < 0 else None
    quality = {"prompt_accuracy": Score(None if skipped else shown, skipped=skipped)}
    quality |= {} if psnr is None else {"psnr": Score(psnr)}
    return make_record(job, timings={}, quality=quality, densities={"executed": 0.5, "run": 0.75})


def test_methods_are_paired_on_the_prompts_that_both_finished() -> None:
    results = {
        "dense": {number: record("dense", number, None, 1.0) for number in range(4)},
        "a": {number: record("a", number, 20.0 + number, 0.5) for number in range(4)},
        "b": {number: record("b", number, 10.0 * number, 1.0) for number in (1, 3)},
        "c": {},
    }
    dense, a, b = summarise_methods(results, heads=1)
    assert (dense.best_other, dense.worst_prompt, a.best_other, b.best_other) == (None, None, "b", "a")
    assert a.to_best_other is not None
    assert b.to_best_other is not None
    assert a.to_best_other.difference == np.mean([21 - 10, 23 - 30]) == -b.to_best_other.difference
    assert (a.prompts, b.prompts, a.to_dense["prompt_accuracy"].count, b.to_dense["prompt_accuracy"].count) == (
        4,
        2,
        4,
        2,
    )
    assert a.to_dense["prompt_accuracy"].difference == -0.5
    assert (a.worst_prompt, b.worst_prompt) == (0, 1)
    row = table_row(a)
    assert row["PSNR [95 %]"].startswith("21.50 dB [20.")
    assert row["worst prompt"] == "#0: 20.0 dB"
    assert row["shown to dense"] == "-50 pp [-50, -50], p = 0.12"


def test_scores_that_were_skipped_are_left_out_of_the_table() -> None:
    results = {"dense": {0: record("dense", 0, None, -1)}, "a": {0: record("a", 0, 20.0, -1)}}
    row = table_row(summarise_methods(results, heads=1)[1])
    assert row["shown [95 %]"] == row["correct"] == row["shown to dense"] == row["PSNR to best other"] == "–"
