"""The folder of a run: what may go on in it, and the files of each of its processes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

from dit_accel.eval.machine import machine, versions
from dit_accel.eval.records import RecordWriter, read_records
from dit_accel.eval.suite.schema import Suite, dump_suite, load_suite

_FIXED = ("name", "runs", "batch", "metrics", "floors", "attention", "trajectory")
_GROWING = ("models", "methods", "settings")


def open_run(folder: Path, suite: Suite, made_with: Mapping[str, str], rank: int = 0) -> None:
    """Begins a run in a folder, or goes on with one that asked for no more than this suite.

    Rank 0 writes the suite to ``suite.yaml``. Models, methods and settings may be added, prompts and seeds at the end
    of their lists; ``show`` may change. Timed clips are added only where the earlier ones were timed.

    Args:
        folder: made when missing.
        suite: what is asked for now.
        made_with: options that every record has, such as its dtype and backend.
        rank: of this process.

    Raises:
        ValueError: a folder with a run that differs, or with records made otherwise or, if timed, elsewhere.
    """
    check_run(folder, suite, made_with)
    folder.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        path = folder / "suite.yaml"
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(dump_suite(suite), encoding="utf-8")
        os.replace(unfinished, path)  # whole at any moment, for the other processes


def check_run(folder: Path, suite: Suite, made_with: Mapping[str, str]) -> None:
    """Raises what ``open_run`` does, and begins nothing."""
    path = folder / "suite.yaml"
    reasons = [*(_differences(load_suite(path), suite) if path.is_file() else ())]
    reasons += _made_otherwise(folder, made_with, timed=suite.runs > 0)
    if reasons:
        raise ValueError(f"{folder} holds a run that {reasons[0]}; undo that or pass another --output.")


def run_writer(folder: Path, rank: int, processes: int) -> RecordWriter:
    """The writer of one process; what any process of this or an earlier start has recorded is finished.

    For as long as it lives, no other start of this or of a first process gets a writer in the folder.

    Raises:
        ValueError: a folder in which another start is at work, or what ``RecordWriter`` refuses.
    """
    locks = [folder / f".lock-{rank}-of-{processes}", *([folder / ".lock"] if rank == 0 else [])]
    file = _run_file(folder, "records", rank, processes)
    return RecordWriter(file, beside=folder.glob("records*.jsonl"), locks=locks)


def note_failure(
    folder: Path, rank: int, processes: int, *, model: str, setting: str, method: str, error: Exception
) -> str:
    """Adds a line to the failures of this process and returns the reason; a failure is no record: it is tried again."""
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    line = {"model": model, "setting": setting, "method": method, "error": reason}
    line["created"] = datetime.now(UTC).isoformat(timespec="seconds")
    with _run_file(folder, "failures", rank, processes).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return reason


def _run_file(folder: Path, kind: str, rank: int, processes: int) -> Path:
    return folder / (f"{kind}.jsonl" if processes == 1 else f"{kind}-{rank}-of-{processes}.jsonl")


def _differences(old: Suite, new: Suite) -> Iterator[str]:
    """What of the new suite contradicts the old one, as ends of a sentence about the old run."""
    for name in _FIXED:
        before, now = getattr(old, name), getattr(new, name)
        if before != now:
            yield f"has {name} {_shown(before)}, got {_shown(now)}"
    for name in _GROWING:
        lost = [value for value in getattr(old, name) if value not in getattr(new, name)]
        if lost:
            yield f"has {_shown(lost[0])} among its {name}, which is gone or changed"
    if old.prompts != new.prompts[: len(old.prompts)]:
        yield f"begins with other prompts, those of {old.prompt_list!r}"
    if old.seeds != new.seeds[: len(old.seeds)]:  # clips of the first one are shown and probed
        yield f"begins with other seeds, {_shown(old.seeds)}"


def _made_otherwise(folder: Path, made_with: Mapping[str, str], timed: bool) -> Iterator[str]:
    device = made_with.get("device")
    here = _where(machine(), versions(), device)
    for path in sorted(folder.glob("records*.jsonl")):
        for record in read_records(path):
            for name, value in made_with.items():
                before = record["options"].get(name)
                if before != value:
                    yield f"was made with {name} {before}, got {value}"
            there = _where(record["machine"], record["versions"], device)
            if timed and there != here:
                yield f"was timed on {there}, this is {here}"


def _where(machine: Mapping[str, str], versions: Mapping[str, str], device: str | None) -> str:
    """What times depend on: one chip, whatever their number, and torch."""
    chip = machine["gpu"].partition(" x ")[2] if device == "cuda" and "gpu" in machine else machine["cpu"]
    return f"{chip} with torch {versions['torch']}"


def _shown(value: object) -> str:
    return getattr(value, "name", None) or (
        ", ".join(map(str, value)) if isinstance(value, (tuple, dict)) else str(value)
    )
