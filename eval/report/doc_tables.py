"""Tables of README.md and docs/ that are made from records in eval/results/, between two comments of the page.

<!-- table NAME: made by dit-accel report --tables -->
<!-- end of table -->
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from dit_accel.eval.aggregate import SPEED_UP, MethodSummary, StudySummary, summarise_study
from dit_accel.eval.bench.doc_tables import actions_table, kernels_table, methods_table, not_measured, steps_table
from dit_accel.eval.claims.page import headline_table
from dit_accel.eval.records import Record, read_records
from dit_accel.eval.report.tables import MISSING, format_table, number
from dit_accel.eval.statistics import compare_samples
from dit_accel.eval.studies import RUN_OPTIONS, call_of, studies
from dit_accel.eval.summary import SHOWN, machine_words, mean_text, sample_words

Column = Callable[[MethodSummary, StudySummary], str]

_BLOCK = re.compile(
    r"(?P<start><!-- table (?P<name>[\w-]+): made by dit-accel report --tables -->\n).*?(?P<end><!-- end of table -->)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Source:
    """Records that a table may be of.

    Args:
        records: file in eval/results/.
        keep: which of its records count. Default: all.
        unsaid: what the file leaves out of every record, being the same in all. Default: nothing.
        remark: what a reader of the table has to know of them.
    """

    records: str
    keep: Callable[[Mapping[str, Any]], bool] = lambda record: True
    unsaid: Mapping[str, object] = field(default_factory=dict)
    remark: str = ""


@dataclass(frozen=True)
class DocTable:
    """A table of one study.

    Args:
        stage: of ``dit-accel reproduce``, which makes the records of the first source.
        columns: by heading, the first one names the method.
        sources: the first one with records counts.
        order: of the rows; "psnr": dense, then from the least mean up. Default as recorded.
    """

    stage: str
    columns: Mapping[str, Column]
    sources: Sequence[Source]
    order: Literal["recorded", "psnr"] = "recorded"


def is_checkout(root: Path) -> bool:
    """Whether a folder has pages with tables."""
    return (root / "README.md").is_file() and (root / "docs").is_dir()


def rewrite_tables(root: Path) -> list[Path]:
    """Makes all tables of a checkout again, and returns the pages that changed.

    Raises:
        ValueError: a folder that is no checkout, or a table that is not known.
    """
    if not is_checkout(root) or not (root / "eval" / "results").is_dir():
        raise ValueError(f"{root} is no checkout of dit_accel with README.md, docs and eval/results; change to one.")
    changed = []
    for page in [root / "README.md", *sorted((root / "docs").rglob("*.md"))]:
        before = page.read_text(encoding="utf-8")
        after = with_tables(before, root)
        if after != before:
            page.write_text(after, encoding="utf-8")
            changed.append(page)
    return changed


def with_tables(text: str, root: Path) -> str:
    """The text of a page with its tables made again."""

    def block(found: re.Match[str]) -> str:
        if found["name"] not in TABLES:
            raise ValueError(f"there is no table {found['name']!r}; choose one of {', '.join(TABLES)}.")
        table = TABLES[found["name"]]
        text = make_table(table, root) if isinstance(table, DocTable) else table(root / "eval" / "results")
        return f"{found['start']}{text}\n{found['end']}"

    return _BLOCK.sub(block, text)


def make_table(table: DocTable, root: Path) -> str:
    """Markdown, with the count and hash of the prompts below; where nothing is measured yet, what does it.

    Raises:
        ValueError: records of more than one model or setting.
    """
    read = ((source, _read(root / "eval" / "results" / source.records, source)) for source in table.sources)
    source, records = next(((source, records) for source, records in read if records), (None, []))
    if source is None:
        return not_measured(table.stage)
    found = [summarise_study(study) for study in studies(records)]
    if len(found) != 1:
        raise ValueError(
            f"a table is of one model and setting, but {source.records} has {len(found)}; choose with keep."
        )
    summary = found[0]
    rows = [
        {name: make(method, summary) for name, make in table.columns.items()}
        for method in _ordered(table, records, summary)
    ]
    facts = [sample_words(summary.study), machine_words(summary.study), f"`eval/results/{source.records}`"]
    return f"{format_table(rows)}\n\n{'; '.join(facts)}{source.remark}."


def _read(path: Path, source: Source) -> list[Record]:
    if not path.exists():
        return []
    if source.unsaid:
        lines = path.read_text(encoding="utf-8").splitlines()
        records = [cast(Record, dict(source.unsaid) | json.loads(line)) for line in lines]
    else:
        records = read_records(path)
    return [record for record in records if source.keep(record)]


def _ordered(table: DocTable, records: Sequence[Record], summary: StudySummary) -> list[MethodSummary]:
    if table.order == "psnr":
        return sorted(summary.methods, key=lambda method: _mean(method, "psnr") or 0.0)
    recorded = list(dict.fromkeys(record["id"] for record in records))
    return sorted(
        summary.methods,
        key=lambda method: min(recorded.index(record["id"]) for record in method.row.samples.values()),
    )


def _mean(method: MethodSummary, metric: str) -> float | None:
    return method.metrics[metric].summary.mean if metric in method.metrics else None


def mean(metric: str, style: str, unit: str = "") -> Column:
    return lambda method, _: number(_mean(method, metric), style, unit)


def interval(metric: str, style: str, unit: str = "") -> Column:
    return lambda method, _: mean_text(method.metrics.get(metric), style, unit)


def density(kind: str) -> Column:
    return lambda method, _: number(method.densities.get(kind), ".1%")


def lead(of: str, metric: str, style: str, unit: str = "") -> Column:
    """How far the method ``of`` is ahead, paired, with its interval."""

    def column(method: MethodSummary, summary: StudySummary) -> str:
        ahead = next((other for other in summary.methods if _record(other)["method"] == of), method)
        both = [side.metrics[metric].by_sample for side in (ahead, method) if metric in side.metrics]
        if ahead is method or method.role != "method" or len(both) < 2:
            return MISSING
        paired = compare_samples(*both)
        if paired is None:
            return MISSING
        low, high = paired.interval.low, paired.interval.high
        return f"{paired.difference:+{style}}{unit} [{low:{style}}, {high:{style}}]"

    return column


def _record(method: MethodSummary) -> Record:
    return next(iter(method.row.samples.values()))


def _name(method: MethodSummary, _: StudySummary) -> str:
    return _record(method)["method"]


def _call(*hidden: str) -> Column:
    return lambda method, _: f"`{call_of(_record(method), (*RUN_OPTIONS, *hidden))}`"


_COMPARE: Mapping[str, Column] = {
    "denoise": mean("denoise", ".2f", " s"),
    "attention": mean("attention", ".2f", " s"),
    "speed-up": mean(SPEED_UP, ".2f", "×"),
    "density": density("executed"),
    "PSNR": mean("psnr", ".1f", " dB"),
    "SSIM": mean("ssim", ".3f"),
    "prompt accuracy": mean(SHOWN, ".0%"),
}
_QUALITY: Mapping[str, Column] = {
    "method": _call("start_percent"),
    "prompts": lambda method, _: str(len(method.prompts)),
    "computed": density("executed"),
    "PSNR [95 %]": interval("psnr", ".1f", " dB"),
    "right": mean("clip_correct", ".0%"),
    "left out": mean("discarded_mass", ".0%"),
}
_SHAPES_H200: Mapping[str, Any] = {  # said at the top of docs/quality.md
    "size": [25, 192, 256],
    "steps": 16,
    "guidance": 4.0,
    "timings": {},
    "versions": {},
    "created": "",
}


def _compared(stage: str, records: str, columns: Mapping[str, Column], **changes: Any) -> DocTable:
    return DocTable(stage, columns, (Source(records),), **changes)


def _at_equal_density(earlier_run: str, keep: Callable[[Mapping[str, Any]], bool]) -> DocTable:
    """Of the suite's methods that ``keep`` chooses; while it has not run, of a run of earlier versions."""
    suite = Source("suite-quality-h200.jsonl", lambda record: record["item"]["role"] != "floor" and keep(record))
    earlier = Source(
        "quality-shapes-h200.jsonl",
        lambda record: record["run"] == earlier_run,
        _SHAPES_H200,
        ", runs of earlier versions, which `dit-accel reproduce --only suite-quality` will replace",
    )
    return DocTable("suite-quality", _QUALITY, (suite, earlier), order="psnr")


def _is_fifth(record: Mapping[str, Any]) -> bool:
    return bool(record["options"].get("density") == 0.2)


TABLES: Mapping[str, DocTable | Callable[[Path], str]] = {  # or what makes one from the folder of the records
    "compare": _compared("compare", "compare-shapes-cpu.jsonl", {"method": _name, **_COMPARE}),
    "delta": _compared("compare-delta", "compare-shapes-cpu-delta.jsonl", {"method": _call(), **_COMPARE}),
    "plan": _compared(
        "compare-plan",
        "compare-shapes-cpu-plan.jsonl",
        {
            "method": _name,
            "speed-up [95 %]": interval(SPEED_UP, ".2f", "×"),
            "plan's lead": lead("plan", SPEED_UP, ".2f"),
            "PSNR [95 %]": interval("psnr", ".1f", " dB"),
            "plan's lead in PSNR": lead("plan", "psnr", ".1f", " dB"),
            "prompt accuracy": mean(SHOWN, ".0%"),
        },
    ),
    "attention-level": _compared(
        "attention-level",
        "attention-level-cpu.jsonl",
        {
            "method": _call("start_percent"),
            "computed": density("executed"),
            "left out": mean("discarded_mass", ".1%"),
            "error": mean("attention_error", ".1%"),
            "cosine": mean("attention_cosine", ".3f"),
            "PSNR": mean("psnr", ".1f", " dB"),
        },
        order="psnr",
    ),
    "headline": headline_table,
    "kernels": kernels_table,
    "methods": methods_table,
    "actions": actions_table,
    "steps": steps_table,
    "quality-fifth": _at_equal_density(
        "equal density .2, 48 prompts", lambda record: record["method"] == "dense" or _is_fifth(record)
    ),
    "quality-third": _at_equal_density("equal density .35", lambda record: not _is_fifth(record)),
}
