"""The training tasks by name."""

from __future__ import annotations

from dit_accel.pipelines.training.pixels import PIXELS
from dit_accel.pipelines.training.shapes import SHAPES
from dit_accel.pipelines.training.task import Task

TASKS: dict[str, Task] = {"shapes": SHAPES, "pixels": PIXELS}
