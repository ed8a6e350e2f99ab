"""Real methods in real models: density 1 is dense, and a method computes exactly the mask it promises."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dit_accel
from dit_accel.layout import TokenLayout
from dit_accel.methods import METHODS, make_method
from dit_accel.pipelines import shapes

BACKENDS = ("reference", "torch", "triton")
# A method of whole runs does not serve a model alone.
SPARSE = [name for name, method in METHODS.items() if name != "dense" and not method.whole_modules]


@pytest.mark.parametrize("family", ["wan", "hunyuan_video", "flux"])
@pytest.mark.parametrize("method", SPARSE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_density_one_is_dense_attention(tiny: ModuleType, backend: str, method: str, family: str) -> None:
    model, arguments = tiny.model(family), tiny.inputs(family)
    with torch.no_grad():
        stock = tiny.forward(model, arguments)
        with dit_accel.apply(model, method, density=1.0, backend=backend) as handle:  # type: ignore[arg-type]
            sparse = tiny.forward(model, arguments)
            assert handle.tally.sparse_calls == tiny.TARGETS
            assert handle.tally.density == 1
        restored = tiny.forward(model, arguments)
    assert (sparse - stock).abs().max() <= 1e-5 * stock.abs().max()
    assert torch.equal(restored, stock)


@pytest.mark.parametrize("text", [("none", 0), ("prefix", 3), ("suffix", 5)], ids=str)
@pytest.mark.parametrize(
    "processor",
    [
        dit_accel.RadialAttnProcessor(tile=16, decay=0.3),
        dit_accel.RadialAttnProcessor(tile=16, tile_rule="strict", sink=False),
        dit_accel.NeighborhoodAttnProcessor(window=(2, 3, 4), stride=(1, 2, 2)),
        dit_accel.NeighborhoodAttnProcessor(window=(2, 2, 3), dilation=(1, 2, 3), causal=(True, False, False)),
        dit_accel.GRATAttnProcessor(pattern="X", group=(2, 2, 4)),
        dit_accel.GRATAttnProcessor(pattern="B", group=(1, 2, 3)),
    ],
    ids=lambda processor: f"{processor.name} {processor.options()}",
)
def test_the_operator_computes_the_mask_that_token_mask_shows(processor: Any, text: tuple[str, int]) -> None:
    position, tokens = text
    grid = (3, 5, 9)
    mask = dit_accel.token_mask(processor, grid, tokens, position)  # type: ignore[arg-type]
    layout = TokenLayout(grid, tokens, position)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, layout.num_tokens, 2, 16, generator=generator, dtype=torch.float64).unbind()
    plan = processor.plan(layout)
    got: Tensor = dit_accel.kernels.block_sparse_attention(q, k, v, plan, backend="torch")
    want = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask).transpose(1, 2)
    assert mask.shape == (1, layout.num_tokens, layout.num_tokens)
    assert mask.diagonal(dim1=1, dim2=2).all()
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", SPARSE)
def test_the_embedded_pipeline_runs_sparse_and_comes_back_unchanged(method: str) -> None:
    pipe: Any = shapes.load()
    pipe.set_progress_bar_config(disable=True)

    def run() -> Tensor:
        out: Tensor = pipe(
            shapes.EXAMPLE_PROMPTS[0],
            height=96,
            width=128,
            num_frames=9,
            num_inference_steps=2,
            max_sequence_length=shapes.DEFAULT_TEXT_LENGTH,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).frames
        return out

    stock = run()
    pipe.set_attn_processor(make_method(method, density=0.5))
    sparse = run()
    pipe.set_attn_processor(None)
    assert sparse.isfinite().all()
    assert not torch.equal(sparse, stock)
    assert torch.equal(run(), stock)


def test_explain_of_a_loaded_pipeline_is_that_of_its_spec() -> None:
    explanation = dit_accel.explain(shapes.load(), "grat", pattern="B", group=(2, 8, 8))
    assert explanation.model == "shapes"
    assert explanation.tokens == 5376
    assert explanation.grid == (7, 24, 32)
    assert explanation.executed_density == pytest.approx(
        dit_accel.GRATAttnProcessor(pattern="B", group=(2, 8, 8)).plan(TokenLayout((7, 24, 32))).density
    )
