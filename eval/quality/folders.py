"""Two folders of pictures or clips, judged pair by pair: the same names and sizes, two clips in memory at a time."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from dit_accel.eval.frames import as_float
from dit_accel.eval.quality.files import FORMATS, Size, clip_size, is_clip, read_clip
from dit_accel.eval.quality.metrics import Accumulator, Metric, Score, score_of
from dit_accel.eval.statistics import Interval, summarise

_NAMED = 5  # files that an error names


@dataclass(frozen=True)
class Pair:
    """Two files that belong together.

    Args:
        name: path within either folder, with slashes.
        reference: the file to be equalled.
        test: the file to judge.
    """

    name: str
    reference: Path
    test: Path


@dataclass(frozen=True)
class Judged:
    """What was found of one pair.

    Args:
        name: of the pair.
        size: frames, height and width.
        identical: whether every value is the same.
        scores: by metric.
    """

    name: str
    size: tuple[int, int, int]
    identical: bool
    scores: Mapping[str, Score]


@dataclass(frozen=True)
class MetricSummary:
    """One metric over all pairs. An infinite score, the PSNR of an identical pair, has its place in an order, and is
    counted, but left out of the mean.

    Args:
        count: pairs with a score.
        infinite: those of them whose score is infinite.
        skipped: pairs without a score, by reason.
        mean, interval: of the finite scores, and its 95 % interval; None without any, the interval also with one.
        median, fifth, worst: of all scores, from the worst end; None without any, and the last two None where neither
            direction is better.
        worst_name: of the pair that is worst.
    """

    count: int
    infinite: int
    skipped: Mapping[str, int]
    mean: float | None = None
    interval: Interval | None = None
    median: float | None = None
    fifth: float | None = None
    worst: float | None = None
    worst_name: str | None = None


def pair_files(reference: Path, test: Path) -> list[Pair]:
    """The files of two folders, subfolders included, paired by name and sorted by it; or the one pair of two files.

    Files that are neither pictures nor clips are left out; ``others`` lists them.

    Raises:
        ValueError: a place that does not exist or holds no picture or clip, or a file without its counterpart.
    """
    for place in (reference, test):
        if not place.exists():
            raise ValueError(f"{place} does not exist; give two folders, or two files, of pictures or clips.")
    if reference.is_file() and test.is_file():
        return [Pair(test.name, _known(reference), _known(test))]
    expected, found = _clips(reference), _clips(test)
    problems = [
        f"{there} lacks {_files(names)} of {here}"
        for names, here, there in (
            (expected.keys() - found.keys(), reference, test),
            (found.keys() - expected.keys(), test, reference),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"both folders must hold the same names, but {' and '.join(problems)}; add, remove or rename files."
        )
    return [Pair(name, expected[name], found[name]) for name in sorted(expected)]


def others(folder: Path) -> list[str]:
    """Names of the files of a folder that are neither pictures nor clips."""
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and not is_clip(path)
    )


def check_sizes(pairs: Iterable[Pair]) -> None:
    """Reads the head of every file, so that a pair that cannot be compared is refused before the first is judged.

    Raises:
        ValueError: a file that cannot be read, or another size or frame count than its counterpart's.
    """
    for pair in pairs:
        expected, found = clip_size(pair.reference), clip_size(pair.test)
        if not found.fits(expected):
            raise ValueError(_unequal(pair, str(found), str(expected)))


def judge_pairs(
    pairs: Iterable[Pair],
    metrics: Sequence[Metric],
    sets: Sequence[Accumulator] = (),
    device: torch.device | str = "cpu",
) -> Iterator[Judged]:
    """Reads and judges one pair after the other.

    Args:
        pairs: what ``pair_files`` found.
        metrics: of single clips.
        sets: accumulators of metrics of sets; each is given every pair.
        device: where metrics are computed. Default: the CPU.

    Raises:
        ValueError: a file that cannot be read, holds NaN or values outside [0, 1], or does not match its counterpart.
    """
    for pair in pairs:
        clip, target = (
            as_float(torch.from_numpy(np.ascontiguousarray(read_clip(path))).to(device), str(path))
            for path in (pair.test, pair.reference)
        )
        if clip.shape != target.shape:
            raise ValueError(_unequal(pair, *(str(Size(*frames.shape[:3])) for frames in (clip, target))))
        for accumulator in sets:
            accumulator.add(clip, target)
        frames, height, width, _ = clip.shape
        scores = {metric.name: score_of(metric, clip, target) for metric in metrics}
        yield Judged(pair.name, (frames, height, width), torch.equal(clip, target), scores)


def summarise_metric(metric: Metric, names: Sequence[str], scores: Sequence[Score]) -> MetricSummary:
    """One metric's scores over the pairs.

    Args:
        metric: what was measured.
        names: of the pairs, sorted.
        scores: one per pair.
    """
    skipped = Counter(score.skipped for score in scores if score.skipped)
    scored = [(score.value, name) for score, name in zip(scores, names, strict=True) if score.value is not None]
    values = [value for value, _ in scored]
    finite = [value for value in values if math.isfinite(value)]
    counted = MetricSummary(len(values), len(values) - len(finite), dict(skipped))
    if not values:
        return counted
    ordered = summarise(values, higher_is_better=metric.higher_is_better is not False)
    counted = replace(counted, median=ordered.median)
    if metric.higher_is_better is not None:
        place = values.index(ordered.worst)
        counted = replace(counted, fifth=ordered.fifth, worst=ordered.worst, worst_name=scored[place][1])
    if not finite:
        return counted
    average = summarise(finite) if counted.infinite else ordered
    return replace(counted, mean=average.mean, interval=average.interval if average.count > 1 else None)


def list_hash(pairs: Iterable[Pair]) -> str:
    """Hash of the names, 16 hex digits: two summaries with the same one are over the same list of files."""
    return hashlib.sha256("\n".join(pair.name for pair in pairs).encode()).hexdigest()[:16]


def _known(path: Path) -> Path:
    if not is_clip(path):
        raise ValueError(f"{path} must be a picture or a clip ({', '.join(FORMATS)}), got another suffix.")
    return path


def _clips(folder: Path) -> dict[str, Path]:
    """The pictures and clips of a folder by name."""
    if folder.is_file():
        raise ValueError(f"{folder} is a file and the other place is a folder; give two files or two folders.")
    found = {
        path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file() and is_clip(path)
    }
    if not found:
        raise ValueError(f"{folder} holds no picture or clip; they end in {', '.join(FORMATS)}.")
    return found


def _files(names: Iterable[str]) -> str:
    """The names, the first few of many."""
    ordered = sorted(names)
    more = f" and {len(ordered) - _NAMED} more" if len(ordered) > _NAMED else ""
    return ", ".join(ordered[:_NAMED]) + more


def _unequal(pair: Pair, found: str, expected: str) -> str:
    return (
        f"{pair.test} has {found} and {pair.reference} has {expected} (height x width); "
        "nothing is scaled or cut, make them alike."
    )
