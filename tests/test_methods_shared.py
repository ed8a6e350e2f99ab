"""What all static methods share: names, options, density=, text."""

from __future__ import annotations

import itertools

import pytest
import torch

from dit_accel.kernels.block_sparse.plan import Triple
from dit_accel.layout import TokenLayout
from dit_accel.methods import METHODS, DenseAttnProcessor, make_method, token_mask
from dit_accel.methods.base import DynamicMethod, StaticMethod, largest_within

STATIC = [
    pytest.param("radial", {}, id="radial"),
    pytest.param("radial", {"sink": False}, id="radial-no-sink"),
    pytest.param("neighborhood", {}, id="neighborhood"),
    pytest.param("neighborhood", {"tile": (1, 8, 16)}, id="neighborhood-tile"),
    pytest.param("grat", {"pattern": "B"}, id="grat-B"),
    pytest.param("grat", {"pattern": "X", "group": (2, 5, 6)}, id="grat-X"),
    pytest.param("sliding_tile", {}, id="sliding_tile"),
    pytest.param("sliding_tile", {"tile": (3, 5, 6)}, id="sliding_tile-tile"),
    pytest.param("attention_tile", {}, id="attention_tile"),
    pytest.param("clear", {}, id="clear"),
    pytest.param("clear", {"tile": (1, 8, 16)}, id="clear-tile"),
    pytest.param("band", {}, id="band"),
    pytest.param("band", {"tile": 32}, id="band-tile"),
]
GRIDS: list[Triple] = [(5, 9, 11), (21, 45, 80), (33, 45, 80), (13, 30, 45), (1, 64, 64), (1, 83, 83), (1, 1, 1)]
TARGETS = (0.001, 0.1, 0.35, 0.7, 1.0)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("name", "options"), STATIC)
def test_density_is_monotone_within_its_target_and_complete_at_one(
    name: str, options: dict[str, object], grid: Triple
) -> None:
    layout = TokenLayout(grid)
    methods = [make_method(name, density=target, **options) for target in TARGETS]
    plans = [method.plan(layout) for method in methods]
    computed = [plan.visual_density for plan in plans if plan is not None]
    ideal = [method.ideal_density(layout) for method in methods]
    assert len(computed) == len(TARGETS)
    assert computed == sorted(computed)
    assert ideal == sorted(ideal)
    assert all(got <= max(target, computed[0]) + 1e-9 for got, target in zip(computed, TARGETS, strict=True))
    assert all(exact <= got + 1e-9 for exact, got in zip(ideal, computed, strict=True))
    assert computed[-1] == pytest.approx(1.0, abs=1e-12)
    assert ideal[-1] == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(("name", "options"), STATIC)
def test_density_masks_are_nested_and_complete(name: str, options: dict[str, object]) -> None:
    masks = [token_mask(make_method(name, density=target, **options), (5, 9, 11)) for target in TARGETS]
    assert all(not (small & ~large).any() for small, large in itertools.pairwise(masks))
    assert masks[0].diagonal(dim1=1, dim2=2).all()
    assert masks[-1].all()


@pytest.mark.parametrize("grid", [(5, 9, 11), (13, 30, 45), (1, 83, 83), (2, 3, 1), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if issubclass(method, StaticMethod)])
def test_default_options_leave_no_row_empty(name: str, grid: Triple) -> None:
    plan = make_method(name).plan(TokenLayout(grid))
    assert plan is None or plan.counts.min() > 0


@pytest.mark.parametrize("density", [None, 0.001], ids=["default", "sparsest"])
@pytest.mark.parametrize("grid", [(5, 9, 11), (13, 30, 45), (1, 83, 83), (2, 3, 1), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if issubclass(method, DynamicMethod)])
def test_no_call_leaves_a_row_empty(name: str, grid: Triple, density: float | None) -> None:
    layout = TokenLayout(grid)
    q, k = 4 * torch.randn(2, 1, layout.num_tokens, 2, 8, generator=torch.Generator().manual_seed(0))
    assert make_method(name, density=density).select(layout, q, k).counts.min() > 0


@pytest.mark.parametrize("position", ["prefix", "suffix"])
@pytest.mark.parametrize(("name", "options"), STATIC)
def test_text_sees_and_is_seen_by_everything(name: str, options: dict[str, object], position: str) -> None:
    method = make_method(name, density=0.3, **options)
    grid = (5, 9, 11)
    mask = token_mask(method, grid, text_tokens=7, text_position=position)[0]  # type: ignore[arg-type]
    text = slice(0, 7) if position == "prefix" else slice(495, 502)
    visual = slice(7, 502) if position == "prefix" else slice(0, 495)
    assert mask[text].all()
    assert mask[:, text].all()
    assert torch.equal(mask[visual, visual], token_mask(method, grid)[0])


def test_dense_keeps_everything_and_refuses_to_keep_less() -> None:
    assert make_method("dense").plan(TokenLayout((2, 3, 4))) is None
    assert make_method("dense", density=1.0).ideal_density(TokenLayout((2, 3, 4))) == 1.0
    assert token_mask(DenseAttnProcessor(), (2, 3, 4), 2, "prefix").shape == (1, 26, 26)
    with pytest.raises(ValueError, match="dense computes every pair"):
        make_method("dense", density=0.5)


def test_lists_from_the_command_line_become_tuples() -> None:
    method = make_method("neighborhood", window=[3, 5, 7], causal=[True, False, False], dense_blocks=[0, 3])
    assert method.options() == {"window": (3, 5, 7), "causal": (True, False, False), "dense_blocks": (0, 3)}
    assert hash(method) == hash(make_method(method))


def test_options_replace_those_of_a_given_method() -> None:
    method = make_method("radial", decay=0.2, start_percent=0.25)
    assert make_method(method, decay=0.5).options() == {"decay": 0.5, "start_percent": 0.25}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        pytest.param("radail", {}, "no method 'radail'; did you mean 'radial'", id="method-near"),
        pytest.param("q", {}, "no method 'q'; choose one of .*grat.*radial", id="method-far"),
        pytest.param("radial", {"decya": 1}, "radial has no option 'decya'; did you mean 'decay'", id="option-near"),
        pytest.param("grat", {"zzz": 1}, "grat has no option 'zzz'; choose one of .*pattern", id="option-far"),
        pytest.param("radial", {"decay": -1}, "decay must be above 0", id="value"),
    ],
)
def test_mistakes_are_named_with_the_nearest_match(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_method(name, **options)


@pytest.mark.parametrize(("target", "index"), [(0.05, 1), (0.1, 1), (0.3, 2), (0.79, 2), (1.0, 4)])
def test_largest_within_takes_the_last_candidate_that_fits(target: float, index: int) -> None:
    densities = [0.1, 0.1, 0.3, 0.8, 1.0]
    assert largest_within(target, len(densities), densities.__getitem__) == index
