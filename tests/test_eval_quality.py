"""Metrics of frames: analytic values, agreement with scikit-image, and clips that are refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dit_accel.eval.frames import as_float, as_uint8
from dit_accel.eval.quality import METRICS, Metric, Score, difference_map, make_metric, measure, prompt_accuracy

torchmetrics = pytest.importorskip("torchmetrics.functional.image", reason="an oracle")
structural_similarity = pytest.importorskip("skimage.metrics", reason="the oracle").structural_similarity


def clip(frames: int = 3, height: int = 19, width: int = 27, seed: int = 0) -> Tensor:
    """A smooth random clip with flat regions, where SSIM is most sensitive to rounding."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(frames, 3, 5, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    smooth[:, :, : height // 3] = 0.7
    return smooth.movedim(1, -1).contiguous()


def noisy(target: Tensor, amount: float, seed: int = 1) -> Tensor:
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(seed))
    return (target + amount * noise).clamp(0, 1)


def test_identical_clips_have_no_error_and_infinite_psnr() -> None:
    scores = measure(clip(), clip())
    assert scores["mse"].value == 0
    assert scores["psnr"].value == math.inf
    assert scores["psnr"].values == (math.inf,) * 3
    assert scores["ssim"].value == pytest.approx(1, abs=1e-12)
    assert scores["flicker_gap"].value == 0
    assert scores["motion_gap"].value == 0
    assert scores["border"].skipped == "border needs clips that differ, these are identical."


def test_black_against_grey_is_not_identical() -> None:
    scores = measure(np.full((1, 24, 24, 3), 128, np.uint8), np.zeros((1, 24, 24, 3), np.uint8))
    assert scores["psnr"].value == pytest.approx(20 * math.log10(255 / 128))
    assert scores["ssim"].value == pytest.approx(0, abs=1e-3)
    assert scores["border"].value == pytest.approx(1)


def test_flat_100_against_black_has_psnr_8_13() -> None:
    grey, black = np.full((2, 16, 16, 3), 100, np.uint8), np.zeros((2, 16, 16, 3), np.uint8)
    scores = measure(grey, black, ["mse", "psnr"])
    assert scores["psnr"].value == pytest.approx(20 * math.log10(255 / 100), abs=1e-6)
    assert scores["psnr"].value == pytest.approx(8.13, abs=5e-3)
    assert scores["mse"].value == pytest.approx((100 / 255) ** 2, rel=1e-6)


def test_psnr_of_a_clip_is_that_of_its_mean_squared_error() -> None:
    target = torch.full((2, 12, 12, 3), 0.5)
    other = target.clone()
    other[1] += 0.25  # the first frame stays identical
    score = measure(other, target, ["psnr"])["psnr"]
    assert score.values == (math.inf, pytest.approx(-20 * math.log10(0.25)))
    assert score.value == pytest.approx(-10 * math.log10(0.25**2 / 2))


@pytest.mark.parametrize("size", [(11, 11), (12, 31), (40, 23)], ids=str)
def test_ssim_agrees_with_scikit_image(size: tuple[int, int]) -> None:
    target = clip(2, *size)
    other = noisy(target, 0.05)
    expected = [
        structural_similarity(
            x, y, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0, channel_axis=-1
        )
        for x, y in zip(other.double().numpy(), target.double().numpy(), strict=True)
    ]
    score = measure(other, target, ["ssim"])["ssim"]
    np.testing.assert_allclose(score.values, expected, atol=1e-6)
    assert score.value == pytest.approx(np.mean(expected), abs=1e-6)


@pytest.mark.parametrize(("size", "amount"), [((176, 176), 0.4), ((181, 199), 0.02)], ids=str)
def test_psnr_ssim_and_ms_ssim_agree_with_torchmetrics(size: tuple[int, int], amount: float) -> None:
    target = clip(1, *size)
    other = noisy(target, amount)
    scores = measure(other, target, ["psnr", "ssim", "ms_ssim"])
    planes = [
        (x.movedim(-1, 0)[None].double(), y.movedim(-1, 0)[None].double()) for x, y in zip(other, target, strict=True)
    ]
    psnr = torchmetrics.peak_signal_noise_ratio(other, target, data_range=1.0)
    assert scores["psnr"].value == pytest.approx(float(psnr), rel=1e-5)
    # It reflects frames at their edges; windows that lie wholly inside are ours.
    maps = [
        torchmetrics.structural_similarity_index_measure(*pair, data_range=1.0, return_full_image=True)[1]
        for pair in planes
    ]
    inside = [float(values[..., 5:-5, 5:-5].mean()) for values in maps]
    np.testing.assert_allclose(scores["ssim"].values, inside, atol=1e-6)
    expected = [
        float(torchmetrics.multiscale_structural_similarity_index_measure(*pair, data_range=1.0)) for pair in planes
    ]
    np.testing.assert_allclose(scores["ms_ssim"].values, expected, atol=1e-6)


def test_flicker_is_the_mean_step_between_frames_and_the_gap_compares_it() -> None:
    still = torch.zeros(4, 8, 8, 3)
    ramp = torch.linspace(0, 0.6, 4).view(4, 1, 1, 1).expand(4, 8, 8, 3)
    scores = measure(ramp, still, ["flicker", "flicker_gap"])
    assert scores["flicker"].value == pytest.approx(0.2)
    assert len(scores["flicker"].values) == 3
    assert scores["flicker_gap"].value == pytest.approx(0.2)
    assert measure(still, ramp, ["flicker_gap"])["flicker_gap"].value == pytest.approx(0.2)


@pytest.mark.parametrize("name", ["mse", "psnr", "ssim", "motion_gap"])
def test_more_noise_scores_worse(name: str) -> None:
    target = clip()
    values = [measure(noisy(target, amount), target, [name])[name].value or 0 for amount in (0.01, 0.03, 0.1, 0.3)]
    assert values == sorted(values, reverse=bool(METRICS[name].higher_is_better))
    assert len(set(values)) == 4


def test_uint8_and_float_clips_score_the_same() -> None:
    target, other = as_uint8(clip()), as_uint8(noisy(clip(), 0.1))
    from_bytes = measure(other, target)
    from_floats = measure(torch.from_numpy(other).double() / 255, target / np.float32(255))
    for name in METRICS:
        assert from_bytes[name].values == pytest.approx(from_floats[name].values, rel=1e-5)


def test_bfloat16_and_float32_clips_score_the_same() -> None:
    target, other = clip().bfloat16(), noisy(clip(), 0.1).bfloat16()
    assert measure(other, target) == measure(other.float(), target.float())


def test_scores_are_the_same_whenever_they_are_taken() -> None:
    target, others = clip(), [noisy(clip(), amount) for amount in (0.02, 0.1)]
    forwards = [measure(other, target) for other in others]
    backwards = [measure(other, target, [*reversed(METRICS)]) for other in reversed(others)]
    assert forwards == backwards[::-1]


def test_uint8_survives_the_way_to_float_and_back() -> None:
    every_value = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    np.testing.assert_array_equal(as_uint8(as_float(every_value)), every_value)


def test_metrics_without_what_they_need_are_skipped_with_the_reason() -> None:
    scores = measure(clip(frames=1))
    assert {name: score.value for name, score in scores.items()} == dict.fromkeys(METRICS)
    assert scores["psnr"].skipped == "psnr needs a reference clip."
    assert scores["flicker"].skipped == "flicker needs at least 2 frames, got 1."


def test_prompt_accuracy_passes_the_clip_to_the_judge() -> None:
    seen = []

    def judge(frames: Tensor) -> float:
        seen.append(frames)
        return 0.75

    scores = measure(as_uint8(clip()), metrics=[prompt_accuracy(judge)])
    assert scores["prompt_accuracy"].value == 0.75
    assert seen[0].shape == (3, 19, 27, 3)
    assert seen[0].dtype == torch.float32


def test_a_metric_of_the_caller_is_measured_beside_the_named_ones() -> None:
    brightest = Metric("brightest", False, None, "", lambda frames, _: frames.flatten(1).amax(1), pool=torch.max)
    scores = measure(clip(), clip(), ["psnr", brightest])
    assert list(scores) == ["psnr", "brightest"]
    assert scores["brightest"].value == pytest.approx(float(clip().max()))


def change(position: tuple[int, ...], value: float) -> Callable[[Tensor], Tensor]:
    def changed(frames: Tensor) -> Tensor:
        frames = frames.clone()
        frames[position] = value
        return frames

    return changed


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "fewer frames": (lambda x: x[:-1], "same frame count, got 2 and 3"),
    "another size": (lambda x: x[:, :, :-1], "same size, got 19x26 and 19x27"),
    "NaN": (change((1, 2, 3, 0), math.nan), "frames must not contain NaN, but frame 1 does"),
    "above range": (change((0, 0, 0, 0), 1.5), r"frames must lie in \[0, 1\], got values from .* to 1.5"),
    "below range": (lambda x: x * 2 - 1, r"frames must lie in \[0, 1\]"),
    "infinite": (change((0, 0, 0, 0), math.inf), r"frames must lie in \[0, 1\]"),
    "four channels": (lambda x: torch.cat([x, x[..., :1]], -1), r"3 channels\], got \[3, 19, 27, 4\]"),
    "channels first": (lambda x: x.movedim(-1, 1), r"3 channels\], got \[3, 3, 19, 27\]"),
    "no frame axis": (lambda x: x[0], r"got \[19, 27, 3\]"),
    "no frames": (lambda x: x[:0], r"got \[0, 19, 27, 3\]"),
    "integers": (lambda x: x.int(), "floating in .* or uint8, got torch.int32"),
}


@pytest.mark.parametrize(("spoil", "sentence"), REFUSED.values(), ids=REFUSED)
def test_malformed_clips_are_refused(spoil: Callable[[Tensor], Tensor], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        measure(spoil(clip()), clip())


def test_a_malformed_reference_is_named() -> None:
    with pytest.raises(ValueError, match="reference must not contain NaN"):
        measure(clip(), change((0, 0, 0, 0), math.nan)(clip()))


def test_ssim_refuses_frames_smaller_than_its_window() -> None:
    with pytest.raises(ValueError, match="at least 11x11 pixels, got 10x27"):
        measure(clip(height=10), clip(height=10), ["ssim"])


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one of mse, psnr, .* got 'lpips'"):
        measure(clip(), clip(), ["lpips"])


def test_difference_map_is_dark_where_equal_and_brighter_with_the_error() -> None:
    target = torch.full((1, 4, 4, 3), 0.5)
    other = target.clone()
    other[0, 0, 1], other[0, 0, 2], other[0, 0, 3] = 0.55, 0.65, 0.9
    shown = difference_map(other, target)
    assert shown.shape == (1, 4, 4, 3)
    assert shown.dtype == np.uint8
    lightness = shown[0].astype(int).sum(-1)
    assert lightness[0, 0] < lightness[0, 1] < lightness[0, 2] < lightness[0, 3]
    assert (lightness[1:] == lightness[0, 0]).all()
    assert lightness[0, 0] < 60


def test_ms_ssim_is_one_for_identical_clips_and_falls_with_noise() -> None:
    target = clip(frames=2, height=176, width=192)
    scores = [measure(noisy(target, amount), target, ["ms_ssim"])["ms_ssim"].value for amount in (0.0, 0.05, 0.2)]
    assert scores[0] == pytest.approx(1, abs=1e-9)
    assert scores[0] > scores[1] > scores[2]


def test_metrics_that_cannot_run_say_why() -> None:
    small = torch.zeros(1, 32, 32, 3)
    assert "sides of at least 176, got [32, 32]" in str(measure(small, small, ["ms_ssim"])["ms_ssim"].skipped)
    absent = Metric(
        "m", False, None, "", lambda frames, _: frames.mean(), dependencies=("torch", "no_such", "nor_this")
    )
    reason = "m needs no_such and nor_this: pip install 'dit-accel[eval]'."
    assert measure(small, metrics=[absent])["m"] == Score(None, skipped=reason)


def test_every_metric_says_what_its_parts_are_of() -> None:
    target = clip()
    for name, score in measure(noisy(target, 0.1), target).items():
        frames = len(target) + 1 - METRICS[name].min_frames
        if METRICS[name].scope == "frame" and not score.skipped:
            assert len(score.values) == frames
    assert {metric.name for metric in METRICS.values() if metric.scope == "clip"} == {"border"}


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("psrn", {}, "metric must be one of mse, psnr, .* got 'psrn'"),
        ("psnr", {"peak": 255}, "metric psnr takes no options, got peak"),
        ("seam", {}, "metric seam .* missing a required argument: 'tile'"),
        ("seam", {"tile": (1, 8, 8), "tiles": 2}, "unexpected keyword argument 'tiles'"),
        ("border", {"width": 0}, "at least 1 pixel, got 0"),
    ],
    ids=["unknown", "no options", "missing", "unknown option", "refused"],
)
def test_metrics_by_name_are_refused_in_one_sentence(name: str, options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make_metric(name, options)
