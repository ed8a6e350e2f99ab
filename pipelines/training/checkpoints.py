"""Checkpoints of a run: whole or absent, the last two, and only for the run that made them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

_KEPT = 2


@dataclass(frozen=True)
class Checkpoints:
    """The folders checkpoint-STEP of a run.

    Each holds ``pipeline`` (diffusers' format, averaged weights), ``state`` (accelerate's: weights, optimiser, random
    states) and ``settings.json``.

    Args:
        out: where they are.
        settings: what a run must share with them to go on.
    """

    out: Path
    settings: dict[str, Any]

    def latest(self) -> Path | None:
        """The checkpoint of the most steps, if any."""
        return max(self.out.glob("checkpoint-*"), key=_step, default=None)

    def begin(self, resume: bool) -> Path | None:
        """The checkpoint to go on from, None for a new run.

        Raises:
            ValueError: a new run would mix with an earlier one, or there is none to resume, or one of other settings.
        """
        if resume:
            return self._to_resume()
        if self.latest() is not None:
            raise ValueError(f"{self.out} holds checkpoints of an earlier run; pass --resume or another --out.")
        return None

    def _to_resume(self) -> Path:
        latest = self.latest()
        if latest is None:
            raise ValueError(f"{self.out} holds no checkpoint to resume; leave --resume away or pass another --out.")
        before = json.loads((latest / "settings.json").read_text())
        names = [name for name in before | self.settings if before.get(name) != self.settings.get(name)]
        if names:
            changes = ", ".join(f"{name}={before.get(name)!r}, not {self.settings.get(name)!r}" for name in names)
            raise ValueError(f"{latest} was trained with {changes}; resume with the same or pass another --out.")
        return latest

    def save(self, step: int, accelerator: Accelerator, save_pipeline: Callable[[Path], None]) -> None:
        """Writes the state, and on the first process the pipeline to the folder given; every process calls this."""
        unfinished = self.out / f".unfinished-{step}"
        if accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(unfinished / "state"))
        if accelerator.is_main_process:
            save_pipeline(unfinished / "pipeline")
            (unfinished / "settings.json").write_text(json.dumps(self.settings, indent=2))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            unfinished.rename(self.out / f"checkpoint-{step}")
            for old in sorted(self.out.glob("checkpoint-*"), key=_step)[:-_KEPT]:
                shutil.rmtree(old)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))
