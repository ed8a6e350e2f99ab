"""Metrics of sets over a run's folder: what is judged with what, once, and again only after a skip."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from dit_accel.eval.quality import SetMetric
from dit_accel.eval.quality.metrics import SetScore
from dit_accel.eval.records import Item, Job, Record, RecordWriter, make_record, read_run
from dit_accel.eval.sets import judge_sets, read_sets
from dit_accel.eval.suite.folder import open_run
from dit_accel.eval.suite.schema import Suite

SUITE = Suite(name="try", models=("shapes",), methods=("draft",), prompts=("zero", "one", "two"))
LABELS = ("dense", "draft", "draft@tuned")


@dataclass
class Difference:
    """Mean difference from the references, or a skip; every clip it sees is in ``seen``."""

    seen: list[tuple[float, float | None, str | None]] = field(default_factory=list)
    skipped: str | None = None

    def add(self, frames: Tensor, reference: Tensor | None, prompt: str | None = None) -> None:
        level = None if reference is None else round(255 * float(reference.mean()))
        self.seen.append((round(255 * float(frames.mean())), level, prompt))

    def result(self) -> SetScore:
        if self.skipped:
            return SetScore(None, skipped=self.skipped)
        return SetScore(sum(level - (other or 0) for level, other, _ in self.seen) / len(self.seen), samples=3)


def metric_of(start: Callable[[], Difference], name: str = "difference") -> SetMetric:
    return SetMetric(name, None, "", (), start)


def make_run(folder: Path, *, shuffled: bool = False, without: tuple[str, int] | None = None) -> Path:
    """A run whose clips have the level 10 * place of the label + prompt number; one clip may not be kept."""
    open_run(folder, SUITE, {})
    (folder / "clips").mkdir()
    (folder / "references").mkdir()
    written: list[Record] = []
    for number, prompt in enumerate(SUITE.prompts):
        baseline = None
        for place, label in enumerate(LABELS):
            name, _, pipeline = label.partition("@")
            job = Job(
                method=name, model=pipeline or "shapes", prompt=prompt, seed=number, size=(2, 4, 4), steps=1, guidance=1
            )
            item = Item(
                suite="try",
                setting="default",
                label=label,
                role="method" if place else "reference",
                prompt_list="inline",
                prompt_hash=SUITE.prompt_hash,
                number=number,
                seed=0,
            )
            record = make_record(job, timings={}, quality={}, densities={}, baseline=baseline, item=item)
            baseline = baseline or record["id"]
            frames = np.full((2, 4, 4, 3), 10 * place + number, np.uint8)
            if place == 0:
                np.savez(folder / "references" / f"{record['id']}.npz", frames=frames)
            if (label, number) != without:
                np.savez(folder / "clips" / f"{record['id']}.npz", frames=frames)
            written.append(record)
    writer = RecordWriter(folder / "records.jsonl")
    for record in reversed(written) if shuffled else written:
        writer.append(record)
    return folder


@pytest.mark.parametrize("shuffled", [False, True], ids=["in order", "shuffled"])
def test_each_label_is_judged_with_its_references_and_prompts(tmp_path: Path, shuffled: bool) -> None:
    judges: list[Difference] = []
    metric = metric_of(lambda: judges.append(Difference()) or judges[-1])  # type: ignore[func-returns-value]
    rows = judge_sets(make_run(tmp_path, shuffled=shuffled), [metric])
    assert [(row["model"], row["label"], row["score"]["value"]) for row in rows] == [
        ("shapes", "dense", 1),
        ("shapes", "draft", 10),
        ("shapes", "draft@tuned", 20),
    ]
    assert [judge.seen for judge in judges] == [
        [(0, None, "zero"), (1, None, "one"), (2, None, "two")],
        [(10, 0, "zero"), (11, 1, "one"), (12, 2, "two")],
        [(20, 0, "zero"), (21, 1, "one"), (22, 2, "two")],
    ]
    assert rows == read_sets(tmp_path)


def test_only_samples_whose_clip_every_label_keeps_are_judged(tmp_path: Path) -> None:
    judges: list[Difference] = []
    metric = metric_of(lambda: judges.append(Difference()) or judges[-1])  # type: ignore[func-returns-value]
    rows = judge_sets(make_run(tmp_path, without=("draft", 1)), [metric])
    assert [len(row["clips"]) for row in rows] == [2, 2, 2]
    assert {tuple(prompt for _, _, prompt in judge.seen) for judge in judges} == {("zero", "two")}


def test_a_label_without_any_kept_clip_leaves_the_others_theirs(tmp_path: Path) -> None:
    make_run(tmp_path)
    for record in read_run(tmp_path):
        if record["item"]["label"] == "draft":
            (tmp_path / "clips" / f"{record['id']}.npz").unlink()
    rows = judge_sets(tmp_path, [metric_of(Difference)])
    assert [(row["label"], len(row["clips"])) for row in rows] == [("dense", 3), ("draft@tuned", 3)]


def test_labels_that_keep_no_sample_in_common_are_not_judged(tmp_path: Path) -> None:
    make_run(tmp_path)
    for record in read_run(tmp_path):
        if (record["item"]["label"] == "draft") == (record["item"]["number"] == 0):
            (tmp_path / "clips" / f"{record['id']}.npz").unlink()
    assert judge_sets(tmp_path, [metric_of(Difference)]) == []


def test_a_metric_whose_package_is_missing_is_skipped_and_tried_again(tmp_path: Path) -> None:
    absent = SetMetric("difference", None, "", ("no_such",), Difference)
    rows = judge_sets(make_run(tmp_path), [absent])
    assert {row["score"]["skipped"] for row in rows} == {"difference needs no_such: pip install 'dit-accel[eval]'."}
    assert [row["score"]["value"] for row in judge_sets(tmp_path, [metric_of(Difference)])] == [1, 10, 20]


def test_a_score_is_not_computed_again(tmp_path: Path) -> None:
    first = judge_sets(make_run(tmp_path), [metric_of(Difference)])

    def never() -> Difference:
        raise AssertionError("judged again")

    assert judge_sets(tmp_path, [metric_of(never)]) == first


def test_a_skip_is_tried_again(tmp_path: Path) -> None:
    [row, *_] = judge_sets(make_run(tmp_path), [metric_of(lambda: Difference(skipped="no package"))])
    assert row["score"]["skipped"] == "no package"
    [row, *_] = judge_sets(tmp_path, [metric_of(Difference)])
    assert row["score"]["value"] == 1


def test_results_of_a_killed_run_stay(tmp_path: Path) -> None:
    started: list[Difference] = []

    def twice() -> Difference:
        if len(started) == 2:
            raise KeyboardInterrupt
        started.append(Difference())
        return started[-1]

    make_run(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        judge_sets(tmp_path, [metric_of(twice)])
    assert [row["label"] for row in read_sets(tmp_path)] == ["dense", "draft"]
    assert [row["label"] for row in judge_sets(tmp_path, [metric_of(Difference)])] == list(LABELS)


def test_of_a_run_that_has_grown_only_the_last_result_stays(tmp_path: Path) -> None:
    judge_sets(make_run(tmp_path, without=("draft", 1)), [metric_of(Difference)])
    [late] = [
        record for record in read_run(tmp_path) if record["item"]["label"] == "draft" and record["prompt"] == "one"
    ]
    np.savez(tmp_path / "clips" / f"{late['id']}.npz", frames=np.full((2, 4, 4, 3), 41, np.uint8))
    judge_sets(tmp_path, [metric_of(Difference), metric_of(Difference, "another")])
    assert [(row["metric"], row["label"], row["score"]["value"]) for row in read_sets(tmp_path)] == [
        (name, label, value)
        for name in ("difference", "another")
        for label, value in zip(LABELS, (1, 20, 20), strict=True)
    ]
