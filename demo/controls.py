"""Controls that tabs share: the knobs of a method, how events run, refusals as toasts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import gradio as gr

from dit_accel.commands.arguments import parse_method
from dit_accel.demo.knobs import LONGEST, Knob, knobs_of, values_of

P = ParamSpec("P")
R = TypeVar("R")

# Runs wait in the workshop's own line, which says how long it is and can be left.
LONG: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
QUICK: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


def method_controls(model: str, method: str) -> list[Any]:
    """One control per option of a method, set to the model's preset."""
    values = values_of(parse_method(method, model))
    found = knobs_of(method)
    controls = [_control(knob, values[knob.name]) for knob in found if knob.in_front]
    with gr.Accordion("When and where it applies", open=False):
        controls += [_control(knob, values[knob.name]) for knob in found if not knob.in_front]
    return controls


def _control(knob: Knob, value: Any) -> Any:
    named = {"label": knob.label, "info": knob.help, "interactive": True}
    if knob.kind == "share":
        return gr.Slider(0, 1, value, step=0.01, **named)
    if knob.kind == "choice":
        return gr.Dropdown(list(knob.choices), value=value, **named)
    if knob.kind == "switch":
        return gr.Checkbox(value, **named)
    return gr.Textbox(value, max_length=LONGEST, placeholder="the method's own", **named)


def refused_as_toast(call: Callable[P, R], *arguments: P.args, **named: P.kwargs) -> R:
    """The call's result; its refusal as a message on the page."""
    try:
        return call(*arguments, **named)
    except ValueError as error:
        raise gr.Error(str(error), title="That cannot be run") from error
