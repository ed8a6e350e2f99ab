"""The Tune tab: a budget in, a plan and its curve out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from dit_accel.demo.controls import LONG, QUICK, refused_as_toast
from dit_accel.demo.pictures import empty, notice
from dit_accel.demo.sessions import Sessions
from dit_accel.demo.tuning import BUDGETS, MOST_MINUTES, Search, Tuned, tune
from dit_accel.demo.workshop import Stopped, Workshop
from dit_accel.eval.media import file_uri
from dit_accel.eval.report.markup import Html

WHAT = (
    "Choose a budget and press Search. Every kind of attention is tried on every layer and group of steps, then whole "
    "plans are run and the best that meets the budget is kept. On two CPU cores the embedded video model takes a "
    "quarter of an hour at its own size; a smaller size is faster."
)


def tune_tab(workshop: Workshop, sessions: Sessions) -> None:
    """Builds the tab inside the blocks that are open."""
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            model = gr.Dropdown(workshop.models, value=workshop.models[0], label="Model", info="what is tuned")
            kind = gr.Dropdown([*BUDGETS], value=next(iter(BUDGETS)), label="Budget", info="what the plan must meet")
            value = gr.Number(28, label="Value", info="of the budget", elem_id="tune-value")
            minutes = gr.Slider(1, MOST_MINUTES, 5, step=1, label="Minutes", info="begin no run that ends later")
            prompts = gr.Slider(1, 8, 1, step=1, label="Prompts", info="to measure on; one says little")
            with gr.Row():
                sizes = [
                    gr.Number(
                        0, label=label, info="0: its own", precision=0, min_width=96, elem_id=f"tune-{label.lower()}"
                    )
                    for label in ("Height", "Width", "Frames", "Steps")
                ]
            with gr.Row():
                run = gr.Button("Search", variant="primary", elem_id="tune-run")
                cancel = gr.Button("Cancel", variant="stop", elem_id="tune-cancel")
        with gr.Column(scale=3, min_width=320):
            progress = gr.HTML(empty("No search yet", WHAT), elem_id="tune-progress", padding=True)
            curve = gr.HTML(elem_id="tune-curve")
            log = gr.Code(label="What the search says", language=None, interactive=False, visible=False)
            plan = gr.DownloadButton("Download the plan", visible=False)

    def search(request: gr.Request, *values: Any) -> Iterator[dict[Any, Any]]:
        session = sessions.of(request.session_hash)
        model_name, kind_name, amount, most, count, *size = values
        asked = Search(
            model=model_name,
            budget=(kind_name, amount),
            minutes=most,
            prompts=int(count),
            height=size[0],
            width=size[1],
            num_frames=size[2],
            steps=size[3],
            device=workshop.device.type,
        )
        stop = refused_as_toast(session.begin)
        try:
            workshop.check_model(model_name)
            for news in tune(asked, session.folder, workshop.line, stop):
                if isinstance(news, Tuned):
                    yield _found(news, session.folder / f"{session.token}-plan.json", progress, curve, log, plan)
                else:
                    yield {progress: notice(news)}
        except Stopped:
            yield {progress: notice("Stopped. Nothing was kept of this search.")}
        except ValueError as error:
            yield {progress: notice("No plan was found.")}
            raise gr.Error(str(error), title="No plan") from error
        finally:
            sessions.done(session)

    def stop_search(request: gr.Request) -> Any:
        session = sessions.of(request.session_hash)
        if not session.running:
            return gr.skip()
        session.stop.set()
        return notice("Stopping.")

    run.click(search, [model, kind, value, minutes, prompts, *sizes], [progress, curve, log, plan], **LONG)
    cancel.click(stop_search, outputs=progress, **QUICK)


def _found(
    tuned: Tuned, served: Path, progress: gr.HTML, curve: gr.HTML, log: gr.Code, plan: gr.DownloadButton
) -> dict[Any, Any]:
    """The page of a search that has ended."""
    tuned.plan.replace(served)  # a name with the session's token, so that the copy which Gradio serves goes with it
    picture = Html()
    if tuned.picture.exists():
        uri = file_uri(tuned.picture, "image/png")
        picture = Html(f'<img src="{uri}" alt="Measured plans: seconds and quality" class="dit-curve">')
    return {
        progress: notice('Done. The plan runs with pipe.set_attn_processor("plan.json").'),
        curve: picture,
        log: gr.Code(tuned.log, visible=True),
        plan: gr.DownloadButton(value=str(served), visible=True),
    }
