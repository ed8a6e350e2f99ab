"""What a probe measures of sparse attention calls, against dense attention counted out in float64."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

import dit_accel
from dit_accel.eval.fidelity import COSINE, ERROR, MASS, gather
from dit_accel.kernels.block_sparse.plan import Triple
from dit_accel.layout import TextPosition, TokenLayout
from dit_accel.methods import make_method, token_mask
from dit_accel.methods.attention import AttnCall, BoundAttention, Place, curve_groups, tile_groups
from dit_accel.methods.fidelity import ProbedCall, probed_call, scattered

GRID: Triple = (3, 6, 7)
SPARSE = make_method("grat", pattern="B", radius=0, group=(1, 4, 4), tile=(1, 4, 4))  # a tile sees itself and the text
MODES = [torch.no_grad, torch.inference_mode, torch.enable_grad]


def call_on(layout: TokenLayout, batch: int = 1, dtype: torch.dtype = torch.float64, seed: int = 0) -> AttnCall:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, batch, layout.num_tokens, 2, 8, generator=generator, dtype=torch.float64).to(dtype)
    return AttnCall(q, k, v, backend="reference", with_lse=True, place=Place(block=3, step=5))


def bound(layout: TokenLayout, **options: object) -> BoundAttention:
    attention = make_method(SPARSE, **options).attention(layout)
    assert attention is not None
    return attention


def probe(attention: BoundAttention, call: AttnCall) -> ProbedCall:
    return probed_call(call, attention, attention.attend(call), "cond")


def counted_out(call: AttnCall, keep: Tensor, visible: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Sparse and dense output [B, H, L, D] and the softmax share left out [B, H, L].

    Args:
        call: the tensors.
        keep: pairs the method computes, bool [L, L].
        visible: keys that are no padding, bool [B, L]. Default all.
    """
    q, k, v = (x.double().transpose(1, 2) for x in (call.q, call.k, call.v))
    seen = torch.ones(len(q), q.shape[2], dtype=torch.bool) if visible is None else visible
    scores = q @ k.mT * q.shape[-1] ** -0.5
    full = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
    sparse = scores.masked_fill(~(seen[:, None] & keep)[:, None], -torch.inf).softmax(-1)
    return sparse @ v, full @ v, (full * ~keep).sum(-1)


def check(probed: ProbedCall, sparse: Tensor, dense: Tensor, mass: Tensor, tolerance: float = 1e-6) -> None:
    """Everything measured against its definition; outputs [B, H, queries, D] and mass [B, H, queries]."""
    s, d = sparse.flatten(2), dense.flatten(2)
    error = torch.linalg.vector_norm(s - d, dim=-1) / torch.linalg.vector_norm(d, dim=-1)
    cosine = torch.cosine_similarity(s, d, dim=-1)
    for got, want in (
        (probed.error, error),
        (probed.error_l1, (s - d).abs().sum(-1) / d.abs().sum(-1)),
        (probed.cosine, cosine),
        (probed.mass, mass),
    ):
        torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("text", "position"), [(0, "none"), (5, "prefix"), (5, "suffix")], ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str
)
def test_a_call_is_measured_as_defined(text: int, position: TextPosition, dtype: torch.dtype, tolerance: float) -> None:
    layout = TokenLayout(GRID, text, position)
    call, attention = call_on(layout, batch=2, dtype=dtype), bound(layout)
    queries = scattered(attention.groups()).anchors + layout.prefix
    sparse, dense, mass = (x[:, :, queries] for x in counted_out(call, token_mask(SPARSE, GRID, text, position)[0]))
    probed = probe(attention, call)
    check(probed, sparse, dense, mass, tolerance)
    assert (probed.step, probed.block, probed.branch) == (5, 3, "cond")
    assert probed.mass.dtype == torch.float32
    assert probed.error.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_padding_of_the_text_is_hidden_from_both_sides() -> None:
    layout = TokenLayout(GRID, 6, "suffix")
    call, attention = call_on(layout, batch=2), bound(layout)
    lengths = torch.tensor([2, 6], dtype=torch.int32)
    padded = AttnCall(call.q, call.k, call.v, text_lengths=lengths, backend="reference", with_lse=True)
    visible = torch.arange(layout.num_tokens) < layout.visual_tokens + lengths[:, None]
    expected = counted_out(call, token_mask(SPARSE, GRID, 6, "suffix")[0], visible)
    sparse, dense, mass = (x[:, :, scattered(attention.groups()).anchors] for x in expected)
    check(probe(attention, padded), sparse, dense, mass)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["radial", "draft", "log_linear"])
def test_nothing_is_wrong_where_nothing_is_left_out(method: str, dtype: torch.dtype) -> None:
    layout = TokenLayout((2, 4, 8))
    options = {"radial": {"tile": 16}, "draft": {"region": (1, 4, 4)}, "log_linear": {"block": 16}}[method]
    attention = make_method(method, density=1.0, **options).attention(layout)
    assert attention is not None
    probed = probe(attention, call_on(layout, dtype=dtype))
    exact = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 8e-3}[dtype]
    assert probed.mass.max() < exact
    assert probed.error.max() < exact
    assert probed.error_l1.max() < exact
    assert probed.cosine.min() > 1 - exact


def test_heads_and_samples_are_measured_apart() -> None:
    """One head of one sample has a value that all keys share, which attention of any kind returns."""
    layout = TokenLayout(GRID)
    call = call_on(layout, batch=2)
    call.v[1, :, 0] = call.v[1, :1, 0]
    probed = probe(bound(layout), call)
    spared = torch.zeros(2, 2, dtype=torch.bool)
    spared[1, 0] = True
    assert probed.error[spared].item() == pytest.approx(0, abs=1e-6)
    assert probed.cosine[spared].item() == pytest.approx(1)
    assert probed.error[~spared].min() > 0.1
    assert probed.cosine[~spared].max() < 0.99
    assert probed.mass[1, 0].mean() > 0.1, "what was left out need not be missed"
    first, second = gather([probed], blocks=4, steps=6, batch=2)
    for name, measured in ((MASS, probed.mass.mean(-1)), (ERROR, probed.error), (COSINE, probed.cosine)):
        assert first[name].by_head[3].tolist() == pytest.approx(measured[0].tolist(), abs=1e-6)
        assert second[name].by_head[3].tolist() == pytest.approx(measured[1].tolist(), abs=1e-6)


def test_a_correction_is_measured_off_its_anchors_where_it_is_exact() -> None:
    layout = TokenLayout((2, 8, 8))
    call, plain, corrected = call_on(layout), bound(layout), bound(layout, delta="add")
    groups = plain.groups()
    # Queries of a tile are alike, as those of neighbouring tokens are, and so is what they lack.
    base = torch.randn(len(groups.anchors), 2, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    call.q[:] = base[groups.group_of] + 0.2 * call.q
    queries, out = scattered(groups).anchors, corrected.attend(call).out.transpose(1, 2)
    _, dense, mass = counted_out(call, token_mask(SPARSE, layout.grid)[0])
    torch.testing.assert_close(out[:, :, groups.anchors], dense[:, :, groups.anchors])
    measured = probe(corrected, call)
    check(measured, out[:, :, queries], dense[:, :, queries], mass[:, :, queries])
    assert measured.error.min() > 0.01
    assert (measured.error < 0.7 * probe(plain, call).error).all()


@pytest.mark.parametrize("grid", [(3, 6, 7), (2, 8, 8), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("kind", ["boxes", "curve"])
def test_each_group_is_probed_at_one_of_its_own_queries(grid: Triple, kind: str) -> None:
    layout = TokenLayout(grid)
    curve = torch.randperm(layout.visual_tokens, generator=torch.Generator().manual_seed(0))
    groups = tile_groups(layout.boxes((2, 4, 4))) if kind == "boxes" else curve_groups(curve, 16)
    moved = scattered(groups)
    assert torch.equal(moved.group_of, groups.group_of)
    assert torch.equal(groups.group_of[moved.anchors], torch.arange(len(groups.anchors)))


def test_probed_queries_lie_evenly_in_their_groups() -> None:
    groups = tile_groups(TokenLayout((1, 40, 40)).boxes((1, 4, 4)))
    queries = scattered(groups).anchors
    places = (queries // 40 % 4) * 4 + queries % 4
    counts = places.bincount(minlength=16)
    assert counts.min() >= 5
    assert counts.max() <= 8, "100 groups, 16 places"


def test_a_probe_collects_every_sparse_call_of_a_run(tiny: ModuleType) -> None:
    pipe = tiny.pipeline("wan")
    handle = dit_accel.apply(pipe, tiny.Tiles(everything=False), start_percent=0.5)
    with handle.probing() as calls:
        tiny.run(pipe)
    sparse = handle.tally.sparse_calls
    assert len(calls) == sparse > 0
    assert {(call.block, call.branch) for call in calls} == {(0, "cond"), (1, "cond"), (0, "uncond"), (1, "uncond")}
    assert all(call.mass.min() >= 0 and call.mass.max() <= 1 for call in calls)
    assert all(call.error.shape == call.cosine.shape == call.mass.shape[:2] for call in calls)
    assert all(call.error.min() > 0 and call.cosine.abs().max() <= 1 for call in calls)
    tiny.run(pipe)
    assert len(calls) == sparse


@pytest.mark.parametrize("family", ["wan", "hunyuan_video", "flux", "sd3"])
def test_a_method_that_leaves_nothing_out_is_exact_in_every_family(tiny: ModuleType, family: str) -> None:
    pipe = tiny.pipeline(family)
    with dit_accel.apply(pipe, tiny.Tiles()) as handle, handle.probing() as calls:
        tiny.run(pipe)
    assert calls
    assert max(call.mass.max().item() for call in calls) < 1e-5
    assert max(call.error.max().item() for call in calls) < 1e-5
    assert min(call.cosine.min().item() for call in calls) > 1 - 1e-5


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.__name__)
def test_a_run_under_autocast_is_measured_in_float32(tiny: ModuleType, mode: type) -> None:
    model = tiny.model("wan")
    handle = dit_accel.apply(model, tiny.Tiles(everything=False))
    with handle, handle.probing() as calls, mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(**tiny.inputs("wan"))
    assert len(calls) == tiny.TARGETS
    for call in calls:
        assert call.error.dtype == call.cosine.dtype == call.mass.dtype == torch.float32
        assert not any(part.requires_grad for part in (call.mass, *call.sums))
        assert call.error.min() > 0.01
        assert call.cosine.max() < 1
