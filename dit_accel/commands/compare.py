"""`dit-accel compare`: the same prompt and seed under dense attention and under sparse methods, side by side."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from dit_accel.commands.arguments import add_run, method_call, output_folder, parse_method
from dit_accel.commands.models import Frames, Model, Request, generate, load, probe, timings_of, warm_up
from dit_accel.commands.scripts import command_of, script_of
from dit_accel.eval.fidelity import ENTRIES, fidelity_of
from dit_accel.eval.frames import as_uint8
from dit_accel.eval.media import SheetRow, contact_sheet, write_mp4
from dit_accel.eval.quality import METRICS, measure
from dit_accel.eval.records import Densities, Job, Record, RecordWriter, make_record, read_records
from dit_accel.eval.report import MISSING, MethodResult, ReportData, format_table, summary, tile_picture, write_report
from dit_accel.kernels.block_sparse.reference import token_mask
from dit_accel.layout import TokenLayout
from dit_accel.methods.assigned import AssignedAttention
from dit_accel.methods.attention import PlannedAttention
from dit_accel.methods.base import AttnMethod
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
        "--attention",
        action="store_true",
        help="one more run of each method: what its attention leaves out and gets wrong, per head and step",
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/compare"), help="folder (default outputs/compare)")


def run(options: argparse.Namespace) -> int:
    names = ["dense", *(options.method or DEFAULT_METHODS)]
    methods = [
        parse_method(name, options.model, None if name == "dense" else options.density) for name in dict.fromkeys(names)
    ]
    writer = RecordWriter(output_folder(options.output / "clips").parent / "records.jsonl")
    model = load(options.model, options.device, options.dtype)
    request = model.request(options, options.prompt, options.seed)
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
    unknown = [entry.label for entry in entries[1:] if not ENTRIES & records[entry.job.key]["quality"].keys()]
    if options.attention and unknown:
        print(
            f"attention was not measured of {', '.join(unknown)}: all calls are dense, the method is a plan, "
            f"or the record is of a run without "
            "--attention; pass another --output."
        )
    return 0


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
    np.savez_compressed(clip, frames=as_uint8(generation.frames, f"the output of {entry.call}"))
    frames = _read(clip)
    reference = None if entry is dense else _read(options.output / "clips" / f"{dense.stem}.npz")
    quality = measure(frames, reference, [*METRICS]) | model.prompt_scores(frames, request.prompt)
    probed = options.attention and entry.method.name != "dense" and not entry.method.whole_modules
    fidelity = probe(model, request, entry.method, options.backend) if probed else None
    quality |= fidelity.scores() if fidelity else {}
    writer.append(
        make_record(
            entry.job,
            timings=timings_of([generation], seconds),
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
    measured = [f"{result.label}: {result.attention}" for _, result in results if result.attention]
    for line in [*(entry.call for entry in entries if entry.call != entry.label), *measured, *notes]:
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
        script=script_of(entry.method, request, model),
        command=command_of(entry.method, request, model),
        tile_picture=_picture(entry.method, layout),
        attention=fidelity_of(record["quality"], model.spec.heads),
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


def _size(request: Request) -> str:
    frames = f", {request.num_frames} frames" if request.num_frames > 1 else ""
    return f"{request.width}x{request.height}{frames}, {request.steps} steps"
