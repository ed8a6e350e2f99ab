"""Pictures and clips as files: read into frames as they are, or refused by name. Nothing is scaled, cut or rounded."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image, ImageFile, ImageSequence

Array = np.ndarray[Any, Any]

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_UNREADABLE = (OSError, SyntaxError, EOFError, RuntimeError, KeyError, zipfile.BadZipFile, Image.DecompressionBombError)


class Size(NamedTuple):
    """What a file says of its clip before it is read."""

    frames: int | None  # None: not known before a video has been decoded
    height: int
    width: int

    def __str__(self) -> str:
        pixels = f"{self.height}x{self.width}"
        return pixels if self.frames is None else f"{self.frames} frame{'s' * (self.frames > 1)} of {pixels}"

    def fits(self, other: Size) -> bool:
        """Whether two clips may be of one size, as far as is known."""
        return self[1:] == other[1:] and (self.frames == other.frames or None in (self.frames, other.frames))


@dataclass(frozen=True)
class Format:
    """How files of some suffixes are read.

    Args:
        size: of the clip, from the head of the file.
        read: frames [T, H, W, 3], uint8 or floating.
        lossy: the suffixes whose files lost something when they were written, or may have.
    """

    size: Callable[[Path], Size]
    read: Callable[[Path], Array]
    lossy: frozenset[str]


def is_clip(path: Path) -> bool:
    """Whether the suffix is one of a picture or a clip."""
    return path.suffix.lower() in FORMATS


def is_lossy(path: Path) -> bool:
    """Whether the file was, or may have been, compressed with a loss that a comparison would measure too."""
    return path.suffix.lower() in FORMATS[path.suffix.lower()].lossy


def clip_size(path: Path) -> Size:
    """Frames, height and width of a file of ``FORMATS``, from its head.

    Raises:
        ValueError: a file that cannot be read.
    """
    with _naming(path):
        return FORMATS[path.suffix.lower()].size(path)


def read_clip(path: Path) -> Array:
    """Frames [T, H, W, 3] of a file of ``FORMATS``, uint8 or floating as stored; a picture is a clip of one frame.

    Raises:
        ValueError: a file that cannot be read, is transparent, or has more or fewer than 8 bits a channel.
    """
    with _naming(path):
        return FORMATS[path.suffix.lower()].read(path)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    except _UNREADABLE as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{path} cannot be read ({reason[-1]}); make it again.") from error


def _picture_size(path: Path) -> Size:
    with Image.open(path) as image:
        return Size(getattr(image, "n_frames", 1), image.height, image.width)


def _read_picture(path: Path) -> Array:
    with Image.open(path) as image:
        return np.stack([_opaque(image) for _ in ImageSequence.Iterator(image)])


def _opaque(image: ImageFile.ImageFile) -> Array:
    """The frame that the file stands at, uint8 [H, W, 3]."""
    packed = [args if isinstance(args, str) else args[0] for _, _, _, args in image.tile if args]
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA") or any("16" in str(name) for name in packed):
        raise ValueError(
            f"must have 8 bits of grey or RGB, got mode {image.mode} stored as {', '.join(map(str, packed))}; "
            "save it with 8 bits, or as floating frames in an .npz file."
        )
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
        raise ValueError("is transparent, and what lies behind is not known; save it without an alpha channel.")
    return np.asarray(image.convert("RGB"))


def _npy_size(path: Path) -> Size:
    with path.open("rb") as file:
        return _array_size(file)


def _npz_size(path: Path) -> Size:
    with zipfile.ZipFile(path) as archive:
        key = _key([name.removesuffix(".npy") for name in archive.namelist()])
        with archive.open(f"{key}.npy") as file:
            return _array_size(file)


def _array_size(file: IO[bytes]) -> Size:
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"must be an array file of version 1 or 2, got version {version}; save it again.")
    frames, height, width, _ = _clip_shape(_HEADERS[version](file)[0])
    return Size(frames, height, width)


def _read_npy(path: Path) -> Array:
    return _as_clip(np.load(path, allow_pickle=False))


def _read_npz(path: Path) -> Array:
    with np.load(path, allow_pickle=False) as archive:
        return _as_clip(archive[_key(archive.files)])


def _key(names: list[str]) -> str:
    """The array that holds the frames: "frames", or the only one."""
    if "frames" in names:
        return "frames"
    if len(names) != 1:
        raise ValueError(f"must hold one array, or one called frames, got {', '.join(names) or 'none'}.")
    return names[0]


def _as_clip(array: Array) -> Array:
    native = array.dtype.newbyteorder("=")
    if native not in (np.uint8, np.float16, np.float32, np.float64):
        raise ValueError(f"must hold floating values in [0, 1] or uint8, got {array.dtype}; convert it.")
    return array.astype(native, copy=False).reshape(_clip_shape(array.shape))


def _clip_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    clip = (1, *shape) if len(shape) == 3 else shape
    if len(clip) != 4 or clip[-1] != 3 or 0 in clip:
        raise ValueError(f"must hold frames [frames, height, width, 3 channels] or one of them, got {list(shape)}.")
    return clip


def _video_size(path: Path) -> Size:
    frames = _video(path)
    width, height = next(frames)["size"]
    frames.close()
    return Size(None, height, width)


def _read_video(path: Path) -> Array:
    frames = _video(path)
    width, height = next(frames)["size"]
    clip = [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in frames]
    if not clip:
        raise ValueError("has no frame that can be decoded; make it again.")
    return np.stack(clip)


def _video(path: Path) -> Any:
    """imageio-ffmpeg's generator: what is known of the video, then the bytes of one frame after the other."""
    import imageio_ffmpeg  # type: ignore[import-untyped] # pictures and arrays do without

    # Frames as stored: by default, ones shown for longer or shorter would be doubled or dropped.
    return imageio_ffmpeg.read_frames(path, output_params=["-fps_mode", "passthrough"])


_PICTURES = Format(_picture_size, _read_picture, frozenset((".jpg", ".jpeg", ".webp", ".gif")))
_VIDEOS = Format(_video_size, _read_video, frozenset((".mp4", ".webm", ".mov")))
FORMATS: dict[str, Format] = {
    **dict.fromkeys((".png", ".bmp", ".tif", ".tiff", ".jpg", ".jpeg", ".webp", ".gif"), _PICTURES),
    **dict.fromkeys((".mp4", ".webm", ".mov"), _VIDEOS),
    ".npy": Format(_npy_size, _read_npy, frozenset()),
    ".npz": Format(_npz_size, _read_npz, frozenset()),
}
