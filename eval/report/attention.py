"""Where a method's attention is far from dense: a map of blocks by heads for each measure, and a row of steps."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image

from dit_accel.eval.aggregate import StudySummary
from dit_accel.eval.colours import Array, colour_map
from dit_accel.eval.fidelity import MEASURES, Fidelity, average, fidelity_of
from dit_accel.eval.media import data_uri, png_bytes
from dit_accel.eval.report.heat_map import heat_map_scales
from dit_accel.eval.report.markup import Html, element, join


def attention_maps(summary: StudySummary, names: Mapping[str, str], heads: int) -> Html:
    """Maps of all methods on one scale per measure; nothing where no attention was probed.

    Args:
        summary: of a study.
        names: of the methods on the page, by label.
        heads: of its model, which records do not say.
    """
    found: dict[str, Fidelity] = {}
    for method in summary.methods:
        runs = [run for record in method.row.samples.values() if (run := fidelity_of(record["quality"], heads))]
        if runs:
            found[names[method.label]] = average(runs)
    scales = heat_map_scales(list(found.values()))
    return join(_measure(name, scale, found) for name, scale in scales.items())


def _measure(name: str, scale: float, found: Mapping[str, Fidelity]) -> Html:
    measure = MEASURES[name]
    title = measure.distance_title
    figures = [_figure(name, label, run, scale) for label, run in found.items() if name in run.profiles]
    ramp = element("i", style=f"background:linear-gradient(to right,{_gradient()})", aria_hidden="true")
    legend = Html(element("span", "0") + ramp + element("span", f"{scale:g} and more; grey where all calls are dense"))
    return join(
        [
            element("h4", title[0].upper() + title[1:]),
            element("div", legend, class_="ramp"),
            element("div", join(figures), class_="maps"),
        ]
    )


def _figure(name: str, label: str, run: Fidelity, scale: float) -> Html:
    profile, style = run[name], MEASURES[name].style
    block, head = run.worst(name)
    extreme = f"{format(profile.by_head[block, head], style)} in block {block}, head {head}"
    caption = Html(element("b", label) + element("span", f"mean {format(profile.mean, style)}, farthest {extreme}"))
    parts = (profile.by_head, f"blocks (down) by heads, {label}"), (profile.by_step[None], f"by step, {label}")
    images = [element("img", src=_cells(name, values, scale), alt=text) for values, text in parts]
    return element("figure", Html(element("figcaption", caption) + join(images)))


def _cells(name: str, values: Array, scale: float) -> str:
    """A pixel for each value, clear where there is none."""
    distance = MEASURES[name].distance(values) / scale
    colours = colour_map(np.nan_to_num(distance))
    alpha = np.where(np.isnan(values), 0, 255).astype(np.uint8)
    return data_uri(png_bytes(Image.fromarray(np.dstack([colours, alpha]))), "image/png")


def _gradient() -> str:
    return ",".join("rgb({},{},{})".format(*colour) for colour in colour_map(np.linspace(0, 1, 9)))
