"""A run on disk as the report reads it: records, what failed, and the clips that were kept."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dit_accel.eval.records import Record, read_records, read_run
from dit_accel.eval.report.embed import Clip
from dit_accel.eval.sets import SetRecord, read_sets


@dataclass(frozen=True)
class Run:
    """A run folder or a file of records.

    Args:
        name: of the suite's, or of the folder or file.
        path: where it is.
        records: in any order.
        failures: what was noted of methods that failed, in order of time.
        sets: what metrics of whole sets said.
        suite: the text of its suite.yaml, "" without one.
    """

    name: str
    path: Path
    records: Sequence[Record]
    failures: Sequence[Mapping[str, str]] = ()
    sets: Sequence[SetRecord] = ()
    suite: str = ""

    def clip_path(self, record: Record) -> Path | None:
        """The file with the frames that were kept of a record, None without."""
        places = (self.path / folder / f"{record['id']}.npz" for folder in ("references", "clips"))
        return next((place for place in places if place.is_file()), None)

    def clip(self, record: Record) -> Clip | None:
        """These frames."""
        path = self.clip_path(record)
        if path is None:
            return None
        with np.load(path) as stored:
            return np.asarray(stored["frames"])


def load_run(path: str | os.PathLike[str]) -> Run:
    """Reads a run folder, another folder with records.jsonl, or a file of records.

    Raises:
        ValueError: nothing there, no record in it, or a line that is none.
    """
    place = Path(path)
    suite = place / "suite.yaml"
    files = [place] if place.is_file() else sorted(place.glob("records*.jsonl"))
    if not files:
        raise ValueError(f"{place} is neither a file of records nor a folder with records.jsonl; pass one of these.")
    records = read_run(place) if suite.is_file() else [record for file in files for record in read_records(file)]
    if not records:
        raise ValueError(f"{place} has no record yet; run its suite first.")
    failures = [
        json.loads(line) for file in sorted(place.glob("failures*.jsonl")) for line in file.open(encoding="utf-8")
    ]
    suites = sorted({record["item"]["suite"] for record in records if "item" in record})
    return Run(
        name=" and ".join(suites) or (place.stem if place.is_file() else place.resolve().name),
        path=place,
        records=records,
        failures=sorted(failures, key=lambda failure: json.dumps([failure.get("created", ""), failure])),
        sets=read_sets(place),
        suite=suite.read_text(encoding="utf-8") if suite.is_file() else "",
    )
