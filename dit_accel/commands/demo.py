"""`dit-accel demo`: the Gradio page, on this machine."""

from __future__ import annotations

import argparse
import importlib.util

from dit_accel.pipelines.embedded import EMBEDDED


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", action="append", metavar="NAME", help="offer this hub id or pipeline folder too, repeat for several"
    )
    parser.add_argument("--device", help="cuda where there is a GPU, else cpu")
    parser.add_argument("--host", default="127.0.0.1", help="address (default 127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on (default 7860)")
    parser.add_argument("--share", action="store_true", help="open a public tunnel of Gradio's to the page")


def run(options: argparse.Namespace) -> int:
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("the demo needs the package gradio, which is not installed; pip install 'dit-accel[demo]'.")
    from dit_accel.demo.app import serve
    from dit_accel.demo.workshop import Workshop

    workshop = Workshop([*dict.fromkeys([*EMBEDDED, *(options.model or [])])], options.device)
    print(f"starting on {workshop.device}; stop with Ctrl-C", flush=True)
    try:
        serve(
            workshop,
            ready=lambda address: print(f"page: {address}", flush=True),
            server_name=options.host,
            server_port=options.port,
            share=options.share,
        )
    except OSError as error:  # Gradio's message when the port is taken
        raise ValueError(
            f"--port {options.port} on {options.host} cannot be used ({error}); choose another."
        ) from error
    return 0
