"""`dit-accel eval`: the quality of methods over many prompts, each beside the dense clip from the same noise."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dit_accel.commands.arguments import add_settings, method_call, parse_method
from dit_accel.commands.batches import sample
from dit_accel.commands.compare import record_writer
from dit_accel.commands.models import Frames, Model, Request, load
from dit_accel.eval.quality import METRICS, Score, measure
from dit_accel.eval.records import RecordWriter, make_record, read_records, to_json
from dit_accel.eval.report import format_table, heat_map, heat_map_scale
from dit_accel.eval.summary import MethodSummary, as_dict, summarise_methods, table_row
from dit_accel.methods.base import AttnMethod
from dit_accel.pipelines.embedded import EMBEDDED
from dit_accel.pipelines.shapes.scenes import captions, held_out_scenes

_POOL = 480  # scenes drawn of each kind, so that a longer run begins with the prompts of a shorter one


@dataclass(frozen=True)
class Candidate:
    """One method of the evaluation.

    Args:
        label: the method as --method takes it, with its options written out.
        method: the processor.
        folder: of the pipeline it runs in; None: that of --model.
    """

    label: str
    method: AttnMethod
    folder: str | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser)
    parser.add_argument(
        "--method",
        action="append",
        required=True,
        metavar="METHOD or METHOD@FOLDER",
        help="name or name(option=value, ...), repeat for several; @FOLDER: in that pipeline, tuned from the model",
    )
    parser.add_argument("--density", type=float, help="for every method that names none itself, in (0, 1]")
    parser.add_argument(
        "--prompts", default="32", help="file with a prompt a line, or how many of the embedded model's (default 32)"
    )
    parser.add_argument("--batch", type=int, default=8, help="clips sampled at once (default 8)")
    parser.add_argument("--discarded", action="store_true", help="also the softmax mass that each method leaves out")
    parser.add_argument("--output", type=Path, default=Path("outputs/eval"), help="folder (default outputs/eval)")


def run(options: argparse.Namespace) -> int:
    if options.batch < 1:
        raise ValueError(f"--batch must be at least 1, got {options.batch}.")
    texts = dict.fromkeys(["dense", *options.method])
    candidates = [parse_candidate(text, options.model, options.density) for text in texts]
    prompts = read_prompts(options.prompts, options.model)
    writer = record_writer(options.output)
    (options.output / "dense").mkdir(exist_ok=True)
    model = load(options.model, options.device, options.dtype)
    first = model.request(options, prompts[0])
    requests = [replace(first, prompt=prompt, seed=options.seed + number) for number, prompt in enumerate(prompts)]
    dense = [model.job(candidates[0].method, request, options.backend).key for request in requests]
    study = Study(options, writer, requests, dense)
    print(f"{model.name}: {len(prompts)} prompts, {len(candidates)} methods, {options.batch} at once, {model.device}")
    try:
        keys, failures = _evaluate_all(study, candidates, model)
    except KeyboardInterrupt:
        print(f"\nstopped; the finished records are in {writer.path}; run the same command to go on.")
        return 130
    records = {record["id"]: record for record in read_records(writer.path)}
    results = {
        label: {number: records[key] for number, key in enumerate(found) if key in records}
        for label, found in keys.items()
    }
    _write_summary(study, model, summarise_methods(results, model.spec.heads), failures)
    return 1 if failures else 0


@dataclass(frozen=True)
class Study:
    """One run of the command.

    Args:
        options: the command line.
        writer: of the records.
        requests: one per prompt.
        dense: ids of the dense records, one per prompt.
    """

    options: argparse.Namespace
    writer: RecordWriter
    requests: Sequence[Request]
    dense: Sequence[str]

    def clip_path(self, number: int) -> Path:
        """Where the dense clip of a prompt is kept."""
        folder: Path = self.options.output / "dense"
        return folder / f"{self.dense[number]}.npz"


def parse_candidate(text: str, model: str, density: float | None) -> Candidate:
    """A method of the command line, ``@FOLDER`` behind it or not.

    Raises:
        ValueError: what ``parse_method`` refuses, or a folder that is not there.
    """
    call, _, folder = text.partition("@")
    if folder and not Path(folder).is_dir():
        raise ValueError(f"{text!r} runs in the pipeline folder {folder}, which does not exist; save a pipeline there.")
    method = parse_method(call, model, None if call.strip() == "dense" else density)
    return Candidate(method_call(method) + (f"@{folder}" if folder else ""), method, folder or None)


def read_prompts(source: str, model: str) -> list[str]:
    """The prompts of a file, one a line, or so many held-out captions, with one object and with two in turn.

    Raises:
        ValueError: a number for a model without captions of its own, a number out of range, or no file with prompts.
    """
    if not source.isdecimal():
        path = Path(source)
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise ValueError(f"--prompts must be a number or a text file with a prompt a line, got {source!r}.")
        return prompts
    count = int(source)
    if model not in EMBEDDED:
        raise ValueError(
            f"{model} has no prompts of its own, got --prompts {source}; pass a file with a prompt a line."
        )
    if not 0 < count <= 2 * _POOL:
        raise ValueError(f"--prompts must be between 1 and {2 * _POOL}, got {count}.")
    language = EMBEDDED[model].language
    pairs = zip(*(captions(held_out_scenes(_POOL, objects, language=language)) for objects in (1, 2)), strict=True)
    return [caption for pair in pairs for caption in pair][:count]


def _evaluate_all(
    study: Study, candidates: Sequence[Candidate], model: Model
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Record ids by method and prompt, in the order asked for, and why methods failed."""
    keys: dict[str, list[str]] = {candidate.label: [] for candidate in candidates}
    failures: dict[str, str] = {}
    with tqdm(total=len(candidates) * len(study.requests), unit="clip") as bar:
        for candidate in sorted(candidates, key=lambda candidate: candidate.folder or ""):  # one pipeline at a time
            bar.set_description(candidate.label[:40])
            try:
                if candidate.folder and candidate.folder != model.name:
                    model = load(candidate.folder, study.options.device, study.options.dtype)
                jobs = [model.job(candidate.method, request, study.options.backend) for request in study.requests]
                keys[candidate.label] = [job.key for job in jobs]
                for count in _evaluate(study, candidate, model):
                    bar.update(count)
            except Exception as error:  # whatever a method does wrong, the others are still to be judged
                if candidate is candidates[0]:
                    raise
                failures[candidate.label] = _note_failure(study.options.output, candidate, error)
                bar.write(f"{candidate.label} failed: {failures[candidate.label]}")
    return keys, failures


def _evaluate(study: Study, candidate: Candidate, model: Model) -> Iterator[int]:
    """Samples, judges and records what is missing of one method; yields how many clips are done."""
    options = study.options
    jobs = [model.job(candidate.method, request, options.backend) for request in study.requests]
    missing = [number for number, job in enumerate(jobs) if not study.writer.finished(job.key)]
    yield len(jobs) - len(missing)
    is_dense = jobs[0].key == study.dense[0]
    for start in range(0, len(missing), options.batch):
        numbers = missing[start : start + options.batch]
        requests = [study.requests[number] for number in numbers]
        batch = sample(model, requests, candidate.method, options.backend, options.discarded and not is_dense)
        for place, number in enumerate(numbers):
            clip, path = batch.clips[place], study.clip_path(number)
            if is_dense:
                np.savez_compressed(path, frames=clip)
            quality = _quality(model, clip, None if is_dense else _read(path), study.requests[number].prompt)
            quality |= batch.discarded[place].scores() if batch.discarded else {}
            study.writer.append(
                make_record(
                    jobs[number],
                    timings={},
                    quality=quality,
                    densities={"executed": batch.executed, "run": batch.density},
                    baseline=None if is_dense else study.dense[number],
                )
            )
        yield len(numbers)


def _quality(model: Model, clip: Frames, reference: Frames | None, prompt: str) -> dict[str, Score]:
    """Measured where the model is: on a GPU that takes milliseconds."""
    frames = torch.from_numpy(clip).to(model.device)
    return measure(frames, reference, [*METRICS]) | model.prompt_scores(clip, prompt)


def _read(path: Path) -> Frames:
    if not path.exists():
        raise ValueError(f"the dense clip {path} is gone, its record is there; pass another --output.")
    with np.load(path) as stored:
        return np.asarray(stored["frames"])


def _note_failure(folder: Path, candidate: Candidate, error: Exception) -> str:
    """Adds the failure to failures.jsonl; it is no record, so that the next run tries again."""
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    line = {"method": candidate.label, "error": reason, "created": datetime.now(UTC).isoformat(timespec="seconds")}
    with (folder / "failures.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    return reason


def _write_summary(study: Study, model: Model, summaries: Sequence[MethodSummary], failures: Mapping[str, str]) -> None:
    """summary.md, summary.json and the heat maps; prints the table."""
    folder, request = study.options.output, study.requests[0]
    settings = {
        "model": model.name,
        "size": [request.num_frames, request.height, request.width],
        "steps": request.steps,
        "guidance": request.guidance,
        "seed": study.options.seed,
        "prompts": [request.prompt for request in study.requests],
        "methods": [as_dict(summary) for summary in summaries],
        "failures": dict(failures),
    }
    (folder / "summary.json").write_text(json.dumps(to_json(settings), indent=1, ensure_ascii=False) + "\n")
    lines = [format_table([table_row(summary) for summary in summaries]), ""]
    rivals = [summary for summary in summaries if summary.best_other]
    if rivals:
        best = max(rivals, key=lambda summary: summary.scores["psnr"].mean)
        lines.append(f"The best mean PSNR is that of {best.label}; it is compared with {best.best_other}.")
    lines += [f"{label} failed: {reason}" for label, reason in failures.items()]
    unknown = [summary.label for summary in summaries[1:] if study.options.discarded and summary.discarded is None]
    if unknown:
        lines.append(
            f"No discarded mass of {', '.join(unknown)}: all calls are dense, the method is a plan, "
            f"or the records are of a run without "
            "--discarded; pass another --output."
        )
    measured = [(number, summary, mass) for number, summary in enumerate(summaries) if (mass := summary.discarded)]
    scale = heat_map_scale([mass for _, _, mass in measured])
    for number, summary, mass in measured:
        picture = folder / f"discarded-{number:02d}.png"
        heat_map(mass, scale).save(picture)
        lines.append(f"{summary.label} leaves out softmax mass: {mass} ({picture.name})")
    lines.append("Nothing was timed: clips are sampled in batches; dit-accel compare times one clip.")
    text = "\n".join(lines)
    (folder / "summary.md").write_text(text + "\n")
    print(f"\n{text}\nsummary: {folder / 'summary.md'}\nrecords: {study.writer.path}")
