"""The report of a comparison: one HTML file that loads nothing else."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dit_accel.eval.fidelity import Fidelity
from dit_accel.eval.frames import Frames, as_uint8
from dit_accel.eval.media import data_uri, png_bytes
from dit_accel.eval.quality.difference import GAIN
from dit_accel.eval.records import Record
from dit_accel.eval.report.embed import Encoding, Media, embed
from dit_accel.eval.report.heat_map import heat_map, heat_map_scales
from dit_accel.eval.report.markup import Html, asset, element, fill, join
from dit_accel.eval.report.tables import speed_up, summary


@dataclass(frozen=True)
class MethodResult:
    """One method of a comparison.

    Args:
        record: its numbers and settings.
        frames: its output [T, H, W, 3], floating in [0, 1] or uint8.
        label: its name on the page, such as "radial, density 0.3".
        script: Python that makes this clip.
        command: shell command that makes this clip.
        tile_picture: what a query sees, see ``tile_picture``. Default: none.
        attention: how far its attention is from dense, shown as a heat map. Default: not measured.
    """

    record: Record
    frames: Frames
    label: str
    script: str
    command: str
    tile_picture: Image.Image | None = None
    attention: Fidelity | None = None


@dataclass(frozen=True)
class ReportData:
    """What the page shows.

    Args:
        results: the dense baseline first; clips of one size and frame count.
        tokens: sequence length of the attention calls.
        fps: frames per second of the clips. Default 16.
        notes: sentences a reader must know, such as "Weights are random: quality says nothing."
    """

    results: Sequence[MethodResult]
    tokens: int
    fps: float = 16.0
    notes: Sequence[str] = ()


def write_report(folder: str | os.PathLike[str], report: ReportData, budget: int = 14_000_000) -> Path:
    """Writes ``index.html`` and returns its path.

    Args:
        folder: made when missing.
        report: the comparison.
        budget: bytes for clips and stills; where they would need more they are compressed more, and the page says
            how. Default 14 MB.

    Raises:
        ValueError: without results, or when a clip is malformed or does not match the baseline's.
    """
    if not report.results:
        raise ValueError("a report needs at least one result, the dense baseline first, got none.")
    results, baseline = report.results, report.results[0].record
    clips = [as_uint8(result.frames, result.label) for result in results]
    media, encoding = embed(clips, report.fps, budget)
    scales = heat_map_scales([result.attention for result in results if result.attention])
    frames, height, width, _ = clips[0].shape
    page = fill(
        "template.html",
        style=asset("style.css"),
        script=asset("page.js"),
        prompt=baseline["prompt"],
        notes=join(element("p", note, class_="note") for note in report.notes),
        facts=_facts(baseline, report.tokens, (frames, height, width)),
        table=_table(results),
        player="" if frames == 1 else fill("player.html", frames=frames, fps=report.fps),
        cards=join(_card(result, item, baseline, scales) for result, item in zip(results, media, strict=True)),
        compare="" if len(results) == 1 else _compare(results, media, frames // 2 + 1, width / height),
        how=_how(results[0], encoding),
        environment=_pairs(baseline["machine"] | baseline["versions"] | _provenance(baseline)),
        rendering="pixelated" if width < 256 else "auto",
    )
    path = Path(folder) / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _facts(record: Record, tokens: int, size: tuple[int, int, int]) -> Html:
    frames, height, width = size
    machine = record["machine"]
    return _pairs(
        {
            "Model": record["model"],
            "Size": f"{width} × {height}" + (f", {frames} frames" if frames > 1 else ""),
            "Tokens": f"{tokens:,}",
            "Steps": str(record["steps"]),
            "Guidance": f"{record['guidance']:g}",
            "Seed": str(record["seed"]),
            "Machine": machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores",
        }
    )


def _provenance(record: Record) -> dict[str, str]:
    return {"commit": record["commit"], "prompt hash": record["prompt_hash"], "created": record["created"]}


def _pairs(pairs: Mapping[str, object]) -> Html:
    return join(
        element("div", Html(element("dt", name) + element("dd", value)), class_="pair") for name, value in pairs.items()
    )


def _table(results: Sequence[MethodResult]) -> Html:
    baseline = results[0].record
    rows = [summary(result.record, baseline, result.label) for result in results]
    ratios = [speed_up(result.record, baseline) for result in results]
    fastest = max((ratio for ratio in ratios if ratio is not None), default=1.0)
    head = join(element("th", _heading(column), scope="col") for column in rows[0])
    body = []
    for row, ratio in zip(rows, ratios, strict=True):
        first, *cells = row.items()
        tds = [element("th", first[1], scope="row")]
        for column, text in cells:
            bar = element("span", style=f"width:{100 * ratio / fastest:.0f}%", class_="bar") if ratio else Html()
            tds.append(element("td", Html(bar + text) if column == "speed-up" else text))
        body.append(element("tr", join(tds)))
    return Html(element("thead", element("tr", head)) + element("tbody", join(body)))


def _heading(column: str) -> str:
    return column[0].upper() + column[1:]


def _card(result: MethodResult, media: Media, baseline: Record, scales: Mapping[str, float]) -> Html:
    figures = summary(result.record, baseline)
    is_baseline = result.record is baseline
    shown = (
        ("denoise", "attention", "density", "prompt accuracy")
        if is_baseline
        else ("speed-up", "density", "PSNR", "SSIM")
    )
    picture = result.tile_picture
    return fill(
        "card.html",
        label=result.label,
        chips=join(
            element("li", Html(element("span", _heading(name)) + element("b", figures[name]))) for name in shown
        ),
        clip=_figure("clip", "", media.clip, f"Output of {result.label}"),
        difference=_figure(
            "difference", f"Difference to dense, × {GAIN:g}", media.difference, f"Error map of {result.label}"
        ),
        tiles=_figure(
            "tiles",
            "Keys that one query (outlined) sees",
            data_uri(png_bytes(picture), "image/png") if picture else None,
            f"Tiles of {result.label}",
        ),
        attention=_figure(
            "tiles",
            f"Attention beside dense: {result.attention}",
            data_uri(png_bytes(heat_map(result.attention, scales)), "image/png") if result.attention else None,
            f"Attention of {result.label} beside dense attention, blocks by heads and by step",
        ),
        options=_options(result.record["options"]),
        script=result.script,
        command=result.command,
    )


def _figure(kind: str, caption: str, uri: str | None, description: str) -> Html:
    if uri is None:
        return Html()
    if uri.startswith("data:video"):
        shown = element("video", src=uri, muted="", playsinline="", preload="auto", aria_label=description)
    else:
        shown = Html(f'<img src="{uri}" alt="{html.escape(description)}">')
    return element("figure", Html(shown + (element("figcaption", caption) if caption else "")), class_=kind)


def _options(options: Mapping[str, object]) -> Html:
    if not options:
        return element("p", "No options: the defaults.", class_="quiet")
    return element("dl", _pairs({name: json.dumps(value) for name, value in options.items()}), class_="pairs")


def _compare(results: Sequence[MethodResult], media: Sequence[Media], frame: int, aspect: float) -> Html:
    others = list(zip(results, media, strict=True))[1:]
    return fill(
        "compare.html",
        frame=frame,
        aspect=f"{aspect:.4f}",
        baseline=results[0].label,
        baseline_still=media[0].still,
        tabs=join(
            element("button", result.label, type="button", aria_pressed="false", data_tab=number)
            for number, (result, _) in enumerate(others)
        ),
        stills=join(Html(f'<img src="{item.still}" alt="{html.escape(result.label)}">') for result, item in others),
    )


def _how(baseline: MethodResult, encoding: Encoding) -> Html:
    timings = baseline.record["timings"]
    runs, warmups = timings.get("runs", 1), timings.get("warmup_runs", 0)
    return _pairs(
        {
            "Denoise": f"From the start of the first denoising step to the end of the last: median of {runs} timed "
            f"run{'s' * (runs != 1)}; {warmups} warm-up run{'s' * (warmups != 1)} before not counted. Text encoder and "
            "VAE are left out.",
            "Attention": "The part of it spent in the attention layers that the method replaces.",
            "Speed-up": f"Denoise time of “{baseline.label}” divided by the method's, on the same machine.",
            "Density": "Share of query-key pairs that the sparse calls compute, whole tiles and text included. A "
            "density of 25% does not make a run 4 times faster: the rest of the model still takes its time.",
            "PSNR, SSIM": "Between the raw frames of a timed run and the dense output of the same prompt, seed and "
            "initial noise. PSNR is of the clip's mean squared error; SSIM uses an 11 × 11 Gaussian window. Closeness "
            "to dense is not the same as looking good.",
            "Prompt accuracy": "Share of the prompt's statements that a verifier reads back from the clip.",
            "Attention beside dense": "On one query of each query tile in a run of its own, where it was asked for: "
            "the share of its softmax that dense attention gives to keys that the method did not look at, the relative "
            "L2 error of the attention output, and its cosine to the dense output. A colour means the same for every "
            "method; grey is dense.",
            "This page": f"Shows compressed media ({encoding}); every number was measured before compression.",
        }
    )
