"""The Patterns tab: what one query sees, on the grid of any model and size, while sliders move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from dit_accel.demo import patterns
from dit_accel.demo.controls import QUICK, method_controls, refused_as_toast
from dit_accel.demo.knobs import knobs_of, method_from
from dit_accel.demo.patterns import Place
from dit_accel.demo.pictures import cards, notice
from dit_accel.eval.media import data_uri, png_bytes
from dit_accel.eval.report.markup import Html, element
from dit_accel.methods import METHODS
from dit_accel.methods.base import AttnMethod, DynamicMethod
from dit_accel.pipelines.specs import SPECS

FIRST_MODEL, FIRST_METHOD = "hunyuanvideo", "radial"


def patterns_tab(device: str) -> None:
    """Builds the tab inside the blocks that are open; speed is predicted for ``device``."""
    own: dict[str, Any] = {
        "interactive": True,
        "min_width": 96,
    }  # events made later take them, which Gradio cannot know
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            model = gr.Dropdown([*SPECS], value=FIRST_MODEL, label="Model", info="its shape; no weights are needed")
            method = gr.Dropdown(
                [name for name in METHODS if name not in ("dense", "dit_fast_attn")],
                value=FIRST_METHOD,
                label="Method",
                info="kind of attention",
                elem_id="pattern-method",
            )
            with gr.Row():
                named = zip(_size(FIRST_MODEL), ("Height", "Width", "Frames"), strict=True)
                size = [
                    gr.Number(value, label=label, precision=0, minimum=1, elem_id=f"pattern-{label.lower()}", **own)
                    for value, label in named
                ]
            query = [
                gr.Slider(
                    0, 1, 0.5, step=0.01, label=label, info=info, elem_id=f"pattern-query-{label.split()[-1]}", **own
                )
                for label, info in (
                    ("Query frame", "place of the query in time"),
                    ("Query row", "from the top"),
                    ("Query column", "from the left"),
                )
            ]

            @gr.render(inputs=[model, method])
            def knobs(model_name: str, method_name: str) -> None:
                controls = method_controls(model_name, method_name)
                names = [knob.name for knob in knobs_of(method_name)]

                def asked(values: Sequence[Any]) -> tuple[Place, AttnMethod]:
                    height, width, num_frames, frame, row, column, *settings = values
                    place = Place(model_name, height, width, num_frames, (frame, row, column))
                    return place, method_from(method_name, dict(zip(names, settings, strict=True)))

                def show(*values: Any) -> tuple[Html, Html]:
                    return refused_as_toast(_shown, *refused_as_toast(asked, values))

                def predict(*values: Any) -> Html:
                    return refused_as_toast(_predicted, *refused_as_toast(asked, values), device)

                inputs = [*size, *query, *controls]
                first = gr.Timer(0.05)  # a new method shows itself at once
                triggers = [first.tick]
                for control in inputs:
                    typed = isinstance(control, gr.Textbox | gr.Number)
                    triggers += [control.submit, control.blur] if typed else [control.change]
                gr.on(triggers, show, inputs, [picture, figures], trigger_mode="always_last", **QUICK).then(
                    lambda: gr.Timer(active=False), outputs=first, **QUICK
                ).then(predict, inputs, speed, trigger_mode="always_last", **QUICK)

        with gr.Column(scale=3, min_width=320):
            figures = gr.HTML(elem_id="pattern-figures")
            speed = gr.HTML(notice("The speed-up is predicted from a short measurement of this machine."))
            picture = gr.HTML(elem_id="pattern-picture")
    model.input(_size, model, size, **QUICK)


def _size(model: str) -> tuple[int, int, int]:
    """Height, width and frames that a model makes by default."""
    spec = SPECS[model]
    return spec.height, spec.width, spec.num_frames


def _shown(place: Place, method: AttnMethod) -> tuple[Html, Html]:
    """The picture and the figures that need no measurement."""
    drawn = patterns.picture(place, method)
    if drawn is None:
        shown = notice(
            f"{method.name} attends to means of tokens, or to all of them here: no picture of tokens shows it."
        )
    else:
        frame, row, column = place.at
        caption = f"Keys that the query in frame {frame}, row {row}, column {column} sees, one panel per latent frame."
        if isinstance(method, DynamicMethod):
            caption += " The method chooses in each call: here it was given a scene made up of two moving objects."
        image = Html(f'<img src="{data_uri(png_bytes(drawn), "image/png")}" alt="{caption}">')
        shown = element("figure", Html(image + element("figcaption", caption)), class_="dit-pattern")
    densities = patterns.densities(place, method)
    return shown, cards(
        {
            "Tokens": (f"{densities.tokens:,}", "grid " + " × ".join(map(str, place.layout.grid))),
            "Computed": (f"{densities.executed:.1%}", "of the query-key pairs, in whole tiles"),
            "Rule": (f"{densities.ideal:.1%}", "of the pairs, token by token"),
            "Tile": (" × ".join(map(str, densities.tile)) if densities.tile else "–", "frames, rows, columns"),
        }
    )


def _predicted(place: Place, method: AttnMethod, device: str) -> Html:
    found = patterns.explain(place, method, device)
    return notice(
        f"Predicted speed-up of the denoising loop on this {device}: {found.predicted_speedup:.2f}×. {found.advice}"
    )
