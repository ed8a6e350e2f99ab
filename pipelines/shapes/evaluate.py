"""Prompt accuracy of a pipeline, read from its clips by the verifier, on captions whose triples were held out.

    python -m dit_accel.pipelines.shapes.evaluate --pipeline outputs/shapes/pipeline --out outputs/shapes

OUT gets one JSON line a setting in evaluation.jsonl, flushed as it comes, and one contact sheet a clip size.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, WanPipeline
from PIL import Image, ImageDraw
from torch import Tensor

from dit_accel.pipelines.shapes.models import decode_latents, latent_statistics, whole_clip_passes
from dit_accel.pipelines.shapes.scenes import CLIPS, Language, captions, held_out_scenes
from dit_accel.pipelines.shapes.verifier import ClipScore, score_clip

_SHEET_FRAMES = 6
_TEXT_HEIGHT = 14


@dataclass(frozen=True)
class Setting:
    """One call of the pipeline."""

    height: int
    width: int
    frames: int
    steps: int
    guidance: float
    text_length: int = 32


@torch.no_grad()
def sample_clips(
    pipeline: WanPipeline, texts: list[str], setting: Setting, seed: int, stock_decode: bool = False
) -> np.ndarray:
    """Clips [B, T, H, W, 3] in [0, 1], float32, one per caption, from the stock pipeline's own call.

    The clip of caption i starts from the noise of the CPU seed ``seed + i``, whatever the batch.  Latents are decoded
    whole, which equals the stock decoder up to rounding; ``stock_decode`` takes the stock one.
    """
    output = pipeline(
        prompt=texts,
        height=setting.height,
        width=setting.width,
        num_frames=setting.frames,
        num_inference_steps=setting.steps,
        guidance_scale=setting.guidance,
        max_sequence_length=setting.text_length,
        generator=[torch.Generator().manual_seed(seed + index) for index in range(len(texts))],
        output_type="np" if stock_decode else "latent",
    )
    if stock_decode:
        return np.asarray(output.frames)
    return decode_clips(pipeline, output.frames)


@torch.no_grad()
def decode_clips(pipeline: WanPipeline, latents: Tensor) -> np.ndarray:
    """Clips [B, T, H, W, 3] in [0, 1], float32, from the latents that ``output_type="latent"`` gives, decoded whole."""
    mean, std = latent_statistics(pipeline.vae, latents.device)
    latents = (latents.float() * std + mean).to(pipeline.vae.dtype)
    with whole_clip_passes():
        decoded = torch.cat([decode_latents(pipeline.vae, part) for part in latents.split(4)])
    return ((decoded.float().clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 4, 1).cpu().numpy()


def sample_batches(
    pipeline: WanPipeline, texts: list[str], setting: Setting, batch: int, **options: Any
) -> Iterator[np.ndarray]:
    """The clips of ``sample_clips`` one by one, sampled ``batch`` at a time with the seeds 0, 1, 2, …."""
    for start in range(0, len(texts), batch):
        yield from sample_clips(pipeline, texts[start : start + batch], setting, start, **options)


def summarise(scores: list[ClipScore], language: Language = CLIPS) -> dict[str, float | int]:
    """Shares of clips and of wanted objects that are right."""
    wanted = sum(score.wanted for score in scores)
    return {
        "clips": len(scores),
        "clips_correct": round(sum(score.correct for score in scores) / len(scores), 4),
        "colours": round(sum(score.colours for score in scores) / wanted, 4),
        "shapes": round(sum(score.shapes for score in scores) / wanted, 4),
        f"{language.trait}s": round(sum(score.traits for score in scores) / wanted, 4),
        "objects": round(sum(score.objects for score in scores) / wanted, 4),
        "clips_with_extra": sum(score.extra > 0 for score in scores),
    }


def contact_sheet(clips: list[np.ndarray], titles: list[str]) -> Image.Image:
    """One row per clip [T, H, W, 3] in [0, 1]: its title above six frames from first to last."""
    height, width = clips[0].shape[1:3]
    row = height + _TEXT_HEIGHT
    sheet = Image.new("RGB", (_SHEET_FRAMES * (width + 2), len(clips) * row), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (clip, title) in enumerate(zip(clips, titles, strict=True)):
        draw.text((2, index * row + 1), title, fill="black")
        for column, frame in enumerate(np.linspace(0, len(clip) - 1, _SHEET_FRAMES).round().astype(int)):
            image = Image.fromarray((clip[frame] * 255 + 0.5).astype(np.uint8))
            sheet.paste(image, (column * (width + 2), index * row + _TEXT_HEIGHT))
    return sheet


def append_record(record: dict[str, Any], out: Path) -> None:
    """Adds a line to evaluation.jsonl and prints it."""
    line = json.dumps(record)
    print(line, flush=True)
    with (out / "evaluation.jsonl").open("a") as file:
        file.write(line + "\n")


def load_pipeline(pipeline: type[DiffusionPipeline], folder: Path) -> Any:
    """A saved pipeline, in bfloat16 on the GPU if there is one, without progress bars."""
    cuda = torch.cuda.is_available()
    loaded = pipeline.from_pretrained(folder, dtype=torch.bfloat16 if cuda else torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded.to("cuda" if cuda else "cpu")


def evaluate(
    pipeline: WanPipeline,
    setting: Setting,
    one_object: int,
    two_objects: int,
    batch: int,
    out: Path,
    sheet_name: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Samples, verifies and records one setting; the first clips of each kind go to the sheet, if it has a name."""
    start = time.time()
    record: dict[str, Any] = {**vars(setting), "batch": batch, **options}
    shown: list[np.ndarray] = []
    titles: list[str] = []
    for objects, count in ((1, one_object), (2, two_objects)):
        if not count:
            continue
        texts = captions(held_out_scenes(count, objects))
        scores = []
        for text, clip in zip(texts, sample_batches(pipeline, texts, setting, batch, **options), strict=True):
            scores.append(score_clip(clip, text))
            if len(scores) <= 8:
                shown.append(clip)
                titles.append(f"{'right' if scores[-1].correct else 'wrong'}: {text}")
        record["one_object" if objects == 1 else "two_objects"] = summarise(scores)
    record["seconds"] = round(time.time() - start, 1)
    append_record(record, out)
    if sheet_name:
        contact_sheet(shown, titles).save(out / sheet_name)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, required=True, help="pipeline folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for the records and sheets")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[16, 12, 24], help="step counts; the first draws sheets"
    )
    parser.add_argument("--guidance", type=float, nargs="+", default=[4.0], help="guidance scales, at the first steps")
    parser.add_argument("--one-object", type=int, default=100, help="one-object captions")
    parser.add_argument("--two-objects", type=int, default=50, help="two-object captions")
    parser.add_argument("--big", type=int, default=16, help="captions at 384x512x37, half of each kind")
    parser.add_argument("--stock", type=int, default=4, help="captions through the stock decoder too")
    parser.add_argument("--long-text", type=int, default=24, help="captions at the pipeline's default text length, 512")
    parser.add_argument("--batch", type=int, default=25, help="default-size clips sampled at once")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pipeline = load_pipeline(WanPipeline, args.pipeline)
    size = (192, 256, 25)
    counts = (args.one_object, args.two_objects)
    first = Setting(*size, args.steps[0], args.guidance[0])
    evaluate(pipeline, first, *counts, args.batch, args.out, "sheet_default.png")
    if args.big:
        big = Setting(384, 512, 37, first.steps, first.guidance)
        evaluate(
            pipeline, big, args.big - args.big // 2, args.big // 2, max(1, args.batch // 6), args.out, "sheet_big.png"
        )
    for steps in args.steps[1:]:
        evaluate(pipeline, Setting(*size, steps, first.guidance), *counts, args.batch, args.out)
    for guidance in args.guidance[1:]:
        evaluate(pipeline, Setting(*size, first.steps, guidance), *counts, args.batch, args.out)
    if args.long_text:
        long = Setting(*size, first.steps, first.guidance, 512)
        evaluate(pipeline, long, args.long_text - args.long_text // 2, args.long_text // 2, args.batch, args.out)
    if args.stock:
        evaluate(pipeline, first, args.stock - args.stock // 2, args.stock // 2, 1, args.out, stock_decode=True)


if __name__ == "__main__":
    main()
