"""The Compare tab: one prompt and seed under two kinds of attention, side by side."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
from PIL import Image

from dit_accel.commands.arguments import parse_method
from dit_accel.demo import pictures
from dit_accel.demo.controls import LONG, QUICK, method_controls, refused_as_toast
from dit_accel.demo.knobs import knobs_of, method_from
from dit_accel.demo.sessions import Session, Sessions
from dit_accel.demo.workshop import Comparison, Progress, Stopped, Wanted, Workshop
from dit_accel.eval.report.markup import element
from dit_accel.methods import METHODS
from dit_accel.pipelines.embedded import EMBEDDED
from dit_accel.pipelines.specs import SPECS

LARGEST_SEED = 2**31 - 1
WHAT = (
    "Press Compare or an example: both sides are made from the same prompt and noise, one after the other. Then the "
    "clips, their difference, times and figures stand here. An example takes about a minute on two CPU cores."
)
COMPARE, COMPARING = "Compare", "Comparing …"
# On a phone the results lie below the form: a run shows where it is.
_SHOW_PROGRESS = """(...values) => {
  if (matchMedia('(max-width: 700px)').matches) document.querySelector('#progress').scrollIntoView();
  return values;
}"""


@dataclass(frozen=True)
class Example:
    """A comparison that takes a CPU less than two minutes."""

    title: str
    model: str
    prompt: str
    size: tuple[int, int, int]  # frames, height, width
    steps: int
    method: str


EXAMPLES = (
    Example("Video: draft", "shapes", EMBEDDED["shapes"].prompts[1], (17, 192, 256), 10, "draft"),
    Example(
        "Image: neighborhood", "shapes-image", EMBEDDED["shapes-image"].prompts[0], (1, 512, 512), 12, "neighborhood"
    ),
    Example("Video: reused steps", "shapes", EMBEDDED["shapes"].prompts[1], (17, 192, 256), 10, "dit_fast_attn"),
)


@dataclass(frozen=True)
class Fields:
    """The controls outside the methods, in the order in which ``wanted`` takes their values."""

    model: gr.Dropdown
    prompt: gr.Textbox
    seed: gr.Number
    random_seed: gr.Checkbox
    height: gr.Number
    width: gr.Number
    num_frames: gr.Number
    steps: gr.Number
    guidance: gr.Number
    left: gr.Dropdown
    right: gr.Dropdown

    def all(self) -> list[Any]:
        return list(vars(self).values())


@dataclass(frozen=True)
class Results:
    """What a comparison fills."""

    progress: gr.HTML
    panel: gr.Column
    figures: gr.HTML
    times: gr.HTML
    clips: gr.HTML
    frame: gr.Slider
    slider: gr.ImageSlider
    script: gr.Code
    command: gr.Code
    history: gr.Dropdown

    def all(self) -> list[Any]:
        return list(vars(self).values())


def compare_tab(workshop: Workshop, sessions: Sessions) -> None:
    """Builds the tab inside the blocks that are open."""
    examples = [example for example in EXAMPLES if example.model in workshop.models]
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            gr.HTML(element("p", "Try one of these, or set up your own:", class_="dit-quiet"), elem_classes="dit-bare")
            with gr.Row(elem_classes="dit-examples"):
                buttons = [gr.Button(example.title, size="sm", min_width=130) for example in examples]
            fields = _fields(workshop)
            settings = gr.Column()
            with gr.Row(elem_classes="dit-actions"):
                run = gr.Button(COMPARE, variant="primary", min_width=120, elem_id="run")
                cancel = gr.Button("Cancel", variant="stop", min_width=120, elem_id="cancel")
        with gr.Column(scale=3, min_width=300):
            results = _results()
    outputs = [*results.all(), *fields.all(), run]

    def compare(wanted: Wanted, request: gr.Request) -> Iterator[dict[Any, Any]]:
        session = sessions.of(request.session_hash)
        stop = refused_as_toast(session.begin)
        try:
            yield {run: gr.Button(COMPARING), results.progress: pictures.progress_bar(Progress(0, 0, 1, "starting"))}
            yield from _compared(workshop.compare(wanted, stop), session, fields, results)
            yield {run: gr.Button(COMPARE)}
        except Exception:  # said in a toast; the page rests whatever it was
            yield {run: gr.Button(COMPARE), results.progress: pictures.notice("Nothing was run.")}
            raise
        finally:
            sessions.done(session)

    with settings:

        @gr.render(inputs=[fields.model, fields.left, fields.right])
        def knobs(model: str, left: str, right: str) -> None:
            controls = []
            for side, method in (("left", left), ("right", right)):
                with gr.Accordion(f"Settings of the {side} side: {method}", open=False):
                    controls += method_controls(model, method)
            names = [[knob.name for knob in knobs_of(method)] for method in (left, right)]

            def compare_wanted(request: gr.Request, *values: Any) -> Iterator[dict[Any, Any]]:
                given, settings = values[: len(fields.all())], iter(values[len(fields.all()) :])
                sides = [{name: next(settings) for name in side} for side in names]
                yield from compare(refused_as_toast(_wanted, given, sides), request)

            inputs = [*fields.all(), *controls]
            gr.on([run.click, fields.prompt.submit], compare_wanted, inputs, outputs, js=_SHOW_PROGRESS, **LONG)

    for button, example in zip(buttons, examples, strict=True):

        def try_out(request: gr.Request, example: Example = example) -> Iterator[dict[Any, Any]]:
            yield _filled(fields, example)
            yield from compare(_example(example), request)

        button.click(try_out, outputs=outputs, js=_SHOW_PROGRESS, **LONG)
    _follow(sessions, fields, results, cancel)


def _fields(workshop: Workshop) -> Fields:
    """The controls, filled with the first model's own settings."""
    first, limits = workshop.models[0], workshop.limits
    # Events fill them too, which would make them read-only; two long names stand below each other on a phone.
    own: dict[str, Any] = {"interactive": True, "min_width": 180}
    model = gr.Dropdown(workshop.models, value=first, label="Model", info="what generates", **own)
    prompt = gr.Textbox(
        _prompt(first), label="Prompt", info="what to show", max_length=limits.prompt, lines=2, elem_id="prompt", **own
    )
    with gr.Accordion("Size, steps and seed", open=False):
        defaults = _defaults(first)
        infos = ("pixels", "pixels", "1: an image", "of denoising", "hold on the prompt")
        with gr.Row():
            numbers = [_number(name, value, info) for name, value, info in zip(_NUMBERS, defaults, infos, strict=True)]
            seed = _number("Seed", 0, "of the first noise")
        gr.HTML(element("p", "0 means the model's own value.", class_="dit-quiet"), elem_classes="dit-bare")
        random_seed = gr.Checkbox(False, label="Another seed each time", **own)
    with gr.Row():
        methods = [*METHODS]
        left = gr.Dropdown(methods, value="dense", label="Left", info="the reference", elem_id="left-method", **own)
        right = gr.Dropdown(methods, value="draft", label="Right", info="compared to it", elem_id="right-method", **own)
    height, width, num_frames, steps, guidance = numbers
    return Fields(model, prompt, seed, random_seed, height, width, num_frames, steps, guidance, left, right)


_NUMBERS = ("Height", "Width", "Frames", "Steps", "Guidance")


def _number(name: str, value: float, info: str) -> gr.Number:
    whole = None if name == "Guidance" else 0
    return gr.Number(
        value, label=name, info=info, precision=whole, minimum=0, min_width=96, interactive=True, elem_id=name.lower()
    )


def _results() -> Results:
    progress = gr.HTML(pictures.empty("Nothing compared yet", WHAT), elem_id="progress", padding=True)
    history = gr.Dropdown([], label="Earlier in this session", visible=False, type="index", elem_id="history")
    with gr.Column(visible=False) as panel:
        figures = gr.HTML(elem_id="figures", padding=True)
        clips = gr.HTML(elem_id="clips", padding=True, js_on_load=_PLAYER)
        slider = gr.ImageSlider(label="Left | right, drag the divider", elem_id="slider", buttons=["fullscreen"])
        frame = gr.Slider(0, 1, 0, step=1, label="Frame shown above", elem_id="frame")
        times = gr.HTML(elem_id="times", padding=True)
        with gr.Accordion("Make it again", open=False):
            script = gr.Code(language="python", label="Python", interactive=False)
            command = gr.Code(language="shell", label="Shell", interactive=False)
    return Results(progress, panel, figures, times, clips, frame, slider, script, command, history)


def _wanted(given: Sequence[Any], sides: Sequence[dict[str, Any]]) -> Wanted:
    """The comparison that the controls ask for."""
    model, prompt, seed, random_seed, height, width, num_frames, steps, guidance, left, right = given
    return Wanted(
        model=model,
        prompt=prompt,
        seed=random.randint(0, LARGEST_SEED) if random_seed else int(seed or 0),
        methods=(method_from(left, sides[0]), method_from(right, sides[1])),
        height=height or None,
        width=width or None,
        num_frames=num_frames or None,
        steps=steps or None,
        guidance=guidance or None,
    )


def _example(example: Example) -> Wanted:
    frames, height, width = example.size
    return Wanted(
        model=example.model,
        prompt=example.prompt,
        seed=0,
        methods=(parse_method("dense", example.model), parse_method(example.method, example.model)),
        height=height,
        width=width,
        num_frames=frames,
        steps=example.steps,
    )


def _filled(fields: Fields, example: Example) -> dict[Any, Any]:
    """The controls as an example has them."""
    frames, height, width = example.size
    return {
        fields.model: example.model,
        fields.prompt: example.prompt,
        fields.seed: 0,
        fields.height: height,
        fields.width: width,
        fields.num_frames: frames,
        fields.steps: example.steps,
        fields.left: "dense",
        fields.right: example.method,
    }


def _compared(
    news: Iterator[Progress | Comparison], session: Session, fields: Fields, results: Results
) -> Iterator[dict[Any, Any]]:
    """Shows how far a comparison is, then what came out."""
    try:
        for found in news:
            if isinstance(found, Progress):
                yield {results.progress: pictures.progress_bar(found)}
            else:
                session.remember(found)
                yield _shown(session, found, results) | {fields.seed: found.wanted.seed}
    except Stopped:
        yield {results.progress: pictures.notice("Stopped. Nothing was kept of this run.")}
    except ValueError as error:
        raise gr.Error(str(error), title="That cannot be run") from error


def _shown(session: Session, comparison: Comparison, results: Results) -> dict[Any, Any]:
    """A comparison on the page."""
    right = comparison.sides[1]
    last = len(right.frames) - 1
    middle = (last + 1) // 2
    titles = [pictures.title(earlier) for earlier in session.history]
    return {
        results.progress: pictures.notice(f"Done: {pictures.title(comparison)}"),
        results.panel: gr.Column(visible=True),
        results.figures: pictures.figures(comparison),
        results.times: pictures.timing_bars(comparison),
        results.clips: pictures.clips(comparison),
        results.frame: gr.Slider(maximum=max(1, last), value=middle, visible=last > 0),
        results.slider: _frame_files(session, comparison, middle),
        results.script: right.script,
        results.command: right.command,
        results.history: gr.Dropdown(titles, value=titles[session.history.index(comparison)], visible=len(titles) > 1),
    }


def _frame_files(session: Session, comparison: Comparison, frame: int) -> tuple[str, str]:
    """One frame of both sides as files of the session."""
    paths = []
    for name, side in zip(("left", "right"), comparison.sides, strict=True):
        path = session.folder / f"{session.token}-{name}.webp"
        Image.fromarray(side.frames[min(int(frame), len(side.frames) - 1)]).save(path, lossless=True)
        paths.append(str(path))
    return paths[0], paths[1]


def _follow(sessions: Sessions, fields: Fields, results: Results, cancel: gr.Button) -> None:
    """What happens at once: cancelling, another frame, an earlier comparison, another model."""

    def stop(request: gr.Request) -> Any:
        session = sessions.of(request.session_hash)
        if not session.running:
            return gr.skip()
        session.stop.set()
        return pictures.notice("Stopping at the next step.")

    def show_frame(frame: int, request: gr.Request) -> Any:
        session = sessions.of(request.session_hash)
        return gr.skip() if session.shown is None else _frame_files(session, session.shown, frame)

    def show_earlier(index: int | None, request: gr.Request) -> dict[Any, Any]:
        session = sessions.of(request.session_hash)
        if index is None or not 0 <= index < len(session.history):
            return {results.progress: gr.skip()}
        session.shown = session.history[index]
        return _shown(session, session.shown, results)

    def change_model(model: str) -> dict[Any, Any]:
        filled = dict(zip(changed[1:], _defaults(model), strict=True))
        return {fields.prompt: _prompt(model), **filled}

    changed = [fields.prompt, fields.height, fields.width, fields.num_frames, fields.steps, fields.guidance]
    cancel.click(stop, outputs=results.progress, **QUICK)
    results.frame.input(show_frame, results.frame, results.slider, **QUICK)
    results.history.input(show_earlier, results.history, results.all(), **QUICK)
    fields.model.input(change_model, fields.model, changed, **QUICK)


def _defaults(model: str) -> tuple[float, ...]:
    """Height, width, frames, steps and guidance of a model whose shape is known; else 0, which means its own."""
    if model not in SPECS:
        return (0,) * 5
    spec = SPECS[model]
    return spec.height, spec.width, spec.num_frames, spec.steps, spec.guidance


def _prompt(model: str) -> str:
    return EMBEDDED[model].prompts[0] if model in EMBEDDED else ""


# The clips of one comparison play as one.
_PLAYER = """
const lead = () => element.querySelector('video');
const all = () => [...element.querySelectorAll('video')];
element.addEventListener('click', event => {
  if (!event.target.closest('.dit-play')) return;
  const pause = !lead().paused;
  all().forEach(clip => { clip.currentTime = lead().currentTime; pause ? clip.pause() : clip.play(); });
  event.target.textContent = pause ? 'Play' : 'Pause';
});
setInterval(() => {
  const first = lead();
  if (!first || first.paused) return;
  all().slice(1).forEach(clip => {
    if (Math.abs(clip.currentTime - first.currentTime) > 0.12 && !clip.seeking) clip.currentTime = first.currentTime;
  });
}, 200);
"""
