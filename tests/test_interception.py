"""Wrapped processors: what is entered, what is left alone, and what is refused."""

from __future__ import annotations

import copy
import inspect
import sys
import threading
import types
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor
from torch._dynamo.testing import CompileCounterWithBackend

import dit_accel
from dit_accel import interception
from dit_accel.methods import attention

FAMILIES = ("wan", "hunyuan_video", "flux", "dit", "pixart", "sd3")
TARGETS = {
    "wan": ["blocks.0.attn1", "blocks.1.attn1"],
    "hunyuan_video": ["single_transformer_blocks.0.attn", "transformer_blocks.0.attn"],
    "flux": ["single_transformer_blocks.0.attn", "transformer_blocks.0.attn"],
    "dit": ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"],
    "pixart": ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"],
    "sd3": ["transformer_blocks.0.attn", "transformer_blocks.0.attn2"],
}
each_family = pytest.mark.parametrize("family", FAMILIES)


def processors(model: Any) -> dict[str, Any]:
    return {name: module.processor for name, module in model.named_modules() if hasattr(module, "processor")}


@each_family
def test_keeping_every_tile_equals_stock(tiny: ModuleType, family: str) -> None:
    model, arguments = tiny.model(family), tiny.inputs(family, batch=2)
    stock = tiny.forward(model, arguments)
    handle = dit_accel.apply(model, tiny.Tiles())
    torch.testing.assert_close(tiny.forward(model, arguments), stock, atol=1e-5, rtol=0)
    assert (handle.tally.sparse_calls, handle.tally.dense_calls) == (2, 0)


@each_family
def test_dense_is_bit_identical_to_stock(tiny: ModuleType, family: str) -> None:
    model, arguments = tiny.model(family), tiny.inputs(family, batch=2)
    stock = tiny.forward(model, arguments)
    handle = dit_accel.apply(model, "dense")
    assert torch.equal(tiny.forward(model, arguments), stock)
    assert (handle.tally.sparse_calls, handle.tally.dense_calls) == (0, 2)


@each_family
def test_only_self_and_joint_attention_is_entered(tiny: ModuleType, family: str) -> None:
    model = tiny.model(family)
    before = processors(model)
    dit_accel.apply(model, tiny.Tiles())
    changed = sorted(name for name, processor in processors(model).items() if processor is not before[name])
    assert changed == TARGETS[family]


def test_blocks_are_counted_double_stream_first(tiny: ModuleType) -> None:
    model = tiny.model("flux", layers=3)
    handle = dit_accel.apply(model, tiny.Tiles(dense_blocks=(0, 4, 5)))
    seen: list[tuple[str, bool]] = []
    for name, module in model.named_modules():
        if hasattr(module, "processor"):
            module.register_forward_pre_hook(lambda *_, name=name: seen.append((name, handle.tally.dense_calls)))
    tiny.forward(model, tiny.inputs("flux"))
    assert [dense for _, dense in seen] == [0, 1, 1, 1, 1, 2]
    assert [name.split("_")[0] for name, _ in seen] == ["transformer"] * 3 + ["single"] * 3


@each_family
def test_wrapped_processors_keep_the_stock_signature(tiny: ModuleType, family: str) -> None:
    model = tiny.model(family)
    stock = processors(model)[TARGETS[family][0]]
    dit_accel.apply(model, tiny.Tiles())
    wrapped = processors(model)[TARGETS[family][0]]
    assert isinstance(wrapped, type(stock))
    assert inspect.signature(wrapped.__call__) == inspect.signature(stock.__call__)


def test_wrapped_processors_are_registered_where_stock_ones_are(tiny: ModuleType) -> None:
    model = tiny.model("flux")
    dit_accel.apply(model, tiny.Tiles())
    wrapped = type(processors(model)["transformer_blocks.0.attn"])
    assert AttentionProcessorRegistry.get(wrapped) is AttentionProcessorRegistry.get(FluxAttnProcessor)


@pytest.mark.parametrize("family", ["wan", "flux"])
def test_fused_projections_are_kept(tiny: ModuleType, family: str) -> None:
    model, arguments = tiny.model(family), tiny.inputs(family)
    model.fuse_qkv_projections()
    stock = tiny.forward(model, arguments)
    handle = dit_accel.apply(model, tiny.Tiles())
    torch.testing.assert_close(tiny.forward(model, arguments), stock, atol=1e-5, rtol=0)
    model.unfuse_qkv_projections()
    torch.testing.assert_close(tiny.forward(model, arguments), stock, atol=1e-5, rtol=0)
    assert handle.tally.sparse_calls == 4


def test_gradients_flow_through_sparse_attention(tiny: ModuleType) -> None:
    model, arguments = tiny.model("wan"), tiny.inputs("wan")
    gradients = []
    for method in ("dense", tiny.Tiles()):
        dit_accel.apply(model, method)
        model.zero_grad()
        model(**arguments)[0].square().mean().backward()
        gradients.append(model.blocks[0].attn1.to_q.weight.grad.clone())
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("family", "layers"), [("wan", 4), ("flux", 2)], ids=["wan", "flux"])
def test_compiled_blocks_share_their_graphs(tiny: ModuleType, family: str, layers: int) -> None:
    arguments = tiny.inputs(family)

    def compiled(method: Any) -> tuple[int, torch.Tensor, Any]:
        torch._dynamo.reset()
        model = tiny.model(family, layers=layers)
        handle = method and dit_accel.apply(model, method)
        counter = CompileCounterWithBackend("aot_eager")
        model.compile_repeated_blocks(fullgraph=True, backend=counter)
        for _ in range(2):
            output = tiny.forward(model, arguments)
        return counter.frame_count, output, handle

    graphs, stock, _ = compiled(None)
    same_graphs, output, handle = compiled(tiny.Tiles(dense_blocks=2))
    assert same_graphs == graphs
    targets = layers if family == "wan" else 2 * layers
    assert (handle.tally.dense_calls, handle.tally.sparse_calls) == (4, 2 * (targets - 2))
    torch.testing.assert_close(output, stock, atol=1e-5, rtol=0)


def test_compiled_blocks_train_as_eager_ones_do(tiny: ModuleType) -> None:
    def gradients(compiled: bool) -> list[torch.Tensor]:
        torch._dynamo.reset()
        model, arguments = tiny.model("wan"), tiny.inputs("wan")
        if compiled:
            model.compile_repeated_blocks(backend="aot_eager")
        with dit_accel.apply(model, tiny.Tiles(everything=False)):
            model(**arguments)[0].square().sum().backward()
        return [parameter.grad for parameter in model.blocks[0].attn1.parameters()]

    for got, want in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(got, want)
        assert want.abs().max() > 0


def test_a_wholly_compiled_model_can_be_entered(tiny: ModuleType) -> None:
    torch._dynamo.reset()
    arguments = tiny.inputs("wan")
    model = tiny.model("wan")
    stock = tiny.forward(model, arguments)
    compiled = torch.compile(model, backend="eager")
    handle = dit_accel.apply(compiled, tiny.Tiles(everything=False))
    sparse = tiny.forward(compiled, arguments)
    dit_accel.restore(compiled)
    torch.testing.assert_close(tiny.forward(compiled, arguments), stock, atol=1e-6, rtol=0)
    dit_accel.apply(model, tiny.Tiles(everything=False))
    torch.testing.assert_close(tiny.forward(model, arguments), sparse, atol=1e-6, rtol=0)
    assert handle.tally.sparse_calls == 2


def test_the_users_dense_backend_serves_dense_calls(tiny: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    dispatch = interception.dispatch_attention_fn

    def noting(*args: Any, backend: Any, **kwargs: Any) -> torch.Tensor:
        used.append(backend)
        return dispatch(*args, backend=backend, **kwargs)

    monkeypatch.setattr(interception, "dispatch_attention_fn", noting)
    model = tiny.model("wan")
    with attention_backend("native"):  # set_attention_backend also changes the process-wide one
        handle = dit_accel.apply(model, tiny.Tiles(dense_blocks=(1,)))
        model.set_attention_backend("_native_math")
        tiny.forward(model, tiny.inputs("wan"))
        assert used == [AttentionBackendName._NATIVE_MATH]
        assert handle.tally.sparse_calls == 1
        model.reset_attention_backend()
        tiny.forward(model, tiny.inputs("wan"))
        assert used[1:] == [None]
        model.set_attention_backend("_native_math")
        handle.restore()
    assert {processor._attention_backend for processor in processors(model).values()} == {used[0]}


def test_padded_prompts_in_a_batch_equal_each_alone(tiny: ModuleType) -> None:
    model, both = tiny.model("hunyuan_video"), tiny.inputs("hunyuan_video", batch=2)
    dit_accel.apply(model, tiny.Tiles(everything=False))
    together = tiny.forward(model, both)
    for item in range(2):
        alone = {name: v[item : item + 1] if isinstance(v, torch.Tensor) else v for name, v in both.items()}
        torch.testing.assert_close(tiny.forward(model, alone)[0], together[item], atol=1e-5, rtol=0)


def test_text_padding_is_not_seen(tiny: ModuleType) -> None:
    model, arguments = tiny.model("hunyuan_video"), tiny.inputs("hunyuan_video")
    dit_accel.apply(model, tiny.Tiles(everything=False))
    output = tiny.forward(model, arguments)
    text = arguments["encoder_hidden_states"].clone()
    text[:, 4:] += 10  # four tokens are valid
    torch.testing.assert_close(tiny.forward(model, arguments | {"encoder_hidden_states": text}), output)
    text[:, 3] += 10
    assert not torch.allclose(tiny.forward(model, arguments | {"encoder_hidden_states": text}), output, atol=1e-4)


def test_models_in_threads_do_not_mix(tiny: ModuleType) -> None:
    methods = [tiny.Tiles(), tiny.Tiles(everything=False), tiny.Tiles(everything=False, dense_blocks=1)]
    models = [tiny.model("wan") for _ in methods]
    grids = [(3, 4, 5), (2, 6, 4), (4, 3, 3)]
    arguments = [tiny.inputs("wan", grid=grid) for grid in grids]
    for model, method in zip(models, methods, strict=True):
        dit_accel.apply(model, method)
    alone = [tiny.forward(*pair) for pair in zip(models, arguments, strict=True)]
    mixed: dict[int, list[torch.Tensor]] = {}

    def work(index: int) -> None:
        mixed[index] = [tiny.forward(models[index], arguments[index]) for _ in range(10)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, expected in enumerate(alone):
        assert all(torch.equal(output, expected) for output in mixed[index])


def test_a_copied_model_is_entered_on_its_own(tiny: ModuleType) -> None:
    model, arguments = tiny.model("wan"), tiny.inputs("wan")
    stock = tiny.forward(model, arguments)
    handle = dit_accel.apply(model, tiny.Tiles(everything=False))
    sparse = tiny.forward(model, arguments)
    twin = copy.deepcopy(model)
    handle.restore()
    assert torch.equal(tiny.forward(twin, arguments), sparse)
    assert handle.tally.calls == 2
    dit_accel.restore(twin)
    assert torch.equal(tiny.forward(twin, arguments), stock)
    assert torch.equal(tiny.forward(model, arguments), stock)
    assert not twin._forward_pre_hooks


def test_an_error_inside_a_processor_leaves_no_trace(tiny: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    model, arguments = tiny.model("wan"), tiny.inputs("wan")
    dit_accel.apply(model, tiny.Tiles())
    output = tiny.forward(model, arguments)
    with monkeypatch.context() as patch:
        patch.setattr(attention, "block_sparse_attention", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tiny.forward(model, arguments)
    assert interception._RUNNING.layer is None
    assert torch.equal(tiny.forward(model, arguments), output)


def test_a_mask_that_is_not_text_padding_is_refused(tiny: ModuleType) -> None:
    model, arguments = tiny.model("hunyuan_video"), tiny.inputs("hunyuan_video")
    dit_accel.apply(model, tiny.Tiles())
    block = model.transformer_blocks[0]
    for mask in (torch.zeros(1, 1, 1, 66), torch.ones(1, 1, 66, 66, dtype=torch.bool)):
        hook = block.register_forward_pre_hook(lambda _, args, mask=mask: (*args[:3], mask, *args[4:]))
        with pytest.raises(ValueError, match="passed attention a mask of"):
            tiny.forward(model, arguments)
        hook.remove()


def test_a_sequence_other_than_the_layout_is_refused(tiny: ModuleType) -> None:
    model = tiny.model("wan")
    dit_accel.apply(model, tiny.Tiles())
    tiny.forward(model, tiny.inputs("wan"))
    with pytest.raises(ValueError, match="60 tokens, but its attention got 7 queries and 7 keys"):
        model.blocks[0].attn1(torch.zeros(1, 7, 24))


def test_context_parallelism_is_refused(tiny: ModuleType) -> None:
    model = tiny.model("wan")
    processors(model)["blocks.1.attn1"]._parallel_config = object()
    with pytest.raises(ValueError, match="context parallelism"):
        dit_accel.apply(model, tiny.Tiles())
    processors(model)["blocks.1.attn1"]._parallel_config = None
    dit_accel.apply(model, tiny.Tiles())
    processors(model)["blocks.1.attn1"]._parallel_config = object()
    with pytest.raises(ValueError, match="a parallel config"):
        tiny.forward(model, tiny.inputs("wan"))


def test_processors_with_weights_are_refused(tiny: ModuleType) -> None:
    model = tiny.model("flux")
    adapter = FluxIPAdapterAttnProcessor(hidden_size=32, cross_attention_dim=32)
    model.transformer_blocks[0].attn.set_processor(adapter)
    with pytest.raises(ValueError, match="FluxIPAdapterAttnProcessor with weights"):
        dit_accel.apply(model, tiny.Tiles())
    assert not model._forward_pre_hooks


def test_processors_that_bypass_dispatch_are_refused(tiny: ModuleType) -> None:
    class Own:
        def __call__(self, attn: Any, hidden_states: torch.Tensor, *rest: Any) -> torch.Tensor:
            return hidden_states

    model = tiny.model("wan")
    model.blocks[1].attn1.set_processor(Own())
    with pytest.raises(ValueError, match="the processor Own, which does not call"):
        dit_accel.apply(model, tiny.Tiles())


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "dit"])  # which has no such setter
def test_a_method_given_to_a_models_own_setter_says_what_to_call(tiny: ModuleType, family: str) -> None:
    model = tiny.model(family)
    if family == "hunyuan_video":  # its text refiner runs first
        model.set_attn_processor({name: tiny.Tiles() for name in model.attn_processors})
    else:
        model.set_attn_processor(tiny.Tiles())
    with pytest.raises(TypeError, match=r"use dit_accel.apply\(model, processor\)"):
        tiny.forward(model, tiny.inputs(family))


def test_fa4_leaves_out_the_keys_that_a_mask_hides(monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's attention in place of the package's kernel, which takes no mask."""
    package = types.ModuleType("flash_attn.cute")

    def flash_attn_func(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float | None) -> Any:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(*heads_first, scale=softmax_scale)
        return out.transpose(1, 2), None

    package.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", package)
    q, k, v = torch.randn(3, 1, 7, 2, 8).unbind()
    mask = (torch.arange(7) < 5)[None, None, None]
    out = interception._fa4_attention(q, k, v, mask, scale=0.3)
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    wanted = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(interception._fa4_attention(q, k, v), flash_attn_func(q, k, v, None)[0])
    for wrong in (mask.flip(3), mask.expand(2, 1, 1, 7), mask.float(), mask & False):
        with pytest.raises(ValueError, match="kernel='fa4' takes a mask that hides the last keys"):
            interception._fa4_attention(q, k, v, wrong)
