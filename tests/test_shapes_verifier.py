from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dit_accel.pipelines.shapes.render import draw_objects, place_objects, render
from dit_accel.pipelines.shapes.scenes import Scenes, captions, held_out_scenes
from dit_accel.pipelines.shapes.verifier import read_clip, score_clip

SIZES = [((128, 128, 9), 12), ((192, 256, 25), 6), ((256, 192, 13), 4), ((384, 512, 37), 2)]
SIZE_IDS = ["x".join(map(str, size)) for size, _ in SIZES]


def as_frames(clips: torch.Tensor) -> list[np.ndarray]:
    return list(((clips + 1) / 2).clamp(0, 1).permute(0, 2, 3, 4, 1).numpy())


def rendered(size: tuple[int, int, int], objects: int, count: int) -> tuple[torch.Tensor, list[str], Scenes]:
    scenes = held_out_scenes(count, objects, seed=1)
    return render(scenes, *size, torch.Generator().manual_seed(2)), captions(scenes), scenes


def blurred(clips: torch.Tensor) -> torch.Tensor:
    """A 5x5 binomial blur and a little noise, worse than the VAE's loss."""
    taps = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    flat = clips.reshape(-1, 1, *clips.shape[-2:])
    smooth = F.conv2d(flat, (taps[:, None] * taps)[None, None], padding=2).view_as(clips)
    noise = torch.randn(clips.shape, generator=torch.Generator().manual_seed(0))
    return (smooth + 0.04 * noise).clamp(-1, 1)


@pytest.mark.parametrize("objects", [1, 2])
@pytest.mark.parametrize(("size", "count"), SIZES, ids=SIZE_IDS)
def test_rendered_clips_are_read_without_error(size: tuple[int, int, int], count: int, objects: int) -> None:
    clips, texts, scenes = rendered(size, objects, count)
    for clip, text, wanted in zip(as_frames(clips), texts, scenes.objects(), strict=True):
        assert score_clip(clip, text).correct, text
        assert {(o.colour, o.shape, o.trait) for o in read_clip(clip).objects} == {
            (o.colour, o.shape, o.trait) for o in wanted
        }


@pytest.mark.parametrize("objects", [1, 2])
def test_blurred_noisy_clips_are_still_read(objects: int) -> None:
    clips, texts, _ = rendered((192, 256, 13), objects, 6)
    assert all(score_clip(clip, text).correct for clip, text in zip(as_frames(blurred(clips)), texts, strict=True))


@pytest.mark.parametrize("objects", [1, 2])
def test_swapped_captions_fail(objects: int) -> None:
    clips, texts, _ = rendered((128, 128, 9), objects, 12)
    swapped = texts[1:] + texts[:1]
    assert not any(score_clip(clip, text).correct for clip, text in zip(as_frames(clips), swapped, strict=True))


def test_noise_shows_nothing() -> None:
    rng = np.random.default_rng(0)
    for clip in (rng.integers(0, 256, (9, 96, 128, 3), dtype=np.uint8), rng.random((9, 96, 128, 3))):
        score = score_clip(clip, "a red circle resting over navy dots")
        assert not score.correct and score.colours == 0


def with_second_object(frames: slice, colour_of_first: bool) -> tuple[np.ndarray, str]:
    """A one-object clip with another object pasted into some frames, and its one-object caption."""
    scenes = held_out_scenes(1, 2, seed=1)
    one = Scenes(**{**vars(scenes), "count": torch.ones(1, dtype=torch.long)})
    colour = scenes.colour[:, :1].expand(-1, 2) if colour_of_first else scenes.colour
    pasted = Scenes(**{**vars(scenes), "colour": colour})
    tracks = place_objects(scenes, 192, 256, 25, torch.Generator().manual_seed(5))
    canvas = torch.full((1, 3, 25, 192, 256), 0.3)
    clip = draw_objects(canvas, one, tracks)
    clip[:, :, frames] = draw_objects(canvas, pasted, tracks)[:, :, frames]
    return clip[0].permute(1, 2, 3, 0).numpy(), captions(one)[0]


def test_the_clip_that_duplicates_spoil_is_correct_without_them() -> None:
    assert score_clip(*with_second_object(slice(0, 0), colour_of_first=True)).correct


@pytest.mark.parametrize("colour_of_first", [True, False], ids=["duplicate", "other colour"])
@pytest.mark.parametrize("frames", [slice(None), slice(21, 25)], ids=["all frames", "last latent frame"])
def test_a_second_object_that_was_not_asked_for_fails(frames: slice, colour_of_first: bool) -> None:
    score = score_clip(*with_second_object(frames, colour_of_first))
    assert not score.correct and score.extra == 1 and score.objects == 1


def test_a_missing_object_fails() -> None:
    clips, texts, _ = rendered((192, 256, 13), 1, 1)
    score = score_clip(as_frames(clips)[0], texts[0].replace(" over ", " and a red star resting over "))
    assert (score.wanted, score.objects, score.extra, score.correct) == (2, 1, 0, False)


def test_bytes_and_floats_read_alike() -> None:
    clip = as_frames(rendered((128, 128, 9), 2, 1)[0])[0]
    assert read_clip((clip * 255).round().astype(np.uint8)) == read_clip(clip) == read_clip(torch.from_numpy(clip))


@pytest.mark.parametrize(
    ("clip", "reason"),
    [
        pytest.param(np.zeros((3, 9, 64, 64)), r"got \[3, 9, 64, 64\]", id="channels first"),
        pytest.param(np.full((9, 64, 64, 3), -1.0), r"got \[-1, -1\]", id="range of the VAE"),
        pytest.param(np.full((9, 64, 64, 3), np.nan), r"got \[nan, nan\]", id="not a number"),
    ],
)
def test_a_clip_in_another_layout_is_refused(clip: np.ndarray, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_clip(clip)
