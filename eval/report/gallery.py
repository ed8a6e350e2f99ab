"""Samples of a run that were kept for looking: dense beside each method, with error maps, within a budget of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dit_accel.eval.aggregate import StudySummary
from dit_accel.eval.records import Record
from dit_accel.eval.report.embed import Clip, Encoding, Media, embed
from dit_accel.eval.report.run import Run
from dit_accel.eval.statistics import Sample

ORDER = ("reference", "method", "floor")


@dataclass(frozen=True)
class Shot:
    """One method's output of one sample.

    Args:
        label: of the method.
        record: its numbers.
        media: data URIs.
    """

    label: str
    record: Record
    media: Media


@dataclass(frozen=True)
class Exhibit:
    """One sample, dense first.

    Args:
        sample: prompt and seed.
        shots: dense, then those whose clips were kept.
        frames: of a clip.
        width: of a frame in pixels.
        encoding: how the media are compressed.
    """

    sample: Sample
    shots: tuple[Shot, ...]
    frames: int
    width: int
    encoding: Encoding


def kept_samples(run: Run, summary: StudySummary) -> list[Sample]:
    """Samples with a dense clip and the clip of a method, in the order of the prompts and seeds."""
    dense = summary.study.reference
    others = [row for row in summary.study.rows if row is not dense]
    found = [
        sample
        for sample, record in (dense.samples.items() if dense else ())
        if run.clip_path(record) and any(run.clip_path(row.samples[sample]) for row in others if sample in row.samples)
    ]
    return sorted(found, key=lambda sample: (summary.study.prompts.index(sample[0]), sample[1]))


def exhibit(run: Run, summary: StudySummary, sample: Sample, fps: float, budget: int) -> Exhibit | None:
    """The clips of one sample in the best encoding that fits; None where none does."""
    order = sorted(summary.study.rows, key=lambda row: ORDER.index(row.role))
    records = [(row.label, row.samples[sample]) for row in order if sample in row.samples]
    kept: list[tuple[str, Record, Clip]] = [
        (label, record, clip) for label, record in records if (clip := run.clip(record)) is not None
    ]
    media, encoding = embed([clip for _, _, clip in kept], fps, budget)
    if sum(item.size for item in media) > budget:
        return None
    frames, _, width, _ = kept[0][2].shape
    shots = tuple(Shot(label, record, item) for (label, record, _), item in zip(kept, media, strict=True))
    return Exhibit(sample, shots, frames, width, encoding)


def exhibits(run: Run, summary: StudySummary, samples: Sequence[Sample], fps: float, budget: int) -> list[Exhibit]:
    """As many samples as fit; each may take an equal part of what is left."""
    found: list[Exhibit] = []
    for number, sample in enumerate(samples):
        shown = exhibit(run, summary, sample, fps, budget // (len(samples) - number))
        if shown:
            found.append(shown)
            budget -= sum(shot.media.size for shot in shown.shots)
    return found
