"""Arguments that several subcommands share."""

from __future__ import annotations

import argparse
import ast
from typing import Any

from dit_accel.kernels import BACKENDS
from dit_accel.methods import make_method
from dit_accel.methods.base import AttnMethod
from dit_accel.pipelines.presets import PRESETS, preset_method


def add_run(parser: argparse.ArgumentParser) -> None:
    """What to generate; every default is the model's own."""
    parser.add_argument("--model", default="shapes", help="shapes (default), a hub id or a pipeline folder")
    parser.add_argument("--prompt", help="text; default one of the embedded model's own")
    parser.add_argument("--seed", type=int, default=0, help="of the initial noise (default 0)")
    add_size(parser)
    parser.add_argument("--steps", type=int, help="denoising steps")
    parser.add_argument("--guidance", type=float, help="guidance scale")
    parser.add_argument("--device", help="cuda where there is a GPU, else cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="bfloat16 on cuda, else float32")
    parser.add_argument("--backend", default="auto", choices=("auto", *BACKENDS), help="of the sparse operator")


def add_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--height", type=int, help="pixels")
    parser.add_argument("--width", type=int, help="pixels")
    parser.add_argument("--num-frames", type=int, help="frames of a video")


def parse_method(text: str, model: str, density: float | None = None) -> AttnMethod:
    """A method from the command line: a name, or a call with options such as ``radial(decay=0.2)``.

    A bare name takes the model's preset where there is one, unless ``density`` is given.

    Raises:
        ValueError: no method call, or what ``make_method`` refuses.
    """
    name, options = _parse_call(text)
    if density is not None:
        options.setdefault("density", density)
    if not options and (model, name) in PRESETS:
        return preset_method(model, name)
    return make_method(name, **options)


def _parse_call(text: str) -> tuple[str, dict[str, Any]]:
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        if isinstance(tree, ast.Name):
            return tree.id, {}
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and not tree.args:
            return tree.func.id, {str(item.arg): ast.literal_eval(item.value) for item in tree.keywords}
    except (SyntaxError, ValueError):
        pass
    raise ValueError(f"a method is written as a name or as name(option=value, ...), got {text!r}.")
