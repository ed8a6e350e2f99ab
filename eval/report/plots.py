"""Plots as inline SVG: positions across are percentages, so that a plot fills its place and text keeps its size.

Colours and strokes are those of CSS classes: ``c0`` to ``c7`` for methods, the others for axes and bands.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from dit_accel.eval.report.markup import Html, element, join

HEIGHT = 340  # pixels
_TICKS = 5
_LABEL = 17  # pixels between the middles of two labels
_SHAPES = (  # of markers, around (0, 0)
    "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0z",
    "M-4.6 -4.6h9.2v9.2h-9.2z",
    "M0 -6.2L6.2 0L0 6.2L-6.2 0z",
    "M0 -5.8L5.8 4.8H-5.8z",
    "M0 5.8L5.8 -4.8H-5.8z",
    "M-1.9 -5.6h3.8v3.7h3.7v3.8h-3.7v3.7h-3.8v-3.7h-3.7v-3.8h3.7z",
)
COLOURS = 8
_TITLED = 200  # dots up to which each says its prompt: more would be the better part of a page


@dataclass(frozen=True)
class Scale:
    """A linear axis from ``low`` to ``high``."""

    low: float
    high: float

    def __call__(self, value: float) -> float:
        """The place of a value as a share of the axis; values beyond it are at its ends."""
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))

    @property
    def ticks(self) -> list[float]:
        rough = (self.high - self.low) / _TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


def scale_of(values: Sequence[float], margin: float = 0.08) -> Scale:
    """An axis with room for the finite ones of the values."""
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    room = margin * (high - low) or max(abs(high), 1.0) * margin
    return Scale(low - room, high + room)


@dataclass(frozen=True)
class Point:
    """A method in a plane; x and y with the ends of their intervals, x may be infinite.

    Args:
        label: beside the marker.
        link: where a click leads, such as "#row-3".
        title: what a pointer is told.
        number: of its colour and shape.
    """

    label: str
    link: str
    title: str
    number: int
    x: tuple[float, float, float]  # low, middle, high
    y: tuple[float, float, float]


@dataclass(frozen=True)
class Band:
    """A range of x."""

    label: str
    low: float
    mean: float
    high: float


def near_bands(points: Sequence[Point], bands: Sequence[Band]) -> list[Band]:
    """Those that are drawn; the others lie far beyond all points."""
    across = scale_of([value for point in points for value in point.x])
    return [band for band in bands if band.high <= across.high + 1.5 * (across.high - across.low)]


def unbeaten(points: Sequence[Point]) -> list[Point]:
    """Those that no other one beats in both, x and y."""
    return [
        point
        for point in points
        if not any(
            other.x[1] >= point.x[1]
            and other.y[1] >= point.y[1]
            and (other.x[1], other.y[1]) != (point.x[1], point.y[1])
            for other in points
        )
    ]


def plane(
    points: Sequence[Point], bands: Sequence[Band], x_title: str, y_title: str, y_unit: str, base: tuple[float, str]
) -> Html:
    """Points with error bars, the line through those that no other one beats in both, and bands behind.

    Points at infinity stand at the right edge. Bands far beyond all points are named there and not drawn.

    Args:
        points: to the right and up is better.
        bands: ranges of x, drawn behind.
        x_title, y_title: of the axes.
        y_unit: behind the numbers of y.
        base: a value of y with a line of its own, and what it is.
    """
    near = near_bands(points, bands)
    inside = [value for point in points for value in point.x]
    across = scale_of([*inside, *(end for band in near for end in (band.low, band.high))])
    if any(math.isinf(point.x[1]) for point in points):
        across = Scale(across.low, across.high + 0.15 * (across.high - across.low))
    up = scale_of([base[0], *(value for point in points for value in point.y)])
    far = [band for band in bands if band not in near]
    parts = [
        *(_band(band, across, row) for row, band in enumerate(near)),
        *_grid(across, up, y_unit),
        *_base(up(base[0]), base[1]),
        *_frontier(points, across, up),
        *_points(points, across, up),
        *(
            _text(f"{band.label}: {_value(band.mean)} →", 100, -8 - _LABEL * (row + len(near)), "note end")
            for row, band in enumerate(far)
        ),
        _text(x_title, 100, HEIGHT + 40, "title end"),
        _text(y_title, 0, -14 - _LABEL * len(bands), "title"),
    ]
    return _figure(parts, f"{y_title} over {x_title}", len(bands))


def lines(series: Mapping[int, tuple[str, Sequence[float]]], x_title: str, y_title: str) -> Html:
    """A line for each method over steps counted from 1, and a legend.

    Args:
        series: label and values by number of the colour.
        x_title, y_title: of the axes.
    """
    longest = max(len(values) for _, values in series.values())
    up = Scale(0.0, 1.08 * max([1e-9, *(value for _, values in series.values() for value in values if value == value)]))
    across = Scale(1.0, max(2.0, float(longest)))
    curves = [
        element(
            "path",
            d=_path([(100 * across(step), 100 * (1 - up(value))) for step, value in enumerate(values, 1)]),
            class_=f"line c{number % COLOURS}",
        )
        for number, (_, values) in series.items()
    ]
    grid = _grid(across, up, "", integers=True)
    titles = (_text(x_title, 100, HEIGHT + 40, "title end"), _text(y_title, 0, -14, "title"))
    keys = [element("li", Html(swatch(number) + element("span", label))) for number, (label, _) in series.items()]
    figure = _figure([*grid, _stretched(curves), *titles], f"{y_title} by {x_title}")
    return Html(element("ul", join(keys), class_="legend") + figure)


def strip(
    values: Mapping[str, float], across: Scale, number: int, worst: str, interval: tuple[float, float, float], unit: str
) -> Html:
    """One dot per prompt in a row, the mean as a line and its interval as a bar, the worst prompt ringed.

    Args:
        values: by prompt; infinite ones stand at the right edge.
        across: the axis that all rows share.
        number: of the colour.
        worst: the prompt to be ringed.
        interval: low, mean and high.
        unit: behind the numbers.
    """
    low, mean, high = (100 * across(value) for value in interval)
    dots = [
        element(
            "circle",
            element("title", f"{prompt}: {_value(value)}{unit}") if len(values) <= _TITLED else "",
            cx=f"{100 * across(value):.2f}%",
            cy=17,
            r=5 if prompt == worst else 4,
            class_=f"dot worst c{number % COLOURS}" if prompt == worst else f"dot c{number % COLOURS}",
        )
        for prompt, value in sorted(values.items(), key=lambda pair: pair[0] == worst)  # the ring on top
    ]
    bar = element("line", x1=f"{low:.2f}%", x2=f"{high:.2f}%", y1=17, y2=17, class_=f"bar c{number % COLOURS}")
    tick = element("line", x1=f"{mean:.2f}%", x2=f"{mean:.2f}%", y1=5, y2=29, class_=f"mean c{number % COLOURS}")
    rails = [_rule(100 * across(tick), 0, 34) for tick in across.ticks]
    return element("svg", join([*rails, bar, *dots, tick]), class_="strip", height=34, aria_hidden="true")


def axis(across: Scale) -> Html:
    """The numbers below strips."""
    ticks = [_text(f"{tick:g}", 100 * across(tick), 14, "tick middle") for tick in across.ticks]
    return element("svg", join(ticks), class_="strip axis", height=20, aria_hidden="true")


def marker(number: int) -> Html:
    """A method's marker, for legends."""
    return element(
        "svg",
        element("path", d=_SHAPES[number % len(_SHAPES)], class_=f"marker c{number % COLOURS}"),
        viewBox="-8 -8 16 16",
        class_="key",
        aria_hidden="true",
    )


def swatch(number: int) -> Html:
    """A piece of a method's line, for legends."""
    line = element("line", x1=-8, x2=8, y1=0, y2=0, class_=f"line c{number % COLOURS}")
    return element("svg", line, viewBox="-8 -8 16 16", class_="key", aria_hidden="true")


def _figure(parts: Sequence[Html], name: str, rows: int = 0) -> Html:
    """A plot with so many rows of labels above it."""
    plot = element("svg", join(parts), height=HEIGHT, role="group", aria_label=name)
    return element("div", plot, class_="plot", style=f"padding-top:{40 + _LABEL * rows}px")


def _grid(across: Scale, up: Scale, y_unit: str, integers: bool = False) -> Iterator[Html]:
    for tick in up.ticks:
        y = HEIGHT * (1 - up(tick))
        yield element("line", x1="0", x2="100%", y1=f"{y:.1f}", y2=f"{y:.1f}", class_="grid")
        yield _text(f"{tick:.4g}{y_unit}", 0, y + 4, "tick end", dx=-8)
    for tick in across.ticks:
        if not integers or tick == int(tick):
            yield _text(f"{tick:.4g}", 100 * across(tick), HEIGHT + 20, "tick middle")
    yield element("line", x1="0", x2="100%", y1=HEIGHT, y2=HEIGHT, class_="edge")


def _base(share: float, label: str) -> Iterator[Html]:
    y = HEIGHT * (1 - share)
    yield element("line", x1="0", x2="100%", y1=f"{y:.1f}", y2=f"{y:.1f}", class_="base")
    yield _text(label, 100, y + 15, "note end")


def _band(band: Band, across: Scale, row: int) -> Html:
    left = 100 * across(band.low)
    width = max(0.5, 100 * across(band.high) - left)
    area = element("rect", x=f"{left:.2f}%", width=f"{width:.2f}%", y=0, height=HEIGHT, class_="band")
    name = _text(band.label, left + width / 2, -8 - _LABEL * row, "note end" if left > 75 else "note middle")
    title = element("title", f"{band.label}: {_value(band.low)} to {_value(band.high)} dB")
    return element("g", join([title, area, name]))


def _frontier(points: Sequence[Point], across: Scale, up: Scale) -> Iterator[Html]:
    corners = sorted((100 * across(point.x[1]), 100 * (1 - up(point.y[1]))) for point in unbeaten(points))
    if len(corners) > 1:
        yield _stretched([element("path", d=_path(corners), class_="frontier")])


def _points(points: Sequence[Point], across: Scale, up: Scale) -> Iterator[Html]:
    heights = _apart({index: HEIGHT * (1 - up(point.y[1])) for index, point in enumerate(points)})
    for index, point in enumerate(points):
        (left, x, right), colour = (100 * across(value) for value in point.x), f"c{point.number % COLOURS}"
        top, y, bottom = (HEIGHT * (1 - up(value)) for value in reversed(point.y))
        aside = x > 50
        marked = element(
            "svg",
            element("path", d=_SHAPES[point.number % len(_SHAPES)], class_=f"marker {colour}"),
            x=f"{x:.2f}%",
            y=f"{y:.1f}",
            overflow="visible",
            width=1,
            height=1,
        )
        parts = [
            element("title", point.title),
            element(
                "line", x1=f"{left:.2f}%", x2=f"{right:.2f}%", y1=f"{y:.1f}", y2=f"{y:.1f}", class_=f"error {colour}"
            ),
            element(
                "line", x1=f"{x:.2f}%", x2=f"{x:.2f}%", y1=f"{top:.1f}", y2=f"{bottom:.1f}", class_=f"error {colour}"
            ),
            marked,
            _text(point.label, x, heights[index] + 4, f"name {colour}{' end' * aside}", dx=-12 if aside else 12),
        ]
        yield element("a", join(parts), href=point.link, class_="point", aria_label=point.title)


def _apart(heights: Mapping[int, float]) -> dict[int, float]:
    """The heights, moved so little that labels do not touch: pushed down from the top, then up from the bottom."""
    order = sorted(heights, key=lambda key: (heights[key], key))
    found: dict[int, float] = {}
    last = -math.inf
    for key in order:
        last = found[key] = max(heights[key], last + _LABEL)
    limit = HEIGHT - 2.0
    for key in reversed(order):
        limit = found[key] = min(found[key], limit)
        limit -= _LABEL
    return found


def _stretched(paths: Sequence[Html]) -> Html:
    """Paths in percentages of the plot, whatever its shape."""
    return element("svg", join(paths), viewBox="0 0 100 100", preserveAspectRatio="none", height=HEIGHT, width="100%")


def _path(corners: Sequence[tuple[float, float]]) -> str:
    return "M" + " L".join(f"{x:.2f} {y:.2f}" for x, y in corners)


def _rule(x: float, top: float, bottom: float) -> Html:
    return element("line", x1=f"{x:.2f}%", x2=f"{x:.2f}%", y1=top, y2=bottom, class_="grid")


def _text(content: str, x: float, y: float, kind: str, dx: int = 0) -> Html:
    return element("text", content, x=f"{x:.2f}%", y=f"{y:.1f}", dx=dx, class_=kind)


def _value(value: float) -> str:
    return "identical" if math.isinf(value) else f"{value:.1f}"
