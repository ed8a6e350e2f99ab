"""Results as JSON lines: one record per item, written when the item ends, so that a killed run resumes.

JSON has no infinity and no NaN. Inside ``timings``, ``quality`` and ``densities`` they are written as the strings
"inf", "-inf" and "nan", and read back as floats.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Literal, TypedDict, cast

from dit_accel.eval.machine import machine, source_version, versions
from dit_accel.eval.quality.metrics import Score
from dit_accel.eval.suite.schema import Suite, load_suite

_NUMERIC = ("timings", "quality", "densities")
_NON_FINITE = ("inf", "-inf", "nan")
_ROLES = ("reference", "floor", "method")


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
    clock_mhz: float  # of the GPU during the timed runs, median
    power_w: float  # that it drew, median


class Densities(TypedDict, total=False):
    """Shares of query-key pairs; absent where not known."""

    executed: float  # of a sparse call: pairs inside the tiles that were computed, text included
    ideal: float  # of a sparse call: pairs that the method's exact rule keeps
    run: float  # of the whole run, dense steps and layers included


class Item(TypedDict):
    """Where in a suite a record belongs."""

    suite: str  # its name
    setting: str  # name of the setting
    label: str  # what ran, as tables call it; "dense" for the reference
    role: Literal["reference", "floor", "method"]
    prompt_list: str
    prompt_hash: str  # of the whole list, not of this prompt
    number: int  # place of the prompt in the list
    seed: int  # the suite's; that of the record is the noise's


class _Record(TypedDict):
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


class Record(_Record, total=False):  # NotRequired is not seen where annotations are text
    """One line of a results file."""

    item: Item  # of a suite's records


def make_record(
    job: Job,
    *,
    timings: Timings,
    quality: Mapping[str, Score],
    densities: Densities,
    baseline: str | None = None,
    item: Item | None = None,
) -> Record:
    """A record of a finished job, stamped with machine, versions, commit and time."""
    record = Record(
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
    return record if item is None else record | {"item": item}


class RecordWriter:
    """Appends records to a JSON-lines file; lines that are there are never changed.

    Args:
        path: the file; it and its folder are made when missing.
        beside: further files whose records count as finished.
        locks: files that are locked for as long as the writer lives; made when missing.

    Raises:
        ValueError: when a line of the existing file, other than an unfinished last one, is not a record, or when
            another writer holds one of the locks.
    """

    def __init__(self, path: str | os.PathLike[str], beside: Iterable[Path] = (), locks: Iterable[Path] = ()) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._locks = [_locked(lock) for lock in locks]
        files = {self.path, *beside}
        self._finished = {record["id"] for file in files if file.exists() for record in read_records(file)}

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


def read_run(folder: str | os.PathLike[str]) -> list[Record]:
    """The records of a run of a suite, whatever processes wrote them, in the suite's order.

    That is by model, setting, seed and prompt; of one sample the dense clip, the noise floors and the methods, several
    of one method by their labels. Of two records of one id the earlier one counts.

    Raises:
        ValueError: a folder without ``suite.yaml`` or with a record that is of no suite.
    """
    if not (Path(folder) / "suite.yaml").is_file():
        raise ValueError(f"{folder} is no run of a suite: it has no suite.yaml; pass the --output of a dit-accel eval.")
    suite = load_suite(Path(folder) / "suite.yaml")
    records: dict[str, Record] = {}
    for path in sorted(Path(folder).glob("records*.jsonl")):
        for record in read_records(path):
            if "item" not in record:
                raise ValueError(f"{path} has the record {record['id']} of no suite; move the file to another folder.")
            first = records.setdefault(record["id"], record)
            if record["created"] < first["created"]:
                records[record["id"]] = record
    return sorted(records.values(), key=lambda record: _place(record, records, suite))


def _place(record: Record, records: Mapping[str, Record], suite: Suite) -> tuple[int | str, ...]:
    item = record["item"]
    model = records.get(record["baseline"] or "", record)["model"]  # a method may run in a pipeline of its own
    methods = [method.partition("(")[0].partition("@")[0].strip() for method in suite.methods]
    settings = [setting.name for setting in suite.settings]
    return (
        *_rank(model, suite.models),
        *_rank(item["setting"], settings),
        *_rank(item["seed"], suite.seeds),
        item["number"],
        _ROLES.index(item["role"]),
        *_rank(record["method"], methods),
        item["label"],
        record["id"],
    )


def _rank(value: Any, known: Sequence[Any]) -> tuple[int, str]:
    """Sorts what is not among the known behind them."""
    return (known.index(value), "") if value in known else (len(known), str(value))


def _parse(path: Path) -> Iterator[Record]:
    lines = path.read_bytes().split(b"\n")
    if not _is_json(lines[-1]):  # empty, or cut off by the end of its process
        lines.pop()
    for number, line in enumerate(lines, start=1):
        row = json.loads(line) if _is_json(line) else None
        if not isinstance(row, dict):
            raise ValueError(f"line {number} of {path} is not a record, got {line[:60]!r}; remove that line.")
        if missing := sorted(Record.__required_keys__ - row.keys()):
            raise ValueError(
                f"line {number} of {path} is not a record, it lacks {', '.join(missing)}; pass a file that dit-accel "
                "compare or eval has written, or remove that line."
            )
        yield cast(Record, row | {section: _from_json(row[section]) for section in _NUMERIC})


def _locked(path: Path) -> IO[str]:
    """The file, locked until it is closed or its process ends, however that ends."""
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(
            f"another process is at work in {path.parent} (it holds {path.name}); wait for it or pass another --output."
        ) from None
    return file


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
