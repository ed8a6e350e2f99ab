"""The page: tabs, theme, limits; `dit-accel demo` starts it, and so does running this file."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

import gradio as gr

from dit_accel.demo.compare_tab import compare_tab
from dit_accel.demo.doors import shut
from dit_accel.demo.patterns_tab import patterns_tab
from dit_accel.demo.results import ROOTS
from dit_accel.demo.results_tab import results_tab
from dit_accel.demo.sessions import Sessions
from dit_accel.demo.theme import THEME
from dit_accel.demo.tune_tab import tune_tab
from dit_accel.demo.workshop import Workshop
from dit_accel.eval.report.markup import element
from dit_accel.pipelines.embedded import EMBEDDED

TITLE = "dit_accel: see what sparse attention does"
LEAD = (
    "Dense and sparse attention on the same prompt and noise: what was gained, where they differ, what was computed. "
    "Everything runs on this machine ({device})."
)


def build(workshop: Workshop, sessions: Sessions) -> gr.Blocks:
    """The page, for visitors with these sessions."""
    os.environ["GRADIO_TEMP_DIR"] = str(sessions.cache)  # read by each component as it is made
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as page:
        lead = LEAD.format(device={"cuda": "GPU", "cpu": "CPU"}[workshop.device.type])
        gr.HTML(element("h1", "dit_accel") + element("p", lead), elem_classes="dit-header")
        with gr.Tab("Compare"):
            compare_tab(workshop, sessions)
        with gr.Tab("Patterns"):
            patterns_tab(workshop.device.type)
        with gr.Tab("Results") as results:
            results_tab(results, sessions, [Path(root) for root in ROOTS])
        with gr.Tab("Tune"):
            tune_tab(workshop, sessions)

        def end(request: gr.Request) -> None:
            sessions.end(request.session_hash)

        page.unload(end)
    page.queue(max_size=64)
    return page


def serve(workshop: Workshop, ready: Callable[[str], object] = print, **options: Any) -> None:
    """Shows the page until SIGINT or SIGTERM ends it; then everything that it wrote is gone.

    Args:
        workshop: what generates.
        ready: called with the address once the page answers.
        options: of Gradio's ``launch``: server_name, server_port, share.

    Raises:
        OSError: a port that cannot be used.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C, through the cleaning up below
    kept = tempfile.TemporaryDirectory(prefix="dit-accel-demo-", ignore_cleanup_errors=True)
    with suppress(KeyboardInterrupt), kept as folder:
        sessions = Sessions(Path(folder))
        page = build(workshop, sessions)
        try:
            _, address, public = page.launch(
                theme=THEME,
                css=files("dit_accel.demo").joinpath("style.css").read_text(encoding="utf-8"),
                footer_links=[],
                show_error=True,
                quiet=True,
                prevent_thread_lock=True,
                app_kwargs={"middleware": shut()},
                **options,
            )
            ready(public or address)
            page.block_thread()
        finally:
            sessions.end_all()
            page.close(verbose=False)


if __name__ == "__main__":
    serve(Workshop([*EMBEDDED]))
