"""Everything at work in a training run, and how it is put together."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn

from dit_accel.pipelines.training.parameters import check_gradients, choose_parameters
from dit_accel.pipelines.training.settings import Settings
from dit_accel.pipelines.training.task import Draw, Feed, Task

Attach = Callable[[nn.Module], Any]
_SCHEDULES = {"constant": "constant_with_warmup", "cosine": "cosine"}


@dataclass
class Progress:
    """How far the run is."""

    step: int = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


@dataclass
class Run:
    """Everything at work in a training run.

    Args:
        denoiser, optimiser: as accelerate prepared them.
        teacher: the frozen dense model, for distillation.
        parameters: those trained, of the pipeline's transformer.
        ema: their averages.
        draw: batches by number.
        tokens: of one sample.
    """

    settings: Settings
    accelerator: Accelerator
    pipeline: Any
    denoiser: nn.Module
    optimiser: Any
    teacher: nn.Module | None
    parameters: list[nn.Parameter]
    schedule: Any
    ema: EMAModel
    draw: Draw
    tokens: int
    progress: Progress = field(default_factory=Progress)


def prepare(task: Task, settings: Settings, attach: Attach, accelerator: Accelerator) -> Run:
    """A run before its first step; refuses what ``train`` refuses, checkpoints and losses aside."""
    spec = task.spec
    layout = spec.layout(settings.height, settings.width, settings.num_frames)
    size = (settings.num_frames or spec.num_frames, settings.height or spec.height, settings.width or spec.width)
    pipeline = _pipeline(task, settings, accelerator)
    denoiser: Any = pipeline.transformer
    teacher = copy.deepcopy(denoiser) if settings.loss == "distill" else None
    parameters = choose_parameters(denoiser.train(), settings.train)
    attach(denoiser)
    if settings.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    for model in (denoiser, teacher):
        if settings.compile and model is not None:
            model.compile_repeated_blocks()
    place = (accelerator.device, accelerator.process_index, accelerator.num_processes)
    draw = task.feed(pipeline, Feed(size, settings.batch, settings.seed, *place))
    with accelerator.autocast():
        check_gradients(denoiser, draw(accelerator.process_index), settings.method)
    fused = accelerator.device.type == "cuda"
    optimiser = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0, fused=fused)
    steps = {"num_warmup_steps": settings.warmup_steps, "num_training_steps": settings.max_steps}
    schedule = get_scheduler(_SCHEDULES[settings.schedule], optimiser, **steps)
    ema = EMAModel(parameters, decay=settings.ema_decay, foreach=True)
    prepared, optimiser = accelerator.prepare(denoiser, optimiser)
    parts = (pipeline, prepared, optimiser, teacher, parameters, schedule, ema)
    run = Run(settings, accelerator, *parts, draw, layout.num_tokens)
    accelerator.register_for_checkpointing(ema, schedule, run.progress)
    return run


def _pipeline(task: Task, settings: Settings, accelerator: Accelerator) -> Any:
    """What the run starts from, on the device and frozen."""
    folder = None if settings.pretrained is None else Path(settings.pretrained)
    if folder is None and task.fresh and settings.loss == "distill":
        raise ValueError(f"distill needs a trained model, got none for {settings.task}; pass --pretrained.")
    if folder is not None and not (folder / "model_index.json").exists():
        raise ValueError(f"{folder} is no pipeline folder; pass one that save_pretrained wrote.")
    torch.manual_seed(settings.seed)
    pipeline = task.build(folder)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.to(accelerator.device).requires_grad_(False).eval()
    return pipeline
