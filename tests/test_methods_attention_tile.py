"""Attention tile against its rule over frames and its published sparsities."""

from __future__ import annotations

import itertools

import pytest
import torch

from dit_accel.kernels.block_sparse.plan import Triple
from dit_accel.layout import TokenLayout
from dit_accel.methods import AttentionTileAttnProcessor, make_method, token_mask


@pytest.mark.parametrize("grid", [(7, 3, 5), (5, 9, 11), (2, 1, 1), (8, 2, 17)], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 5, 40])
def test_frames_see_themselves_and_the_reference_frames_everything(grid: Triple, count: int) -> None:
    frames, per_frame = grid[0], grid[1] * grid[2]
    least = min(count, frames)
    reference = {index * frames // least for index in range(least)}
    want = (
        torch.tensor([[f == g or f in reference or g in reference for g in range(frames)] for f in range(frames)])
        .repeat_interleave(per_frame, 0)
        .repeat_interleave(per_frame, 1)
    )
    method = AttentionTileAttnProcessor(reference_frames=count)
    assert torch.equal(token_mask(method, grid)[0], want)
    assert method.ideal_density(TokenLayout(grid)) == pytest.approx(float(want.double().mean()), abs=1e-12)


@pytest.mark.parametrize(
    ("frames", "count", "sparsity", "reported"),
    [
        (8, 4, 18.8, 17.60),
        (8, 3, 31.3, 29.88),
        (8, 2, 46.9, 45.47),
        (8, 1, 65.6, 64.38),
        (24, 12, 22.9, 21.51),
        (24, 8, 41.7, 40.30),
        (24, 6, 53.1, 51.88),
        (24, 4, 66.0, 64.98),
        (24, 3, 72.9, 72.05),
    ],
    ids=lambda value: str(value),
)
def test_published_masks_have_their_sparsity(frames: int, count: int, sparsity: float, reported: float) -> None:
    """The constant gap to what is reported is the rounding of frames to tiles there; here none is cut."""
    plan = AttentionTileAttnProcessor(reference_frames=count).plan(TokenLayout((frames, 9, 16)))
    assert 100 * (1 - plan.visual_density) == pytest.approx(sparsity, abs=0.051)
    assert 0.8 < 100 * (1 - plan.visual_density) - reported < 1.5


@pytest.mark.parametrize("frames", [2, 5, 21])
def test_reference_frames_are_evenly_spaced_from_the_first(frames: int) -> None:
    for count in range(1, frames + 1):
        mask = token_mask(AttentionTileAttnProcessor(reference_frames=count), (frames, 1, 1))[0]
        found = mask.all(1).nonzero()[:, 0].tolist()
        if count < frames - 1:
            assert len(found) == count and found[0] == 0
            gaps = [b - a for a, b in itertools.pairwise([*found, frames])]
            assert max(gaps) - min(gaps) <= 1
        else:
            assert mask.all()


@pytest.mark.parametrize("grid", [(24, 45, 80), (13, 30, 45), (8, 17, 9)], ids=str)
def test_boxes_lie_in_one_frame_and_nothing_is_computed_in_vain(grid: Triple) -> None:
    method, layout = AttentionTileAttnProcessor(reference_frames=2), TokenLayout(grid)
    plan = method.plan(layout)
    assert plan.tiles.tile[0] == 1
    assert plan.tiles.tile_size == 128
    assert plan.window is None
    assert plan.visual_density == pytest.approx(method.ideal_density(layout), abs=1e-12)


@pytest.mark.parametrize("frames", [2, 7, 24])
@pytest.mark.parametrize("target", [0.01, 0.2, 0.5, 0.83, 1.0])
def test_density_takes_the_most_reference_frames_that_fit(frames: int, target: float) -> None:
    layout = TokenLayout((frames, 2, 3))
    shares = [
        AttentionTileAttnProcessor(reference_frames=count).ideal_density(layout) for count in range(1, frames + 1)
    ]
    want = max((share for share in shares if share <= target), default=shares[0])
    assert AttentionTileAttnProcessor(density=target).ideal_density(layout) == pytest.approx(want, abs=1e-12)


def test_an_image_keeps_every_pair() -> None:
    assert token_mask(AttentionTileAttnProcessor(), (1, 9, 7), 3, "prefix").all()


def test_no_reference_frame_is_refused() -> None:
    with pytest.raises(ValueError, match="reference_frames must be at least 1, got 0"):
        make_method("attention_tile", reference_frames=0)
