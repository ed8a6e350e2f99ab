"""Denoisers with random weights: shaped like the real ones, finite, and no weight forgotten."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dit_accel.pipelines import random_models
from dit_accel.pipelines.families import family_of
from dit_accel.pipelines.random_models import batch_of, random_call, random_denoiser, randomise
from dit_accel.pipelines.specs import SPECS, ModelSpec
from dit_accel.state import bind_arguments

CPU = torch.device("cpu")
NAMES = ["wan2.1-1.3b", "hunyuanvideo", "flux.1-dev", "sd3-medium", "sd3.5-medium", "pixart-sigma-1k", "pixel-dit-s"]
NAMES += ["dit-xl-2-512"]


def tiny(name: str) -> ModelSpec:
    """Two narrow blocks of each kind; square, which is all that DiT makes."""
    spec = SPECS[name]
    few = {kind: min(2, getattr(spec, kind)) for kind in ("blocks", "single_blocks", "visual_blocks")}
    side = 6 if spec.family == "pixel_dit" else 64
    frames = 9 if spec.num_frames > 1 else 1
    return replace(spec, heads=2, head_dim=16, ffn_dim=48, height=side, width=side, num_frames=frames, **few)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_are_finite_and_no_constant(name: str, dtype: torch.dtype) -> None:
    spec = tiny(name)
    with torch.no_grad():
        output = random_denoiser(spec, CPU, dtype)(**random_call(spec, spec.layout(), CPU, dtype))[0]
    assert output.dtype == dtype and bool(output.isfinite().all())
    assert output.float().std() > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_a_call_has_the_tokens_of_the_spec(name: str) -> None:
    spec = tiny(name)
    model = random_denoiser(spec, CPU, torch.float32)
    arguments = random_call(spec, spec.layout(), CPU, torch.float32)
    family = family_of(type(model))
    assert family is not None and family.name == spec.family
    tokens = family.read(bind_arguments(model, (), arguments), model.config)
    assert tokens.layout == spec.layout()
    assert tokens.batch == batch_of(spec) == (2 if family.guidance == "batched" else 1)
    shape = family.shape(model.config)
    assert {name: getattr(spec, name) for name in shape if name not in ("ffn_dim", "height", "width")} == {
        name: value for name, value in shape.items() if name not in ("ffn_dim", "height", "width")
    }


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_written(name: str) -> None:
    model = random_denoiser(tiny(name), CPU, torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    randomise(model, torch.Generator().manual_seed(0))
    for label, parameter in model.named_parameters():
        assert bool(parameter.isfinite().all()), label
        if parameter.ndim == 1:
            assert bool((parameter == (0 if label.endswith("bias") else 1)).all()), label
        elif parameter.numel() > 1000:
            assert float(parameter.detach().std()) * parameter[0].numel() ** 0.5 == pytest.approx(1, rel=0.2), label


@pytest.mark.parametrize("name", NAMES)
def test_buffers_are_those_of_an_ordinary_model(name: str) -> None:
    spec = tiny(name)
    recipe = random_models._RECIPES[spec.family]
    ordinary = dict(recipe.model(**recipe.config(spec)).named_buffers())
    made = dict(random_denoiser(spec, CPU, torch.bfloat16).named_buffers())
    assert made.keys() == ordinary.keys()
    for label, buffer in ordinary.items():
        torch.testing.assert_close(made[label], buffer, rtol=0, atol=0)


def test_weights_are_those_of_the_seed_and_the_default_dtype_stays() -> None:
    spec = tiny("flux.1-dev")
    first, again, other = (random_denoiser(spec, CPU, torch.bfloat16, seed) for seed in (0, 0, 1))
    assert torch.get_default_dtype() == torch.float32
    assert {parameter.dtype for parameter in first.parameters()} == {torch.bfloat16}
    weight = "x_embedder.weight"
    assert torch.equal(first.get_parameter(weight), again.get_parameter(weight))
    assert not torch.equal(first.get_parameter(weight), other.get_parameter(weight))


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("wan2.1-14b", 14.29),
        ("wan2.1-1.3b", 1.42),
        ("hunyuanvideo", 12.82),
        ("flux.1-dev", 11.90),
        ("sd3.5-large", 8.06),
        ("sd3-medium", 2.03),
        ("pixart-sigma-1k", 0.61),
    ],
)
def test_real_models_have_their_published_number_of_parameters(name: str, billions: float) -> None:
    recipe = random_models._RECIPES[SPECS[name].family]
    with torch.device("meta"):
        model = recipe.model(**recipe.config(SPECS[name]))
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.006)


@pytest.mark.parametrize(("channels", "axes"), [(128, (16, 56, 56)), (64, (8, 28, 28)), (16, (4, 6, 6))])
def test_rotary_axes_are_the_published_ones_scaled(channels: int, axes: tuple[int, int, int]) -> None:
    assert random_models._rotary_axes(replace(SPECS["flux.1-dev"], head_dim=channels)) == axes
