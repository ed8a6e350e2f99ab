"""Metrics of whole sets over a run: every method's clips at once, after the last of them is made."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from dit_accel.eval.frames import as_float
from dit_accel.eval.quality.metrics import SetMetric, SetScore, missing_packages
from dit_accel.eval.records import Record, read_run, to_json


class SetRecord(TypedDict):
    """One line of ``sets.jsonl``."""

    model: str
    setting: str
    label: str  # what ran, "dense" for the reference
    metric: str
    clips: list[str]  # ids of the records whose clips were judged, in the suite's order
    score: dict[str, Any]  # SetScore as a dict


def judge_sets(folder: Path, metrics: Iterable[SetMetric], device: torch.device | str = "cpu") -> list[SetRecord]:
    """What each metric says of the clips that the run keeps (``show``), by model, setting and label.

    Where labels of one setting have clips of other samples, since ``show`` was raised or something failed, those that
    all of them have are judged.

    ``sets.jsonl`` has all results in the end. A score that it has of the very same clips is not computed again, and
    none depends on the number of processes that made the clips.

    Args:
        folder: of the run.
        metrics: of sets.
        device: where frames are judged. Default: the CPU.

    Raises:
        ValueError: what ``read_run`` refuses.
    """
    groups = _groups(folder)
    wanted = {
        (*place, metric.name, *(record["id"] for record in records)): (metric, records)
        for metric in metrics
        for place, records in groups.items()
    }
    rows = {_key(row): row for row in read_sets(folder) if row["score"]["value"] is not None}
    for key, (metric, records) in wanted.items():
        if key not in rows:
            model, setting, label, name, *clips = key
            score = to_json(dataclasses.asdict(_judge(folder, metric, records, device)))
            rows[key] = SetRecord(model=model, setting=setting, label=label, metric=name, clips=clips, score=score)
            _write(folder, [rows[known] for known in wanted if known in rows])
    return [rows[key] for key in wanted]


def read_sets(folder: Path) -> list[SetRecord]:
    """The lines of ``sets.jsonl``; none where the run has no such file."""
    path = folder / "sets.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def set_row(row: SetRecord) -> dict[str, str]:
    """A row of a table, column heading -> text."""
    score = row["score"]
    return {
        "model": row["model"],
        "setting": row["setting"],
        "method": row["label"],
        "metric of the set": row["metric"],
        "value": f"skipped: {score['skipped']}" if score["value"] is None else f"{float(score['value']):.4g}",
        "samples": str(score["samples"]),
    }


def _write(folder: Path, rows: Iterable[SetRecord]) -> None:
    path = folder / "sets.jsonl"
    lines = [json.dumps(row, allow_nan=False, ensure_ascii=False) for row in rows]
    path.with_suffix(".unfinished").write_text("\n".join([*lines, ""]), encoding="utf-8")
    os.replace(path.with_suffix(".unfinished"), path)


def _key(row: SetRecord) -> tuple[str, ...]:
    return row["model"], row["setting"], row["label"], row["metric"], *row["clips"]


def _groups(folder: Path) -> dict[tuple[str, str, str], list[Record]]:
    """Records of the samples of which every label of the model and setting that keeps clips has one."""
    records = {record["id"]: record for record in read_run(folder)}
    groups: dict[tuple[str, str], dict[str, dict[tuple[int, int], Record]]] = {}
    for record in records.values():
        if _clip(folder, record).is_file():
            model = records.get(record["baseline"] or "", record)["model"]  # a method may run in another pipeline
            item = record["item"]
            labels = groups.setdefault((model, item["setting"]), {})
            labels.setdefault(item["label"], {})[item["number"], item["seed"]] = record
    found: dict[tuple[str, str, str], list[Record]] = {}
    for (model, setting), labels in groups.items():
        shared = set.intersection(*map(set, labels.values()))
        for label, samples in labels.items() if shared else ():
            found[model, setting, label] = [record for sample, record in samples.items() if sample in shared]
    return found


def _judge(folder: Path, metric: SetMetric, records: Sequence[Record], device: torch.device | str) -> SetScore:
    if lack := missing_packages(metric.name, metric.dependencies):
        return SetScore(None, skipped=lack)
    judge = metric.start()
    for record in records:
        baseline = record["baseline"]
        reference = _frames(folder / "references" / f"{baseline}.npz", device) if baseline else None
        judge.add(_frames(_clip(folder, record), device), reference, record["prompt"])
    return judge.result()


def _clip(folder: Path, record: Record) -> Path:
    return folder / "clips" / f"{record['id']}.npz"


def _frames(path: Path, device: torch.device | str) -> Tensor:
    with np.load(path) as stored:
        return as_float(torch.from_numpy(stored["frames"]).to(device), str(path))
