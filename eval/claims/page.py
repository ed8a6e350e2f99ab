"""Published figures beside ours: one Markdown page, and a table of one line per method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from string import Template

from dit_accel.eval.claims.answers import PENDING, Records, answer_of, read_records, selected, verdict
from dit_accel.eval.claims.formulas import FORMULAS, UNITS, Row, figure
from dit_accel.eval.claims.schema import Claim, Claims, Embedded, Ours, Setting, load_claims
from dit_accel.eval.report.tables import MISSING
from dit_accel.eval.statistics import Sample, per_prompt, summarise
from dit_accel.eval.studies import prompt_hash

TEMPLATE = Path(__file__).parent / "page.md"


def write_headline(folder: Path, path: Path) -> None:
    """The page, made from the records in a folder.

    Raises:
        ValueError: no folder of records, or a claim whose record is ambiguous or has not the fields asked for.
    """
    if not folder.is_dir():
        raise ValueError(
            f"the headline page is made from records, but there is no folder {folder}; change to a checkout."
        )
    path.write_text(headline_page(load_claims(), folder), encoding="utf-8")


def headline_page(claims: Claims, folder: Path) -> str:
    """The page as Markdown."""
    template, records = Template(TEMPLATE.read_text(encoding="utf-8")), read_records(claims, folder)
    return template.substitute(
        summary=_summary(claims, records, page=""),
        methods="\n".join(_method_section(claims, method, records) for method in claims.titles),
        embedded=_table([_embedded_row(claims, entry, records) for entry in claims.embedded]),
        unchecked="\n".join(_unchecked(claims)),
        differences="\n".join(_differences(claims)),
    )


def headline_table(folder: Path) -> str:
    """One line per method, for the README: its paper's headline, ours and the best dense baseline."""
    claims = load_claims()
    return _summary(claims, read_records(claims, folder), page="docs/headline.md")


def _summary(claims: Claims, records: Records, page: str) -> str:
    return _table([_headline(claim, records, page) for claim in claims.claims if claim.headline])


def _headline(claim: Claim, records: Records, page: str) -> dict[str, str]:
    first = {
        "method": f"[`{claim.method}`]({page}#{claim.method})",
        "of": claim.kind,
        "published": f"{claim.says}, {_case(claim.setting)}: {_published(claim)}, {_hardware(claim)}",
        "source": f"{claim.paper}, {claim.read}",
    }
    found = "not checked" if claim.ours is None else answer_of(claim, claim.ours, records)
    if claim.ours is None or isinstance(found, str):
        return {**first, "ours": str(found), "best dense": MISSING, "verdict": MISSING}
    return {
        **first,
        "ours": f"{figure(found.answer.value, claim.published.unit)} ({found.answer.detail})",
        "best dense": found.answer.dense or MISSING,
        "verdict": verdict(claim, claim.ours, found),
    }


def _method_section(claims: Claims, method: str, records: Records) -> str:
    own = [claim for claim in claims.claims if claim.method == method]
    rows = [
        _row(claim, claim.ours, claims.command(claim.ours.record), records) for claim in own if claim.ours is not None
    ]
    title = f"## {method}\n\n{claims.titles[method]}; [the method here](methods/{method}.md)."
    return "\n\n".join(part for part in (title, _table(rows)) if part) + "\n"


def _row(claim: Claim, ours: Ours, command: str, records: Records) -> dict[str, str]:
    found, unit = answer_of(claim, ours, records), claim.published.unit
    row = {
        "claim": f"{claim.kind}: {claim.says}",
        "setting": _setting(claim.setting),
        "source": _source(claim),
        "published": _published(claim),
        "on": _hardware(claim),
        "ours": PENDING,
        "best dense": MISSING,
        "bound": MISSING,
        "ours / published": MISSING,
        "verdict": MISSING,
        "command": f"`{command}`",
    }
    if isinstance(found, str):
        return {**row, "ours": found}
    answer, formula = found.answer, FORMULAS[ours.formula]
    gpu = "" if formula.depends == "nothing" else found.gpu
    less = " (less is better)" if formula.better == "lower" else ""
    details = ", ".join(part for part in (answer.detail, answer.count, gpu) if part)
    return {
        **row,
        "ours": f"{figure(answer.value, unit)} ({details})",
        "best dense": answer.dense or MISSING,
        "bound": MISSING if answer.bound is None else figure(answer.bound, unit),
        "ours / published": f"{answer.value / claim.published.value:.2f}{less}" if claim.published.value else MISSING,
        "verdict": verdict(claim, ours, found),
    }


def _hardware(claim: Claim) -> str:
    named = {"": "GPU not known", "any": "any GPU", "Hopper": "a Hopper GPU"}
    return named.get(claim.setting.hardware, claim.setting.hardware)


def _source(claim: Claim) -> str:
    place = "" if claim.where == claim.read else f"; {claim.where}"
    return f"{claim.paper}, {claim.read}{place}"


def _model(setting: Setting) -> str:
    return f"{setting.model} {setting.size}".strip()


def _case(setting: Setting) -> str:
    tokens = "" if setting.tokens is None or setting.size else f", {setting.tokens:,} tokens"
    return _model(setting) + tokens


def _setting(setting: Setting) -> str:
    parts = [_model(setting)]
    if setting.tokens is not None:
        parts.append(f"{setting.tokens:,} tokens")
    if setting.density is not None:
        parts.append(f"density {setting.density:g}")
    if setting.steps is not None:
        dense = "" if setting.dense_steps is None else f", {setting.dense_steps:g} dense"
        parts.append(f"{setting.steps} steps{dense}")
    if setting.baseline:
        parts.append(f"dense {setting.baseline}")
    return "; ".join(parts)


def _published(claim: Claim) -> str:
    digits = f"{claim.published.value:,.10f}".rstrip("0").rstrip(".")
    note = f" ({claim.published.note})" if claim.published.note else ""
    return UNITS[claim.published.unit].format(digits) + note


def _embedded_row(claims: Claims, entry: Embedded, records: Records) -> dict[str, str]:
    name = entry.archived if entry.archived and not records[entry.record] else entry.record
    rows = records[name]
    chosen = [rows[number] for number in selected(rows, entry.select, f"{entry.call} in {name}")]
    samples = {(record["prompt"], _place(record)[1]): record for record in chosen}
    if len(samples) < len(chosen):
        raise ValueError(f"{entry.call} selects a prompt and seed twice in {name}; name more fields.")
    row = dict.fromkeys(("method", "prompts", "PSNR", "right", "dense right", "speed-up", "record", "command"), MISSING)
    row |= {"method": f"`{entry.call}`", "PSNR": PENDING, "command": f"`{claims.command(entry.record)}`"}
    if not chosen:
        return row
    dense = {record["id"]: record for record in rows}
    references = {sample: dense[record["baseline"]] for sample, record in samples.items()}
    psnr = summarise(_scores(samples, "psnr"))
    speed_ups = {sample: _over_best_dense(record, rows) for sample, record in samples.items()}
    timed = {sample: speed_up for sample, speed_up in speed_ups.items() if speed_up is not None}
    interval = f" [{psnr.interval.low:.1f}, {psnr.interval.high:.1f}]" if psnr.count > 1 else ""
    return row | {
        "prompts": _prompts(chosen),
        "PSNR": f"{psnr.mean:.1f}{interval} dB",
        "right": f"{mean(_scores(samples, 'clip_correct')):.0%}",
        "dense right": f"{mean(_scores(references, 'clip_correct')):.0%}",
        "speed-up": figure(median(per_prompt(timed).values()), "times") if timed else MISSING,
        "record": f"`{name}`{' (archived)' if name == entry.archived else ''}",
    }


def _place(record: Row) -> tuple[int, int]:
    """Number of the prompt and seed; a record of no suite has one number for both."""
    return (record["item"]["number"], record["item"]["seed"]) if "item" in record else (record["seed"], record["seed"])


def _prompts(records: Sequence[Row]) -> str:
    """How many prompts and seeds, with the hash of the texts."""
    texts = list(dict.fromkeys(text for _, text in sorted((_place(record)[0], record["prompt"]) for record in records)))
    seeds = len(records) / len(texts)
    times = f" × {seeds:g} seeds" if seeds.is_integer() else f", {len(records)} clips"
    return f"{len(texts)}{times if seeds > 1 else ''} (hash {prompt_hash(texts)})"


def _scores(samples: Mapping[Sample, Row], metric: str) -> list[float]:
    """One of each prompt, the mean over its seeds."""
    found = {sample: float(record["quality"][metric]["value"]) for sample, record in samples.items()}
    return list(per_prompt(found).values())


def _over_best_dense(record: Row, rows: Sequence[Row]) -> float | None:
    """The denoising loop by the fastest exact kernel of the same sample and steps over this one; None if not timed."""
    if not _is_timed(record):
        return None
    sample = ("model", "prompt", "seed", "size", "steps")
    same = [row for row in rows if all(row.get(key) == record.get(key) for key in sample)]
    dense = [float(row["timings"]["denoise"]) for row in same if row["method"] == "dense" and _is_timed(row)]
    return min(dense) / float(record["timings"]["denoise"]) if dense else None


def _is_timed(record: Row) -> bool:
    return "denoise" in record.get("timings", {})


def _unchecked(claims: Claims) -> Iterable[str]:
    """One list for each reason."""
    by_reason: dict[str, list[Claim]] = {}
    for claim in claims.claims:
        if claim.ours is None:
            by_reason.setdefault(claim.unchecked, []).append(claim)
    for reason, own in by_reason.items():
        lines = [f"**{reason}**", ""]
        lines += [
            f"- `{claim.method}`, {claim.kind}: {claim.says}, {_model(claim.setting)}: {_published(claim)}, "
            f"{_hardware(claim)} ({_source(claim)})"
            for claim in own
        ]
        yield "\n".join(lines) + "\n"


def _differences(claims: Claims) -> Iterable[str]:
    for name, sentence in claims.differences.items():
        methods = dict.fromkeys(claim.method for claim in claims.claims if name in claim.differs)
        kinds = dict.fromkeys(claim.kind for claim in claims.claims if name in claim.differs)
        yield f"- {', '.join(f'`{method}`' for method in methods)}, {', '.join(kinds)}: {sentence}"


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    """Markdown whose cells are words: flush left, and as long as they are."""
    lines = [[*rows[0]], ["---"] * len(rows[0]), *([*row.values()] for row in rows)] if rows else []
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
