"""`dit-accel explain`: what a method does at a size, from the model's shape alone."""

from __future__ import annotations

import argparse
import json

import torch

from dit_accel.commands.arguments import add_size, parse_method
from dit_accel.explanation import explain_spec
from dit_accel.pipelines.specs import find_spec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="shapes", help="a name of `dit-accel list` (default shapes)")
    parser.add_argument("--method", default="radial", help="a name or name(option=value, ...) (default radial)")
    parser.add_argument("--density", type=float, help="in place of the method's own settings, in (0, 1]")
    add_size(parser)
    parser.add_argument("--steps", type=int, help="denoising steps")
    parser.add_argument("--device", help="where the speed-up is predicted (default cuda, else cpu)")
    parser.add_argument("--format", choices=("text", "json"), default="text")


def run(options: argparse.Namespace) -> int:
    spec = find_spec(options.model)
    method = parse_method(options.method, options.model, options.density)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    explanation = explain_spec(
        spec,
        method,
        height=options.height,
        width=options.width,
        num_frames=options.num_frames,
        steps=options.steps,
        device=device,
    )
    print(json.dumps(explanation.as_dict(), indent=2) if options.format == "json" else explanation)
    return 0
