"""Results as JSON lines: one record per item, written when the item ends, so that a killed run resumes.

JSON has no infinity and no NaN. Inside ``timings``, ``quality`` and ``densities`` they are written as the strings
"inf", "-inf" and "nan", and read back as floats.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypedDict, cast

from dit_accel.eval.machine import machine, source_version, versions
from dit_accel.eval.quality.metrics import Score

_NUMERIC = ("timings", "quality", "densities")
_NON_FINITE = ("inf", "-inf", "nan")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is asked for; equal jobs have equal keys.

    Args:
        method: method name.
        options: the method's options as JSON values, and whatever else makes two runs differ (dtype, backend).
        model: pipeline folder or hub name.
        prompt: text.
        seed: of the initial latents.
        size: (frames, height, width) in pixels.
        steps: denoising steps.
        guidance: guidance scale.
    """

    method: str
    model: str
    prompt: str
    seed: int
    size: tuple[int, int, int]
    steps: int
    guidance: float
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Hash of every field, 16 hex digits; independent of the order of options."""
        return _digest(json.dumps(dataclasses.asdict(self), sort_keys=True))


class Timings(TypedDict, total=False):
    """Seconds, except where the key says otherwise; absent where not measured."""

    denoise: float  # first step's start to last step's end, median of the timed runs
    denoise_iqr: float
    attention: float  # spent in the attention layers that the method replaces, within denoise
    total: float  # the whole pipeline call, text encoder and VAE included
    warmup: float  # the runs before the timed ones
    steps: list[float]  # each step of one timed run
    runs: int  # timed runs
    warmup_runs: int
    peak_memory_bytes: int


class Densities(TypedDict, total=False):
    """Shares of query-key pairs; absent where not known."""

    executed: float  # of a sparse call: pairs inside the tiles that were computed, text included
    ideal: float  # of a sparse call: pairs that the method's exact rule keeps
    run: float  # of the whole run, dense steps and layers included


class Record(TypedDict):
    """One line of a results file."""

    id: str  # the job's key
    method: str
    options: dict[str, Any]
    model: str
    prompt: str
    prompt_hash: str
    seed: int
    size: list[int]  # frames, height, width
    steps: int
    guidance: float
    timings: Timings
    quality: dict[str, dict[str, Any]]  # metric name -> Score as a dict, of the output of a timed run
    densities: Densities
    machine: dict[str, str]
    versions: dict[str, str]
    commit: str  # git commit, or package version where there is no checkout
    baseline: str | None  # id of the record that speed-up and quality are against; None for the baseline itself
    created: str  # UTC, ISO 8601


def make_record(
    job: Job,
    *,
    timings: Timings,
    quality: Mapping[str, Score],
    densities: Densities,
    baseline: str | None = None,
) -> Record:
    """A record of a finished job, stamped with machine, versions, commit and time."""
    return Record(
        id=job.key,
        method=job.method,
        options=dict(job.options),
        model=job.model,
        prompt=job.prompt,
        prompt_hash=_digest(job.prompt),
        seed=job.seed,
        size=list(job.size),
        steps=job.steps,
        guidance=job.guidance,
        timings=timings,
        quality={name: dataclasses.asdict(score) for name, score in quality.items()},
        densities=densities,
        machine=machine(),
        versions=versions(),
        commit=source_version(),
        baseline=baseline,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


class RecordWriter:
    """Appends records to a JSON-lines file; lines that are there are never changed.

    Args:
        path: the file; it and its folder are made when missing.

    Raises:
        ValueError: when a line of the existing file, other than an unfinished last one, is not a record.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._finished = {record["id"] for record in read_records(self.path)} if self.path.exists() else set()

    def finished(self, key: str) -> bool:
        """Whether a job of this key (``Job.key``) has its record."""
        return key in self._finished

    def append(self, record: Record) -> None:
        """Writes one line and returns when it is on disk.

        Raises:
            ValueError: when the file already has a record of this id.
        """
        if self.finished(record["id"]):
            raise ValueError(f"{self.path} already has a record with id {record['id']}; records are never replaced.")
        line = json.dumps(to_json(record), allow_nan=False, ensure_ascii=False)
        _end_last_line(self.path)
        with self.path.open("ab", buffering=0) as file:
            file.write(line.encode() + b"\n")
            os.fsync(file.fileno())
        self._finished.add(record["id"])


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """The records of a file in the order they were written; an unfinished last line (a killed run) is left out.

    Raises:
        ValueError: when any other line is not a record.
    """
    return list(_parse(Path(path)))


def _parse(path: Path) -> Iterator[Record]:
    lines = path.read_bytes().split(b"\n")
    if not _is_json(lines[-1]):  # empty, or cut off by the end of its process
        lines.pop()
    for number, line in enumerate(lines, start=1):
        row = json.loads(line) if _is_json(line) else None
        if not isinstance(row, dict) or not Record.__required_keys__ <= row.keys():
            raise ValueError(f"line {number} of {path} is not a record, got {line[:60]!r}; remove that line.")
        yield cast(Record, row | {section: _from_json(row[section]) for section in _NUMERIC})


def _end_last_line(path: Path) -> None:
    """Completes the last line with its newline, or removes it where it was cut off."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        start = content.rfind(b"\n") + 1
        if _is_json(content[start:]):
            file.write(b"\n")
        else:
            file.truncate(start)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def to_json(value: Any) -> Any:
    """The value as JSON has it: non-finite floats as strings, tuples as lists."""
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _from_json(value: Any) -> Any:
    """The value with the strings of non-finite floats as floats again."""
    if isinstance(value, dict):
        return {key: _from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    return float(value) if value in _NON_FINITE else value


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
