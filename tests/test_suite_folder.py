"""Run folders: several processes, resuming with another number of them, and what may not go on in one folder."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import pytest

from dit_accel.eval.records import Item, Job, Record, make_record, read_run
from dit_accel.eval.suite import folder as run_folder
from dit_accel.eval.suite.folder import check_run, note_failure, open_run, run_writer
from dit_accel.eval.suite.items import chunks, share
from dit_accel.eval.suite.schema import Setting, Suite, load_suite

SUITE = Suite(
    name="try",
    models=("shapes", "image"),
    methods=("radial(density=0.3)", "draft", "draft(sink=True)@tuned"),
    settings=(Setting(name="small", height=64), Setting(name="large", height=128)),
    prompts=("a", "b", "c"),
    seeds=(4, 0),
)
MADE_WITH = {"dtype": "torch.float32", "backend": "auto"}
RUNS = (  # label, role, method, pipeline of its own; in the suite's order
    ("dense", "reference", "dense", None),
    ("dense(kernel='native')", "floor", "dense", None),
    ("dense, one step less", "floor", "dense", None),
    ("radial(density=0.3)", "method", "radial", None),
    ("draft(density=0.3)", "method", "draft", None),
    ("draft(sink=True)", "method", "draft", "tuned"),
)


def records_of(suite: Suite, rank: int = 0, processes: int = 1) -> list[Record]:
    """What one process writes."""
    written: list[Record] = []
    for chunk in share(chunks(suite), rank, processes):
        for sample in chunk.samples:
            baseline = None
            for label, role, method, pipeline in RUNS:
                item = Item(
                    suite=suite.name,
                    setting=chunk.setting.name,
                    label=label,
                    role=role,  # type: ignore[typeddict-item]
                    prompt_list=suite.prompt_list,
                    prompt_hash=suite.prompt_hash,
                    number=sample.number,
                    seed=sample.seed,
                )
                job = Job(
                    method=method,
                    model=pipeline or chunk.model,
                    prompt=sample.prompt,
                    seed=sample.noise,
                    size=(1, chunk.setting.height or 0, 32),
                    steps=2,
                    guidance=1.0,
                    options=MADE_WITH | {"label": label, "of": chunk.model},
                )
                record = make_record(job, timings={}, quality={}, densities={}, baseline=baseline, item=item)
                baseline = baseline or record["id"]
                written.append(record)
    return written


@pytest.fixture(scope="module")
def expected() -> list[Record]:
    return records_of(SUITE)


def places(records: list[Record]) -> list[tuple[Any, ...]]:
    return [(row["id"], row["model"], row["item"]["setting"], row["seed"], row["item"]["label"]) for row in records]


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_a_run_reads_the_same_whatever_the_number_of_processes(
    tmp_path: Path, expected: list[Record], processes: int
) -> None:
    for rank in range(processes):
        open_run(tmp_path, SUITE, MADE_WITH, rank)
        writer = run_writer(tmp_path, rank, processes)
        mine = {row["id"] for row in records_of(SUITE, rank, processes)}
        for row in expected:
            if row["id"] in mine:
                writer.append(row)
    assert places(read_run(tmp_path)) == places(expected)
    assert len(list(tmp_path.glob("records*.jsonl"))) == processes


def test_the_order_of_lines_does_not_matter(tmp_path: Path, expected: list[Record]) -> None:
    open_run(tmp_path, SUITE, MADE_WITH)
    writers = [run_writer(tmp_path, rank, 3) for rank in range(3)]
    for place, row in enumerate(random.Random(0).sample(expected, len(expected))):
        writers[place % 3].append(row)
    assert places(read_run(tmp_path)) == places(expected)


def test_a_run_of_one_process_goes_on_with_four(tmp_path: Path, expected: list[Record]) -> None:
    open_run(tmp_path, SUITE, MADE_WITH)
    first = run_writer(tmp_path, 0, 1)
    for row in expected[:31]:
        first.append(row)
    with first.path.open("a") as file:
        file.write('{"id": "cut o')
    del first  # and its lock
    for rank in range(4):
        writer = run_writer(tmp_path, rank, 4)
        assert all(writer.finished(row["id"]) for row in expected[:31])
        mine = {row["id"] for row in records_of(SUITE, rank, 4)}
        for row in expected:
            if row["id"] in mine and not writer.finished(row["id"]):
                writer.append(row)
    assert places(read_run(tmp_path)) == places(expected)


def test_files_are_named_after_their_process(tmp_path: Path) -> None:
    assert run_writer(tmp_path, 0, 1).path == tmp_path / "records.jsonl"
    assert run_writer(tmp_path, 2, 4).path == tmp_path / "records-2-of-4.jsonl"


def test_of_two_records_of_one_job_the_earlier_counts(tmp_path: Path, expected: list[Record]) -> None:
    open_run(tmp_path, SUITE, MADE_WITH)
    row = expected[0]
    late, early = (row | {"created": f"2026-01-0{day}T00:00:00+00:00"} for day in (2, 1))
    writers = run_writer(tmp_path, 0, 2), run_writer(tmp_path, 1, 2)
    writers[0].append(late)  # type: ignore[arg-type]
    writers[1].append(early)  # type: ignore[arg-type]
    assert [found["created"] for found in read_run(tmp_path)] == [early["created"]]


def test_records_of_no_suite_and_folders_of_no_run_are_refused(tmp_path: Path, expected: list[Record]) -> None:
    with pytest.raises(ValueError, match=r"is no run of a suite: it has no suite\.yaml; pass the --output of"):
        read_run(tmp_path)
    open_run(tmp_path, SUITE, MADE_WITH)
    stray = {name: value for name, value in expected[0].items() if name != "item"}
    run_writer(tmp_path, 0, 1).append(stray)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"records\.jsonl has the record {stray['id']} of no suite; move the file"):
        read_run(tmp_path)


def test_failures_are_lines_of_their_own_file_and_no_records(tmp_path: Path) -> None:
    open_run(tmp_path, SUITE, MADE_WITH)
    error = RuntimeError("out of memory\nat a place")
    for rank, processes in ((0, 1), (1, 2), (1, 2)):
        reason = note_failure(tmp_path, rank, processes, model="m", setting="s", method="draft", error=error)
        assert reason == "RuntimeError: out of memory"
    counts = {path.name: len(path.read_text().splitlines()) for path in tmp_path.glob("failures*")}
    assert counts == {"failures.jsonl": 1, "failures-1-of-2.jsonl": 2}
    line = json.loads((tmp_path / "failures.jsonl").read_text())
    assert line.pop("created").endswith("+00:00")
    assert line == {"model": "m", "setting": "s", "method": "draft", "error": "RuntimeError: out of memory"}
    assert read_run(tmp_path) == []


GROWN: dict[str, dict[str, Any]] = {
    "same": {},
    "models": {"models": ("new", *SUITE.models)},
    "methods": {"methods": ("grat", *SUITE.methods)},
    "settings": {"settings": (Setting(name="new"), *SUITE.settings)},
    "seeds": {"seeds": (*SUITE.seeds, 9)},
    "prompts": {"prompts": (*SUITE.prompts, "d")},
    "shown": {"show": 0},
}


@pytest.mark.parametrize("changes", GROWN.values(), ids=list(GROWN))
def test_a_run_goes_on_with_a_grown_suite(tmp_path: Path, changes: dict[str, Any]) -> None:
    open_run(tmp_path, SUITE, MADE_WITH)
    grown = replace(SUITE, **changes)
    open_run(tmp_path, grown, MADE_WITH, rank=1)
    assert load_suite(tmp_path / "suite.yaml") == SUITE
    open_run(tmp_path, grown, MADE_WITH)
    assert load_suite(tmp_path / "suite.yaml") == grown
    assert {path.name for path in tmp_path.iterdir()} == {"suite.yaml"}


CHANGED: dict[str, tuple[dict[str, Any], str]] = {
    "name": ({"name": "other"}, "has name try, got other"),
    "runs": ({"runs": 3}, "has runs 1, got 3"),
    "batch": ({"batch": 4}, "has batch 1, got 4"),
    "metrics": ({"metrics": {"psnr": {}}}, "has metrics mse, psnr, .*, got psnr"),
    "metric options": ({"metrics": {name: {"tile": 8} for name in SUITE.metrics}}, "has metrics "),
    "floors": ({"floors": ()}, "has floors backend, got "),
    "attention": ({"attention": 1}, "has attention 0, got 1"),
    "trajectory": ({"trajectory": True}, "has trajectory False, got True"),
    "model gone": ({"models": ("image",)}, "has shapes among its models, which is gone or changed"),
    "method gone": ({"methods": ("draft",)}, r"has radial\(density=0.3\) among its methods, which is gone"),
    "setting changed": (
        {"settings": (replace(SUITE.settings[0], steps=9), SUITE.settings[1])},
        "has small among its settings, which is gone or changed",
    ),
    "seed gone": ({"seeds": (4,)}, "begins with other seeds, 4, 0"),
    "seed before": ({"seeds": (9, *SUITE.seeds)}, "begins with other seeds"),
    "seeds in another order": ({"seeds": (0, 4)}, "begins with other seeds"),
    "prompt before": ({"prompts": ("new", *SUITE.prompts)}, "begins with other prompts, those of 'inline'"),
    "prompt gone": ({"prompts": SUITE.prompts[:2]}, "begins with other prompts"),
}


@pytest.mark.parametrize(("changes", "reason"), CHANGED.values(), ids=list(CHANGED))
@pytest.mark.parametrize("rank", [0, 1])
def test_another_run_is_refused_and_leaves_the_folder_alone(
    tmp_path: Path, changes: dict[str, Any], reason: str, rank: int
) -> None:
    open_run(tmp_path, SUITE, MADE_WITH)
    with pytest.raises(ValueError, match=rf"holds a run that {reason}.*; undo that or pass another --output\."):
        open_run(tmp_path, replace(SUITE, **changes), MADE_WITH, rank)
    assert load_suite(tmp_path / "suite.yaml") == SUITE


@pytest.mark.parametrize(("name", "value"), [("dtype", "torch.bfloat16"), ("backend", "triton")])
def test_records_made_otherwise_are_refused(tmp_path: Path, expected: list[Record], name: str, value: str) -> None:
    open_run(tmp_path, SUITE, MADE_WITH)
    run_writer(tmp_path, 1, 2).append(expected[0])
    with pytest.raises(ValueError, match=rf"was made with {name} {MADE_WITH[name]}, got {value}; undo that"):
        open_run(tmp_path, SUITE, MADE_WITH | {name: value})
    open_run(tmp_path, SUITE, MADE_WITH)


HERE = {"cpu": "a CPU", "gpu": "2 x NVIDIA H200"}
MACHINES: dict[str, tuple[str, dict[str, str], str, str | None]] = {
    "another GPU": ("cuda", HERE | {"gpu": "8 x NVIDIA A100"}, "2.13.0", "NVIDIA A100 with torch 2.13.0"),
    "another number of GPUs": ("cuda", HERE | {"gpu": "1 x NVIDIA H200"}, "2.13.0", None),
    "another CPU beside the GPU": ("cuda", HERE | {"cpu": "other"}, "2.13.0", None),
    "another torch": ("cuda", HERE, "2.9.0", "NVIDIA H200 with torch 2.9.0"),
    "another CPU": ("cpu", HERE | {"cpu": "other"}, "2.13.0", "other with torch 2.13.0"),
    "another GPU beside the CPU": ("cpu", {"cpu": "a CPU"}, "2.13.0", None),
}


@pytest.mark.parametrize(("device", "machine", "torch", "before"), MACHINES.values(), ids=list(MACHINES))
@pytest.mark.parametrize("runs", [0, 1])
def test_times_of_two_machines_never_stand_in_one_folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    expected: list[Record],
    device: str,
    machine: dict[str, str],
    torch: str,
    before: str | None,
    runs: int,
) -> None:
    monkeypatch.setattr(run_folder, "machine", lambda: HERE)
    monkeypatch.setattr(run_folder, "versions", lambda: {"torch": "2.13.0"})
    suite, made_with = replace(SUITE, runs=runs), {"device": device}
    open_run(tmp_path, suite, made_with)
    row = expected[0] | {"options": made_with, "machine": machine, "versions": {"torch": torch}}
    run_writer(tmp_path, 0, 1).append(row)  # type: ignore[arg-type]
    if before is None or runs == 0:
        check_run(tmp_path, suite, made_with)
    else:
        now = {"cuda": "NVIDIA H200", "cpu": "a CPU"}[device]
        with pytest.raises(ValueError, match=rf"was timed on {before}, this is {now} with torch 2\.13\.0; undo that"):
            check_run(tmp_path, suite, made_with)


@pytest.mark.parametrize(
    ("mine", "theirs"), [((0, 1), (0, 1)), ((0, 1), (0, 4)), ((0, 4), (0, 2)), ((3, 4), (3, 4))], ids=str
)
def test_a_folder_has_one_writer_of_a_rank_and_one_first_process(
    tmp_path: Path, mine: tuple[int, int], theirs: tuple[int, int]
) -> None:
    writer = run_writer(tmp_path, *mine)
    with pytest.raises(ValueError, match=rf"another process is at work in {tmp_path} \(it holds \.lock.*\); wait for"):
        run_writer(tmp_path, *theirs)
    del writer
    run_writer(tmp_path, *theirs)


def test_a_killed_process_leaves_its_folder_to_the_next(tmp_path: Path) -> None:
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    with Popen([sys.executable, "-c", hold, str(tmp_path / ".lock")], stdin=PIPE, stdout=PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"\n"
        with pytest.raises(ValueError, match="another process is at work"):
            run_writer(tmp_path, 0, 1)
        process.kill()
    run_writer(tmp_path, 0, 1)
