"""What a comparison looks like: figures, bars and synchronised clips as HTML that loads nothing else."""

from __future__ import annotations

from collections.abc import Mapping

from dit_accel.commands.compare import FPS
from dit_accel.demo.workshop import Comparison, Made, Progress
from dit_accel.eval.quality import Score
from dit_accel.eval.report.embed import embed
from dit_accel.eval.report.markup import Html, element, join
from dit_accel.eval.report.tables import MISSING, number

BUDGET = 12_000_000  # bytes of clips and error maps in one page


def progress_bar(progress: Progress) -> Html:
    """A bar over both sides, and what happens at the moment."""
    done = (progress.side + progress.step / max(1, progress.steps)) / 2
    bar = element(
        "div",
        element("div", class_="dit-bar", style=f"width:{max(2, 100 * done):.1f}%"),
        class_="dit-track",
        role="progressbar",
        aria_valuenow=f"{100 * done:.0f}",
        aria_valuemin="0",
        aria_valuemax="100",
        aria_label="Progress of the comparison",
    )
    side = "left" if progress.side == 0 else "right"
    return element("div", Html(bar + element("p", f"{side}: {progress.note}")), class_="dit-progress")


def notice(text: str) -> Html:
    """One line in place of the progress bar."""
    return element("p", text, class_="dit-notice", role="status")


def empty(heading: str, text: str) -> Html:
    """What stands where nothing is yet."""
    return element("div", Html(element("strong", heading) + element("p", text)), class_="dit-empty")


def title(comparison: Comparison) -> str:
    """A comparison in one line."""
    left, right = (method.name for method in comparison.wanted.methods)
    psnr = _value(comparison.quality["psnr"], ".1f", " dB")
    return f"{right} against {left}: {comparison.speedup:.2f}×, {psnr}, {comparison.wanted.prompt!r}"


def figures(comparison: Comparison) -> Html:
    """The row of figures: what was gained, how far apart the sides are, what each shows of the prompt."""
    left, right = comparison.sides
    quality = comparison.quality
    return cards(
        {
            "Speed-up": (f"{comparison.speedup:.2f}×", "denoising time, left over right"),
            "PSNR": (_value(quality["psnr"], ".1f", " dB"), "of right against left"),
            "SSIM": (_value(quality["ssim"], ".3f"), "1 is identical"),
            "Pairs computed": (f"{right.density:.1%}", f"of the run at right, {left.density:.1%} at left"),
            "Prompt shown": (_shown(right), f"at right, {_shown(left)} at left"),
        }
    )


def cards(figures: Mapping[str, tuple[str, str]]) -> Html:
    """A row of figures: heading -> figure and what it means."""
    return element(
        "dl",
        join(
            element("div", Html(element("dt", name) + element("dd", value) + element("small", note)), class_="dit-card")
            for name, (value, note) in figures.items()
        ),
        class_="dit-cards",
    )


def timing_bars(comparison: Comparison) -> Html:
    """Where the time of each side went: attention, the rest of the denoiser, text encoder and VAE."""
    longest = max(side.total for side in comparison.sides)
    rows = []
    for name, side in zip(("left", "right"), comparison.sides, strict=True):
        parts = {
            "attention": side.attention,
            "rest": side.denoise - side.attention,
            "outside": max(0.0, side.total - side.denoise),
        }
        bars = join(
            element(
                "span",
                class_=f"dit-part dit-{part}",
                style=f"width:{100 * seconds / longest:.2f}%",
                title=f"{_PARTS[part]}: {seconds:.2f} s",
            )
            for part, seconds in parts.items()
        )
        note = " (from an earlier run)" if side.reused else ""
        rows.append(
            element("p", f"{name}: {side.call}{note}", class_="dit-call")
            + element("div", Html(bars + element("b", f"{side.total:.2f} s")), class_="dit-row")
        )
    legend = join(element("span", text, class_=f"dit-key dit-{part}") for part, text in _PARTS.items())
    return element("div", Html("\n".join(rows) + element("p", legend, class_="dit-legend")), class_="dit-times")


_PARTS = {"attention": "attention", "rest": "rest of the denoiser", "outside": "text encoder and VAE"}


def clips(comparison: Comparison) -> Html:
    """Both outputs and where they differ, playing together; stills where there is one frame."""
    left, right = comparison.sides
    media, encoding = embed([left.frames, right.frames], FPS, BUDGET)
    shown = (("Left", left.call, media[0].clip), ("Right", right.call, media[1].clip))
    parts = [_figure(f"{name}: {call}", uri) for name, call, uri in shown]
    parts.append(_figure("Difference, 4 times amplified", media[1].difference or ""))
    controls = element("button", "Pause", type="button", class_="dit-play") if len(left.frames) > 1 else Html()
    note = element("p", f"Shown as {encoding}; figures are of the raw frames.", class_="dit-quiet")
    return element("div", Html(controls + element("div", join(parts), class_="dit-clips") + note), class_="dit-player")


def _figure(caption: str, uri: str) -> Html:
    if uri.startswith("data:video"):
        shown = element(
            "video", src=uri, muted="", autoplay="", playsinline="", loop="", preload="auto", aria_label=caption
        )
    else:
        shown = element("img", src=uri, alt=caption)
    return element("figure", Html(shown + element("figcaption", caption)))


def _value(score: Score, style: str, unit: str = "") -> str:
    return number(score.value, style, unit)


def _shown(side: Made) -> str:
    score = side.scores.get("prompt_accuracy")
    return MISSING if score is None else number(score.value, ".0%")
