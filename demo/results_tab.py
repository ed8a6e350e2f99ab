"""The Results tab: what was measured on this machine before."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from dit_accel.demo.controls import QUICK, refused_as_toast
from dit_accel.demo.pictures import notice
from dit_accel.demo.results import find_runs, methods_of, write_report
from dit_accel.demo.sessions import Sessions
from dit_accel.eval.report.markup import Html

NOTHING = (
    "There is no run yet: dit-accel compare and dit-accel eval write to outputs/ and runs/ of the folder they are "
    "started in; start the demo there too."
)


def results_tab(tab: gr.Tab, sessions: Sessions, roots: Sequence[Path]) -> None:
    """Builds the tab inside the blocks that are open; runs are those below ``roots``, looked for when it is opened."""
    with gr.Row():
        runs = gr.Dropdown([], label="Runs", info="one or several", multiselect=True, scale=3, elem_id="results-runs")
        methods = gr.Dropdown(
            [], label="Methods", info="empty: all", multiselect=True, scale=2, elem_id="results-methods"
        )
        again = gr.Button("Look again", scale=0, min_width=120, size="sm")
    with gr.Row():
        kinds = ("page", "table", "records")
        downloads = [gr.DownloadButton(f"Download the {kind}", size="sm", visible=False) for kind in kinds]
    page = gr.HTML(notice("Choose a run."), elem_id="results-page")
    found: dict[str, Path] = {}  # the only paths that a visitor can name

    def look() -> dict[Any, Any]:
        found.clear()
        found.update((str(path), path) for path in find_runs(roots))
        return {runs: gr.Dropdown([*found], value=[]), page: notice("Choose a run." if found else NOTHING)}

    def choose(names: list[str]) -> Any:
        return gr.Dropdown(refused_as_toast(methods_of, [found[name] for name in names]), value=[])

    def show(names: list[str], only: list[str], request: gr.Request) -> list[Any]:
        if not names:
            return [notice("Choose a run."), *(gr.DownloadButton(visible=False) for _ in downloads)]
        session = sessions.of(request.session_hash)
        paths = [found[name] for name in names if name in found]
        files = refused_as_toast(write_report, paths, only, session.folder, session.token)
        text = files["page"].read_text(encoding="utf-8")
        frame = Html(f'<iframe class="dit-report" title="Report" srcdoc="{html.escape(text)}"></iframe>')
        return [frame, *(gr.DownloadButton(value=str(files[kind]), visible=True) for kind in kinds)]

    again.click(look, outputs=[runs, page], **QUICK)
    tab.select(look, outputs=[runs, page], **QUICK)
    runs.change(choose, runs, methods, **QUICK).then(show, [runs, methods], [page, *downloads], **QUICK)
    methods.input(show, [runs, methods], [page, *downloads], **QUICK)
