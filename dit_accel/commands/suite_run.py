"""Carrying out a suite: each task sampled or timed, judged beside dense, recorded as its clips end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dit_accel.commands.batches import sample
from dit_accel.commands.models import Frames, Generation, Model, OnStep, generate, probe, timings_of, warm_up
from dit_accel.commands.suite_plan import DENSE, Shelf, Task
from dit_accel.eval.frames import as_uint8
from dit_accel.eval.power import during, power_log
from dit_accel.eval.quality import Metric, Score, measure
from dit_accel.eval.quality.trajectory import trajectory
from dit_accel.eval.records import Densities, Item, RecordWriter, Timings, make_record
from dit_accel.eval.suite.folder import note_failure
from dit_accel.eval.suite.items import Sample, is_probed, is_shown
from dit_accel.eval.suite.schema import Suite
from dit_accel.methods import make_method


@dataclass(frozen=True)
class Run:
    """One process of a run.

    Args:
        suite: what is run.
        folder: of the run.
        metrics: of the frames, made from the suite's.
        shelf: where pipelines come from.
        backend: of the operator.
        writer: of this process' records.
        rank, processes: which of how many.
        warm: seconds of the warm-ups made so far, by pipeline, setting and label.
    """

    suite: Suite
    folder: Path
    metrics: Sequence[Metric]
    shelf: Shelf
    backend: str
    writer: RecordWriter
    rank: int = 0
    processes: int = 1
    warm: dict[tuple[str, str, str], float] = field(default_factory=dict)

    def reference(self, key: str) -> Path:
        """Where the dense clip of that record is kept."""
        return self.folder / "references" / f"{key}.npz"


@dataclass(frozen=True)
class Outcome:
    """One finished sample.

    Args:
        clip: uint8 [T, H, W, 3].
        latents: float32 [steps, ...], after each step; None unless they were asked for.
        executed, density: measured.
        timings: empty where nothing is timed.
        quality: scores that are not of the clip alone.
    """

    clip: Frames
    latents: Frames | None
    executed: float
    density: float
    timings: Timings = field(default_factory=Timings)
    quality: dict[str, Score] = field(default_factory=dict)


def carry_out(run: Run, tasks: Sequence[Task]) -> None:
    """Does what has no record yet; a task that fails is noted, and the others go on."""
    with tqdm(total=sum(len(task.jobs) for task in tasks), unit="clip", disable=run.rank > 0) as bar:
        for task in tasks:
            chunk, label = task.chunk, task.entry.label
            bar.set_description(f"{chunk.setting.name} {label}"[:40])
            try:
                if not all(run.writer.finished(job.key) for job in task.jobs):
                    _carry_out(run, task)
            except Exception as error:  # whatever a method does wrong, the others are still to be judged
                place = {"model": chunk.model, "setting": chunk.setting.name, "method": label}
                reason = note_failure(run.folder, run.rank, run.processes, **place, error=error)
                bar.write(f"{chunk.setting.name}, {label} failed: {reason}")
            bar.update(len(task.jobs))


def _carry_out(run: Run, task: Task) -> None:
    """All samples of the task, also those that have their record: a batch is the same each time."""
    model = run.shelf.get(task.entry.pipeline)
    is_dense = task.entry.role == "reference"
    references = [None if is_dense else _read_reference(run, key) for key in task.references]
    outcomes = [_timed(run, model, task)] if run.suite.runs else _sampled(run, model, task)
    for number, outcome in enumerate(outcomes):
        job, item = task.jobs[number], task.chunk.samples[number]
        if run.writer.finished(job.key):
            continue
        if is_dense:
            _write(run.reference(job.key), outcome)
        if is_shown(run.suite, item):
            np.savez_compressed(_made(run.folder / "clips") / f"{job.key}.npz", frames=outcome.clip)
        densities = Densities(executed=outcome.executed, run=outcome.density)
        if task.entry.ideal is not None:
            densities["ideal"] = task.entry.ideal
        run.writer.append(
            make_record(
                job,
                timings=outcome.timings,
                quality=_quality(run, model, task, number, outcome, references[number]),
                densities=densities,
                baseline=None if is_dense else task.references[number],
                item=_item(run.suite, task, item),
            )
        )


def _sampled(run: Run, model: Model, task: Task) -> list[Outcome]:
    """All samples by one call of the pipeline, untimed."""
    steps, on_step = _recorder(run.suite)
    batch = sample(model, task.requests, task.entry.method, run.backend, on_step)
    latents = _stacked(steps, len(task.requests))
    return [
        Outcome(clip, of_clip, batch.executed, batch.density)
        for clip, of_clip in zip(batch.clips, latents, strict=True)
    ]


def _timed(run: Run, model: Model, task: Task) -> Outcome:
    """The one sample of the task, run as often as the suite says; the first run's output is the one to judge.

    With latents to record, which lie on the GPU until the first run has ended, its peak of memory counts only where it
    is the only run.
    """
    [request], method = task.requests, task.entry.method
    warm = _warm(run, model, task)
    steps, on_step = _recorder(run.suite)
    clips: list[Frames] = []
    latents: Frames | None = None
    generations: list[Generation] = []
    spans: list[tuple[float, float]] = []
    with power_log(model.device) as samples:
        for number in range(run.suite.runs):
            begin = time.time()
            once = generate(model, request, method, run.backend, progress=False, on_step=None if number else on_step)
            spans.append((begin, time.time()))
            clips.append(as_uint8(once.frames, f"the output of {task.entry.label}"))
            once = replace(once, frames=clips[-1][:0])  # a clip as floats takes four times the memory
            if number == 0 and steps:
                [latents] = _stacked(steps, 1)
                steps.clear()
                once = replace(once, peak_memory=once.peak_memory if run.suite.runs == 1 else None)
            generations.append(once)
    timings = timings_of(generations, warm)
    if measured := during(samples, spans):
        timings["clock_mhz"], timings["power_w"] = measured
    return Outcome(
        clip=clips[0],
        latents=latents,
        executed=generations[0].executed,
        density=generations[0].density,
        timings=timings,
        quality=_repeat_difference(clips),
    )


def _warm(run: Run, model: Model, task: Task) -> float:
    """Seconds of warming up the task's method, once a process; dense attention too, which methods begin with."""
    place = task.entry.pipeline, task.chunk.setting.name
    for label, method in {DENSE: make_method(DENSE), task.entry.label: task.entry.method}.items():
        if (*place, label) not in run.warm:
            run.warm[*place, label] = warm_up(model, task.requests[0], method, run.backend)
    return run.warm[*place, task.entry.label]


def _repeat_difference(clips: Sequence[Frames]) -> dict[str, Score]:
    """The largest difference between runs of one sample, in 8-bit levels; nothing of a single run."""
    pairs = combinations([clip.astype(np.int16) for clip in clips], 2)
    differences = [float(np.abs(one - other).max()) for one, other in pairs]
    return {"repeat_difference": Score(max(differences))} if differences else {}


def _quality(
    run: Run, model: Model, task: Task, number: int, outcome: Outcome, reference: dict[str, Frames] | None
) -> dict[str, Score]:
    """Every score of one sample; frames are measured where the model is: on a GPU that takes milliseconds."""
    request, clip = task.requests[number], outcome.clip
    frames = torch.from_numpy(clip).to(model.device)
    quality = measure(frames, None if reference is None else reference["frames"], run.metrics, request.prompt)
    quality |= model.prompt_scores(clip, request.prompt) | outcome.quality
    if reference and outcome.latents is not None:
        quality["trajectory"] = trajectory(outcome.latents, reference["latents"])
    method = task.entry.method
    has_calls = method.name != DENSE and not method.whole_modules  # of its own, to hold to dense ones
    if has_calls and is_probed(run.suite, task.chunk.samples[number]):
        found = probe(model, request, method, run.backend)
        quality |= found.scores() if found else {}
    return quality


def _recorder(suite: Suite) -> tuple[list[Tensor], OnStep | None]:
    """A list, and what fills it with the latents of each step where the suite asks for them."""
    steps: list[Tensor] = []

    def record(step: int, latents: Tensor) -> None:
        steps.append(latents.detach().clone())

    return steps, record if suite.trajectory else None


def _stacked(steps: Sequence[Tensor], samples: int) -> Sequence[Frames | None]:
    """The latents of each sample, [steps, ...]; None for each without any."""
    return [*torch.stack([*steps], 1).float().cpu().numpy()] if steps else [None] * samples


def _write(path: Path, outcome: Outcome) -> None:
    arrays: dict[str, Any] = {"frames": outcome.clip}
    if outcome.latents is not None:
        arrays["latents"] = outcome.latents
    np.savez_compressed(_made(path.parent) / path.name, **arrays)


def _read_reference(run: Run, key: str) -> dict[str, Frames]:
    path = run.reference(key)
    if not run.writer.finished(key):
        raise ValueError("the dense run of its samples failed; run the same command again.")
    if not path.exists():
        raise ValueError(f"there is no dense clip {path}, which has its record; pass another --output.")
    with np.load(path) as stored:
        return dict(stored)


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def _item(suite: Suite, task: Task, item: Sample) -> Item:
    return Item(
        suite=suite.name,
        setting=task.chunk.setting.name,
        label=task.entry.label,
        role=task.entry.role,
        prompt_list=suite.prompt_list,
        prompt_hash=suite.prompt_hash,
        number=item.number,
        seed=item.seed,
    )
