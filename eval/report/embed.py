"""Clips and stills as data URIs that fit into a page of limited size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from dit_accel.eval.media import data_uri, file_uri, png_bytes, write_mp4
from dit_accel.eval.quality import difference_map

Clip = np.ndarray[Any, np.dtype[np.uint8]]  # [T, H, W, 3]


@dataclass(frozen=True)
class Encoding:
    """How media are compressed for the page.

    Args:
        crf: x264 rate factor of clips.
        still: WebP quality of stills; None is lossless PNG.
        shrink: frames are this many times smaller per side.
    """

    crf: int
    still: int | None
    shrink: int

    def __str__(self) -> str:
        stills = "lossless PNG" if self.still is None else f"WebP at quality {self.still}"
        size = "" if self.shrink == 1 else f", sides divided by {self.shrink}"
        return f"clips as H.264 at CRF {self.crf}, stills as {stills}{size}"


ENCODINGS = (
    Encoding(crf=18, still=None, shrink=1),
    Encoding(crf=24, still=95, shrink=1),
    Encoding(crf=30, still=90, shrink=1),
    Encoding(crf=30, still=90, shrink=2),
    Encoding(crf=34, still=80, shrink=4),
)


@dataclass(frozen=True)
class Media:
    """Data URIs of one method.

    Args:
        clip: an mp4; a still where there is one frame.
        still: the middle frame.
        difference: error map against the baseline, as ``clip``; None for the baseline itself.
    """

    clip: str
    still: str
    difference: str | None

    @property
    def size(self) -> int:
        return sum(len(uri) for uri in (self.clip, self.still, self.difference or ""))


def embed(clips: Sequence[Clip], fps: float, budget: int) -> tuple[list[Media], Encoding]:
    """Media of each clip in the best encoding that fits, or in the smallest one where none does.

    Args:
        clips: the baseline first.
        fps: frames per second.
        budget: bytes of all data URIs together.
    """
    maps = [None, *(difference_map(clip, clips[0]) for clip in clips[1:])]
    for encoding in ENCODINGS:
        media = [_encode(clip, error, fps, encoding) for clip, error in zip(clips, maps, strict=True)]
        if sum(item.size for item in media) <= budget:
            break
    return media, encoding


def _encode(clip: Clip, error: Clip | None, fps: float, encoding: Encoding) -> Media:
    show = _still if len(clip) == 1 else _video
    return Media(
        clip=show(clip, fps, encoding),
        still=_still(clip[len(clip) // 2 :], fps, encoding),
        difference=None if error is None else show(error, fps, encoding),
    )


def _still(clip: Clip, fps: float, encoding: Encoding) -> str:
    image = _shrunk(clip[0], encoding.shrink)
    if encoding.still is None:
        return data_uri(png_bytes(image), "image/png")
    buffer = BytesIO()
    image.save(buffer, "WEBP", quality=encoding.still)
    return data_uri(buffer.getvalue(), "image/webp")


def _video(clip: Clip, fps: float, encoding: Encoding) -> str:
    frames = np.stack([np.asarray(_shrunk(frame, encoding.shrink)) for frame in clip])
    with TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_mp4(path, frames, fps, encoding.crf)
        return file_uri(path, "video/mp4")


def _shrunk(frame: np.ndarray[Any, Any], factor: int) -> Image.Image:
    image = Image.fromarray(frame)
    return image if factor == 1 else image.reduce(factor)
