from __future__ import annotations

import itertools

import pytest
import torch

from dit_accel.pipelines.shapes.render import REACH, place_objects, render
from dit_accel.pipelines.shapes.scenes import (
    COLOUR_NAMES,
    MOTIONS,
    SHAPES,
    Scenes,
    captions,
    held_out_scenes,
    is_held_out,
    parse_caption,
    sample_scenes,
)

SIZES = [(64, 64, 5), (128, 128, 9), (192, 256, 25), (256, 192, 13), (384, 512, 37), (64, 320, 9)]
SIZE_IDS = ["x".join(map(str, size)) for size in SIZES]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def every_pair_of_motions() -> Scenes:
    """Two-object scenes with all pairs of motions, each four times because diagonals draw their direction."""
    pairs = torch.tensor(list(itertools.product(range(len(MOTIONS)), repeat=2))).repeat(4, 1)
    zeros = torch.zeros(len(pairs), dtype=torch.long)
    return Scenes(zeros + 2, torch.stack([zeros, zeros + 1], 1), torch.stack([zeros, zeros], 1), pairs, zeros, zeros)


def test_parsing_a_caption_gives_back_its_objects() -> None:
    scenes = sample_scenes(300, 0.6, generator())
    assert [parse_caption(text) for text in captions(scenes)] == scenes.objects()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param("a purple circle resting over navy dots", "unknown word 'purple'", id="unknown word"),
        pytest.param("a red circle over navy dots", "does not describe", id="no motion"),
        pytest.param("a red circle resting", "does not describe", id="no background"),
        pytest.param(
            "a red circle resting and a red star resting over navy dots", "different colours", id="same colour"
        ),
        pytest.param("", "does not describe", id="empty"),
    ],
)
def test_a_caption_that_cannot_be_scored_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_caption(text)


def test_case_and_final_stop_do_not_matter() -> None:
    (found,) = parse_caption("An Orange ring moving up over gray checks.")
    assert (found.colour, found.shape, found.trait) == ("orange", "ring", "moving up")


def test_training_scenes_never_show_a_held_out_triple() -> None:
    scenes = sample_scenes(20_000, 0.5, generator())
    assert not is_held_out(scenes.colour, scenes.shape, scenes.trait).any()
    seen = set(zip(*(v.flatten().tolist() for v in (scenes.colour, scenes.shape, scenes.trait)), strict=True))
    assert len(seen) == len(COLOUR_NAMES) * len(SHAPES) * len(MOTIONS) - 48


@pytest.mark.parametrize("objects", [1, 2])
def test_held_out_scenes_show_all_held_out_triples_and_nothing_else(objects: int) -> None:
    scenes = held_out_scenes(100, objects, seed=3)
    shown = [triple for scene in scenes.objects() for triple in scene]
    assert len(set(shown)) == 48 and len(shown) == 100 * objects
    assert is_held_out(scenes.colour, scenes.shape, scenes.trait).all()
    assert (scenes.colour[:, 0] != scenes.colour[:, 1]).all()
    assert len(set(captions(scenes))) == 100


def test_held_out_scenes_of_three_objects_are_refused() -> None:
    with pytest.raises(ValueError, match="1 or 2 objects, got objects=3"):
        held_out_scenes(4, 3)


@pytest.mark.parametrize("size", SIZES, ids=SIZE_IDS)
def test_objects_stay_inside_the_frame_and_apart(size: tuple[int, int, int]) -> None:
    height, width, frames = size
    tracks = place_objects(every_pair_of_motions(), height, width, frames, generator())
    reach = REACH * tracks.radius
    for centre, length in ((tracks.x, width), (tracks.y, height)):
        assert (centre - reach >= 0).all() and (centre + reach <= length).all()
    distance = torch.hypot(tracks.x[:, 0] - tracks.x[:, 1], tracks.y[:, 0] - tracks.y[:, 1])
    assert (distance > reach.sum(1)).all()


def test_default_objects_span_enough_latent_cells() -> None:
    tracks = place_objects(sample_scenes(400, 0.0, generator()), 192, 256, 25, generator())
    cells = 2 * 0.9 * tracks.radius[:, 0].mean(-1) / 8  # of a circle
    assert cells.min() > 6 and cells.max() < 11


def test_rendering_depends_on_the_generator_alone() -> None:
    scenes = sample_scenes(3, 0.5, generator(1))
    first, again, other = (render(scenes, 64, 96, 5, generator(seed)) for seed in (2, 2, 3))
    assert first.shape == (3, 3, 5, 64, 96) and first.abs().max() <= 1
    assert torch.equal(first, again) and not torch.equal(first, other)
