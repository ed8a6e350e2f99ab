"""What `dit-accel bench training` measures: optimisation steps of DiT-S on pixels, as `dit-accel train` makes them."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dit_accel.commands.train import attacher
from dit_accel.eval.bench.training import Journal, Mode, TrainingCase
from dit_accel.pipelines.training.loop import train
from dit_accel.pipelines.training.settings import Settings
from dit_accel.pipelines.training.tasks import TASKS

GPU_DENSE = ("dense", "dense(kernel='_native_cudnn')", "dense(kernel='fa4')")
LINES = 6  # of a run's journal, the first of which is warm-up


@dataclass(frozen=True)
class Setting:
    """A size of the square images of one step, and whether blocks are compiled.

    Args:
        side: in pixels, each of which is a token.
        mode: compiled or eager.
        steps: of one line of the journal.
        dense: the baselines, as ``--method`` takes them; plain "dense" is torch's own choice of a kernel.
        methods: the others.
        batch: images of a step.
    """

    side: int
    mode: Mode
    steps: int
    dense: tuple[str, ...]
    methods: tuple[str, ...] = ("log_linear(top_k=8, exclude_covered=False)",)
    batch: int = 1

    @property
    def name(self) -> str:
        return f"DiT-S on pixels, {self.batch} x {self.side**2:,} tokens, {self.mode}"

    def case(self) -> TrainingCase:
        runs = {method: functools.partial(_run, self, method) for method in (*self.dense, *self.methods)}
        return TrainingCase(self.name, self.side, self.mode, self.batch, self.side**2, runs, frozenset(self.dense))


GPU_SETTINGS: tuple[Setting, ...] = (
    Setting(128, "compiled", 20, GPU_DENSE),
    Setting(256, "compiled", 5, GPU_DENSE),
    Setting(256, "eager", 5, GPU_DENSE),
)
CPU_SETTINGS: tuple[Setting, ...] = (Setting(16, "eager", 1, ("dense",)),)


def settings(device: torch.device) -> tuple[Setting, ...]:
    """What fits the device."""
    return GPU_SETTINGS if device.type == "cuda" else CPU_SETTINGS


def cases(device: torch.device) -> dict[str, Callable[[], TrainingCase]]:
    """What fits the device by name."""
    return {setting.name: setting.case for setting in settings(device)}


def _run(setting: Setting, text: str) -> Journal:
    """The journal of a short run."""
    if setting.mode == "compiled":
        torch.compiler.reset()  # graphs of an earlier run count towards the limit of recompilations
    with tempfile.TemporaryDirectory() as folder:
        wanted = Settings(
            task="pixels",
            out=Path(folder),
            height=setting.side,
            width=setting.side,
            batch=setting.batch,
            method=text,
            compile=setting.mode == "compiled",
            log_steps=setting.steps,
            max_steps=LINES * setting.steps,
        )
        train(TASKS["pixels"], wanted, attacher(text))
        return [json.loads(line) for line in (wanted.out / "journal.jsonl").read_text().splitlines()]
