"""Generating for the demo: one run at a time on the device, watched step by step, stopped at the next one."""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dit_accel.commands.arguments import method_call
from dit_accel.commands.models import Frames, Generation, Model, Request, generate, load, target_device, warm_up
from dit_accel.commands.scripts import command_of, script_of
from dit_accel.demo.line import Line, Place
from dit_accel.eval.frames import as_uint8
from dit_accel.eval.quality import Score, measure
from dit_accel.methods.base import AttnMethod
from dit_accel.tuned_plan import method_for

METRICS = ("psnr", "ssim", "flicker_gap")
KEPT_BYTES = 512 * 2**20  # of dense results, the latest ones


class Stopped(Exception):
    """The run was cancelled; the pipeline is as it was before."""


@dataclass(frozen=True)
class Limits:
    """The most that one visitor may ask for.

    Args:
        side: pixels of height or width.
        frames: of a clip.
        steps: denoising steps.
        prompt: characters.
        tokens: of one attention call.
    """

    side: int = 2048
    frames: int = 129
    steps: int = 100
    prompt: int = 600
    tokens: int = 150_000

    def check(self, wanted: Wanted) -> None:
        """Raise a ValueError for what is beyond the limits; the pipeline judges the rest."""
        asked = {
            "height": (wanted.height, self.side, "pixels"),
            "width": (wanted.width, self.side, "pixels"),
            "frames": (wanted.num_frames, self.frames, "frames"),
            "steps": (wanted.steps, self.steps, "steps"),
            "prompt": (len(wanted.prompt.strip()), self.prompt, "characters"),
        }
        for name, (value, most, unit) in asked.items():
            if value is not None and not 1 <= value <= most:
                raise ValueError(f"{name} must be between 1 and {most} {unit}, got {value}; choose one in between.")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A comparison.

    Args:
        model: name.
        prompt: text.
        seed: of the initial noise.
        methods: of the left side, which the right one is compared with, and of the right side.
        height, width: pixels. Default None: the model's own, as for the others.
        num_frames: of a clip.
        steps: denoising steps.
        guidance: guidance scale.
    """

    model: str
    prompt: str
    seed: int
    methods: tuple[AttnMethod, AttnMethod]
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    steps: int | None = None
    guidance: float | None = None


@dataclass(frozen=True)
class Progress:
    """Where a comparison is.

    Args:
        side: 0 left, 1 right.
        step: denoising steps done.
        steps: of how many.
        note: what it does at the moment, in words.
    """

    side: int
    step: int
    steps: int
    note: str


@dataclass(frozen=True, eq=False)
class Made:
    """One side of a comparison.

    Args:
        call: the method as commands take it.
        frames: uint8 [T, H, W, 3].
        denoise, attention, total: seconds.
        density: share of query-key pairs computed over the run.
        scores: of the prompt, where the model has a verifier.
        reused: whether this is an earlier result of the same request.
        script, command: what makes it again.
    """

    call: str
    frames: Frames
    denoise: float
    attention: float
    total: float
    density: float
    scores: dict[str, Score]
    reused: bool
    script: str
    command: str


@dataclass(frozen=True, eq=False)
class Comparison:
    """Both sides, and the right one's distance to the left one by metric."""

    wanted: Wanted
    sides: tuple[Made, Made]
    quality: dict[str, Score]

    @property
    def speedup(self) -> float:
        """Denoise time of the left side over that of the right side."""
        return self.sides[0].denoise / self.sides[1].denoise


def turn(line: Line, place: Place, stop: threading.Event) -> Iterator[str]:
    """Waits until a place is the first in line, and says how many are before.

    Raises:
        Stopped: after ``stop`` was set.
    """
    while before := place.before:
        if stop.is_set():
            raise Stopped
        yield f"waiting, {before} {'run' if before == 1 else 'runs'} before this one"
        line.wait(1.0)


class Workshop:
    """Models in memory, and the one run that a device does at a time.

    Args:
        models: names that may be asked for.
        device: "cuda" or "cpu"; default a GPU where there is one.
        limits: of what may be asked. Default: ``Limits()``, with 24,000 tokens on a CPU.

    ``line`` is where every use of the device waits for its turn.
    """

    def __init__(self, models: Sequence[str], device: str | None = None, limits: Limits | None = None) -> None:
        self.models = tuple(models)
        self.device = target_device(device)
        self.limits = limits or (Limits() if self.device.type == "cuda" else Limits(tokens=24_000))
        self.line = Line()  # whoever is first in it may use a pipeline
        self._loaded: dict[str, Model] = {}
        self._warm: set[str] = set()
        self._kept: OrderedDict[str, Made] = OrderedDict()

    def compare(self, wanted: Wanted, stop: threading.Event) -> Iterator[Progress | Comparison]:
        """Runs both sides; the last thing that it yields is the comparison.

        Closing the iterator stops the run at its next step, as setting ``stop`` does.

        Raises:
            ValueError: a model that is not offered, a request that the limits, the pipeline or a method refuse.
            Stopped: after ``stop`` was set.
        """
        self.check_model(wanted.model)
        self.limits.check(wanted)
        with self.line.join() as place:
            yield from (Progress(0, 0, 1, note) for note in turn(self.line, place, stop))
            yield Progress(0, 0, 1, f"loading {wanted.model}")
            model = self._model(wanted.model)
            request = model.request(wanted, wanted.prompt, wanted.seed)
            methods = [self._checked(model, request, method) for method in wanted.methods]
            left = yield from self._make(model, request, methods[0], 0, stop)
            right = yield from self._make(model, request, methods[1], 1, stop)
        yield Comparison(wanted, (left, right), measure(right.frames, left.frames, METRICS))

    def check_model(self, name: str) -> None:
        """Raise a ValueError for a model that is not offered."""
        if name not in self.models:
            raise ValueError(f"model must be one of {', '.join(self.models)}, got {name!r}.")

    def _model(self, name: str) -> Model:
        if name not in self._loaded:
            self._loaded[name] = load(name, str(self.device))
        return self._loaded[name]

    def _checked(self, model: Model, request: Request, method: AttnMethod) -> AttnMethod:
        """The method, if it can serve the request."""
        layout = model.layout(request)
        if layout.num_tokens > self.limits.tokens:
            raise ValueError(
                f"this size makes {layout.num_tokens:,} tokens, and {self.limits.tokens:,} are the most here; "
                "choose a smaller size or fewer frames."
            )
        method = method_for(model.pipe, method)
        method.attention(layout)
        return method

    def _make(
        self, model: Model, request: Request, method: AttnMethod, side: int, stop: threading.Event
    ) -> Generator[Progress, None, Made]:
        key = model.job(method, request, "auto").key
        if key in self._kept:
            self._kept.move_to_end(key)
            return replace(self._kept[key], reused=True)
        steps: queue.Queue[int | Generation | BaseException] = queue.Queue()

        def on_step(step: int, latents: Any) -> None:
            if stop.is_set():
                raise Stopped
            steps.put(step + 1)

        def work() -> None:
            try:
                if key not in self._warm:
                    warm_up(model, request, method, "auto")
                    self._warm.add(key)
                if stop.is_set():
                    raise Stopped
                steps.put(generate(model, request, method, "auto", progress=False, on_step=on_step))
            except BaseException as error:  # raised again where the run is waited for
                steps.put(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield Progress(side, 0, request.steps, f"{method.name}: warming up")
            while True:
                news = steps.get()
                if isinstance(news, BaseException):
                    raise news
                if isinstance(news, Generation):
                    break
                yield Progress(side, news, request.steps, f"{method.name}: step {news} of {request.steps}")
        except BaseException:  # a failure, or the visitor has gone
            stop.set()
            raise
        finally:
            thread.join()
        made = self._made(model, request, method, news)
        if method.name == "dense":
            self._keep(key, made)
        return made

    def _made(self, model: Model, request: Request, method: AttnMethod, run: Generation) -> Made:
        frames = as_uint8(run.frames, f"the output of {method.name}")
        return Made(
            call=method_call(method),
            frames=frames,
            denoise=run.denoise,
            attention=run.attention,
            total=run.total,
            density=run.density,
            scores=model.prompt_scores(frames, request.prompt),
            reused=False,
            script=script_of(method, request, model),
            command=command_of(method, request, model),
        )

    def _keep(self, key: str, made: Made) -> None:
        self._kept[key] = made
        while sum(kept.frames.nbytes for kept in self._kept.values()) > KEPT_BYTES:
            self._kept.popitem(last=False)
