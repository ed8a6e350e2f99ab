"""What families read from a call, checked against where tokens really lie, and what specs and presets promise."""

from __future__ import annotations

import logging
import re
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import dit_accel
from dit_accel import runtime
from dit_accel.layout import TokenLayout
from dit_accel.methods import attention
from dit_accel.pipelines.families import FAMILIES, family_of
from dit_accel.pipelines.families.flux import read as read_flux
from dit_accel.pipelines.presets import PRESETS, find_preset, preset_method
from dit_accel.pipelines.specs import SPECS, ModelSpec, find_spec, spec_of

NAMES = ("wan", "hunyuan_video", "flux", "dit", "pixart", "sd3", "pixel_dit")
IMAGES = ("dit", "pixart", "sd3")  # latents [B, C, H, W]
each_family = pytest.mark.parametrize("family", NAMES)


def layout_of(tiny: ModuleType, family: str, arguments: dict[str, Any], **config: Any) -> TokenLayout | None:
    model = tiny.model(family, **config)
    known = family_of(type(model))
    assert known is not None
    layout: TokenLayout | None = known.read(arguments, model.config).layout
    return layout


def queries_of(model: Any, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tiny: ModuleType) -> Tensor:
    """Queries of the first sparse call, [B, L, H, D]."""
    seen: list[Tensor] = []

    def keeping(query: Tensor, *_: Any, **__: Any) -> Tensor:
        seen.append(query.clone())
        return query

    with monkeypatch.context() as patch:
        patch.setattr(attention, "block_sparse_attention", keeping)
        tiny.forward(model, arguments)
    return seen[0]


def moved(tiny: ModuleType, family: str, frame: int, row: int, column: int) -> dict[str, Any]:
    """The family's inputs with the latents of one token changed."""
    arguments = tiny.inputs(family)
    latents = arguments["hidden_states"].clone()
    columns = tiny.GRIDS[family][2]
    if family == "flux":
        latents[:, row * columns + column] += 5
    elif family == "pixel_dit":
        latents[:, :, row, column] += 5
    elif family in IMAGES:
        latents[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += 5
    else:
        latents[:, :, frame, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += 5
    return arguments | {"hidden_states": latents}


@each_family
@pytest.mark.parametrize("corner", [(0, 0, 1), (2, 3, 0), (1, 1, 3)], ids=["first row", "last frame", "middle"])
def test_a_token_lies_where_the_layout_says(
    tiny: ModuleType, monkeypatch: pytest.MonkeyPatch, family: str, corner: tuple[int, int, int]
) -> None:
    model = tiny.model(family)
    handle = dit_accel.apply(model, tiny.Tiles())
    frames, rows, columns = tiny.GRIDS[family]
    frame, row, column = min(corner[0], frames - 1), corner[1], corner[2]
    stock = queries_of(model, tiny.inputs(family), monkeypatch, tiny)
    changed = queries_of(model, moved(tiny, family, frame, row, column), monkeypatch, tiny)
    layout = handle.states[0].layout
    assert layout is not None
    assert stock.shape[1] == layout.num_tokens
    rows_changed = (stock != changed).flatten(2).any(-1)[0].nonzero().flatten().tolist()
    assert rows_changed == [layout.prefix + (frame * rows + row) * columns + column]


@pytest.mark.parametrize("family", ["hunyuan_video", "flux", "sd3"])
def test_text_lies_where_the_layout_says(tiny: ModuleType, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    model, arguments = tiny.model(family), tiny.inputs(family)
    handle = dit_accel.apply(model, tiny.Tiles())
    text = arguments["encoder_hidden_states"].clone()
    text[:, 1] += 5
    stock = queries_of(model, arguments, monkeypatch, tiny)
    changed = queries_of(model, arguments | {"encoder_hidden_states": text}, monkeypatch, tiny)
    layout = handle.states[0].layout
    assert layout is not None
    rows_changed = set((stock != changed).flatten(2).any(-1)[0].nonzero().flatten().tolist())
    first = 0 if layout.prefix else layout.visual_tokens
    assert first + 1 in rows_changed
    assert rows_changed <= set(range(first, first + layout.text_tokens))


@each_family
def test_state_of_a_call(tiny: ModuleType, family: str) -> None:
    model = tiny.model(family)
    handle = dit_accel.apply(model, tiny.Tiles())
    tiny.forward(model, tiny.inputs(family, batch=2))
    state = handle.states[0]
    position = tiny.TEXT_POSITIONS.get(family, "none")
    text = 0 if position == "none" else tiny.TEXT_TOKENS
    assert state.layout == TokenLayout(tiny.GRIDS[family], text, position)
    branch = "batched" if family in tiny.BATCHED else None
    assert (state.batch, state.step, state.num_steps, state.branch) == (2, 0, 1, branch)
    if family == "hunyuan_video":
        assert state.text_lengths is not None
        assert state.text_lengths.dtype == torch.int32
        assert state.text_lengths.tolist() == [4, 2]
    else:
        assert state.text_lengths is None


def test_wan_with_an_image_is_regular(tiny: ModuleType) -> None:
    model = tiny.model("wan", image_dim=4, added_kv_proj_dim=24)
    arguments = tiny.inputs("wan") | {
        "encoder_hidden_states": torch.randn(1, 512, 16),
        "encoder_hidden_states_image": torch.randn(1, 5, 4),
    }
    stock = tiny.forward(model, arguments)
    handle = dit_accel.apply(model, tiny.Tiles())
    torch.testing.assert_close(tiny.forward(model, arguments), stock, atol=1e-5, rtol=0)
    assert handle.tally.sparse_calls == 2


def test_wan_with_one_timestep_per_token_is_regular(tiny: ModuleType) -> None:
    arguments = tiny.inputs("wan") | {"timestep": torch.full((1, 60), 5.0)}
    assert layout_of(tiny, "wan", arguments) == TokenLayout((3, 4, 5))
    model = tiny.model("wan")
    dit_accel.apply(model, tiny.Tiles())
    assert tiny.forward(model, arguments).isfinite().all()


def irregular(tiny: ModuleType, case: str) -> tuple[Any, dict[str, Any]]:
    if case == "token replace":
        return tiny.model("hunyuan_video", image_condition_type="token_replace"), tiny.inputs("hunyuan_video")
    arguments = tiny.inputs("flux", grid=(1, 6, 4))
    ids = tiny.position_ids(6, 4)
    if case == "reference image":
        ids[16:, 0] = 1
    else:
        ids = ids[torch.randperm(24, generator=torch.Generator().manual_seed(0))]
    return tiny.model("flux"), arguments | {"img_ids": ids}


@pytest.mark.parametrize("case", ["token replace", "reference image", "shuffled"])
def test_irregular_tokens_run_dense_with_one_notice(
    tiny: ModuleType, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    runtime._notice.cache_clear()
    model, arguments = irregular(tiny, case)
    stock = tiny.forward(model, arguments)
    handle = dit_accel.apply(model, tiny.Tiles(everything=False))
    with caplog.at_level(logging.WARNING, logger="dit_accel"):
        for _ in range(2):
            assert torch.equal(tiny.forward(model, arguments), stock)
    assert [record.name for record in caplog.records].count("dit_accel.runtime") == 1
    assert (handle.tally.sparse_calls, handle.tally.dense_calls) == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (7, 1), (6, 5), (300, 258)], ids=str)
def test_flux_grids_are_read_in_any_precision(tiny: ModuleType, grid: tuple[int, int], dtype: torch.dtype) -> None:
    ids = tiny.position_ids(*grid).to(dtype)
    arguments = {
        "hidden_states": torch.empty(2, len(ids), 1),
        "encoder_hidden_states": torch.empty(2, 3, 1),
        "img_ids": ids,
    }
    assert read_flux(arguments, None).layout == TokenLayout((1, *grid), 3, "prefix")
    assert read_flux(arguments | {"img_ids": ids[None]}, None).layout == TokenLayout((1, *grid), 3, "prefix")


def test_flux_positions_are_read_once_per_tensor(tiny: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.pipeline("flux")
    dit_accel.apply(pipe, tiny.Tiles())
    reads = []
    cpu = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda self: reads.append(self.shape) or cpu(self))
    tiny.run(pipe)
    assert reads.count((20, 3)) == 1


def test_a_denoiser_has_one_family() -> None:
    names = [name for family in FAMILIES for name in family.models]
    assert len(names) == len(set(names))
    assert {family.name for family in FAMILIES} == set(NAMES)
    assert family_of(torch.nn.Linear) is None


@pytest.mark.parametrize("name", SPECS)
def test_spec_layout_is_what_the_family_reads(tiny: ModuleType, name: str) -> None:
    known = SPECS[name]
    family = next(family for family in FAMILIES if family.name == known.family)
    layout = known.layout()
    time, down, across = known.vae
    latent = ((known.num_frames - 1) // time + 1, known.height // down, known.width // across)
    text = torch.empty(1, known.text_tokens, 1)
    if known.family == "flux":
        rows, columns = (size // 2 for size in latent[1:])
        arguments = {"hidden_states": torch.empty(1, rows * columns, 1), "img_ids": tiny.position_ids(rows, columns)}
        config = None
    elif known.family in IMAGES:
        config = SimpleNamespace(patch_size=known.patch[1])
        arguments = {"hidden_states": torch.empty(1, 1, *latent[1:])}
    elif known.family == "pixel_dit":
        arguments, config = {"hidden_states": torch.empty(1, 3, *latent[1:])}, None
    else:
        arguments = {"hidden_states": torch.empty(1, 1, *latent), "encoder_attention_mask": torch.ones(1, 1)}
        patch: Any = known.patch if known.family == "wan" else known.patch[1]
        config = type("Config", (), {"patch_size": patch, "patch_size_t": 1, "image_condition_type": None})
    assert family.read(arguments | {"encoder_hidden_states": text}, config).layout == layout


def test_spec_sizes() -> None:
    assert find_spec("wan2.1-14b").layout(720, 1280, 81).num_tokens == 75_600
    assert find_spec("wan2.1-14b").hidden_dim == 5120
    assert find_spec("hunyuanvideo").layout(720, 1280, 129).num_tokens == 118_800 + 256
    assert find_spec("flux.1-dev").layout(1024, 1024).num_tokens == 4096 + 512
    assert find_spec("shapes").layout().grid == (7, 24, 32)
    assert find_spec("dit-xl-2-512").layout().num_tokens == 1024
    assert find_spec("pixart-sigma-2k").layout().num_tokens == 16_384
    assert find_spec("sd3-medium").layout().num_tokens == 4096 + 333
    assert find_spec("sd3.5-large").hidden_dim == 2432


def test_spec_flops_match_the_published_count() -> None:
    wan = find_spec("wan2.1-14b")  # 560 PFLOPs for 768x1280, 69 frames, 50 steps (arXiv 2506.19852)
    layout = wan.layout(768, 1280, 69)
    total = (wan.attention_flops(layout) + wan.linear_flops(layout)) * wan.steps * wan.guidance_calls
    assert total == pytest.approx(560e15, rel=0.005)
    assert wan.attention_flops(layout, 0.25) == wan.attention_flops(layout) / 4


@each_family
def test_spec_flops_are_the_multiplications_of_the_blocks(tiny: ModuleType, family: str) -> None:
    model, arguments = tiny.model(family), tiny.inputs(family)
    layout = layout_of(tiny, family, arguments)
    assert layout is not None
    dim = model.config.num_attention_heads * model.config.attention_head_dim
    two_kinds = family in ("hunyuan_video", "flux")
    is_sd3 = family == "sd3"
    known = ModelSpec(
        name="tiny",
        family=family,
        heads=model.config.num_attention_heads,
        head_dim=model.config.attention_head_dim,
        blocks=1 if two_kinds or is_sd3 else 2,
        single_blocks=int(two_kinds),
        visual_blocks=int(is_sd3),
        ffn_dim=32 if family in ("wan", "pixel_dit") else 4 * dim,
        height=8,
        width=8,
        num_frames=1,
        steps=1,
        guidance=1.0,
        cross_tokens=tiny.TEXT_TOKENS if family in ("wan", "pixart") else 0,
    )
    counted = []
    blocks = re.compile(r"(single_transformer_|transformer_)?blocks\.\d+\.")
    for name, module in model.named_modules():
        if blocks.match(name) and "norm" not in name and isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda m, args, _: counted.append(2 * args[0].numel() * m.out_features))
    tiny.forward(model, arguments)
    cross_attention = 4 * layout.num_tokens * known.cross_tokens * dim * known.num_blocks
    unused = 2 * layout.text_tokens * (dim**2 + 8 * dim**2) if is_sd3 else 0  # the last block gives no text on
    assert sum(counted) + cross_attention + unused == known.linear_flops(layout)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("wan2.1-14b", {"height": 725}, "multiples of 16 pixels, got height=725; use 720"),
        ("wan2.1-14b", {"num_frames": 80}, r"4k \+ 1 frames, got num_frames=80; use 81"),
        ("hunyuanvideo", {"num_frames": 0}, "use 1"),
        ("shapes", {"width": 3}, "multiples of 16 pixels, got width=3; use 16"),
        ("flux.1-dev", {"num_frames": 5}, "makes images"),
    ],
    ids=["height", "frames", "no frames", "width", "image"],
)
def test_sizes_that_cannot_be_made_are_refused_with_the_nearest(name: str, size: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_spec(name).layout(**size)


@pytest.mark.parametrize(("model", "method"), PRESETS, ids=lambda value: str(value))
def test_presets_make_their_method_for_their_size(model: str, method: str) -> None:
    preset, known = PRESETS[model, method], SPECS[model]
    made = preset_method(model, method)
    layout = known.layout(preset.height, preset.width, preset.num_frames)
    assert made.name == method
    if layout.num_tokens < 80_000:
        bound = made.attention(layout)
        assert bound is not None
        assert bound.layout == layout


def test_presets_keep_their_published_schedule() -> None:
    radial = preset_method("wan2.1-14b", "radial")
    dense = [radial.is_dense_at(block=1, step=step, num_steps=50, num_tokens=1) for step in range(50)]
    assert dense == [True] * 12 + [False] * 38
    assert all(radial.is_dense_at(block=0, step=step, num_steps=50, num_tokens=1) for step in range(50))
    assert preset_method("wan2.1-14b", "radial", decay=0.5).options()["decay"] == 0.5


@each_family
def test_spec_of_a_pipeline_is_its_own_shape(tiny: ModuleType, family: str) -> None:
    pipe = tiny.pipeline(family)
    spec = spec_of(pipe)
    handle = dit_accel.apply(pipe, tiny.Tiles())
    tiny.run(pipe)
    state = handle.states[0]
    assert state.layout is not None
    width = 64 if family == "dit" else 80
    assert spec.layout(64, width, 1 if spec.num_frames == 1 else 9).grid == state.layout.grid
    assert (spec.name, spec.family, spec.num_blocks) == (type(pipe).__name__, family, tiny.TARGETS)
    assert spec.hidden_dim == pipe.transformer.config.num_attention_heads * pipe.transformer.config.attention_head_dim


@pytest.mark.parametrize("name", SPECS)
def test_spec_of_a_known_model_is_known(name: str) -> None:
    known = SPECS[name]
    family = next(family for family in FAMILIES if family.name == known.family)
    config = {
        "num_attention_heads": known.heads,
        "attention_head_dim": known.head_dim,
        "num_layers": known.blocks,
        "num_single_layers": known.single_blocks,
        "ffn_dim": known.ffn_dim,
        "mlp_ratio": 4.0,
        "patch_size": known.patch if known.family == "wan" else known.patch[1],
        "patch_size_t": known.patch[0],
        "sample_size": known.height // known.vae[1],
        "dual_attention_layers": range(known.visual_blocks),
    }
    denoiser = type(family.models[0], (torch.nn.Module,), {"config": SimpleNamespace(**config)})
    scales = {"vae_scale_factor_temporal": known.vae[0], "vae_scale_factor_spatial": known.vae[1]}
    pipe = SimpleNamespace(components={str(i): denoiser() for i in range(known.denoisers)}, **scales)
    assert spec_of(pipe) == known


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"choose one of shapes, shapes-image, wan2.1-1.3b"):
        find_spec("sora")
    with pytest.raises(ValueError, match="it has radial, neighborhood, .*grat"):
        find_preset("hunyuanvideo", "dense")
