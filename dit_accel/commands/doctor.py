"""`dit-accel doctor`: what this machine can run, found by running it."""

from __future__ import annotations

import argparse
import importlib.util

import torch

from dit_accel.eval.machine import machine, versions
from dit_accel.kernels import BACKENDS, block_sparse_attention
from dit_accel.layout import TokenLayout
from dit_accel.plan import plan_from_tile_mask

OPTIONAL = {"xformers": "pip install 'dit-accel[xformers]'", "flash_attn": "pip install 'dit-accel[flash]'"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def run(options: argparse.Namespace) -> int:
    for name, value in {**machine(), **versions()}.items():
        print(f"{name:16}{value}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    healthy = True
    print(f"\nbackends of the block-sparse operator on {device}")
    for backend in BACKENDS:
        verdict = _try(backend, device)
        print(f"  {backend:14}{verdict}")
        healthy &= not verdict.startswith("gives wrong")
    print("\noptional packages")
    for package, remedy in OPTIONAL.items():
        found = importlib.util.find_spec(package) is not None
        print(f"  {package:14}{'installed' if found else f'not installed: {remedy}'}")
    return 0 if healthy else 1


def _try(backend: str, device: str) -> str:
    """Runs a small ragged case against the reference; "works", or why not."""
    layout = TokenLayout((3, 9, 11), 5, "suffix")
    tiles = layout.boxes((2, 8, 8))
    generator = torch.Generator().manual_seed(0)
    plan = plan_from_tile_mask(layout, tiles, torch.rand(tiles.num_tiles, tiles.num_tiles, generator=generator) < 0.6)
    dtype = torch.float16 if device == "cuda" else torch.float32
    q, k, v = torch.randn(3, 1, layout.num_tokens, 2, 64, generator=generator).to(device, dtype).unbind()
    exact = block_sparse_attention(q.double(), k.double(), v.double(), plan, backend="reference")
    try:
        out = block_sparse_attention(q, k, v, plan, backend=backend)  # type: ignore[call-overload]
    except ValueError as refusal:
        return str(refusal)
    error = float((out.double() - exact).norm() / exact.norm())
    bound = 8 * torch.finfo(dtype).eps
    return "works" if error < bound else f"gives wrong numbers (relative error {error:.1e}, expected below {bound:.1e})"
