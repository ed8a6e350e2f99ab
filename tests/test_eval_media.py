"""Clips and pictures as files."""

from __future__ import annotations

import base64
from io import BytesIO
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

from dit_accel.eval.media import SheetRow, contact_sheet, data_uri, file_uri, png_bytes, write_mp4


def gradient(frames: int, height: int, width: int) -> np.ndarray:
    """A smooth clip whose brightness grows with the frame, uint8 [T, H, W, 3]."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    return np.stack([20 + 200 * x / width, 20 + 200 * y / height, 20 + 200 * t / frames], -1).astype(np.uint8)


@pytest.mark.parametrize(
    ("size", "shown"),
    [((32, 48), (32, 48)), ((34, 50), (34, 50)), ((33, 51), (34, 52))],
    ids=["multiple of 16", "even", "odd"],
)
def test_mp4_keeps_frame_count_size_and_colours(tmp_path: Path, size: tuple[int, int], shown: tuple[int, int]) -> None:
    clip = gradient(7, *size)
    write_mp4(tmp_path / "clip.mp4", clip, fps=10)
    read = iio.imread(tmp_path / "clip.mp4")
    assert read.shape == (7, *shown, 3)
    assert iio.immeta(tmp_path / "clip.mp4")["fps"] == 10
    height, width = size
    assert np.abs(read[:, :height, :width].astype(int) - clip).mean() < 3


def test_mp4_is_for_browsers(tmp_path: Path) -> None:
    write_mp4(tmp_path / "clip.mp4", gradient(3, 16, 16))
    assert iio.immeta(tmp_path / "clip.mp4")["codec"] == "h264"
    assert iio.immeta(tmp_path / "clip.mp4")["pix_fmt"].startswith("yuv420p")
    content = (tmp_path / "clip.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat"), "faststart puts the index first"


def test_contact_sheet_has_a_strip_per_row_and_a_frame_per_column() -> None:
    rows = [SheetRow("dense", "12.3 s", gradient(9, 32, 64)), SheetRow("radial", "6.1 s\n2.0×", gradient(9, 32, 64))]
    wide, narrow = contact_sheet(rows, columns=4, frame_width=100), contact_sheet(rows, columns=3, frame_width=100)
    assert wide.width - narrow.width == 104
    assert contact_sheet(rows[:1], columns=4, frame_width=100).height < wide.height
    # The last column is the last frame: its top right corner.
    np.testing.assert_allclose(wide.getpixel((wide.width - 18, 17)), rows[0].frames[-1, 0, -1], atol=12)


def test_contact_sheet_shows_no_frame_twice() -> None:
    image = contact_sheet([SheetRow("a", "", gradient(1, 32, 32))], columns=5, frame_width=80)
    assert image.width < 2 * 80 + 100


def test_contact_sheet_needs_rows() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        contact_sheet([])


def test_data_uris_hold_the_bytes(tmp_path: Path) -> None:
    image = Image.new("RGB", (3, 2), "red")
    uri = data_uri(png_bytes(image), "image/png")
    head, _, body = uri.partition(",")
    assert head == "data:image/png;base64"
    assert Image.open(BytesIO(base64.b64decode(body))).size == (3, 2)
    (tmp_path / "file.bin").write_bytes(b"\x00\xff")
    assert file_uri(tmp_path / "file.bin", "a/b") == "data:a/b;base64,AP8="
