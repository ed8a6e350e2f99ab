"""The report of runs over many prompts: one HTML page that loads nothing else, and the same numbers as files."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from dit_accel.eval.aggregate import MethodSummary
from dit_accel.eval.quality.difference import GAIN
from dit_accel.eval.report.attention import attention_maps
from dit_accel.eval.report.figures import pareto, prompt_strips, trajectories
from dit_accel.eval.report.gallery import Exhibit, Shot, exhibits, kept_samples
from dit_accel.eval.report.markup import Html, asset, element, fill, join
from dit_accel.eval.report.part import Part, parts_of
from dit_accel.eval.report.results_table import results_table
from dit_accel.eval.report.run import Run
from dit_accel.eval.report.tables import MISSING, number
from dit_accel.eval.sets import set_row
from dit_accel.eval.statistics import Sample
from dit_accel.eval.summary import (
    SHOWN,
    machine_words,
    remarks,
    sample_words,
    write_summaries,
)

Heads = Callable[[str], int | None]

FPS = 12.0
BUDGET = 14_000_000  # bytes of clips and stills


def write_run_report(
    folder: str | os.PathLike[str], runs: Sequence[Run], heads: Heads, fps: float = FPS, budget: int = BUDGET
) -> Path:
    """Writes index.html, summary.md, summary.csv and summary.json, and returns the path of the page.

    Args:
        folder: made when missing.
        runs: in the order of the page; each is summarised by itself.
        heads: attention heads of a model, None where unknown: then what was probed per head is not drawn.
        fps: frames per second of the clips. Default 12.
        budget: bytes of clips and stills; samples that do not fit are left out, and the page says so. Default 14 MB.

    Raises:
        ValueError: without runs, or what ``studies`` refuses.
    """
    if not runs:
        raise ValueError("a report needs at least one run, got none.")
    parts = parts_of(runs)
    kept = [kept_samples(part.run, part.summary) for part in parts]
    whole = max(1, sum(map(len, kept)))
    page = fill(
        "run_page.html",
        style=asset("style.css"),
        own_style=asset("run_page.css"),
        script=asset("page.js"),
        title=" and ".join(dict.fromkeys(part.study.run for part in parts)),
        facts=_pairs(_facts(parts)),
        contents=_contents(parts),
        studies=join(
            _section(part, samples, heads(part.study.model), fps, budget * len(samples) // whole)
            for part, samples in zip(parts, kept, strict=True)
        ),
        how=_pairs(_HOW),
        environment=join(_environment(run, next(part for part in parts if part.run is run)) for run in runs),
    )
    write_summaries(folder, [part.summary for part in parts])
    path = Path(folder) / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


def _pairs(pairs: Mapping[str, object]) -> Html:
    return join(
        element("div", Html(element("dt", name) + element("dd", value)), class_="pair") for name, value in pairs.items()
    )


def _facts(parts: Sequence[Part]) -> dict[str, str]:
    facts = {
        "Model": [part.study.model for part in parts],
        "Methods": [str(len({method.label for part in parts for method in part.summary.of("method")}))],
        "Size": [part.study.size_words for part in parts],
        "Samples": [sample_words(part.study) for part in parts],
        "Machine": [machine_words(part.study) for part in parts],
    }
    return {name: "; ".join(dict.fromkeys(values)) for name, values in facts.items()}


def _contents(parts: Sequence[Part]) -> Html:
    if len(parts) == 1:
        return Html()
    links = (element("li", element("a", part.title, href=f"#{part.anchor}")) for part in parts)
    return element("nav", element("ul", join(links), class_="contents"), aria_label="Studies")


def _section(part: Part, kept: Sequence[Sample], heads: int | None, fps: float, budget: int) -> Html:
    shown = exhibits(part.run, part.summary, kept, fps, budget)
    lines = [element("li", remark) for remark in remarks(part.summary)]
    return fill(
        "study.html",
        anchor=part.anchor,
        title=part.title,
        lead=f"{part.study.size_words}. {sample_words(part.study)}. Same prompt, seed and initial noise in each row; "
        "only the attention differs.",
        findings=_pairs(dict(_findings(part))),
        table=results_table(part),
        remarks=element("ul", join(lines), class_="remarks") if lines else "",
        figures=join([pareto(part), trajectories(part)]),
        strips=prompt_strips(part, {exhibit.sample for exhibit in shown}),
        exhibits=_exhibits(part, shown, len(kept), fps),
        attention=_attention(part, heads),
        sets=_sets(part),
        failures=_failures(part),
    )


def _findings(part: Part) -> Iterator[tuple[str, Html]]:
    """The extremes of the table in words."""
    timed = [method for method in part.summary.of("method") if method.speed_up]
    if timed:
        fastest = max(timed, key=lambda method: method.speed_up.median if method.speed_up else 0.0)
        yield "Fastest", _finding(part, fastest, f"{fastest.speed_up.median if fastest.speed_up else 0:.2f}×")
    if part.judged:
        nearest = max(part.judged, key=lambda method: method.metrics["psnr"].summary.mean)
        yield "Closest to dense", _finding(part, nearest, _closeness(nearest))
    if part.judged and len(part.study.prompts) > 1:
        worst = min(part.judged, key=lambda method: method.metrics["psnr"].summary.worst)
        yield "Worst prompt of all", _finding(part, worst, number(worst.metrics["psnr"].summary.worst, ".1f", " dB"))
    if part.summary.floor:
        floor = part.summary[part.summary.floor]
        yield "Kernel noise floor", _finding(part, floor, _closeness(floor))


def _closeness(method: MethodSummary) -> str:
    psnr = method.metrics["psnr"]
    return number((psnr.finite or psnr.summary).mean, ".1f", " dB")


def _finding(part: Part, method: MethodSummary, figure: str) -> Html:
    return Html(element("span", figure) + element("small", part.names[method.label]))


def _exhibits(part: Part, shown: Sequence[Exhibit], kept: int, fps: float) -> Html:
    if not kept:
        return Html()
    left_out = f" {kept - len(shown)} more would make the page too large." * (kept > len(shown))
    encodings = " and ".join(dict.fromkeys(str(exhibit.encoding) for exhibit in shown))
    words = (
        f"The clip, and below it its difference to dense, × {GAIN:g} for every method. Media are compressed "
        f"({encodings}), the numbers are of the raw frames.{left_out}"
    )
    samples = [_exhibit(part, exhibit, fps) for exhibit in shown]
    return join([element("h3", "Samples"), element("p", words, class_="quiet"), *samples])


def _exhibit(part: Part, exhibit: Exhibit, fps: float) -> Html:
    prompt, seed = exhibit.sample
    player = fill("player.html", frames=exhibit.frames, fps=fps) if exhibit.frames > 1 else Html()
    shots = element("div", join(_shot(part, shot) for shot in exhibit.shots), class_="shots")
    return element(
        "article",
        join([element("h4", prompt), element("p", f"seed {seed}", class_="quiet"), player, shots]),
        class_="panel exhibit",
        id=part.sample_anchor(exhibit.sample),
        style="--rendering:" + ("pixelated" if exhibit.width < 256 else "auto"),
        data_clips="",
    )


def _shot(part: Part, shot: Shot) -> Html:
    quality, name = shot.record["quality"], part.names[shot.label]
    scores = {"psnr": (".1f", " dB"), "ssim": (".3f", ""), SHOWN: (".0%", " shown")}
    texts = [number(quality.get(metric, {}).get("value"), *style) for metric, style in scores.items()]
    caption = Html(element("b", name) + element("span", " · ".join(text for text in texts if text != MISSING)))
    media = [_medium(shot.media.clip, f"Output of {name}")]
    if shot.media.difference:
        media.append(_medium(shot.media.difference, f"Error map of {name}"))
    return element("figure", Html(element("figcaption", caption) + join(media)))


def _medium(uri: str, description: str) -> Html:
    if uri.startswith("data:video"):
        return element("video", src=uri, muted="", playsinline="", preload="auto", aria_label=description)
    return element("img", src=uri, alt=description)


def _attention(part: Part, heads: int | None) -> Html:
    maps = attention_maps(part.summary, part.names, heads) if heads else Html()
    if not maps:
        return Html()
    words = (
        "Each row of a map is a transformer block, each column a head, the mean over steps, guidance branches and "
        "probed prompts; the thin row below goes over the denoising steps. Bright is far from dense attention."
    )
    content = join([element("h3", "Attention, layer by layer"), element("p", words), maps])
    return element("div", element("section", content, class_="panel"), class_="figures")


def _sets(part: Part) -> Html:
    """Metrics of whole sets, which have one value for a method."""
    own = [row for row in part.run.sets if (row["model"], row["setting"]) == (part.study.model, part.study.setting)]
    rows = [{name: text for name, text in set_row(row).items() if name not in ("model", "setting")} for row in own]
    if not rows:
        return Html()
    head = element("tr", join(element("th", name, scope="col") for name in rows[0]))
    body = [
        element("tr", join(element("td" if place else "th", text) for place, text in enumerate(row.values())))
        for row in rows
    ]
    table = element("table", Html(element("thead", head) + element("tbody", join(body))))
    return join(
        [
            element("h3", "Whole sets"),
            element("div", table, class_="scroll", tabindex=0, role="region", aria_label="Metrics of whole sets"),
        ]
    )


def _failures(part: Part) -> Html:
    own = [
        f"{failure['method']}: {failure['error']}"
        for failure in part.run.failures
        if (failure.get("model"), failure.get("setting")) == (part.study.model, part.study.setting)
    ]
    if not own:
        return Html()
    lines = element("ul", join(element("li", text) for text in dict.fromkeys(own)), class_="failures")
    return join([element("h3", "What failed"), lines])


def _environment(run: Run, part: Part) -> Html:
    study = part.study
    facts = {**study.machine, **study.versions, "commit": study.commit, "records": len(run.records)}
    command = ["dit-accel", "eval", "suite.yaml", "--output", str(run.path)] if run.suite else []
    again = [command, ["dit-accel", "report", str(run.path)]] if command else [["dit-accel", "report", str(run.path)]]
    blocks = [element("h3", run.name), element("dl", _pairs(facts), class_="pairs")]
    blocks.append(_code("Shell", "\n".join(shlex.join(words) for words in again)))
    if run.suite:
        blocks.append(_code("suite.yaml", run.suite.rstrip()))
    return element("div", join(blocks), class_="environment")


def _code(name: str, content: str) -> Html:
    copy = element("button", "Copy", type="button", data_copy="")
    return element("div", Html(element("span", name) + copy + element("pre", element("code", content))), class_="code")


_HOW = {
    "Prompts": "The unit of every mean, interval and test is the prompt. Seeds of one prompt are not independent: they "
    "are averaged first. Intervals are 95 % bootstrap intervals over prompts, p is of the Wilcoxon signed-rank test on "
    "prompts that both methods finished. The hash is of the texts of the prompts.",
    "Speed-up": "Denoise time of the dense run over the method's, of the same sample on the same machine, with the "
    "pipeline's own attention kernel; median and quartiles over samples. “Over fastest” is the median over the fastest "
    "exact dense kernel of those that were run.",
    "Bound": "1 / (1 - a + a·d) for the share a of the dense run that is attention and the density d of the run, from "
    "computed pairs: the most that a method can reach that saves pairs alone; none for one that skips projections too.",
    "Pairs computed": "Share of query-key pairs in a sparse call, whole tiles and text included, as executed; below, "
    "the mean over the whole run, dense steps and layers included.",
    "PSNR, SSIM": "Between the raw frames and the dense clip of the same sample. Identical clips have infinite PSNR. "
    "Closeness to dense is not the same as looking good.",
    "Noise floor": "What the same comparison says of dense attention by another exact kernel, or with one step less. "
    "A method at the kernel's floor is as close as a reordering of sums.",
    "Prompt accuracy": "Share of the prompt's statements that a verifier reads back from the clip; the difference is "
    "to the dense clips, paired.",
    "Files": "summary.md, summary.csv and summary.json beside this page have the same numbers, and more metrics.",
}
