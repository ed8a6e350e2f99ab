"""Loading a pipeline and running it once, timed: the part of the commands that knows diffusers' pipelines."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dit_accel.eval.fidelity import Fidelity, gather
from dit_accel.eval.quality import Score
from dit_accel.eval.records import Job, Timings
from dit_accel.eval.speed import StepClock, interquartile_range, measure
from dit_accel.layout import TokenLayout
from dit_accel.methods import make_method
from dit_accel.methods.base import AttnMethod
from dit_accel.methods.dit_fast_attn import DiTFastAttnProcessor
from dit_accel.pipelines.embedded import EMBEDDED, Call, Embedded
from dit_accel.pipelines.shapes.verifier import score_clip
from dit_accel.pipelines.specs import ModelSpec, spec_of
from dit_accel.plugin import apply

Frames = np.ndarray[Any, np.dtype[Any]]
OnStep = Callable[[int, Tensor], None]  # number of the denoising step that has ended, latents [B, ...]

PROMPT_SCORES = ("prompt_accuracy", "clip_correct")
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
        executed: share of query-key pairs that a sparse call computes, the mean over them; 1.0 without any.
        density: that of all calls of those layers, dense ones included.
        peak_memory: bytes on the GPU, None on the CPU.
    """

    frames: Frames
    denoise: float
    step_seconds: tuple[float, ...]
    attention: float
    total: float
    executed: float
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

    @property
    def embedded(self) -> Embedded | None:
        """The embedded pipeline that this is or is tuned from; a verifier reads what it makes."""
        return EMBEDDED.get(self.spec.name)

    @property
    def call(self) -> Call:
        """How the pipeline is called."""
        return self.embedded.call if self.embedded else Call()

    def layout(self, request: Request) -> TokenLayout:
        return self.spec.layout(request.height, request.width, request.num_frames)

    def request(self, sizes: Any, prompt: str | None, seed: int) -> Request:
        """A request; the attributes height, width, num_frames, steps and guidance of ``sizes`` that are None are the
        model's own.

        Raises:
            ValueError: a size the model cannot make, or no prompt for a model that has no own.
        """
        spec = self.spec
        if prompt is None:
            if self.name not in EMBEDDED:
                raise ValueError(f"{self.name} needs a prompt; pass --prompt.")
            prompt = EMBEDDED[self.name].prompts[0]
        given = {name: value for name in _SIZES if (value := getattr(sizes, name)) is not None}
        request = Request(prompt, seed, **{name: given.get(name, getattr(spec, name)) for name in _SIZES})
        if request.steps < 1:
            raise ValueError(f"--steps must be at least 1, got {request.steps}.")
        self.layout(request)
        return request

    def flops(self, request: Request) -> float:
        """Floating-point operations of denoising one request with dense attention."""
        layout, calls = self.layout(request), self.spec.guidance_calls if request.guidance > 1 else 1
        return request.steps * calls * (self.spec.linear_flops(layout) + self.spec.attention_flops(layout))

    def job(self, method: AttnMethod, request: Request, backend: str, **place: str) -> Job:
        """What identifies the record of one request run with one method; ``place`` tells equal requests apart."""
        run_settings = {"dtype": str(self.pipe.transformer.dtype), "backend": backend, "device": self.device.type}
        return Job(
            method=method.name,
            model=self.name,
            prompt=request.prompt,
            seed=request.seed,
            size=(request.num_frames, request.height, request.width),
            steps=request.steps,
            guidance=request.guidance,
            options=method.options() | run_settings | place,
        )

    def prompt_scores(self, clip: Frames, prompt: str) -> dict[str, Score]:
        """How much of the prompt a uint8 clip shows: the share of its objects, and whether all of it is right."""
        try:
            if self.embedded is None:
                raise ValueError("the model brings no verifier.")
            seen = score_clip(clip, prompt, self.embedded.language)
        except ValueError as error:
            return {name: Score(None, skipped=str(error)) for name in PROMPT_SCORES}
        share = seen.objects / (seen.wanted + seen.extra)  # of everything wanted or extra, what is wanted and right
        values = (share, float(seen.correct))
        return {name: Score(value, (value,)) for name, value in zip(PROMPT_SCORES, values, strict=True)}


def load(name: str, device: str | None = None, dtype: str | None = None) -> Model:
    """An embedded pipeline, a pipeline folder or a hub model.

    Raises:
        ValueError: a name that is none of these, or a pipeline that cannot be loaded or has no supported denoiser.
    """
    target = target_device(device)
    kind: torch.dtype = getattr(torch, dtype or ("bfloat16" if target.type == "cuda" else "float32"))
    if name in EMBEDDED:
        pipe = EMBEDDED[name].load(kind, target)
    else:
        pipe = _load_diffusers(name, kind).to(target)
    return Model(name, pipe, spec_of(pipe))


def target_device(name: str | None) -> torch.device:
    """The device of that name, or the one to take here.

    Raises:
        ValueError: no name of a device, or a GPU that torch does not see.
    """
    try:
        target = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"--device must be cpu, cuda or cuda:NUMBER, got {name!r}.") from error
    gpus = torch.cuda.device_count()
    if target.type == "cuda" and gpus == 0:
        raise ValueError(f"--device {target} needs an NVIDIA GPU, and torch sees none; use --device cpu.")
    if target.type == "cuda" and target.index is not None and target.index >= gpus:
        raise ValueError(f"--device {target} is not among the GPUs that torch sees, of which the last is {gpus - 1}.")
    return target


def _load_diffusers(name: str, dtype: torch.dtype) -> Any:
    from diffusers import DiffusionPipeline

    if not Path(name).is_dir() and name.count("/") != 1:
        near = difflib.get_close_matches(name, EMBEDDED, n=1)
        instead = f"did you mean {near[0]!r}" if near else "use shapes, a pipeline folder or a hub id owner/name"
        raise ValueError(f"there is no model {name!r}; {instead}.")
    try:
        return DiffusionPipeline.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError, AttributeError) as error:  # the last: a pipeline class that diffusers does not have
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{name!r} could not be loaded ({reason}); check the id, the network or the folder."
        ) from error


def generate(
    model: Model,
    request: Request,
    method: AttnMethod,
    backend: Any,
    progress: bool = True,
    output_type: Literal["np", "latent"] = "np",
    on_step: OnStep | None = None,
) -> Generation:
    """Runs the pipeline once with ``method`` applied, and takes it out again; its frames may be the final latents.

    ``on_step`` is called at the end of each step; what it raises ends the run, and the pipeline is as it was before.
    """
    pipe, device = model.pipe, model.device
    pipe.set_progress_bar_config(disable=not progress, desc=method.name.rjust(12), leave=True)
    clock, outputs = StepClock(device), []
    hook = pipe.transformer.register_forward_pre_hook(clock.start)
    try:
        with apply(pipe, method, backend=backend) as handle, handle.timing() as tally:
            handle.prepare(model.layout(request), device)
            arguments = call_arguments(model, request) | step_end(clock, on_step) | {"output_type": output_type}
            whole = measure(lambda: outputs.append(pipe(**arguments)[0][0]), warmup=0, runs=1, device=device)
    finally:
        hook.remove()
    frames = torch.as_tensor(outputs[0]).float().cpu().numpy()
    return Generation(
        frames=frames if frames.ndim == 4 else frames[None],
        denoise=clock.denoise_seconds,
        step_seconds=clock.step_seconds,
        attention=tally.attention_seconds,
        total=whole.median,
        executed=tally.sparse_density,
        density=tally.density,
        peak_memory=whole.peak_memory,
    )


def timings_of(generations: Sequence[Generation], warmup: float) -> Timings:
    """Timings of repeated runs of one request, after so many seconds of warming up."""
    denoise = [generation.denoise for generation in generations]
    median = statistics.median(denoise)
    typical = min(generations, key=lambda generation: abs(generation.denoise - median))
    timings = Timings(
        denoise=median,
        denoise_iqr=interquartile_range(denoise),
        attention=statistics.median(generation.attention for generation in generations),
        total=statistics.median(generation.total for generation in generations),
        warmup=warmup,
        steps=list(typical.step_seconds),
        runs=len(generations),
        warmup_runs=1,
    )
    peaks = [generation.peak_memory for generation in generations if generation.peak_memory is not None]
    return timings | Timings(peak_memory_bytes=max(peaks)) if peaks else timings


def probe(model: Model, request: Request, method: AttnMethod, backend: Any) -> Fidelity | None:
    """How far the method's attention is from dense attention in one run, untimed; None where every call is dense.

    Raises:
        ValueError: a plan.
    """
    model.pipe.set_progress_bar_config(disable=True)
    with apply(model.pipe, method, backend=backend) as handle, handle.probing() as calls:
        model.pipe(**call_arguments(model, request) | {"output_type": "latent"})
    found = gather(calls, blocks=model.spec.num_blocks, steps=request.steps)
    return found[0] if found else None


def check_steps(model: Model) -> None:
    """Raise a ValueError for a pipeline that calls back at no step."""
    if "callback_on_step_end" not in inspect.signature(model.pipe.__call__).parameters:
        raise ValueError(
            f"{type(model.pipe).__name__} calls back at no step, which timing and the latents of each step need; "
            "use dit_accel.apply in a script."
        )


def step_end(clock: StepClock | None, on_step: OnStep | None) -> dict[str, Any]:
    """Arguments of a pipeline's call: what it calls at the end of each step, where there is something to call."""
    if clock is None and on_step is None:
        return {}

    def ended(pipe: object, step: int, timestep: object, tensors: dict[str, Any]) -> dict[str, Any]:
        if clock is not None:
            clock(pipe, step, timestep, tensors)
        if on_step is not None:
            on_step(step, tensors["latents"])
        return tensors

    return {"callback_on_step_end": ended, "callback_on_step_end_tensor_inputs": ["latents"]}


def warm_up(model: Model, request: Request, method: AttnMethod, backend: Any) -> float:
    """One denoising step at full size with the method on from the first; seconds, kernels and tiles included.

    Of a plan each method that it names, since a single step of it would be full.

    Raises:
        ValueError: a pipeline that calls back at no step.
    """
    check_steps(model)
    if isinstance(method, DiTFastAttnProcessor):
        named = method.methods() or (make_method("dense"),)
        return sum(warm_up(model, request, each, backend) for each in named)
    always = dataclasses.replace(method, start_percent=0.0, end_percent=1.0, dense_blocks=0)
    model.pipe.set_progress_bar_config(disable=True)
    clock = StepClock(model.device)
    clock.start()
    with apply(model.pipe, always, backend=backend):
        model.pipe(**call_arguments(model, request) | step_end(clock, None) | {"num_inference_steps": 1})
    return clock.denoise_seconds


def call_arguments(model: Model, request: Request, *others: Request) -> dict[str, Any]:
    """The arguments of one call of the pipeline, for a request or several that differ in prompt and seed alone."""
    requests = [request, *others]
    arguments: dict[str, Any] = {
        "prompt": [request.prompt for request in requests],
        "height": request.height,
        "width": request.width,
        "num_inference_steps": request.steps,
        "generator": [torch.Generator("cpu").manual_seed(request.seed) for request in requests],
        "output_type": "np",
    }
    if model.spec.num_frames > 1:
        arguments["num_frames"] = request.num_frames
    return arguments | model.call.of(request.guidance, len(requests))
