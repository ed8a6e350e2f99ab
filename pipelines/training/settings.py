"""What a training run is asked to do."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

Loss = Literal["flow", "distill"]
Trained = Literal["attention", "all"]
Schedule = Literal["constant", "cosine"]


# What a resumed run may change: the weights after a step do not depend on it.
_FREE = (
    "out",
    "backend",
    "max_steps",
    "max_seconds",
    "save_steps",
    "save_seconds",
    "log_steps",
    "gradient_checkpointing",
    "compile",
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One training run.

    Args:
        task: "shapes" or "pixels".
        out: folder of the checkpoints and of journal.jsonl.
        pretrained: pipeline folder to start from; None for the task's own start.
        height, width, num_frames: size of the samples in pixels; None for the task's default.
        batch: samples of one forward, on one process. Default 8.
        accumulation: forwards of a step. Default 1.
        method: as commands take it, for example "radial(density=0.5)". Default "dense".
        backend: of the method's operator. Default "auto".
        loss: "flow" (default) or "distill", the distance to the frozen dense model that the run starts from.
        flow_weight: of the flow loss beside distillation. Default 0.5.
        train: "all" (default) parameters of the denoiser or those of its "attention" that a method can replace.
        learning_rate: peak. Default 1e-4.
        schedule: "constant" (default) or "cosine", to 0 at max_steps.
        warmup_steps: of linear growth of the rate. Default 100.
        clip: norm to which gradients are clipped. Default 1.
        ema_decay: of the averaged weights that checkpoints hold, reached by and by. Default 0.999.
        seed: of fresh weights, data and noise. Default 0.
        max_steps: steps of the run, earlier sessions included.
        max_seconds: of this session; None (default) for no bound.
        save_steps: steps from one checkpoint to the next. Default 500.
        save_seconds: seconds from one to the next, where they come first. Default 600.
        log_steps: steps from one line of the journal to the next; the clock is looked at then. Default 10.
        gradient_checkpointing: recompute blocks in the backward pass, for memory. Default False.
        compile: compile the denoiser's blocks. Default False.

    Raises:
        ValueError: a number out of range, or a choice that does not exist.
    """

    task: str
    out: Path = Path("outputs/training")
    pretrained: str | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    batch: int = 8
    accumulation: int = 1
    method: str = "dense"
    backend: str = "auto"
    loss: Loss = "flow"
    flow_weight: float = 0.5
    train: Trained = "all"
    learning_rate: float = 1e-4
    schedule: Schedule = "constant"
    warmup_steps: int = 100
    clip: float = 1.0
    ema_decay: float = 0.999
    seed: int = 0
    max_steps: int = 1000
    max_seconds: float | None = None
    save_steps: int = 500
    save_seconds: float = 600.0
    log_steps: int = 10
    gradient_checkpointing: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("loss", Loss), ("train", Trained), ("schedule", Schedule)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {getattr(self, name)!r}.")
        for name in ("batch", "accumulation", "max_steps", "save_steps", "log_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("flow_weight", "learning_rate", "warmup_steps", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}.")
        if not self.clip > 0:
            raise ValueError(f"clip must be above 0, got {self.clip}.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}.")

    def fixed(self) -> dict[str, Any]:
        """What a resumed run must share, as JSON values."""
        names = [item.name for item in dataclasses.fields(self) if item.name not in _FREE]
        names += ["max_steps"] if self.schedule == "cosine" else []
        return {name: getattr(self, name) for name in names}
