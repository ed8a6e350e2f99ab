"""`dit-accel compare`: the same prompt and seed under dense attention and under sparse methods, side by side."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from dit_accel.commands.arguments import add_run, apply_call, method_call, parse_method
from dit_accel.commands.models import Frames, Generation, Model, Request, generate, load, probe, warm_up
from dit_accel.eval.discarded import BY_HEAD, discarded_of
from dit_accel.eval.media import SheetRow, contact_sheet, write_mp4
from dit_accel.eval.quality import METRICS, measure
from dit_accel.eval.records import Densities, Job, Record, RecordWriter, Timings, make_record, read_records
from dit_accel.eval.report import MISSING, MethodResult, ReportData, format_table, summary, tile_picture, write_report
from dit_accel.kernels.block_sparse.reference import token_mask
from dit_accel.layout import TokenLayout
from dit_accel.methods.assigned import AssignedAttention
from dit_accel.methods.attention import PlannedAttention
from dit_accel.methods.base import AttnMethod
from dit_accel.pipelines.embedded import EMBEDDED
from dit_accel.tuned_plan import method_for

DEFAULT_METHODS = ("radial", "neighborhood", "grat", "draft", "log_linear", "dit_fast_attn")
FPS = 12.0


@dataclass(frozen=True)
class Entry:
    """One method of the comparison.

    Args:
        label: its name on pages: the method's, with the options where another entry has the same.
        call: the method as --method takes it.
        method: the processor.
        job: identifies its record.
    """

    label: str
    call: str
    method: AttnMethod
    job: Job

    @property
    def stem(self) -> str:
        return f"{self.method.name}-{self.job.key[:6]}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument(
        "--method",
        action="append",
        metavar="NAME or NAME(option=value, ...) or PLAN.json",
        help=f"repeat for several (default: {', '.join(DEFAULT_METHODS)}, with the model's presets)",
    )
    parser.add_argument("--density", type=float, help="for every method, in place of its own settings, in (0, 1]")
    parser.add_argument(
        "--discarded", action="store_true", help="one more run of each method: the softmax mass it leaves out"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/compare"), help="folder (default outputs/compare)")


def run(options: argparse.Namespace) -> int:
    names = ["dense", *(options.method or DEFAULT_METHODS)]
    methods = [
        parse_method(name, options.model, None if name == "dense" else options.density) for name in dict.fromkeys(names)
    ]
    writer = record_writer(options.output)
    model = load(options.model, options.device, options.dtype)
    request = model.request(options, options.prompt)
    layout = model.layout(request)
    for method in methods:  # a method that cannot serve this model or size fails here, before any step
        method_for(model.pipe, method)
        method.attention(layout)
    kinds = [method.name for method in methods]
    entries = [_entry(method, kinds.count(method.name) == 1, model, request, options) for method in methods]
    print(f"{model.name}: {request.prompt!r}, {_size(request)}, {layout.num_tokens:,} tokens, on {model.device}")
    try:
        frames = [_frames(entry, entries[0], model, request, options, writer) for entry in entries]
    except KeyboardInterrupt:
        done = sum(writer.finished(entry.job.key) for entry in entries)
        print(f"\nstopped: {done} of {len(entries)} records are in {writer.path}; run the same command to go on.")
        return 130
    records = {record["id"]: record for record in read_records(writer.path)}
    _write_pages(options.output, model, entries, [records[entry.job.key] for entry in entries], frames, layout, request)
    unknown = [entry.label for entry in entries[1:] if BY_HEAD not in records[entry.job.key]["quality"]]
    if options.discarded and unknown:
        print(
            f"no discarded mass of {', '.join(unknown)}: all calls are dense, the method is a plan, "
            f"or the record is of a run without "
            "--discarded; pass another --output."
        )
    return 0


def record_writer(folder: Path) -> RecordWriter:
    """The records of an output folder; a ValueError if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "clips").mkdir(exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"the output folder {folder} cannot be written ({reason}); pass another --output.") from error
    return RecordWriter(folder / "records.jsonl")


def _entry(method: AttnMethod, only_one: bool, model: Model, request: Request, options: argparse.Namespace) -> Entry:
    call, job = method_call(method), model.job(method, request, options.backend)
    return Entry(method.name if only_one else call, call, method, job)


def _frames(
    entry: Entry, dense: Entry, model: Model, request: Request, options: argparse.Namespace, writer: RecordWriter
) -> Frames:
    """The entry's frames, generated and recorded now, or kept from the run that this one goes on with."""
    clip = options.output / "clips" / f"{entry.stem}.npz"
    if writer.finished(entry.job.key):
        if not clip.exists():
            raise ValueError(
                f"{writer.path} has the record of {entry.label} but {clip} is gone; pass another --output."
            )
        tqdm.write(f"{entry.label}: taken from {writer.path}")
        return _read(clip)
    seconds = warm_up(model, request, entry.method, options.backend)
    generation = generate(model, request, entry.method, options.backend)
    np.savez_compressed(clip, frames=(generation.frames * 255).round().astype(np.uint8))
    frames = _read(clip)
    reference = None if entry is dense else _read(options.output / "clips" / f"{dense.stem}.npz")
    quality = measure(frames, reference, [*METRICS]) | model.prompt_scores(frames, request.prompt)
    probed = options.discarded and entry is not dense and not entry.method.whole_modules
    mass = probe(model, request, entry.method, options.backend) if probed else None
    quality |= mass.scores() if mass else {}
    writer.append(
        make_record(
            entry.job,
            timings=_timings(generation, seconds),
            quality=quality,
            densities=_densities(entry.method, model.layout(request), generation.density),
            baseline=None if entry is dense else dense.job.key,
        )
    )
    return frames


def _densities(method: AttnMethod, layout: TokenLayout, run: float) -> Densities:
    attention = method.attention(layout)
    if attention is None:
        return {"executed": 1.0, "ideal": 1.0, "run": run}
    if isinstance(attention, AssignedAttention):  # what a call computes differs by step and block
        return {"executed": run, "run": run}
    ideal = layout.joint_density(method.ideal_density(layout))
    return {"executed": attention.density, "ideal": ideal, "run": run}


def _timings(generation: Generation, warmup: float) -> Timings:
    timings = Timings(
        denoise=generation.denoise,
        denoise_iqr=0.0,
        attention=generation.attention,
        total=generation.total,
        warmup=warmup,
        steps=list(generation.step_seconds),
        runs=1,
        warmup_runs=1,
    )
    if generation.peak_memory is not None:
        timings["peak_memory_bytes"] = generation.peak_memory
    return timings


def _read(clip: Path) -> Frames:
    with np.load(clip) as stored:
        return np.asarray(stored["frames"])


def _write_pages(
    folder: Path,
    model: Model,
    entries: Sequence[Entry],
    records: Sequence[Record],
    frames: Sequence[Frames],
    layout: TokenLayout,
    request: Request,
) -> None:
    rows, results = [], []
    for entry, record, clip in zip(entries, records, frames, strict=True):
        row = summary(record, records[0], entry.label)
        rows.append(row)
        results.append(_result(entry, record, row, clip, request, model, layout))
        if len(clip) > 1:
            write_mp4(folder / "clips" / f"{entry.stem}.mp4", clip, FPS)
        else:
            Image.fromarray(clip[0]).save(folder / "clips" / f"{entry.stem}.png")
    contact_sheet([sheet for sheet, _ in results]).save(folder / "sheet.png")
    notes = _notes(records)
    page = write_report(folder, ReportData([result for _, result in results], layout.num_tokens, FPS, notes))
    print(f"\n{format_table(rows)}\n")
    masses = [(result.label, result.discarded) for _, result in results if result.discarded]
    left_out = [f"{label} leaves out softmax mass: {mass}" for label, mass in masses]
    for line in [*(entry.call for entry in entries if entry.call != entry.label), *left_out, *notes]:
        print(line)
    print(f"page: {page}\nsheet: {folder / 'sheet.png'}\nrecords: {folder / 'records.jsonl'}")


def _result(
    entry: Entry, record: Record, row: dict[str, str], clip: Frames, request: Request, model: Model, layout: TokenLayout
) -> tuple[SheetRow, MethodResult]:
    """What the sheet and the page show of one method."""
    shown = {name: row[name] for name in ("denoise", "speed-up", "PSNR", "prompt accuracy") if row[name] != MISSING}
    note = "\n".join(f"{name} {value.replace('×', 'x')}" for name, value in shown.items())  # the font has no ×
    result = MethodResult(
        record=record,
        frames=clip,
        label=entry.label,
        script=_script(entry, request, model),
        command=_command(entry, request, model),
        tile_picture=_picture(entry.method, layout),
        discarded=discarded_of(record["quality"], model.spec.heads),
    )
    return SheetRow(entry.label, note, clip), result


def _notes(records: Sequence[Record]) -> list[str]:
    """What a reader of the table must know."""
    slower = [
        record["method"] for record in records[1:] if record["timings"]["denoise"] > records[0]["timings"]["denoise"]
    ]
    return [f"{', '.join(slower)} took longer than dense here: use dense at this size."] if slower else []


def _picture(method: AttnMethod, layout: TokenLayout) -> Image.Image | None:
    """What the query in the middle of the grid sees."""
    attention = method.attention(layout)
    if not isinstance(attention, PlannedAttention):
        return None
    frame, row, column = (size // 2 for size in layout.grid)
    position = layout.prefix + (frame * layout.grid[1] + row) * layout.grid[2] + column
    seen = token_mask(attention.plan, torch.tensor([position]))[0, :, 0].float().mean(0)
    grid = seen[layout.prefix : layout.prefix + layout.visual_tokens].reshape(layout.grid)
    return tile_picture(grid.numpy(), (frame, row, column))


def _script(entry: Entry, request: Request, model: Model) -> str:
    frames = f", num_frames={request.num_frames}" if request.num_frames > 1 else ""
    extra = "".join(f", {name}={value!r}" for name, value in model.call.arguments.items())
    if model.name in EMBEDDED:
        package = EMBEDDED[model.name].package
        loading = f"from dit_accel.pipelines import {package}\n\npipe = {package}.load()"
    else:
        loading = f"from diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained({model.name!r})"
    return (
        f"import torch\nimport dit_accel\n{loading}\n"
        f"dit_accel.apply(pipe, {apply_call(entry.method)})\n"
        f"output = pipe({request.prompt!r}, height={request.height}, width={request.width}{frames}, "
        f"num_inference_steps={request.steps}, {model.call.guidance}={request.guidance:g}{extra}, "
        f"generator=torch.Generator().manual_seed({request.seed}))[0]"
    )


def _command(entry: Entry, request: Request, model: Model) -> str:
    numbers = {
        "seed": request.seed,
        "height": request.height,
        "width": request.width,
        "num-frames": request.num_frames,
        "steps": request.steps,
        "guidance": f"{request.guidance:g}",
    }
    words = ["dit-accel", "generate", "--model", model.name, "--method", entry.call, "--prompt", request.prompt]
    words += [word for name, value in numbers.items() for word in (f"--{name}", str(value))]
    return shlex.join(words)


def _size(request: Request) -> str:
    frames = f", {request.num_frames} frames" if request.num_frames > 1 else ""
    return f"{request.width}x{request.height}{frames}, {request.steps} steps"
