"""`dit-accel list`: methods with their options, models and presets."""

from __future__ import annotations

import argparse
import dataclasses

from dit_accel.methods import METHODS
from dit_accel.methods.base import AttnMethod
from dit_accel.pipelines.families import FAMILIES
from dit_accel.pipelines.presets import PRESETS
from dit_accel.pipelines.specs import SPECS

_SHARED = {field.name for field in dataclasses.fields(AttnMethod)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def run(options: argparse.Namespace) -> int:
    print("methods (every one also takes density, start_percent, end_percent, dense_blocks, min_tokens)")
    for name, method in METHODS.items():
        own = [f"{field.name}={field.default!r}" for field in dataclasses.fields(method) if field.name not in _SHARED]
        print(f"  {name:14}{', '.join(own)}")
        print(f"  {'':14}{(method.__doc__ or '').strip().splitlines()[0]}")
    print("\nmodels for explain, and their presets")
    for name, spec in SPECS.items():
        layout = spec.layout()
        presets = ", ".join(
            f"{method} ({preset.source})" for (model, method), preset in PRESETS.items() if model == name
        )
        size = f"{spec.height}x{spec.width}" + (f"x{spec.num_frames}" if spec.num_frames > 1 else "")
        print(f"  {name:17}{size}: {layout.num_tokens:,} tokens; presets: {presets or 'none'}")
    print("\ndenoisers that a method can be applied to")
    for family in FAMILIES:
        print(f"  {family.name:14}{', '.join(family.models)}")
    return 0
