"""Arguments that several subcommands share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dit_accel.eval.suite import prompts as prompt_lists
from dit_accel.kernels import BACKENDS
from dit_accel.methods import make_method, parse_method_call
from dit_accel.methods.base import AttnMethod
from dit_accel.pipelines.embedded import EMBEDDED
from dit_accel.pipelines.presets import PRESETS, preset_method
from dit_accel.plan_file import names_plan
from dit_accel.tuned_plan import PlanAttnProcessor, method_of


def add_run(parser: argparse.ArgumentParser) -> None:
    """What to generate; every default is the model's own."""
    add_settings(parser)
    parser.add_argument("--prompt", help="text; default one of the embedded model's own")


def add_settings(parser: argparse.ArgumentParser) -> None:
    """How to generate, whatever the prompt."""
    parser.add_argument("--model", default="shapes", help="shapes (default), shapes-image, a hub id or a folder")
    parser.add_argument("--seed", type=int, default=0, help="of the initial noise (default 0)")
    add_size(parser)
    parser.add_argument("--steps", type=int, help="denoising steps")
    parser.add_argument("--guidance", type=float, help="guidance scale")
    add_machine(parser)


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Where and how to compute."""
    parser.add_argument("--device", help="cuda where there is a GPU, else cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="bfloat16 on cuda, else float32")
    parser.add_argument("--backend", default="auto", choices=("auto", *BACKENDS), help="of the sparse operator")


def add_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--height", type=int, help="pixels")
    parser.add_argument("--width", type=int, help="pixels")
    parser.add_argument("--num-frames", type=int, help="frames of a video")


def parse_method(text: str, model: str, density: float | None = None, **others: Any) -> AttnMethod:
    """A method from the command line: a name, a call such as ``radial(decay=0.2)``, or the place of a tuned plan.

    ``density`` and ``others`` are options of a method that does not name them itself. A bare name takes the model's
    preset where there is one, unless they are given.

    Raises:
        ValueError: no method call, or what ``make_method`` or ``TunedPlan`` refuses.
    """
    defaults = others if density is None else {"density": density, **others}
    if names_plan(text):
        return method_of(text, **defaults)
    name, options = parse_method_call(text)
    options = defaults | options
    if not options and (model, name) in PRESETS:
        return preset_method(model, name)
    return make_method(name, **options)


def output_folder(folder: Path) -> Path:
    """The folder, made when missing; a ValueError if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)  # another process may have been faster
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"the output folder {folder} cannot be written ({reason}); pass another --output.") from error
    return folder


def read_prompts(source: str, model: str) -> tuple[str, ...]:
    """The prompts of a list or a file, or so many of the list that ships for an embedded model.

    Raises:
        ValueError: a number for a model without a list of its own, a number out of range, or no prompts.
    """
    if not source.isdecimal():
        return prompt_lists.read_prompts(source, Path())[0]
    if model not in EMBEDDED:
        raise ValueError(
            f"{model} has no prompts of its own, got --prompts {source}; pass a file with a prompt a line."
        )
    if int(source) < 1:
        raise ValueError(f"--prompts must be at least 1, got {source}.")
    return prompt_lists.read_prompts(model, Path(), int(source))[0]


def method_call(method: AttnMethod) -> str:
    """The method as the command line takes it."""
    if isinstance(method, PlanAttnProcessor):
        return method.source
    inner = ", ".join(f"{name}={value!r}" for name, value in method.options().items())
    return f"{method.name}({inner})" if inner else method.name


def apply_call(method: AttnMethod) -> str:
    """The arguments of ``dit_accel.apply`` after the pipeline, as Python has them."""
    if isinstance(method, PlanAttnProcessor):
        return repr(method.source)
    return repr(method.name) + "".join(f", {name}={value!r}" for name, value in method.options().items())
