"""Loading a pipeline and running it once, timed: the part of the commands that knows diffusers' pipelines."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_accel.eval.quality import Metric, prompt_accuracy
from dit_accel.eval.speed import StepClock, measure
from dit_accel.layout import TokenLayout
from dit_accel.methods.base import AttnMethod
from dit_accel.pipelines import shapes
from dit_accel.pipelines.shapes.scenes import parse_caption
from dit_accel.pipelines.shapes.verifier import ClipScore, score_clip
from dit_accel.pipelines.specs import ModelSpec, spec_of
from dit_accel.plugin import apply

Frames = np.ndarray[Any, np.dtype[Any]]

EMBEDDED = "shapes"
_SIZES = ("height", "width", "num_frames", "steps", "guidance")  # of a request, defaults of a spec


@dataclass(frozen=True)
class Request:
    """One generation: what is asked of a pipeline. Sizes in pixels; ``num_frames`` is 1 for an image."""

    prompt: str
    seed: int
    height: int
    width: int
    num_frames: int
    steps: int
    guidance: float


@dataclass(frozen=True)
class Generation:
    """One finished run.

    Args:
        frames: float32 [T, H, W, 3] in [0, 1].
        denoise: seconds of the denoising loop.
        step_seconds: seconds of each step.
        attention: seconds within, in the attention layers that the method replaces.
        total: seconds of the whole call, text encoder and VAE included.
        density: share of query-key pairs computed, the mean over those layers and all steps.
        peak_memory: bytes on the GPU, None on the CPU.
    """

    frames: Frames
    denoise: float
    step_seconds: tuple[float, ...]
    attention: float
    total: float
    density: float
    peak_memory: int | None


@dataclass(frozen=True)
class Model:
    """A loaded pipeline with its shape."""

    name: str
    pipe: Any
    spec: ModelSpec

    @property
    def device(self) -> torch.device:
        return torch.device(self.pipe.device)

    def layout(self, request: Request) -> TokenLayout:
        return self.spec.layout(request.height, request.width, request.num_frames)

    def request(self, options: argparse.Namespace) -> Request:
        """The request of a command line, the model's defaults where it says nothing.

        Raises:
            ValueError: a size the model cannot make, or no prompt for a model that has no own.
        """
        spec, embedded = self.spec, self.name == EMBEDDED
        if options.prompt is None and not embedded:
            raise ValueError(f"{self.name} needs a prompt; pass --prompt.")
        given = {name: value for name in _SIZES if (value := getattr(options, name)) is not None}
        request = Request(
            prompt=shapes.EXAMPLE_PROMPTS[0] if options.prompt is None else options.prompt,
            seed=options.seed,
            **{name: given.get(name, getattr(spec, name)) for name in _SIZES},
        )
        if request.steps < 1:
            raise ValueError(f"--steps must be at least 1, got {request.steps}.")
        self.layout(request)
        return request

    def judge(self, prompt: str) -> Metric | None:
        """How much of the prompt a clip shows, where the model brings a verifier that can read it."""
        if self.name != EMBEDDED:
            return None
        try:
            parse_caption(prompt)
        except ValueError:
            return None
        return prompt_accuracy(lambda clip: _share_shown(score_clip(clip.numpy(), prompt)))


def load(name: str, device: str | None = None, dtype: str | None = None) -> Model:
    """The embedded pipeline, a pipeline folder or a hub model.

    Raises:
        ValueError: a name that is none of these, or a pipeline that cannot be loaded or has no supported denoiser.
    """
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs an NVIDIA GPU, and torch sees none; use --device cpu.")
    kind: torch.dtype = getattr(torch, dtype or ("bfloat16" if target.type == "cuda" else "float32"))
    if name == EMBEDDED:
        pipe = shapes.load(kind, target)
    else:
        pipe = _load_diffusers(name, kind).to(target)
    return Model(name, pipe, spec_of(pipe))


def _load_diffusers(name: str, dtype: torch.dtype) -> Any:
    from diffusers import DiffusionPipeline

    if not Path(name).is_dir() and name.count("/") != 1:
        near = difflib.get_close_matches(name, [EMBEDDED], n=1)
        instead = f"did you mean {near[0]!r}" if near else "use shapes, a pipeline folder or a hub id owner/name"
        raise ValueError(f"there is no model {name!r}; {instead}.")
    try:
        return DiffusionPipeline.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{name!r} could not be loaded ({reason}); check the id, the network or the folder."
        ) from error


def generate(model: Model, request: Request, method: AttnMethod, backend: Any, progress: bool = True) -> Generation:
    """Runs the pipeline once with ``method`` applied, and takes it out again."""
    pipe, device = model.pipe, model.device
    pipe.set_progress_bar_config(disable=not progress, desc=method.name.rjust(12), leave=True)
    clock, outputs = StepClock(device), []
    hook = pipe.transformer.register_forward_pre_hook(clock.start)
    try:
        with apply(pipe, method, backend=backend) as handle, handle.timing() as tally:
            arguments = _arguments(model, request) | {"callback_on_step_end": clock}
            whole = measure(lambda: outputs.append(pipe(**arguments)[0][0]), warmup=0, runs=1, device=device)
    finally:
        hook.remove()
    frames = np.asarray(outputs[0], dtype=np.float32)
    return Generation(
        frames=frames if frames.ndim == 4 else frames[None],
        denoise=clock.denoise_seconds,
        step_seconds=clock.step_seconds,
        attention=tally.attention_seconds,
        total=whole.median,
        density=tally.density,
        peak_memory=whole.peak_memory,
    )


def _share_shown(score: ClipScore) -> float:
    """Of everything wanted or extra in a clip, the share that is a wanted object with everything right."""
    return score.objects / (score.wanted + score.extra)


def warm_up(model: Model, request: Request, method: AttnMethod, backend: Any) -> float:
    """One denoising step at full size with the method on from the first; seconds, kernels and plan included."""
    always = dataclasses.replace(method, start_percent=0.0, end_percent=1.0, dense_blocks=0)
    model.pipe.set_progress_bar_config(disable=True)
    clock = StepClock(model.device)
    clock.start()
    with apply(model.pipe, always, backend=backend):
        arguments = _arguments(model, request) | {"num_inference_steps": 1, "output_type": "latent"}
        model.pipe(**arguments, callback_on_step_end=clock)
    return clock.denoise_seconds


def _arguments(model: Model, request: Request) -> dict[str, Any]:
    """The pipeline call's arguments."""
    arguments: dict[str, Any] = {
        "prompt": request.prompt,
        "height": request.height,
        "width": request.width,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance,
        "generator": torch.Generator("cpu").manual_seed(request.seed),
        "output_type": "np",
    }
    if model.spec.num_frames > 1:
        arguments["num_frames"] = request.num_frames
    if model.name == EMBEDDED:
        arguments["max_sequence_length"] = shapes.DEFAULT_TEXT_LENGTH
    return arguments
