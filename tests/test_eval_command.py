"""`dit-accel eval` on the embedded pipeline, at a size and step count that say nothing of its quality."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from dit_accel.cli import main
from dit_accel.commands import eval as command
from dit_accel.commands import suite_plan, suite_run
from dit_accel.commands.batches import Batch, sample
from dit_accel.commands.models import Frames, Generation, Model, OnStep, Request, generate, load
from dit_accel.eval.power import Sample
from dit_accel.eval.quality import measure
from dit_accel.eval.records import Record, read_records, read_run
from dit_accel.eval.sets import read_sets
from dit_accel.methods.attention import AttnResult, PlannedAttention
from dit_accel.pipelines import shapes

WEIGHTS = str(Path(shapes.__file__).with_name("weights"))
FLOOR, LESS, RADIAL, EXACT = (
    "dense(kernel='_native_math')",
    "dense, one step less",
    "radial(tile=16)",
    "grat(density=1)",
)
SUITE: dict[str, Any] = {
    "name": "tiny",
    "models": ["shapes"],
    "methods": [RADIAL, EXACT],
    "settings": [{"name": "small", "height": 32, "width": 48, "num_frames": 5, "steps": 2}],
    "prompts": ["a red star moving up", "a green ring shrinking", "a blue square moving left"],
    "metrics": ["psnr", "flicker"],
    "floors": ["backend", "step"],
    "runs": 0,
    "batch": 2,
    "attention": 1,
    "trajectory": True,
    "show": 1,
}
LEAN: dict[str, Any] = {"methods": [RADIAL], "floors": [], "attention": 0, "trajectory": False, "batch": 1}


def evaluate(folder: Path, *arguments: str, **changes: Any) -> int:
    """The exit code of the suite, changed, run in a folder."""
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(SUITE | changes))
    return main(["eval", str(file), "--output", str(folder), *arguments])


def timeless(folder: Path) -> list[dict[str, Any]]:
    """The records of a run without what differs from run to run."""
    return [{key: value for key, value in record.items() if key != "created"} for record in read_run(folder)]


def failures(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "failures.jsonl").read_text().splitlines()]


def breaking(monkeypatch: pytest.MonkeyPatch, broken: Any) -> None:
    """Lets ``sample`` raise what ``broken`` (method, number of the call) gives."""
    calls: list[str] = []

    def instead(model: Model, requests: Any, method: Any, backend: Any, on_step: OnStep | None = None) -> Batch:
        calls.append(method.name)
        if error := broken(method.name, len(calls)):
            raise error
        return sample(model, requests, method, backend, on_step)

    monkeypatch.setattr(suite_run, "sample", instead)


@pytest.fixture(scope="module", autouse=True)
def loaded_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite_plan, "load", functools.cache(load))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval") / "run"
    assert evaluate(folder) == 0
    return folder


def test_each_sample_has_dense_floors_and_methods_against_its_own_dense_clip(finished: Path) -> None:
    records = read_run(finished)
    roles = {"dense": "reference", FLOOR: "floor", LESS: "floor", EXACT: "method", RADIAL: "method"}
    found = [(record["item"]["number"], record["item"]["label"]) for record in records]
    assert sorted(found) == sorted((number, label) for number in range(3) for label in roles)
    dense = {record["item"]["number"]: record["id"] for record in records if record["item"]["label"] == "dense"}
    for record in records:
        item = record["item"]
        assert item["role"] == roles[item["label"]]
        assert record["seed"] == item["number"] and record["prompt"] == SUITE["prompts"][item["number"]]
        assert record["baseline"] == (None if item["label"] == "dense" else dense[item["number"]])
        assert record["steps"] == (1 if item["label"] == LESS else 2)
        assert record["timings"] == {}
        assert 0 <= (record["quality"]["prompt_accuracy"]["value"] or 0) <= 1
    assert (finished / "summary.md").stat().st_size > 0


def by_label(folder: Path) -> dict[str, Record]:
    """The records of the first prompt."""
    return {record["item"]["label"]: record for record in read_run(folder) if record["item"]["number"] == 0}


def test_a_method_that_is_dense_follows_the_dense_trajectory_and_others_leave_it(finished: Path) -> None:
    first = by_label(finished)
    assert "trajectory" not in first["dense"]["quality"]
    for label, close in ((EXACT, True), (FLOOR, True), (RADIAL, False)):
        errors = first[label]["quality"]["trajectory"]["values"]
        assert len(errors) == 2 and errors[-1] == first[label]["quality"]["trajectory"]["value"]
        assert max(errors) < 1e-4 if close else min(errors) > 0.01
        assert (first[label]["quality"]["psnr"]["value"] > 50) == close
    assert "as many steps" in first[LESS]["quality"]["trajectory"]["skipped"]
    assert first[EXACT]["densities"] == {"executed": 1, "run": 1, "ideal": 1}
    assert first[RADIAL]["densities"]["executed"] == first[RADIAL]["densities"]["run"] < 0.9


def test_attention_is_probed_and_clips_are_kept_for_as_many_prompts_as_asked(finished: Path) -> None:
    probed = [record["item"] for record in read_run(finished) if "discarded_mass" in record["quality"]]
    assert [(item["label"], item["number"]) for item in probed] == [(RADIAL, 0), (EXACT, 0)]
    shown = {path.stem for path in (finished / "clips").iterdir()}
    assert shown == {record["id"] for record in by_label(finished).values()}
    with np.load(finished / "references" / f"{by_label(finished)['dense']['id']}.npz") as dense:
        assert dense["frames"].shape == (5, 32, 48, 3) and dense["frames"].dtype == np.uint8
        assert dense["latents"].shape[0] == 2 and dense["latents"].dtype == np.float32


def test_metrics_of_sets_judge_the_kept_clips_in_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network, folder = tmp_path / "network.pt", tmp_path / "run"
    example = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    torch.jit.trace(lambda images: images.float().mean((2, 3)), example).save(str(network))
    metrics = ["psnr", {"fid": {"network": str(network)}}]
    assert evaluate(folder, "--limit", "1", **LEAN | {"metrics": metrics}) == 0
    dense, radial = read_sets(folder)
    assert (dense["label"], radial["label"]) == ("dense", RADIAL)
    assert dense["score"]["skipped"] == "fid needs clips and reference clips."
    assert radial["score"]["value"] > 0 and radial["score"]["samples"] == 5
    assert f"{radial['score']['value']:.4g}" in capsys.readouterr().out


def test_a_killed_run_resumes_to_the_same_records(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        breaking(patch, lambda method, number: KeyboardInterrupt() if number == 8 else None)
        assert evaluate(tmp_path / "run") == 130
    assert "run the same command to go on" in capsys.readouterr().out
    records = tmp_path / "run" / "records.jsonl"
    whole = records.read_bytes()
    assert len(whole.splitlines()) == 12, "both prompts of the first chunk, two entries of the second"
    lines = whole.splitlines(keepends=True)
    cut = b"".join(lines[:8]) + lines[8][:100]  # killed while it wrote one of the two clips of a batch
    (tmp_path / "run" / "references" / "unfinished.npz").write_bytes(b"PK")
    records.write_bytes(cut)
    assert evaluate(tmp_path / "run") == 0
    assert records.read_bytes().startswith(b"".join(lines[:8]))
    assert timeless(tmp_path / "run") == timeless(finished)


def test_records_depend_on_neither_the_order_of_methods_nor_what_ran_before(finished: Path, tmp_path: Path) -> None:
    assert evaluate(tmp_path / "run", "--limit", "2", methods=[EXACT]) == 0
    assert evaluate(tmp_path / "run", methods=[EXACT, RADIAL]) == 0
    ours = {record["id"]: record for record in timeless(tmp_path / "run")}
    theirs = {record["id"]: record for record in timeless(finished)}
    assert ours == theirs


def test_failures_are_noted_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        breaking(patch, lambda method, number: RuntimeError("out of\nmemory") if number in (2, 3) else None)
        assert evaluate(tmp_path / "run", **LEAN) == 1
    found = failures(tmp_path / "run")
    assert [failure["method"] for failure in found] == [RADIAL, "dense", RADIAL]
    assert {failure["setting"] for failure in found} == {"small"}
    assert [failure["error"].split(":")[0] for failure in found] == ["RuntimeError", "RuntimeError", "ValueError"]
    assert found[2]["error"].endswith("the dense run of its samples failed; run the same command again.")
    labels = [(record["item"]["number"], record["item"]["label"]) for record in read_run(tmp_path / "run")]
    assert labels == [(0, "dense"), (2, "dense"), (2, RADIAL)]
    assert "3 clips are missing" in capsys.readouterr().out
    assert evaluate(tmp_path / "run", **LEAN) == 0
    assert len(read_run(tmp_path / "run")) == 6


@pytest.mark.parametrize("runs", [0, 2], ids=["sampled", "timed"])
def test_frames_that_are_no_numbers_are_a_failure_and_no_record(
    runs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        PlannedAttention, "attend", lambda self, call: AttnResult(torch.full_like(call.q, torch.nan), None, 1.0)
    )
    assert evaluate(tmp_path / "run", "--limit", "1", **LEAN | {"runs": runs, "show": 1}) == 1
    [failure] = failures(tmp_path / "run")
    assert failure["method"] == RADIAL
    assert failure["error"] == f"ValueError: the output of {RADIAL} must not contain NaN, but frame 0 does."
    [dense] = read_run(tmp_path / "run")
    assert dense["item"]["label"] == "dense"
    assert [path.stem for path in (tmp_path / "run" / "clips").iterdir()] == [dense["id"]]


def test_a_dense_clip_that_is_gone_is_said_to_be_gone(tmp_path: Path) -> None:
    assert evaluate(tmp_path / "run", "--limit", "1", **LEAN) == 0
    [reference] = (tmp_path / "run" / "references").iterdir()
    reference.unlink()
    assert evaluate(tmp_path / "run", "--limit", "1", **LEAN | {"methods": [RADIAL, EXACT]}) == 1
    [failure] = failures(tmp_path / "run")
    assert failure["error"].endswith(f"no dense clip {reference}, which has its record; pass another --output.")


def test_tables_are_written_before_metrics_of_sets_that_may_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        assert "tiny: shapes, small" in (tmp_path / "run" / "summary.md").read_text()
        raise RuntimeError("out of memory")

    monkeypatch.setattr(command, "judge_sets", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate(tmp_path / "run", "--limit", "1", **LEAN)


def test_limit_takes_the_first_prompts_and_a_dry_run_counts_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(tmp_path / "run", "--limit", "1", **LEAN) == 0
    assert {record["item"]["number"] for record in read_run(tmp_path / "run")} == {0}
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(command, "carry_out", lambda *_: pytest.fail("a dry run ran"))
    capsys.readouterr()
    assert evaluate(tmp_path / "run", "--dry-run", **LEAN) == 0
    said = capsys.readouterr().out
    assert "6 clips in 3 chunks, 1 at once, nothing timed; 2 are recorded" in said
    assert f"    3 clips, 1 recorded: {RADIAL}" in said
    assert "minutes of denoising" in said
    before.pop(tmp_path / "run.yaml")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert evaluate(tmp_path / "new", "--dry-run", **LEAN) == 0
    assert not (tmp_path / "new").exists()


def test_the_timed_output_is_the_judged_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, Frames]] = []

    def unsteady(used: Model, request: Request, method: Any, backend: Any, **options: Any) -> Generation:
        once = generate(used, request, method, backend, **options)
        if made and made[-1][0] == "radial":  # its second run
            frames = once.frames.copy()
            frames[0, 0, 0, 0] += (3 if frames[0, 0, 0, 0] < 0.5 else -3) / 255
            once = replace(once, frames=frames)
        made.append((method.name, once.frames))
        return once

    monkeypatch.setattr(suite_run, "generate", unsteady)
    assert evaluate(tmp_path / "run", "--limit", "1", **LEAN | {"runs": 2, "trajectory": True}) == 0
    records = by_label(tmp_path / "run")
    dense, radial = (
        [(frames * 255).round().astype(np.uint8) for name, frames in made if name == method]
        for method in ("dense", "radial")
    )
    assert len(dense) == len(radial) == 2, "warm-ups are runs of their own"
    assert records[RADIAL]["quality"]["psnr"]["value"] == measure(radial[0], dense[0], ["psnr"])["psnr"].value
    assert len(records[RADIAL]["quality"]["trajectory"]["values"]) == 2
    assert records["dense"]["quality"]["repeat_difference"]["value"] == 0
    assert records[RADIAL]["quality"]["repeat_difference"]["value"] == pytest.approx(3, abs=1)
    for record in records.values():
        timings = record["timings"]
        assert timings["runs"] == 2 and timings["warmup_runs"] == 1 and len(timings["steps"]) == 2
        assert 0 < timings["attention"] < timings["denoise"] < timings["total"]
        assert timings["warmup"] > 0
        assert not {"clock_mhz", "power_w", "peak_memory_bytes"} & timings.keys(), "known of a GPU alone"


@pytest.mark.parametrize(("runs", "peak"), [(1, 900), (2, 700)])
def test_latents_that_are_recorded_count_in_no_other_runs_peak_of_memory(
    runs: int, peak: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*arguments: Any, on_step: OnStep | None, **options: Any) -> Generation:
        once = generate(*arguments, on_step=on_step, **options)
        return replace(once, peak_memory=900 if on_step else 700)

    monkeypatch.setattr(suite_run, "generate", measured)
    assert evaluate(tmp_path / "run", "--limit", "1", **LEAN | {"runs": runs, "trajectory": True}) == 0
    assert {record["timings"]["peak_memory_bytes"] for record in read_run(tmp_path / "run")} == {peak}


def test_clock_and_power_are_those_during_the_timed_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def log(device: torch.device) -> Iterator[list[Sample]]:
        samples = [Sample(time.time() - 1, clock=210, power=70)]  # of the warm-up
        begin = time.time()
        yield samples
        step = (time.time() - begin) / 100
        samples += [Sample(begin + step * number, clock=1980, power=650) for number in range(100)]
        samples += [Sample(time.time() + 1, clock=210, power=70)] * 200

    monkeypatch.setattr(suite_run, "power_log", log)
    assert evaluate(tmp_path / "run", "--limit", "1", **LEAN | {"runs": 1}) == 0
    for record in read_run(tmp_path / "run"):
        assert (record["timings"]["clock_mhz"], record["timings"]["power_w"]) == (1980, 650)


def test_dense_attention_is_warm_before_a_method_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warmed: list[str] = []

    def noted(model: Model, request: Request, method: Any, backend: Any) -> float:
        warmed.append(method.name)
        return float(len(warmed))

    monkeypatch.setattr(suite_run, "warm_up", noted)
    timed = LEAN | {"runs": 1}
    assert evaluate(tmp_path / "run", "--limit", "2", **timed) == 0
    assert warmed == ["dense", "radial"], "once for all samples"
    assert evaluate(tmp_path / "run", "--limit", "2", **timed | {"methods": [RADIAL, EXACT]}) == 0
    assert warmed == ["dense", "radial", "dense", "grat"], "dense is recorded and not run again"
    found = {record["method"]: record["timings"]["warmup"] for record in read_run(tmp_path / "run")}
    assert found == {"dense": 1, "radial": 2, "grat": 4}


def test_a_method_runs_in_another_pipeline_against_the_same_dense_clips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed: list[str] = []
    monkeypatch.setattr(suite_run, "probe", lambda model, request, method, backend: probed.append(method.name))
    methods = [f"dense@{WEIGHTS}", f"{RADIAL}@{WEIGHTS}"]
    assert evaluate(tmp_path / "run", "--limit", "2", **LEAN | {"methods": methods, "attention": 1}) == 0
    assert probed == ["radial"], "dense attention has nothing to be held to dense attention"
    records = read_run(tmp_path / "run")
    dense = [record["id"] for record in records if record["model"] == "shapes"]
    same = [record for record in records if record["item"]["label"] == f"dense@{WEIGHTS}"]
    assert [record["baseline"] for record in same] == dense and len(records) == 6
    assert {record["quality"]["psnr"]["value"] for record in same} == {float("inf")}, "the same weights and noise"


def test_settings_have_their_own_records_and_options(tmp_path: Path) -> None:
    settings = [
        SUITE["settings"][0] | {"name": "two"},
        SUITE["settings"][0] | {"name": "one", "steps": 1, "options": {"tile": 32}},
        SUITE["settings"][0] | {"name": "three", "steps": 3},
    ]
    changes = LEAN | {"settings": settings, "methods": ["radial"]}
    assert evaluate(tmp_path / "run", "--limit", "1", **changes) == 0
    assert evaluate(tmp_path / "run", "--limit", "1", **changes | {"floors": ["step"]}) == 2, "floors are not added"
    assert (
        evaluate(tmp_path / "floor", "--limit", "1", **changes | {"settings": settings[::2], "floors": ["step"]}) == 0
    )
    found = [
        (record["item"]["setting"], record["item"]["label"], record["steps"])
        for folder in ("run", "floor")
        for record in read_run(tmp_path / folder)
    ]
    preset = "radial(density=0.35, start_percent=0.25)"
    assert found[:6] == [
        *(("two", label, 2) for label in ("dense", preset)),
        *(("one", label, 1) for label in ("dense", "radial(tile=32)")),
        *(("three", label, 3) for label in ("dense", preset)),
    ], "without options of the setting a method has its preset"
    assert found[6:] == [
        *(("two", label, steps) for label, steps in (("dense", 2), (LESS, 1), (preset, 2))),
        *(("three", label, steps) for label, steps in (("dense", 3), (LESS, 2), (preset, 3))),
    ], "a floor of two steps is not the dense clip of two steps"


def test_records_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    assert evaluate(tmp_path / "one", "--dtype", "float32", **LEAN) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    arguments = ["dit_accel.cli", "eval", str(tmp_path / "one.yaml"), "--output", str(tmp_path / "two")]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*launch, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "two").glob("records*")} == {
        "records-0-of-2.jsonl",
        "records-1-of-2.jsonl",
    }
    assert [len(read_records(path)) for path in sorted((tmp_path / "two").glob("records*"))] == [4, 2]
    assert timeless(tmp_path / "two") == timeless(tmp_path / "one")
    assert (tmp_path / "two" / "summary.md").is_file() and done.stdout.count("run: ") == 1


def test_times_are_never_taken_by_two_processes_on_one_device() -> None:
    two: Any = SimpleNamespace(num_processes=2, local_process_index=1)
    with pytest.raises(ValueError, match="needs a device for each process, got 2 processes and 1 cpu device on this"):
        command.own_device("cpu", two, timed=True)
    assert command.own_device("cpu", two, timed=False) == torch.device("cpu")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        pytest.param({"models": ["shaeps"]}, "did you mean 'shapes'", id="model"),
        pytest.param({"methods": ["radail"]}, "method radail at setting small of shapes: there is no", id="method"),
        pytest.param({"methods": ["neighborhood(window=(9, 9, 99))"]}, "does not fit", id="method at the size"),
        pytest.param({"methods": ["radial@nowhere"]}, "folder nowhere does not exist", id="folder"),
        pytest.param({"methods": ["dense(kernel='none')"]}, "kernel must be fa4 or one of", id="kernel"),
        pytest.param(
            {"settings": [{"name": "odd", "height": 30}]}, "setting odd: shapes makes sides that are", id="size"
        ),
        pytest.param(
            {"settings": [SUITE["settings"][0] | {"options": {"tlie": 8}}]},
            "radial has no option 'tlie'; did you mean 'tile'",
            id="option",
        ),
        pytest.param(
            {"settings": [SUITE["settings"][0] | {"steps": 1}]}, "floors: step takes one step off", id="floor"
        ),
        pytest.param({"metrics": ["prsn"]}, "got 'prsn'", id="metric"),
    ],
)
def test_refusals_come_before_anything_runs(
    changes: dict[str, Any],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "carry_out", lambda *_: pytest.fail("it ran"))
    assert evaluate(tmp_path / "run", **changes) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_another_timing_in_one_folder_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(finished, runs=1, batch=1) == 2
    assert "has runs 0, got 1" in capsys.readouterr().err
