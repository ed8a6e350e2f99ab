"""`dit-accel train`: trains a denoiser, or distils it into itself, with the attention of a method."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from dit_accel.commands.arguments import add_size
from dit_accel.kernels import BACKENDS
from dit_accel.kernels.block_sparse.backends import Backend
from dit_accel.methods import make_method, parse_method_call
from dit_accel.methods.dense import kernel_of
from dit_accel.pipelines.training.loop import train
from dit_accel.pipelines.training.settings import Loss, Schedule, Settings, Trained
from dit_accel.pipelines.training.tasks import TASKS
from dit_accel.plugin import apply

DEFAULTS = {item.name: item.default for item in dataclasses.fields(Settings)}
NUMBERS = {  # options that are numbers with a default
    "batch": "samples of one forward on one GPU",
    "accumulation": "forwards of a step",
    "flow_weight": "of the flow loss beside distillation",
    "learning_rate": "peak",
    "warmup_steps": "of growing rate",
    "clip": "norm of the gradients",
    "ema_decay": "of the averaged weights that checkpoints hold",
    "seed": "of fresh weights, data and noise",
    "max_steps": "of the run, earlier sessions included",
    "save_steps": "from one checkpoint to the next",
    "save_seconds": "from one checkpoint to the next",
    "log_steps": "from one line of the journal to the next",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", required=True, choices=tuple(TASKS), help="what to train on")
    parser.add_argument("--out", type=Path, default=DEFAULTS["out"], help="folder (default outputs/training)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument("--pretrained", help="pipeline folder to start from (default: the task's own start)")
    add_size(parser)
    parser.add_argument("--method", default="dense", help="a name or name(option=value, ...) (default dense)")
    parser.add_argument("--backend", default="auto", choices=("auto", *BACKENDS), help="of the method's operator")
    parser.add_argument("--loss", default="flow", choices=typing.get_args(Loss), help="default flow")
    parser.add_argument("--train", default="all", choices=typing.get_args(Trained), help="parameters (default all)")
    parser.add_argument("--schedule", default="constant", choices=typing.get_args(Schedule), help="default constant")
    parser.add_argument("--max-seconds", type=float, help="of this session (default no bound)")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="recompute blocks, for memory")
    parser.add_argument("--compile", action="store_true", help="compile the denoiser's blocks")
    for name, text in NUMBERS.items():
        value: Any = DEFAULTS[name]
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(value), default=value, help=f"{text} (default {value:g})")


def attacher(text: str, backend: Backend = "auto") -> Callable[[nn.Module], None]:
    """What gives a denoiser the attention of a method, as ``--method`` takes it; plain ``dense`` leaves it its own."""
    name, values = parse_method_call(text)
    method = make_method(name, **values)

    def attach(denoiser: nn.Module) -> None:
        if name != "dense" or kernel_of(method) is not None:
            apply(denoiser, method, backend=backend)

    return attach


def run(options: argparse.Namespace) -> int:
    settings = Settings(**{name: getattr(options, name) for name in DEFAULTS})
    attach = attacher(settings.method, options.backend)
    try:
        last = train(TASKS[settings.task], settings, attach, resume=options.resume)
    except KeyboardInterrupt:
        print(f"\nstopped: --resume goes on from the last checkpoint in {settings.out}.")
        return 130
    if last is not None:
        print(f"{last / 'pipeline'}: averaged weights; {last}: to resume; {settings.out / 'journal.jsonl'}: losses.")
    return 0
