"""What makes a result again: a script, and a command line."""

from __future__ import annotations

import shlex

from dit_accel.commands.arguments import apply_call, method_call
from dit_accel.commands.models import Model, Request
from dit_accel.methods.base import AttnMethod
from dit_accel.pipelines.embedded import EMBEDDED


def script_of(method: AttnMethod, request: Request, model: Model) -> str:
    """Python that makes one result again."""
    frames = f", num_frames={request.num_frames}" if request.num_frames > 1 else ""
    extra = "".join(f", {name}={value!r}" for name, value in model.call.arguments.items())
    if model.name in EMBEDDED:
        package = EMBEDDED[model.name].package
        loading = f"from dit_accel.pipelines import {package}\n\npipe = {package}.load()"
    else:
        loading = f"from diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained({model.name!r})"
    return (
        f"import torch\nimport dit_accel\n{loading}\n"
        f"dit_accel.apply(pipe, {apply_call(method)})\n"
        f"output = pipe({request.prompt!r}, height={request.height}, width={request.width}{frames}, "
        f"num_inference_steps={request.steps}, {model.call.guidance}={request.guidance:g}{extra}, "
        f"generator=torch.Generator().manual_seed({request.seed}))[0]"
    )


def command_of(method: AttnMethod, request: Request, model: Model) -> str:
    """The shell command that makes one result again."""
    numbers = {
        "seed": request.seed,
        "height": request.height,
        "width": request.width,
        "num-frames": request.num_frames,
        "steps": request.steps,
        "guidance": f"{request.guidance:g}",
    }
    texts = {"model": model.name, "method": method_call(method), "prompt": request.prompt}
    words = ["dit-accel", "generate"]
    words += [word for name, value in (texts | numbers).items() for word in (f"--{name}", str(value))]
    return shlex.join(words)
