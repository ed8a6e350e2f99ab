"""`dit-accel report`: one page, Markdown, CSV and JSON from the records of runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from dit_accel.commands.arguments import output_folder
from dit_accel.eval.claims.page import write_headline
from dit_accel.eval.report.doc_tables import rewrite_tables
from dit_accel.eval.report.run import load_run
from dit_accel.eval.report.run_page import write_run_report
from dit_accel.pipelines.specs import SPECS

HEADLINE = Path("docs/headline.md")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="*", metavar="RUN", type=Path, help="output folder of dit-accel eval, or a file of records"
    )
    parser.add_argument("--output", type=Path, help="folder (default: that of a single run, else outputs/report)")
    parser.add_argument(
        "--tables", action="store_true", help="in a checkout: the tables of README.md and docs/ from eval/results/"
    )
    parser.add_argument(
        "--headline", action="store_true", help="in a checkout: docs/headline.md, published figures beside ours"
    )


def run(options: argparse.Namespace) -> int:
    in_checkout = options.tables or options.headline
    if in_checkout == bool(options.runs):
        got = "both" if options.runs else "neither"
        raise ValueError(f"report takes runs, or --tables and --headline, got {got}; name a run.")
    if options.tables:
        changed = rewrite_tables(Path.cwd())
        print("\n".join(f"rewritten: {path}" for path in changed) or "all tables are what the records say.")
    if options.headline:
        write_headline(Path("eval/results"), HEADLINE)
        print(f"written: {HEADLINE}")
    if in_checkout:
        return 0
    runs = [load_run(path) for path in options.runs]
    own = options.runs[0] if len(runs) == 1 and options.runs[0].is_dir() else Path("outputs/report")
    page = write_run_report(output_folder(options.output or own), runs, heads_of)
    print(f"{(page.parent / 'summary.md').read_text(encoding='utf-8')}\npage: {page}")
    return 0


def heads_of(model: str) -> int | None:
    """Attention heads of an embedded model, a pipeline folder or a hub model that was used here; None where unknown."""
    if model in SPECS:
        return SPECS[model].heads
    own = Path(model) / "transformer" / "config.json"
    cached = (
        None if own.is_file() or model.count("/") != 1 else try_to_load_from_cache(model, "transformer/config.json")
    )
    path = Path(cached) if isinstance(cached, str) else own
    heads: int | None = json.loads(path.read_text()).get("num_attention_heads") if path.is_file() else None
    return heads
