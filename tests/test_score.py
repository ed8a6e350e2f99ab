"""`dit-accel score`: files paired by name, refused by name, streamed, and summed up whatever their order."""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dit_accel.cli import main
from dit_accel.eval.media import write_mp4
from dit_accel.eval.quality import METRICS, Metric, Score, SetMetric, measure
from dit_accel.eval.quality.files import FORMATS, clip_size, read_clip
from dit_accel.eval.quality.folders import check_sizes, judge_pairs, pair_files, summarise_metric
from dit_accel.eval.quality.metrics import SetScore

Array = np.ndarray[Any, Any]


def picture(seed: int = 0, height: int = 24, width: int = 33) -> Array:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def clip(frames: int = 3, seed: int = 0) -> Array:
    return np.stack([picture(seed + frame) for frame in range(frames)])


def worse(frames: Array, amount: int) -> Array:
    """The frames with every value off by so much."""
    return np.where(frames < 128, frames + amount, frames - amount).astype(np.uint8)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Five pairs, one of them in a subfolder; number i is off by i, so that number 0 is identical."""
    for side in ("dense", "sparse"):
        (tmp_path / side / "more").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.png", "c.png", "more/a.png", "more/d.png")):
        Image.fromarray(picture(number)).save(tmp_path / "dense" / name)
        Image.fromarray(worse(picture(number), number)).save(tmp_path / "sparse" / name)
    return tmp_path / "dense", tmp_path / "sparse"


def score(*arguments: object) -> int:
    return main(["score", *map(str, arguments)])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_pair_is_a_line_and_the_last_line_sums_up(folders: tuple[Path, Path], tmp_path: Path) -> None:
    assert score(*folders, "--metric", "psnr", "--metric", "ssim", "--output", tmp_path / "new" / "scores.jsonl") == 0
    *pairs, last = lines(tmp_path / "new" / "scores.jsonl")
    assert [pair["name"] for pair in pairs] == ["a.png", "b.png", "c.png", "more/a.png", "more/d.png"]
    assert [pair["identical"] for pair in pairs] == [True, False, False, False, False]
    assert pairs[0]["scores"]["psnr"]["value"] == "inf"
    expected = measure(worse(picture(2), 2)[None], picture(2)[None], ["psnr", "ssim"])
    assert pairs[2]["scores"]["ssim"]["value"] == expected["ssim"].value
    assert pairs[2]["size"] == [1, 24, 33]
    summary = last["summary"]
    assert (summary["pairs"], summary["identical"], len(summary["list_hash"])) == (5, 1, 16)
    psnr = summary["metrics"]["psnr"]
    assert (psnr["count"], psnr["infinite"]) == (5, 1)
    assert psnr["mean"] == pytest.approx(np.mean([20 * math.log10(255 / off) for off in (1, 2, 3, 4)]))
    assert psnr["median"] == pytest.approx(20 * math.log10(255 / 2))
    assert (psnr["worst_name"], psnr["fifth"]) == ("more/d.png", psnr["worst"])


def test_the_table_counts_infinite_scores_and_names_the_worst(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert score(*folders) == 0
    shown = capsys.readouterr().out
    assert "5 pairs, 1 of them identical" in shown
    row = next(line for line in shown.splitlines() if line.startswith("| psnr [dB]"))
    assert "5 (1 infinite)" in row and row.endswith("more/d.png |")
    assert "skipped in 5 of 5 pairs: flicker needs at least 2 frames, got 1." in shown


def test_scores_do_not_depend_on_the_order_in_which_files_were_written(folders: tuple[Path, Path]) -> None:
    pairs = pair_files(*folders)
    metrics = [METRICS["psnr"], METRICS["ssim"]]
    forwards = list(judge_pairs(pairs, metrics))
    backwards = list(judge_pairs(reversed(pairs), metrics))
    assert forwards == backwards[::-1]
    assert pairs == sorted(pairs, key=lambda pair: pair.name)


def test_a_metric_of_a_set_sees_every_pair_once(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Total:
        def __init__(self) -> None:
            self.sum, self.clips = 0.0, 0

        def add(self, frames: Tensor, reference: Tensor | None, prompt: str | None = None) -> None:
            assert reference is not None and frames.shape == reference.shape
            self.sum += float((frames - reference).abs().mean())
            self.clips += 1

        def result(self) -> SetScore:
            return SetScore(self.sum * 255, samples=self.clips)

    made = {
        "total": SetMetric("total", False, "", (), Total),
        "absent": SetMetric("absent", False, "", ("no_such",), Total),
    }
    monkeypatch.setattr(
        "dit_accel.commands.score.make_metrics", lambda calls: [made.get(name) or METRICS[name] for name, _ in calls]
    )
    assert score(*folders, "--metric", "psnr", "--metric", "total", "--metric", "absent") == 0
    shown = capsys.readouterr().out
    assert next(line for line in shown.splitlines() if line.startswith("| total")).split("|")[3].strip() == "10"
    assert "skipped in 5 of 5 pairs: absent needs no_such: pip install 'dit-accel[eval]'." in shown


def test_two_files_are_a_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "dense.npz", frames=clip())
    np.savez(tmp_path / "other.npz", frames=worse(clip(), 3))
    assert score(tmp_path / "dense.npz", tmp_path / "other.npz", "--metric", "seam(tile=(1, 8, 8))") == 0
    assert "| seam" in capsys.readouterr().out


def nothing(folder: Path) -> None:
    for path in folder.rglob("*.png"):
        path.unlink()


def with_nan(folder: Path) -> None:
    np.save(folder.parent / "dense" / "e.npy", np.zeros((2, 8, 8, 3)))
    np.save(folder / "e.npy", np.where(np.arange(2)[:, None, None, None] == 1, math.nan, np.zeros((2, 8, 8, 3))))


def other_frame_count(folder: Path) -> None:
    np.savez(folder.parent / "dense" / "e.npz", frames=clip(3))
    np.savez(folder / "e.npz", frames=clip(2))


def truncated(folder: Path) -> None:
    path = folder / "b.png"
    path.write_bytes(path.read_bytes()[:-200])


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda folder: (folder / "c.png").unlink(), "sparse lacks c.png of .*dense; add"),
    "extra": (lambda folder: Image.fromarray(picture()).save(folder / "z.png"), "dense lacks z.png of .*sparse; add"),
    "renamed": (
        lambda folder: (folder / "c.png").rename(folder / "d.png"),
        "sparse lacks c.png of .*dense and .*dense lacks d.png of .*sparse",
    ),
    "moved": (lambda folder: (folder / "b.png").rename(folder / "more" / "b.png"), "lacks b.png .* lacks more/b.png"),
    "another size": (
        lambda folder: Image.fromarray(picture(width=32)).save(folder / "c.png"),
        "sparse/c.png has 1 frame of 24x32 and .*dense/c.png has 1 frame of 24x33",
    ),
    "another frame count": (other_frame_count, "e.npz has 2 frames of 24x33 and .*e.npz has 3 frames"),
    "NaN": (with_nan, "sparse/e.npy must not contain NaN, but frame 1 does"),
    "no picture": (lambda folder: (folder / "c.png").write_text("no"), "sparse/c.png cannot be read .*make it again"),
    "cut off": (truncated, "sparse/b.png cannot be read .*make it again"),
    "empty": (nothing, "sparse holds no picture or clip; they end in .png"),
}


@pytest.mark.parametrize(("spoil", "sentence"), SPOILT.values(), ids=SPOILT)
def test_what_cannot_be_compared_is_refused_by_name(
    spoil: Callable[[Path], object], sentence: str, folders: tuple[Path, Path]
) -> None:
    spoil(folders[1])
    with pytest.raises(ValueError, match=sentence):
        list(judge_pairs(_checked(folders), [METRICS["mse"]]))


def _checked(folders: tuple[Path, Path]) -> list[Any]:
    pairs = pair_files(*folders)
    check_sizes(pairs)
    return pairs


def test_sizes_are_refused_before_the_first_pair_is_scored(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(picture(height=23)).save(folders[1] / "more" / "d.png")
    assert score(*folders, "--output", tmp_path / "scores.jsonl") == 2
    assert "more/d.png has 1 frame of 23x33" in capsys.readouterr().err
    assert not (tmp_path / "scores.jsonl").exists()


def test_many_missing_files_are_counted(folders: tuple[Path, Path]) -> None:
    for number in range(7):
        Image.fromarray(picture()).save(folders[0] / f"e{number}.png")
    with pytest.raises(ValueError, match="sparse lacks e0.png, e1.png, e2.png, e3.png, e4.png and 2 more of"):
        pair_files(*folders)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("nowhere", "dense"), "nowhere does not exist"),
        (("dense/a.png", "sparse"), "a.png is a file and the other place is a folder"),
        (("dense", "sparse", "--metric", "psnr("), "a metric is written as a name or as name"),
        (("dense", "sparse", "--metric", "psnr", "--metric", "psnr"), "must name each metric once, got psnr, psnr"),
        (("dense", "sparse", "--metric", "psrn"), "metric must be one of mse"),
        (("dense", "sparse", "--device", "cudaa"), "--device must be cpu, cuda or cuda:NUMBER, got 'cudaa'"),
        (("dense", "sparse", "--device", "cuda:99"), "--device cuda:99"),
    ],
    ids=["no folder", "file and folder", "no call", "twice", "unknown", "no device", "no such GPU"],
)
def test_arguments_are_refused_in_one_sentence(
    arguments: tuple[str, ...],
    sentence: str,
    folders: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folders[0].parent)
    assert score(*arguments) == 2
    assert sentence in capsys.readouterr().err


def test_other_files_and_lossy_ones_are_remarked_on(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (folders[0] / "prompts.txt").write_text("a cat")
    for folder in folders:
        Image.fromarray(picture()).save(folder / "e.JPG")
    assert score(*folders, "--metric", "mse") == 0
    shown = capsys.readouterr().out
    assert ".jpg files may be compressed with a loss, which the scores contain" in shown
    assert f"left out of {folders[0]}, neither pictures nor clips: 1 (prompts.txt)." in shown


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_does_not_grow_with_the_number_of_pairs(tmp_path: Path) -> None:
    for folder in ("dense", "sparse"):
        (tmp_path / folder).mkdir()
        Image.fromarray(picture(len(folder), 48, 48)).save(tmp_path / folder / "0000.png")
        for number in range(1, 1500):
            (tmp_path / folder / f"{number:04d}.png").hardlink_to(tmp_path / folder / "0000.png")
    pairs = pair_files(tmp_path / "dense", tmp_path / "sparse")
    judged = judge_pairs(pairs, [METRICS["mse"], METRICS["psnr"]])
    assert not any(next(judged).identical for _ in range(150))
    before = resident_bytes()
    growth = max(resident_bytes() - before for _ in judged)
    assert growth < 20_000_000  # the frames of 1350 pairs are 75 MB as floats


def saved(path: Path, frames: Array) -> Path:
    """One file of the suffix's format."""
    pictures = [Image.fromarray(frame) for frame in frames]
    match path.suffix:
        case ".npy":
            np.save(path, frames)
        case ".npz":
            np.savez(path, frames=frames, latents=np.zeros(3))
        case ".mp4" | ".mov" | ".webm":
            write_mp4(path.with_suffix(".mp4"), frames, crf=1)
            path.with_suffix(".mp4").rename(path)
        case ".webp":
            pictures[0].save(path, save_all=True, append_images=pictures[1:], lossless=True)
        case ".gif" | ".tiff" | ".tif":
            pictures[0].save(path, save_all=True, append_images=pictures[1:])
        case _:
            pictures[0].save(path)
    return path


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_is_read_as_it_was_written(suffix: str, tmp_path: Path) -> None:
    single = suffix in (".png", ".bmp", ".jpg", ".jpeg")
    smooth = np.linspace(20, 230, 24 * 34).reshape(1, 24, 34, 1).repeat(3, 0).repeat(3, -1)
    frames = (smooth - 8 * np.arange(3).reshape(3, 1, 1, 1)).astype(np.uint8)[: 1 if single else 3]
    path = saved(tmp_path / f"clip{suffix}", frames)
    read = read_clip(path)
    assert read.shape == frames.shape
    assert clip_size(path)[1:] == (24, 34)
    assert clip_size(path).frames in (None, len(frames))
    lossy = suffix in (".jpg", ".jpeg", ".mp4", ".mov", ".webm")
    assert np.abs(read.astype(int) - frames).max() <= (6 if lossy else 0)


def test_frames_shown_for_different_times_are_each_read_once(tmp_path: Path) -> None:
    pictures = [Image.fromarray(np.full((16, 16, 3), 40 * number, np.uint8)) for number in range(4)]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=[20, 400, 20, 1000])
    assert read_clip(tmp_path / "a.gif")[:, 0, 0, 0].tolist() == [0, 40, 80, 120]


def test_grey_pictures_are_read_as_three_equal_channels(tmp_path: Path) -> None:
    Image.fromarray(picture()[..., 0]).save(tmp_path / "grey.png")
    assert (read_clip(tmp_path / "grey.png")[0] == picture()[..., :1]).all()


def png(bits: int, colour: int, pixel: bytes) -> bytes:
    """A PNG file of 2 x 2 equal pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 2, 2, bits, colour, 0, 0, 0)
    rows = zlib.compress((b"\0" + 2 * pixel) * 2)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (png(16, 2, bytes(range(6))), "a.png must have 8 bits of grey or RGB, got mode RGB stored as RGB;16B"),
        (png(16, 0, b"\1\2"), "a.png must have 8 bits of grey or RGB, got mode I;16"),
        (png(8, 6, b"\1\2\3\4"), "a.png is transparent"),
    ],
    ids=["16-bit RGB", "16-bit grey", "transparent"],
)
def test_pictures_that_8_bits_of_rgb_cannot_hold_are_refused(content: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        read_clip(tmp_path / "a.png")


def test_an_opaque_alpha_channel_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(8, 6, b"\1\2\3\xff"))
    assert read_clip(tmp_path / "a.png")[0, 1, 1].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"x": clip(), "y": clip()}, "a.npz must hold one array, or one called frames, got x, y"),
        ({"frames": clip()[..., 0]}, r"a.npz must hold frames .* got \[3, 24, 33\]"),
        ({"frames": np.array([{}])}, "a.npz"),
    ],
    ids=["two arrays", "no channels", "objects"],
)
@pytest.mark.parametrize("read", [read_clip, clip_size])
def test_arrays_that_hold_no_clip_are_refused(
    read: Callable[[Path], object], arrays: dict[str, Array], sentence: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "a.npz", allow_pickle=True, **arrays)
    with pytest.raises(ValueError, match=sentence):
        read(tmp_path / "a.npz")


@pytest.mark.parametrize("dtype", ["<f2", ">f4", "<f8"])
def test_floats_of_any_width_and_byte_order_are_read(dtype: str, tmp_path: Path) -> None:
    values = np.linspace(0, 1, 24).reshape(2, 2, 2, 3).astype(dtype)
    np.save(tmp_path / "a.npy", values)
    assert torch.equal(torch.from_numpy(read_clip(tmp_path / "a.npy")).double(), torch.from_numpy(values.astype(float)))


@pytest.mark.parametrize("dtype", ["i8", "u2", "U1", "c8"])
def test_arrays_of_other_numbers_are_refused(dtype: str, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((1, 2, 2, 3), dtype))
    with pytest.raises(ValueError, match="a.npy must hold floating values in .* or uint8, got"):
        read_clip(tmp_path / "a.npy")


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00", b"PK\x03\x04", b"nothing of the kind"], ids=str)
@pytest.mark.parametrize("suffix", FORMATS)
def test_broken_files_are_named(suffix: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    for read in (clip_size, read_clip):
        with pytest.raises(ValueError, match=f"broken{suffix} "):
            read(path)


def test_infinite_scores_are_ordered_and_counted_but_left_out_of_the_mean() -> None:
    names = ["a", "b", "c", "d"]
    scores = [Score(math.inf), Score(30.0), Score(math.inf), Score(None, skipped="why.")]
    found = summarise_metric(METRICS["psnr"], names, scores)
    assert (found.count, found.infinite, found.skipped) == (3, 2, {"why.": 1})
    assert (found.mean, found.median, found.worst, found.worst_name) == (30.0, math.inf, 30.0, "b")
    all_infinite = summarise_metric(METRICS["psnr"], names[:1], scores[:1])
    assert (all_infinite.mean, all_infinite.interval, all_infinite.median) == (None, None, math.inf)
    assert summarise_metric(METRICS["psnr"], names[:1], scores[3:]).median is None


def test_a_metric_without_a_direction_has_no_worst_pair() -> None:
    brightness = Metric("brightness", False, None, "", lambda frames, _: torch.ones(1))
    found = summarise_metric(brightness, ["a", "b"], [Score(1.0), Score(2.0)])
    assert (found.mean, found.worst, found.fifth, found.worst_name) == (1.5, None, None, None)
