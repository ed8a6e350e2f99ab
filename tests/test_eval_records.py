"""Record files: order, resuming, killed runs, numbers that JSON lacks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from dit_accel.eval.quality import Score
from dit_accel.eval.records import Job, Record, RecordWriter, make_record, read_records


def job(seed: int = 0, **changes: object) -> Job:
    settings = {
        "method": "radial",
        "model": "shapes",
        "prompt": "a red “circle”\nmoves",
        "seed": seed,
        "size": (17, 64, 96),
        "steps": 4,
        "guidance": 3.5,
        "options": {"density": 0.3, "window": [3, 5, 5]},
    }
    return Job(**(settings | changes))  # type: ignore[arg-type]


def record(seed: int = 0) -> Record:
    scores = {
        "psnr": Score(math.inf, (math.inf, 30.5)),
        "flicker": Score(None, skipped="flicker needs at least 2 frames, got 1."),
    }
    return make_record(job(seed), timings={"denoise": 1.5}, quality=scores, densities={"executed": 0.25})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "results.jsonl"


def test_records_come_back_in_the_order_they_were_written(path: Path) -> None:
    writer = RecordWriter(path)
    for seed in (5, 1, 3):
        writer.append(record(seed))
    assert [row["seed"] for row in read_records(path)] == [5, 1, 3]


def test_a_record_carries_its_job_and_where_it_was_made(path: Path) -> None:
    RecordWriter(path).append(record())
    (row,) = read_records(path)
    assert row["id"] == job().key
    assert row["prompt"] == "a red “circle”\nmoves"
    assert row["size"] == [17, 64, 96]
    assert row["options"] == {"density": 0.3, "window": [3, 5, 5]}
    assert row["timings"] == {"denoise": 1.5}
    assert row["baseline"] is None
    assert {"cpu", "platform"} <= row["machine"].keys()
    assert row["versions"]["torch"]
    assert row["commit"]
    assert row["created"].endswith("+00:00")


def test_infinity_and_nan_are_valid_json_and_come_back(path: Path) -> None:
    row = record()
    row["quality"]["mse"] = {"value": math.nan, "values": [-math.inf], "skipped": None}
    RecordWriter(path).append(row)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    raw = json.loads(path.read_text(), parse_constant=refuse)
    assert raw["quality"]["psnr"] == {"value": "inf", "values": ["inf", 30.5], "skipped": None}
    quality = read_records(path)[0]["quality"]
    assert quality["psnr"]["value"] == math.inf
    assert math.isnan(quality["mse"]["value"])
    assert quality["mse"]["values"] == [-math.inf]
    assert quality["flicker"]["skipped"] == "flicker needs at least 2 frames, got 1."


def test_a_prompt_that_reads_like_a_number_stays_text(path: Path) -> None:
    RecordWriter(path).append(make_record(job(prompt="inf"), timings={}, quality={}, densities={}))
    assert read_records(path)[0]["prompt"] == "inf"


def test_a_second_run_resumes(path: Path) -> None:
    RecordWriter(path).append(record(1))
    again = RecordWriter(path)
    assert again.finished(job(1).key)
    assert not again.finished(job(2).key)
    again.append(record(2))
    assert again.finished(job(2).key)
    assert [row["seed"] for row in read_records(path)] == [1, 2]


def test_a_finished_record_is_never_replaced(path: Path) -> None:
    writer = RecordWriter(path)
    writer.append(record(1))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="records are never replaced"):
        writer.append(record(1))
    assert path.read_bytes() == before


@pytest.mark.parametrize("kept", [0.01, 0.5, 0.99], ids=["one brace", "half", "nearly whole"])
def test_a_line_cut_off_by_a_killed_run_is_left_out_and_then_repaired(path: Path, kept: float) -> None:
    writer = RecordWriter(path)
    writer.append(record(1))
    whole = path.stat().st_size
    writer.append(record(2))
    content = path.read_bytes()
    path.write_bytes(content[: whole + max(1, int((len(content) - whole) * kept))])

    assert [row["seed"] for row in read_records(path)] == [1]
    resumed = RecordWriter(path)
    assert not resumed.finished(job(2).key)
    resumed.append(record(3))
    assert [row["seed"] for row in read_records(path)] == [1, 3]
    assert path.read_bytes().startswith(content[:whole])


def test_a_line_that_lacks_only_its_newline_counts(path: Path) -> None:
    RecordWriter(path).append(record(1))
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    resumed = RecordWriter(path)
    assert resumed.finished(job(1).key)
    resumed.append(record(2))
    assert [row["seed"] for row in read_records(path)] == [1, 2]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{broken", "got b'{broken'; remove"),
        ("3", "got b'3'; remove"),
        ('{"id": "only"}', "it lacks baseline, commit, created, .*, versions; pass a file"),
    ],
    ids=["cut", "a number", "without keys"],
)
def test_a_broken_line_elsewhere_is_reported_by_number(path: Path, line: str, why: str) -> None:
    writer = RecordWriter(path)
    writer.append(record(1))
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=rf"line 2 of .* is not a record, {why}"):
        read_records(path)


def test_keys_tell_settings_apart_and_ignore_the_order_of_options() -> None:
    changes: list[dict[str, object]] = [
        {},
        {"seed": 1},
        {"steps": 5},
        {"prompt": "a"},
        {"method": "draft"},
        {"size": (17, 96, 64)},
        {"guidance": 1.0},
        {"options": {"density": 0.4}},
    ]
    assert len({job(**change).key for change in changes}) == len(changes)
    options = {"window": [3, 5, 5], "density": 0.3}
    assert job(options=options).key == job().key
