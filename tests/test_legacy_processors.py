"""DiT, PixArt and Stable Diffusion 3: processors like the stock ones bit for bit, and methods in their models."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    FusedJointAttnProcessor2_0,
    JointAttnProcessor2_0,
    SD3IPAdapterJointAttnProcessor2_0,
)
from torch import Tensor, nn

import dit_accel
from dit_accel import interception
from dit_accel.layout import TokenLayout
from dit_accel.legacy_processors import REPLACEMENTS
from dit_accel.methods import METHODS
from dit_accel.pipelines.families import family_of
from dit_accel.pipelines.training.parameters import choose_parameters

FAMILIES = ("dit", "pixart", "sd3")
SPARSE = [name for name in METHODS if name != "dense"]
each_family = pytest.mark.parametrize("family", FAMILIES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def attention(dtype: torch.dtype, fused: bool, **options: Any) -> Attention:
    torch.manual_seed(0)
    made = Attention(query_dim=64, heads=4, dim_head=16, bias=True, **options).to(dtype).eval()
    if fused:
        made.fuse_projections(fuse=True)
    return made


def same(stock: type, attn: Attention, *args: Any, **kwargs: Any) -> bool:
    """Whether a stock processor and its replacement give the very same tensors."""
    outputs = []
    for processor in (stock(), REPLACEMENTS[stock]()):
        out = processor(attn, *args, **kwargs)
        outputs.append(out if isinstance(out, tuple) else (out,))
    return len(outputs[0]) == len(outputs[1]) and all(map(torch.equal, *outputs))


@each_dtype
@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qk_norm": "rms_norm"},
        {"qk_norm": "layer_norm", "norm_num_groups": 4},
        {"residual_connection": True, "rescale_output_factor": 1.5, "out_bias": False},
        {"spatial_norm_dim": 4, "residual_connection": True},
    ],
    ids=["plain", "rms norms", "layer and group norms", "residual", "spatial norm"],
)
@torch.no_grad()
def test_self_attention_is_the_stock_one_bit_for_bit(options: dict[str, Any], fused: bool, dtype: torch.dtype) -> None:
    attn, stock = attention(dtype, fused, **options), FusedAttnProcessor2_0 if fused else AttnProcessor2_0
    image = noise(2, 64, 7, 19, dtype=dtype)
    latents = noise(2, 4, 7, 19, dtype=dtype)
    assert same(stock, attn, image, temb=latents)
    if "spatial_norm_dim" not in options:
        tokens, mask = noise(2, 133, 64, dtype=dtype), noise(2, 1, 133, dtype=dtype)
        assert same(stock, attn, tokens)
        assert same(stock, attn, tokens, attention_mask=mask)


@each_dtype
@pytest.mark.parametrize("pre_only", [False, True], ids=["text goes on", "last block"])
@pytest.mark.parametrize(
    ("fused", "norm"), [(False, None), (False, "rms_norm"), (True, None)], ids=["separate", "norms", "fused"]
)
@torch.no_grad()
def test_joint_attention_is_the_stock_one_bit_for_bit(
    fused: bool, norm: str | None, pre_only: bool, dtype: torch.dtype
) -> None:
    attn = attention(dtype, fused, qk_norm=norm, added_kv_proj_dim=64, context_pre_only=pre_only, out_dim=64)
    stock = FusedJointAttnProcessor2_0 if fused else JointAttnProcessor2_0
    assert same(stock, attn, noise(2, 133, 64, dtype=dtype), noise(2, 11, 64, dtype=dtype))
    if not fused:  # the stock fused one cannot
        alone = attention(dtype, fused, qk_norm=norm, out_dim=64)
        assert same(stock, alone, noise(2, 133, 64, dtype=dtype))


@pytest.mark.parametrize("norm", [None, "rms_norm"], ids=["no norms", "norms"])
@pytest.mark.parametrize("dual", [(), (0,), (0, 2)], ids=["3", "3.5", "3.5, last block too"])
def test_deep_sd3_is_the_stock_one_bit_for_bit(tiny: ModuleType, dual: tuple[int, ...], norm: str | None) -> None:
    model = tiny.model("sd3", layers=3, dual=dual, qk_norm=norm)
    arguments = tiny.inputs("sd3", batch=2, grid=(1, 9, 7))
    stock = tiny.forward(model, arguments)
    with dit_accel.apply(model, "dense") as handle:
        assert torch.equal(tiny.forward(model, arguments), stock)
        assert handle.tally.dense_calls == 3 + len(dual)
    with dit_accel.apply(model, tiny.Tiles()) as handle:
        torch.testing.assert_close(tiny.forward(model, arguments), stock, atol=1e-5, rtol=1e-5)
        assert handle.tally.sparse_calls == 3 + len(dual)


@pytest.mark.parametrize("method", [name for name in SPARSE if not METHODS[name].whole_modules])  # which need steps
@each_family
def test_density_one_is_dense_attention(tiny: ModuleType, family: str, method: str) -> None:
    model, arguments = tiny.model(family, layers=2), tiny.inputs(family, batch=2)
    stock = tiny.forward(model, arguments)
    with torch.no_grad(), dit_accel.apply(model, method, density=1.0, backend="torch") as handle:
        sparse = tiny.forward(model, arguments)
    assert handle.tally.sparse_calls == 2 + (family == "sd3")
    assert (sparse - stock).abs().max() <= 1e-5 * stock.abs().max()
    assert torch.equal(tiny.forward(model, arguments), stock)


@pytest.mark.parametrize("method", SPARSE)
@each_family
def test_every_method_runs_with_guidance(tiny: ModuleType, family: str, method: str) -> None:
    pipe = tiny.pipeline(family)
    handle = dit_accel.apply(pipe, method, density=0.6, start_percent=0.5)
    assert tiny.run(pipe).isfinite().all()
    assert handle.tally.calls == 4 * tiny.TARGETS
    assert handle.tally.sparse_calls >= 2 * tiny.TARGETS, "a plan's full steps are its own"
    assert handle.states[0].batch == 2


@pytest.mark.parametrize("family", [*FAMILIES, "pixel_dit"])
def test_the_conditional_half_is_where_the_family_says(tiny: ModuleType, family: str) -> None:
    pipe = tiny.pipeline(family)
    conditions: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        condition = kwargs.get("encoder_hidden_states", kwargs.get("class_labels"))
        conditions.append(args[2] if condition is None else condition)

    pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
    text = torch.ones(1, tiny.TEXT_TOKENS, 32)
    by_class = family in ("dit", "pixel_dit")
    tiny.run(pipe, steps=2, **({} if by_class else {"prompt_embeds": text, "negative_prompt_embeds": 0 * text}))
    wanted = [bool((half == (3 if by_class else 1)).all()) for half in conditions[0].chunk(2)]
    known = family_of(type(pipe.transformer))
    assert known is not None
    assert wanted == [known.cond_half == "first", known.cond_half == "second"]


def test_attention_of_the_image_alone_has_a_layout_without_text(tiny: ModuleType) -> None:
    model, seen = tiny.model("sd3", layers=2), []
    method = tiny.Tiles(everything=False, dense_blocks=(0, 1))
    handle = dit_accel.apply(model, method)
    for name in ("attn", "attn2"):
        getattr(model.transformer_blocks[0], name).register_forward_hook(
            lambda *_: seen.append((handle.tally.sparse_calls, float(handle.tally.density_sum)))
        )
    tiny.forward(model, tiny.inputs("sd3"))
    alone = method.plan(TokenLayout((1, 6, 5))).density
    assert method.plan(TokenLayout((1, 6, 5), tiny.TEXT_TOKENS, "suffix")).density > alone
    assert seen == [(0, 1.0), (1, pytest.approx(1 + alone))], "blocks of the image alone are counted last"


@pytest.mark.parametrize(("family", "modules"), [("pixart", {"attn1"}), ("sd3", {"attn", "attn2"})], ids=FAMILIES[1:])
def test_attention_that_is_entered_is_what_training_chooses(tiny: ModuleType, family: str, modules: set[str]) -> None:
    model = tiny.model(family)
    choose_parameters(model, "attention")
    trained = {name.split(".")[2] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == modules


def test_skip_layer_guidance_calls_once_more_a_step(tiny: ModuleType) -> None:
    skip = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.2, "skip_layer_guidance_stop": 0.8}
    pipe = tiny.pipeline("sd3", layers=2)
    stock = tiny.run(pipe, steps=5, **skip)
    assert not torch.allclose(tiny.run(pipe, steps=5), stock, atol=1e-3)
    with dit_accel.apply(pipe, "dense") as handle:
        assert torch.equal(tiny.run(pipe, steps=5, **skip), stock)
        assert handle.tally.calls == 5 * 3 + 2 * 2
    with dit_accel.apply(pipe, "draft", density=1.0, refresh=3, start_percent=0.5) as handle:
        torch.testing.assert_close(tiny.run(pipe, steps=5, **skip), stock, atol=1e-3, rtol=1e-3)
        assert handle.tally.sparse_calls == 2 * 3 + 2  # the third and the second last step; the extra call in one


def unfused(tiny: ModuleType, family: str) -> Any:
    return tiny.model(family, **({"layers": 2, "qk_norm": None, "dual": ()} if family == "sd3" else {}))


@pytest.mark.parametrize("family", ["pixart", "sd3"])
def test_fused_projections_are_kept(tiny: ModuleType, family: str) -> None:
    model, arguments = unfused(tiny, family), tiny.inputs(family, batch=2)
    model.fuse_qkv_projections()
    stock = tiny.forward(model, arguments)
    before = [module.processor for module in model.modules() if isinstance(module, Attention)]
    with dit_accel.apply(model, "dense"):
        assert torch.equal(tiny.forward(model, arguments), stock)
    with dit_accel.apply(model, tiny.Tiles()) as handle:
        torch.testing.assert_close(tiny.forward(model, arguments), stock, atol=1e-5, rtol=1e-5)
        assert handle.tally.sparse_calls == 2
    after = [module.processor for module in model.modules() if isinstance(module, Attention)]
    assert all(old is new for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("family", ["pixart", "sd3"])
def test_unfused_projections_are_used_though_modules_still_have_fused_ones(tiny: ModuleType, family: str) -> None:
    model, arguments = unfused(tiny, family), tiny.inputs(family)
    model.fuse_qkv_projections()
    model.unfuse_qkv_projections()
    for name, parameter in model.named_parameters():
        if "to_q." in name:  # as an adapter loaded now would
            parameter.data += 0.1
    stock = tiny.forward(model, arguments)
    dit_accel.apply(model, "dense")
    assert torch.equal(tiny.forward(model, arguments), stock)


def test_fused_projections_that_lose_norms_are_refused(tiny: ModuleType) -> None:
    model = tiny.model("sd3", dual=())
    model.fuse_qkv_projections()
    with pytest.raises(ValueError, match="leaves the norms out; call unfuse_qkv_projections"):
        dit_accel.apply(model, tiny.Tiles())
    model.unfuse_qkv_projections()
    dit_accel.apply(model, tiny.Tiles())


def test_one_processor_of_two_attentions_comes_back_to_both(tiny: ModuleType) -> None:
    model = tiny.model("sd3")
    block = model.transformer_blocks[0]
    shared = block.attn.processor
    assert block.attn2.processor is shared
    for _ in range(2):  # the second replaces the first
        handle = dit_accel.apply(model, tiny.Tiles())
    assert block.attn.processor is not block.attn2.processor
    handle.restore()
    assert block.attn.processor is shared and block.attn2.processor is shared
    assert vars(shared) == {}


def test_the_active_backend_is_not_taken_but_a_chosen_one_is(tiny: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    used, dispatch = [], interception.dispatch_attention_fn

    def noting(*args: Any, backend: Any, **kwargs: Any) -> Tensor:
        used.append(backend)
        return dispatch(*args, backend=backend, **kwargs)

    monkeypatch.setattr(interception, "dispatch_attention_fn", noting)
    model, arguments = tiny.model("pixart"), tiny.inputs("pixart")
    stock = tiny.forward(model, arguments)
    processor = model.transformer_blocks[0].attn1.processor
    handle = dit_accel.apply(model, "dense")
    with attention_backend("_native_math"):  # the stock processors do not notice
        assert torch.equal(tiny.forward(model, arguments), stock)
        model.set_attention_backend("_native_math")
        tiny.forward(model, arguments)
        handle.restore()
    assert used == [AttentionBackendName.NATIVE] * 2 + [AttentionBackendName._NATIVE_MATH] * 2
    assert vars(processor) == {}
    assert torch.equal(tiny.forward(model, arguments), stock)


def test_a_wholly_compiled_model_can_be_entered(tiny: ModuleType) -> None:
    torch._dynamo.reset()
    model, arguments = tiny.model("sd3", layers=2), tiny.inputs("sd3")
    stock = tiny.forward(model, arguments)
    handle = dit_accel.apply(model, tiny.Tiles())
    output = tiny.forward(torch.compile(model, backend="eager"), arguments)
    torch.testing.assert_close(output, stock, atol=1e-5, rtol=1e-5)
    assert handle.tally.sparse_calls == 3


def test_processors_with_weights_are_refused(tiny: ModuleType) -> None:
    model = tiny.model("sd3")
    adapter = SD3IPAdapterJointAttnProcessor2_0(hidden_size=32, ip_hidden_states_dim=32, head_dim=16)
    model.transformer_blocks[0].attn.set_processor(adapter)
    with pytest.raises(ValueError, match="SD3IPAdapterJointAttnProcessor2_0 with weights"):
        dit_accel.apply(model, tiny.Tiles())


@each_family
def test_context_parallelism_is_refused(tiny: ModuleType, family: str) -> None:
    model = tiny.model(family)
    attn = next(module for module in model.modules() if isinstance(module, Attention))
    attn.processor._parallel_config = object()
    with pytest.raises(ValueError, match="context parallelism"):
        dit_accel.apply(model, tiny.Tiles())
    del attn.processor._parallel_config
    dit_accel.apply(model, tiny.Tiles())
    attn.processor._parallel_config = object()
    with pytest.raises(ValueError, match="a parallel config"):
        tiny.forward(model, tiny.inputs(family))


def test_calls_that_do_not_fit_are_refused(tiny: ModuleType) -> None:
    model, arguments = tiny.model("pixart"), tiny.inputs("pixart")
    dit_accel.apply(model, tiny.Tiles())
    tiny.forward(model, arguments)
    attn = model.transformer_blocks[0].attn1
    with pytest.raises(ValueError, match="30 tokens, but its attention got 7 queries and 7 keys"):
        attn(noise(1, 7, 32))
    with pytest.raises(ValueError, match="it got encoder_hidden_states"):
        attn(noise(1, 30, 32), noise(1, 5, 32))
    with pytest.raises(ValueError, match="passed attention a mask of torch.float32"):
        tiny.forward(model, arguments | {"attention_mask": torch.ones(1, 30)})
    sd3 = tiny.model("sd3")
    dit_accel.apply(sd3, tiny.Tiles())
    tiny.forward(sd3, tiny.inputs("sd3"))
    with pytest.raises(ValueError, match="30 tokens, but its attention got 36 queries and 36 keys"):
        sd3.transformer_blocks[0].attn2(noise(1, 36, 32))
