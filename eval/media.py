"""Clips and pictures as files and as data URIs."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dit_accel.eval.frames import Frames, as_uint8

# RGB is converted with the matrix that the file declares; undeclared, players guess and colours shift.
_COLOURS = (
    "scale=out_color_matrix=bt709:out_range=tv,"
    "setparams=colorspace=bt709:color_primaries=bt709:color_trc=iec61966-2-1:range=tv"
)


def write_mp4(path: str | os.PathLike[str], frames: Frames, fps: float = 16.0, crf: int = 16) -> None:
    """Writes an H.264 clip (yuv420p, faststart) that browsers play.

    Frames keep their size: nothing is rescaled. yuv420p needs even sides, so an odd one repeats its last row or
    column once. The file is for looking at; measure raw frames instead.

    Args:
        path: the file, replaced when it exists.
        frames: [T, H, W, 3], floating in [0, 1] or uint8.
        fps: frames per second. Default 16.
        crf: x264's constant rate factor, lower is better. Default 16, visually lossless.
    """
    clip = as_uint8(frames)
    _, height, width, _ = clip.shape
    clip = np.pad(clip, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    # A key frame every 12 keeps scrubbing quick.
    parameters = ["-crf", str(crf), "-g", "12", "-movflags", "+faststart", "-vf", _COLOURS]
    _encode(path, clip, fps, "libx264", "yuv420p", parameters)


def write_lossless_mp4(path: str | os.PathLike[str], frames: Frames, fps: float = 16.0) -> None:
    """Writes an H.264 clip in RGB that decodes to the very same 8-bit frames; few browsers play it.

    Args:
        path: the file, replaced when it exists.
        frames: [T, H, W, 3], floating in [0, 1] or uint8.
        fps: frames per second. Default 16.
    """
    _encode(path, as_uint8(frames), fps, "libx264rgb", "rgb24", ["-qp", "0", "-preset", "ultrafast"])


def _encode(
    path: str | os.PathLike[str],
    clip: np.ndarray[Any, np.dtype[np.uint8]],  # [T, H, W, 3]
    fps: float,
    codec: str,
    pixel_format: str,
    parameters: list[str],
) -> None:
    import imageio_ffmpeg  # type: ignore[import-untyped] # only files of clips need it, tables do not

    writer = imageio_ffmpeg.write_frames(
        str(path),
        (clip.shape[2], clip.shape[1]),
        fps=fps,
        codec=codec,
        pix_fmt_in="rgb24",
        pix_fmt_out=pixel_format,
        macro_block_size=1,
        quality=None,
        output_params=parameters,
    )
    writer.send(None)
    for frame in clip:
        writer.send(np.ascontiguousarray(frame))
    writer.close()


@dataclass(frozen=True)
class SheetRow:
    """One method in a contact sheet.

    Args:
        label: heading of the row.
        note: key figures, one line each.
        frames: [T, H, W, 3], floating in [0, 1] or uint8.
    """

    label: str
    note: str
    frames: Frames


def contact_sheet(rows: Sequence[SheetRow], columns: int = 5, frame_width: int = 240) -> Image.Image:
    """A picture with one row per method and evenly spaced frames as columns.

    Args:
        rows: methods, top to bottom.
        columns: frames per row, fewer where a clip is shorter. Default 5.
        frame_width: pixels each frame is scaled to. Default 240.

    Raises:
        ValueError: without rows.
    """
    if not rows:
        raise ValueError("a contact sheet needs at least one row, got none.")
    strips = [_strip(as_uint8(row.frames, row.label), columns, frame_width) for row in rows]
    margin, gap, size = 16, 8, 15
    heading, text = ImageFont.load_default(size + 3), ImageFont.load_default(size)
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    labels = [draw.textbbox((0, 0), row.label, font=heading)[2] for row in rows]
    notes = [draw.multiline_textbbox((0, 0), row.note, font=text, spacing=5) for row in rows]
    text_width = int(max(*labels, *(box[2] for box in notes)))
    heights = [max(strip.height, int(box[3]) + size + 14) for strip, box in zip(strips, notes, strict=True)]
    width = margin * 3 + text_width + max(strip.width for strip in strips)
    sheet = Image.new("RGB", (width, 2 * margin + sum(heights) + gap * (len(rows) - 1)), "white")
    draw, top = ImageDraw.Draw(sheet), margin
    for row, strip, height in zip(rows, strips, heights, strict=True):
        draw.text((margin, top), row.label, font=heading, fill="#10141a")
        draw.multiline_text((margin, top + size + 12), row.note, font=text, fill="#5a6472", spacing=5)
        sheet.paste(strip, (2 * margin + text_width, top))
        top += height + gap
    return sheet


def png_bytes(image: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def data_uri(content: bytes, mime: str) -> str:
    """``content`` as a ``data:`` URI, for pages that load nothing else."""
    return f"data:{mime};base64,{base64.b64encode(content).decode('ascii')}"


def file_uri(path: str | os.PathLike[str], mime: str) -> str:
    """The content of a file as a ``data:`` URI."""
    return data_uri(Path(path).read_bytes(), mime)


def _strip(clip: np.ndarray[Any, Any], columns: int, frame_width: int, gap: int = 4) -> Image.Image:
    """Evenly spaced frames side by side, the first and the last among them."""
    count, height, width, _ = clip.shape
    chosen = np.linspace(0, count - 1, min(columns, count)).round().astype(int)
    frame_height = max(1, round(height * frame_width / width))
    strip = Image.new("RGB", (len(chosen) * (frame_width + gap) - gap, frame_height), "white")
    for column, index in enumerate(chosen):
        frame = Image.fromarray(clip[index]).resize((frame_width, frame_height), Image.Resampling.LANCZOS)
        strip.paste(frame, (column * (frame_width + gap), 0))
    return strip
