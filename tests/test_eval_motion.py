"""The motion gap: known motions, motions that differ more and more, and frames where nothing is to be seen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from dit_accel.eval.quality import measure

SIDE = 32


def texture(height: int, width: int, seed: int) -> Tensor:
    coarse = torch.rand(1, 3, height // 6, width // 6, generator=torch.Generator().manual_seed(seed))
    return interpolate(coarse, (height, width), mode="bilinear")[0].movedim(0, -1)


def moving(rows: int, columns: int, frames: int = 4, background: Tensor | None = None) -> Tensor:
    """A textured square on grey, or on a picture, moving by so many pixels per frame."""
    square, clip = texture(SIDE, SIDE, seed=1), []
    for frame in range(frames):
        picture = torch.full((96, 128, 3), 0.5) if background is None else background.clone()
        top, left = 32 + rows * frame, 48 + columns * frame
        picture[top : top + SIDE, left : left + SIDE] = square
        clip.append(picture)
    return torch.stack(clip)


def panned(speed: int) -> Tensor:
    wide = texture(96, 192, seed=2)
    return torch.stack([wide[:, speed * frame : speed * frame + 128] for frame in range(4)])


def gap(frames: Tensor, reference: Tensor) -> float:
    return measure(frames, reference, ["motion_gap"])["motion_gap"].value or 0.0


@pytest.mark.parametrize("speed", [1, 3, 6, 10])
def test_a_pan_differs_from_a_still_by_its_speed(speed: int) -> None:
    assert gap(panned(speed), panned(0)) == pytest.approx(speed, rel=0.15)


def test_identical_motion_has_no_gap() -> None:
    assert gap(moving(1, 3), moving(1, 3)) == 0


@pytest.mark.parametrize("background", [None, texture(96, 128, seed=3)], ids=["flat", "textured"])
def test_the_gap_grows_with_the_difference_of_motion(background: Tensor | None) -> None:
    clips = [moving(0, speed, background=background) for speed in (2, 3, 4, 6)]
    gaps = [gap(other, clips[0]) for other in clips]
    assert gaps == sorted(gaps)
    assert gaps[1] < 0.5 * gaps[3]


def test_opposite_motions_differ_though_each_frame_changes_as_much() -> None:
    left, right = moving(0, -3), moving(0, 3)
    assert gap(left, right) > 1.5 * gap(moving(0, 0), right)


def test_the_gap_is_the_same_either_way() -> None:
    assert gap(moving(2, 0), moving(0, 3)) == pytest.approx(gap(moving(0, 3), moving(2, 0)))


def test_rounding_noise_is_no_motion() -> None:
    still = moving(0, 0)
    noise = torch.rand(still.shape, generator=torch.Generator().manual_seed(4)) - 0.5
    assert gap((still + noise * 2 / 255).clamp(0, 1), still) < 0.02


def test_flat_frames_do_not_move() -> None:
    grey = torch.linspace(0.2, 0.8, 4).view(4, 1, 1, 1).expand(4, 40, 33, 3)
    assert gap(grey, grey.flip(0)) == 0


@pytest.mark.parametrize("size", [(16, 16), (17, 90), (61, 35)], ids=str)
def test_odd_sizes_are_measured(size: tuple[int, int]) -> None:
    frames = torch.rand(3, *size, 3, generator=torch.Generator().manual_seed(5))
    score = measure(frames, frames.flip(2), ["motion_gap"])["motion_gap"]
    assert len(score.values) == 2
    assert (score.value or 0) > 0


def test_small_frames_are_skipped() -> None:
    score = measure(torch.zeros(2, 15, 40, 3), torch.zeros(2, 15, 40, 3), ["motion_gap"])["motion_gap"]
    assert score.skipped == "motion_gap needs sides of at least 16, got [15, 40]."
