"""What `dit-accel bench actions` measures: the actions of DiTFastAttn on one attention module of DiT-XL/2."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import Tensor, nn

from dit_accel.eval.bench.actions import ActionCase, Module, Published
from dit_accel.layout import TokenLayout
from dit_accel.methods.actions import FULL, REUSE, Action, Assignment
from dit_accel.methods.band import BandAttnProcessor
from dit_accel.methods.dit_fast_attn import DiTFastAttnProcessor
from dit_accel.pipelines.costs import action_share
from dit_accel.plugin import Handle, apply

HEADS, HEAD_DIM = 16, 72  # of DiT-XL/2 and PixArt
BATCH = 2  # both branches of guidance, the conditional one first
SIDES = {"cuda": (32, 64, 128), "cpu": (32,)}  # tokens per side
TURN_SECONDS = {"cuda": 0.1, "cpu": 0.0}
STEPS = 4  # a full one, then the action at all others
BAND = BandAttnProcessor()
ACTIONS: Mapping[str, Action] = {
    "full": FULL,
    "ASC": Action(share=True),
    "WA-RS": Action(BAND, residual=True),
    "WA-RS+ASC": Action(BAND, residual=True, share=True),
    "AST": REUSE,
}
PUBLISHED: Mapping[tuple[int, str], Published] = {
    (tokens, name): Published(*shares)
    for tokens, row in {
        1024: {"ASC": (50, 59), "WA-RS": (77, 85), "WA-RS+ASC": (38, 51), "AST": (0, 4)},
        4096: {"ASC": (50, 54), "WA-RS": (51, 54), "WA-RS+ASC": (26, 31), "AST": (0, 3)},
        16384: {"ASC": (50, 52), "WA-RS": (33, 35), "WA-RS+ASC": (16, 19), "AST": (0, 1)},
    }.items()
    for name, shares in row.items()
}


def modules(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Module]]:
    """What fits the device by name, each to be made when its turn comes."""
    return {_name(side): functools.partial(module, side, device, dtype) for side in SIDES[device.type]}


def _name(side: int) -> str:
    return f"{BATCH} x {side**2:,} tokens, {HEADS} heads, D={HEAD_DIM}"


@torch.no_grad()
def module(side: int, device: torch.device, dtype: torch.dtype) -> Module:
    """The attention module of a DiT of one block, as it is and under each action."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=2 * side,
        patch_size=2,
    )
    nn.Module.to(model, device, dtype).eval()  # the model's own would warn of the cast
    hidden = torch.randn(BATCH, side**2, HEADS * HEAD_DIM).to(device, dtype)
    layout = TokenLayout((1, side, side))
    cases = []
    for name, action in ACTIONS.items():
        step, handle = _taken(copy.deepcopy(model), action, hidden)
        cases.append(
            ActionCase(
                name,
                step,
                rule_share=action_share(action, layout, HEADS * HEAD_DIM, counted="rule"),
                tile_share=action_share(action, layout, HEADS * HEAD_DIM, counted="tiles"),
                kept_bytes=handle.kept_bytes,
                published=PUBLISHED.get((side**2, name)),
            )
        )
    return Module(
        name=_name(side),
        batch=BATCH,
        tokens=side**2,
        heads=HEADS,
        head_dim=HEAD_DIM,
        dtype=dtype,
        conditional=slice(BATCH // 2),
        stock=_step(model, hidden),
        cases=cases,
    )


def _taken(model: Any, action: Action, hidden: Tensor) -> tuple[Callable[[], Tensor], Handle]:
    """The attention module at the second step of a run that takes the action after a full first step."""
    table = torch.ones(STEPS, 1, 1, dtype=torch.int16)
    table[0] = 0
    pipe = DiTPipeline(model, vae=None, scheduler=DDIMScheduler())
    pipe.scheduler.set_timesteps(STEPS)
    assignment = Assignment((FULL, action), table)
    handle = apply(pipe, DiTFastAttnProcessor(assignment=assignment))
    one = torch.randn(1, 4, model.config.sample_size, model.config.sample_size).to(hidden)
    step = _step(model, hidden)
    for timestep in pipe.scheduler.timesteps[:2]:
        model(
            one.repeat(BATCH, 1, 1, 1), timestep.repeat(BATCH).to(hidden.device), torch.arange(BATCH).to(hidden.device)
        )
        step()
    return step, handle


def _step(model: Any, hidden: Tensor) -> Callable[[], Tensor]:
    """A call of the model's attention module."""
    attention = model.transformer_blocks[0].attn1

    def step() -> Tensor:
        out: Tensor = attention(hidden)
        return out

    return step
