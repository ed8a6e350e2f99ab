"""The plots of a study: speed over closeness, every prompt, errors over steps."""

from __future__ import annotations

from collections import Counter

import numpy as np

from dit_accel.eval.aggregate import MethodSummary, MetricSummary, is_exact
from dit_accel.eval.report.markup import Html, element, join
from dit_accel.eval.report.part import Part
from dit_accel.eval.report.plots import (
    Band,
    Point,
    Scale,
    axis,
    lines,
    marker,
    near_bands,
    plane,
    scale_of,
    strip,
    unbeaten,
)
from dit_accel.eval.report.tables import number
from dit_accel.eval.statistics import Sample
from dit_accel.eval.summary import mean_text

_KERNELS = "dense attention by another kernel; to its right a difference means nothing"
_FEWER = "dense attention with a step left out, a change and no noise"


def pareto(part: Part) -> Html:
    """Speed-up over PSNR; where nothing was timed, pairs left out over PSNR."""
    timed = [method for method in part.judged if method.speed_up]
    methods = timed or [method for method in part.judged if "run" in method.densities]
    if not methods:
        return Html()
    points = [_point(part, method) for method in methods]
    floors = [method for method in part.summary.of("floor") if "psnr" in method.metrics]
    kernels = [_band(part, method) for method in floors if is_exact(method.row, part.study)]
    fewer = [_band(part, method) for method in floors if not is_exact(method.row, part.study)]
    y_title, y_unit, base = ("speed-up", "×", (1.0, "dense")) if timed else ("pairs left out", "%", (0.0, "dense"))
    plot = plane(points, [*kernels, *fewer], "PSNR, dB →", f"{y_title} ↑", y_unit, base)
    said = {
        f"{_lead(part, bool(timed))}, right is closer to dense.": True,
        f"Bars: {'quartiles up, ' * bool(timed)}95 % across.": len(part.study.prompts) > 1,
        "The line joins the methods that no other one beats in both.": len(unbeaten(points)) > 1,
        f"Shaded: {_KERNELS}.": near_bands(points, kernels),
        f"Shaded, “one step less”: {_FEWER}.": near_bands(points, fewer),
    }
    words = " ".join(sentence for sentence, holds in said.items() if holds)
    return _panel("Speed and closeness" if timed else "Density and closeness", words, plot)


def _lead(part: Part, timed: bool) -> str:
    if timed:
        return "Up is faster"
    measured = any("denoise" in method.metrics for method in part.judged)
    why = "No dense run was timed on the same samples" if measured else "Nothing was timed"
    return f"{why}: up is fewer query-key pairs computed in the run"


def trajectories(part: Part) -> Html:
    """How far the latents are from the dense run's at each step, the mean over samples, where that was recorded."""
    series: dict[int, tuple[str, list[float]]] = {}
    for method in part.summary.of("method"):
        found = [
            record["quality"]["trajectory"]["values"]
            for record in method.row.samples.values()
            if record["quality"].get("trajectory", {}).get("values")
        ]
        if found:
            mean = [float(value) for value in np.mean(found, axis=0)]
            series[part.numbers[method.label]] = part.names[method.label], mean
    if not series:
        return Html()
    words = "Distance of the latents from those of the dense run, relative to their norm; the mean over samples."
    return _panel("Error over steps", words, lines(series, "step", "relative error of the latents"))


def prompt_strips(part: Part, shown: set[Sample]) -> Html:
    """A row for each method, a dot for each prompt; the worst prompt is named and leads to its clips if shown.

    Nothing of a single prompt.
    """
    if not part.judged or len(part.study.prompts) == 1:
        return Html()
    values = [value for method in part.judged for value in method.metrics["psnr"].by_prompt.values()]
    across = scale_of(values, 0.04)
    cells = [cell for method in part.judged for cell in _strip_row(part, method, across, shown)]
    below = [Html("<span></span>"), axis(across), element("span", "PSNR, dB", class_="worst-prompt")]
    words = (
        f"One dot for each of the {len(part.study.prompts)} prompts{_over_seeds(part)}. Upright: the mean, with its "
        "95 % interval. Ringed: the worst prompt."
    )
    rows = element("div", join([*cells, *below]), class_="strips")
    return element("div", _panel("Prompt by prompt", words, rows), class_="figures")


def _over_seeds(part: Part) -> str:
    """What a dot is the mean over, if of more than one clip."""
    clips = {
        count
        for method in part.judged
        for count in Counter(prompt for prompt, _ in method.metrics["psnr"].by_sample).values()
    }
    if clips == {1}:
        return ""
    return f", the mean over its {clips.pop()} seeds" if len(clips) == 1 else ", the mean over its seeds"


def _strip_row(part: Part, method: MethodSummary, across: Scale, shown: set[Sample]) -> list[Html]:
    psnr, place = method.metrics["psnr"], part.numbers[method.label]
    summary, prompt = psnr.summary, psnr.worst_prompt
    clips = min((sample for sample in shown if sample[0] == prompt), default=None)
    text = element("a", prompt, href=f"#{part.sample_anchor(clips)}") if clips else element("span", prompt)
    worst = Html(element("b", number(summary.worst, ".1f", " dB")) + " " + text)
    return [
        element("div", Html(marker(place) + element("span", part.names[method.label])), class_="who"),
        strip(psnr.by_prompt, across, place, prompt, _interval(psnr), " dB"),
        element("div", worst, class_="worst-prompt"),
    ]


def _point(part: Part, method: MethodSummary) -> Point:
    psnr = method.metrics["psnr"]
    speed = method.speed_up
    left_out = 100 * (1 - method.densities.get("run", 1.0))
    y = (speed.low, speed.median, speed.high) if speed else (left_out, left_out, left_out)
    height = f"{speed.median:.2f}×" if speed else f"{left_out:.0f}% of the pairs left out"
    return Point(
        label=part.names[method.label],
        link=f"#{part.row_anchor(method.label)}",
        title=f"{method.label}: {height}, {mean_text(psnr, '.1f', ' dB')}",
        number=part.numbers[method.label],
        x=_interval(psnr),
        y=y,
    )


def _band(part: Part, method: MethodSummary) -> Band:
    """The interval of a noise floor's mean."""
    name = "kernel floor" if method.label == part.summary.floor else part.names[method.label]
    return Band(name.removeprefix("dense, "), *_interval(method.metrics["psnr"]))


def _interval(metric: MetricSummary) -> tuple[float, float, float]:
    """Low end, mean and high end, infinite where all clips are identical."""
    found = metric.finite or metric.summary
    return found.interval.low, found.mean, found.interval.high


def _panel(heading: str, words: str, content: Html) -> Html:
    return element("section", join([element("h3", heading), element("p", words), content]), class_="panel")
