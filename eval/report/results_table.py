"""The table of a study on the page: figures with their intervals below, noise floors set apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from dit_accel.eval.aggregate import MethodSummary
from dit_accel.eval.report.markup import Html, element, join
from dit_accel.eval.report.part import Part
from dit_accel.eval.report.plots import marker
from dit_accel.eval.report.tables import MISSING, number
from dit_accel.eval.summary import SHOWN, chance_text, count_words, floor_text

Cell = tuple[str, ...]  # the figure, and the lines below it
NOTHING: Cell = (MISSING,)
_FLOORS = "Noise floors: dense attention by another kernel or with one step less, beside the same dense clips"


def results_table(part: Part) -> Html:
    """Head and bodies of the table; columns that say nothing are left out."""
    methods = {"": [*part.summary.of("reference"), *part.summary.of("method")], _FLOORS: part.summary.of("floor")}
    cells = {method.label: {name: make(method) for name, make in _COLUMNS.items()} for method in part.summary.methods}
    columns = [name for name in _COLUMNS if any(row[name] != NOTHING for row in cells.values())]
    head = [element("th", "Method", scope="col"), *(_heading(name) for name in columns)]
    bodies = [_body(part, heading, members, columns, cells) for heading, members in methods.items() if members]
    return Html(element("thead", element("tr", join(head))) + join(bodies))


def _body(
    part: Part,
    heading: str,
    methods: Sequence[MethodSummary],
    columns: Sequence[str],
    cells: Mapping[str, Mapping[str, Cell]],
) -> Html:
    rows = [
        element(
            "tr",
            join([_name(part, method), *(_cell(*cells[method.label][name]) for name in columns)]),
            id=part.row_anchor(method.label),
        )
        for method in methods
    ]
    if heading:
        rows.insert(0, element("tr", element("th", heading, colspan=len(columns) + 1, scope="rowgroup")))
    return element("tbody", join(rows), class_="floors" if heading else "methods")


def _name(part: Part, method: MethodSummary) -> Html:
    short = part.names[method.label]
    key = marker(part.numbers[method.label]) if method.label in part.numbers else Html()
    below = element("small", method.label) if short != method.label else Html()
    return element("th", Html(key + element("span", short) + below), scope="row")


def _heading(name: str) -> Html:
    title, _, below = name.partition("\n")
    return element("th", Html(element("span", title) + (element("small", below) if below else "")), scope="col")


def _cell(figure: str, *below: str) -> Html:
    return element("td", Html(element("b", figure) + "".join(element("small", line) for line in below)))


def _speed_up(method: MethodSummary) -> Cell:
    speed, fastest = method.speed_up, method.speed_up_fastest
    if speed is None:
        return NOTHING
    quartiles = [f"{speed.low:.2f} to {speed.high:.2f}"] if speed.count > 1 else []
    return f"{speed.median:.2f}×", *quartiles, *([f"{fastest.median:.2f}× over fastest"] if fastest else [])


def _mean(metric: str, style: str, unit: str = "") -> Callable[[MethodSummary], Cell]:
    def cell(method: MethodSummary) -> Cell:
        found = method.metrics.get(metric)
        if found is None:
            return NOTHING
        if found.finite is None:
            return (number(found.summary.mean, style),)
        interval = found.finite.interval
        ends = [f"{interval.low:{style}} to {interval.high:{style}}"] if found.finite.count > 1 else []
        identical = [f"{found.identical} identical"] if found.identical else []
        return f"{found.finite.mean:{style}}{unit}", *ends, *identical

    return cell


def _worst(method: MethodSummary) -> Cell:
    if "psnr" not in method.metrics or method.metrics["psnr"].summary.count == 1:
        return NOTHING
    summary = method.metrics["psnr"].summary
    return number(summary.worst, ".1f", " dB"), number(summary.fifth, ".1f")


def _to_floor(method: MethodSummary) -> Cell:
    return (floor_text(method.to_floor if method.role == "method" else None),)


def _to_dense(method: MethodSummary) -> Cell:
    paired = method.metrics[SHOWN].difference if SHOWN in method.metrics else None
    if paired is None:
        return NOTHING
    low, high = (f"{100 * end:+.0f}" for end in (paired.interval.low, paired.interval.high))
    below = [f"{low} to {high}", chance_text(paired)] if paired.count > 1 else []
    return f"{100 * paired.difference:+.0f} pp", *below


def _computed(method: MethodSummary) -> Cell:
    executed, run = (method.densities.get(name) for name in ("executed", "run"))
    return number(executed, ".1%"), number(run, ".1%")


_COLUMNS: Mapping[str, Callable[[MethodSummary], Cell]] = {  # heading and what is below it -> cell
    "Samples": lambda method: (str(len(method.row.samples)), count_words(len(method.prompts))),
    "Speed-up\nmedian, quartiles": _speed_up,
    "Bound\nfrom computed pairs": lambda method: (
        number(method.bound if method.role == "method" else None, ".2f", "×"),
    ),
    "Pairs computed\nin a sparse call, in the run": _computed,
    "PSNR\nmean, 95 %": _mean("psnr", ".1f", " dB"),
    "Worst prompt\nPSNR, 5th percentile": _worst,
    "To kernel floor\nPSNR": _to_floor,
    "SSIM\nmean, 95 %": _mean("ssim", ".3f"),
    "Prompt accuracy\nmean, 95 %": _mean(SHOWN, ".0%"),
    "To dense\npaired, 95\N{NO-BREAK SPACE}%, p": _to_dense,
}
