"""Prompt accuracy of an image pipeline, read by the verifier, on captions whose triples were held out.

    python -m dit_accel.pipelines.shapes_image.evaluate --pipeline outputs/image/pipeline --out outputs/image

OUT gets one JSON line a size and guidance in evaluation.jsonl, flushed as it comes, and one contact sheet a size, with
images of the first guidance.
"""

from __future__ import annotations

import argparse
import math
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image, ImageDraw

from dit_accel.pipelines import shapes_image
from dit_accel.pipelines.shapes.evaluate import append_record, load_pipeline, summarise
from dit_accel.pipelines.shapes.scenes import IMAGES, captions, held_out_scenes
from dit_accel.pipelines.shapes.verifier import ClipScore, score_clip

_THUMBNAIL, _COLUMNS, _TEXT_HEIGHT, _SHOWN = 256, 6, 46, 24
_TOKENS_AT_ONCE = 131_072


@dataclass(frozen=True)
class Setting:
    """One call of the pipeline; guidance 1 calls the transformer once a step, any other twice."""

    height: int
    width: int
    steps: int
    guidance: float
    text_length: int = shapes_image.DEFAULT_TEXT_LENGTH


@torch.no_grad()
def sample_images(pipeline: FluxPipeline, texts: list[str], setting: Setting) -> Iterator[np.ndarray]:
    """Images [H, W, 3] in [0, 1], float32, one by one, from the stock pipeline's own call.

    The image of caption i starts from the noise of the CPU seed i, whatever the batch.
    """
    batch = max(1, _TOKENS_AT_ONCE * 64 // (setting.height * setting.width))
    for start in range(0, len(texts), batch):
        part = texts[start : start + batch]
        yield from pipeline(
            prompt=part,
            negative_prompt=[""] * len(part),
            true_cfg_scale=setting.guidance,
            height=setting.height,
            width=setting.width,
            num_inference_steps=setting.steps,
            max_sequence_length=setting.text_length,
            generator=[torch.Generator().manual_seed(start + place) for place in range(len(part))],
            output_type="np",
        ).images


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share, by Wilson's score."""
    z = 1.96
    middle = (right + z**2 / 2) / (count + z**2)
    half = z / (count + z**2) * math.sqrt(right * (count - right) / count + z**2 / 4)
    return round(max(0.0, middle - half), 4), round(min(1.0, middle + half), 4)


def contact_sheet(images: list[np.ndarray], titles: list[str]) -> Image.Image:
    """Thumbnails of square images [H, W, 3] in [0, 1], six a row, each below its title."""
    row = _THUMBNAIL + _TEXT_HEIGHT
    sheet = Image.new("RGB", (_COLUMNS * (_THUMBNAIL + 4), -(-len(images) // _COLUMNS) * row), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (image, title) in enumerate(zip(images, titles, strict=True)):
        left, top = place % _COLUMNS * (_THUMBNAIL + 4), place // _COLUMNS * row
        draw.text((left + 2, top + 1), "\n".join(textwrap.wrap(title, 42)), fill="black")
        thumbnail = Image.fromarray((image * 255 + 0.5).astype(np.uint8)).resize((_THUMBNAIL, _THUMBNAIL))
        sheet.paste(thumbnail, (left, top + _TEXT_HEIGHT))
    return sheet


def evaluate(
    pipeline: FluxPipeline, setting: Setting, count: int, out: Path, sheet_name: str | None = None
) -> dict[str, Any]:
    """Samples, verifies and records one setting on so many captions, half of them of one object, half of two."""
    start = time.time()
    record: dict[str, Any] = dict(vars(setting))
    texts = {objects: captions(held_out_scenes(count // 2, objects, language=IMAGES)) for objects in (1, 2)}
    images = sample_images(pipeline, texts[1] + texts[2], setting)
    scores: list[ClipScore] = []
    shown: list[np.ndarray] = []
    titles: list[str] = []
    for text, image in zip(texts[1] + texts[2], images, strict=True):
        scores.append(score_clip(image[None], text, IMAGES))
        if (len(scores) - 1) % (count // 2) < _SHOWN // 2:
            shown.append(image)
            titles.append(f"{'right' if scores[-1].correct else 'WRONG'}: {text}")
    right = sum(score.correct for score in scores)
    record |= {"right": round(right / len(scores), 4), "interval": wilson_interval(right, len(scores))}
    record["one_object"] = summarise(scores[: count // 2], IMAGES)
    record["two_objects"] = summarise(scores[count // 2 :], IMAGES)
    record["seconds"] = round(time.time() - start, 1)
    append_record(record, out)
    if sheet_name:
        contact_sheet(shown, titles).save(out / sheet_name)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, required=True, help="pipeline folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for the records and sheets")
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 256, 1024], help="sides of square images, pixels")
    parser.add_argument(
        "--guidance", type=float, nargs="+", default=[2.0, 1.0, 3.5], help="scales; the first draws sheets"
    )
    parser.add_argument("--steps", type=int, default=shapes_image.DEFAULT_STEPS, help="denoising steps")
    parser.add_argument("--captions", type=int, default=96, help="captions of a setting, at least 2")
    parser.add_argument("--long-text", type=int, default=0, help="captions at the pipeline's default text length, 512")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pipeline = load_pipeline(FluxPipeline, args.pipeline)
    for side in args.sides:
        for number, guidance in enumerate(args.guidance):
            sheet = None if number else f"sheet_{side}.png"
            evaluate(pipeline, Setting(side, side, args.steps, guidance), args.captions, args.out, sheet)
    if args.long_text:
        side = args.sides[0]
        evaluate(pipeline, Setting(side, side, args.steps, args.guidance[0], 512), args.long_text, args.out)


if __name__ == "__main__":
    main()
