"""Judges whose packages cannot be installed beside ours: each runs in an interpreter that the user gives.

The clips of a set are written to a temporary folder without loss, one process judges them all, and the folder is
removed. Whatever goes wrong in there is the reason why the metric is skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dit_accel.eval.frames import as_uint8
from dit_accel.eval.media import write_lossless_mp4
from dit_accel.eval.quality.drivers import IMAGE_REWARD, VBENCH
from dit_accel.eval.quality.metrics import SetMetric, SetScore

_FRAMES = 8  # of a clip, evenly spaced, that a judge of images sees
_NOWHERE = "http://127.0.0.1:9"  # a proxy that refuses: packages that would download weights fail instead
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), _NOWHERE),
    **dict.fromkeys(("no_proxy", "NO_PROXY"), ""),
}
DIMENSIONS: Mapping[str, bool | None] = {  # of VBench, for clips of any prompt: whether higher is better
    "subject_consistency": True,
    "background_consistency": True,
    "temporal_flickering": True,
    "motion_smoothness": True,
    "dynamic_degree": None,
    "aesthetic_quality": True,
    "imaging_quality": True,
    "temporal_style": True,
    "overall_consistency": True,
}
_WITH_PROMPT = ("temporal_style", "overall_consistency")


def image_reward(python: str, weights: str | os.PathLike[str], timeout: float = 3600.0) -> SetMetric:
    """The metric ``image_reward`` (Xu et al. 2023): a model of human preference for an image, given its prompt.

    Of a clip it sees up to eight evenly spaced frames; their mean is the clip's score.

    Args:
        python: an interpreter with the package ImageReward.
        weights: folder with ``ImageReward.pt`` and ``med_config.json``.
        timeout: seconds for a whole set. Default an hour.

    Raises:
        ValueError: when there is no such interpreter or folder.
    """
    name = "image_reward"
    options = {"weights": str(_folder(name, weights))}
    tool = Tool(name, _interpreter(name, python), IMAGE_REWARD, _write_frames, timeout, options, needs_prompt=True)
    return tool.metric(higher_is_better=True)


def vbench(dimension: str, python: str, weights: str | os.PathLike[str], timeout: float = 3600.0) -> SetMetric:
    """The metric ``vbench_DIMENSION`` (Huang et al. 2024), as VBench 0.1.5 judges clips of one's own prompts.

    Args:
        dimension: of ``DIMENSIONS``.
        python: an interpreter with the package vbench.
        weights: VBench's cache folder, with all that the dimension needs.
        timeout: seconds for a whole set. Default an hour.

    Raises:
        ValueError: for another dimension, or when there is no such interpreter or folder.
    """
    if dimension not in DIMENSIONS:
        raise ValueError(f"vbench's dimension must be one of {', '.join(DIMENSIONS)}, got {dimension!r}.")
    name, options = f"vbench_{dimension}", {"dimension": dimension}
    environment = {"VBENCH_CACHE_DIR": str(_folder(name, weights))}
    with_prompt = dimension in _WITH_PROMPT
    tool = Tool(name, _interpreter(name, python), VBENCH, _write_clip, timeout, options, with_prompt, environment)
    return tool.metric(DIMENSIONS[dimension])


@dataclass(frozen=True)
class Tool:
    """A package that judges a set of clips in a process of its own.

    Args:
        name: of the metric.
        python: the interpreter.
        driver: its program. It runs in the temporary folder, reads ``job.json`` (``options``, and of each clip its
            ``files`` and its ``prompt``) and writes ``answer.json`` (``value`` of the set, ``values`` of the clips).
        write: writes a clip and returns its files; the path it is given has no suffix.
        timeout: seconds.
        options: for the driver.
        needs_prompt: whether each clip must bring its prompt. Default False.
        environment: variables of the process. Default: none more.
    """

    name: str
    python: str
    driver: str
    write: Callable[[Path, Tensor], list[Path]]
    timeout: float
    options: Mapping[str, Any]
    needs_prompt: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.timeout, (int, float)) or self.timeout <= 0:
            raise ValueError(f"{self.name} needs a timeout in seconds, above 0, got {self.timeout!r}.")

    def metric(self, higher_is_better: bool | None) -> SetMetric:
        """The metric of a set that this tool computes."""
        return SetMetric(self.name, higher_is_better, unit="", dependencies=(), start=lambda: OutsideJudge(self))


class OutsideJudge:
    """Accumulator of clips for a tool; ``result`` runs it and ends the accumulator.

    Args:
        tool: that judges.
    """

    def __init__(self, tool: Tool) -> None:
        self._tool = tool
        self._folder = TemporaryDirectory(prefix="dit_accel-")
        self._clips: list[dict[str, Any]] = []

    def add(self, frames: Tensor, reference: Tensor | None, prompt: str | None = None) -> None:
        """One clip, float [T, H, W, 3] in [0, 1], and its prompt; the reference is not looked at."""
        path = Path(self._folder.name) / "clips" / f"{len(self._clips):05d}"
        path.parent.mkdir(exist_ok=True)
        files = [file.relative_to(self._folder.name).as_posix() for file in self._tool.write(path, frames)]
        self._clips.append({"files": files, "prompt": prompt})

    def result(self) -> SetScore:
        """What the tool says of all clips, or why it says nothing."""
        name, count = self._tool.name, len(self._clips)
        with self._folder as folder:
            if not self._clips:
                return SetScore(None, skipped=f"{name} needs clips.")
            if self._tool.needs_prompt and any(clip["prompt"] is None for clip in self._clips):
                return SetScore(None, skipped=f"{name} needs the prompt of every clip.", samples=count)
            job = {"clips": self._clips, "options": self._tool.options}
            Path(folder, "job.json").write_text(json.dumps(job))
            reason = _run(self._tool, Path(folder))
            if reason:
                return SetScore(None, skipped=f"{name} gave no score: {reason}", samples=count)
            path = Path(folder, "answer.json")
            if not path.is_file():
                return SetScore(None, skipped=f"{name} gave no score: its driver wrote no answer.", samples=count)
            answer = json.loads(path.read_text())
        return SetScore(float(answer["value"]), tuple(map(float, answer["values"])), samples=count)


def _run(tool: Tool, folder: Path) -> str | None:
    """Runs the driver; why it failed, else None."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    with (folder / "errors.txt").open("wb") as errors:
        process = subprocess.Popen(
            [tool.python, "-c", tool.driver],
            cwd=folder,
            env=inherited | _OFFLINE | dict(tool.environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,  # so that what it started ends with it
        )
        try:
            code = process.wait(tool.timeout)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return f"{tool.python} took longer than {tool.timeout:g} s."
    if code == 0:
        return None
    lines = (folder / "errors.txt").read_text(errors="replace").splitlines()
    said = [line.strip() for line in lines if line.strip()]
    return said[-1] if said else f"{tool.python} ended with exit code {code}."


def _write_frames(path: Path, frames: Tensor) -> list[Path]:
    """Evenly spaced frames as PNG files."""
    places = torch.linspace(0, len(frames) - 1, min(len(frames), _FRAMES)).round().long()
    files = []
    for number, frame in enumerate(as_uint8(frames[places.to(frames.device)])):
        files.append(path.with_name(f"{path.name}-{number}.png"))
        Image.fromarray(frame).save(files[-1], compress_level=1)
    return files


def _write_clip(path: Path, frames: Tensor) -> list[Path]:
    file = path.with_suffix(".mp4")
    write_lossless_mp4(file, frames)
    return [file]


def _interpreter(metric: str, python: str) -> str:
    found = shutil.which(os.path.expanduser(str(python)))
    if found is None:
        raise ValueError(f"{metric} needs the interpreter {python}, which cannot be run; correct the option python.")
    return os.path.abspath(found)  # links stay: a virtual environment is known by the path of its interpreter


def _folder(metric: str, path: str | os.PathLike[str]) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{metric} needs its weights in the folder {path}, which does not exist; correct the option.")
    return folder.absolute()
