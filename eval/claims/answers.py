"""The record that answers a claim, and what the two figures together say."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from dit_accel.eval.claims.formulas import FORMULAS, Answer, Found, Row
from dit_accel.eval.claims.schema import Claim, Claims, Ours, Published

Records = Mapping[str, Sequence[Row]]  # by name of the file

ARCHITECTURES = {"A100": "Ampere", "H100": "Hopper", "H200": "Hopper", "B200": "Blackwell", "Hopper": "Hopper"}
PENDING = "not measured yet"
_RUN = ("created", "command")  # what the rows of one run share


@dataclass(frozen=True)
class Answered:
    """A claim's answer and the GPU that gave it."""

    answer: Answer
    gpu: str


def answer_of(claim: Claim, ours: Ours, records: Records) -> Answered | str:
    """Our figure by the newest row that matches, or why there is none, in a few words.

    Args:
        claim: whose answer.
        ours: where it is.
        records: of its file at least.

    Raises:
        ValueError: fields that no record has are asked for.
    """
    rows = records[ours.record]
    chosen = selected(rows, ours.select, f"{claim.id} in {ours.record}")
    if not chosen:
        return PENDING
    row = sorted((rows[number] for number in chosen), key=lambda row: str(row.get("created", "")))[-1]
    if row.get("refused") is not None:
        return f"no figure: {row['refused']}"
    formula = FORMULAS[ours.formula]
    if missing := [name for name in formula.needs if row[name] is None]:
        return f"no figure: the record has no {missing[0]}"
    run = [other for other in rows if all(other.get(key) == row.get(key) for key in _RUN)]
    answer = formula.compute(Found(row, run, ours.baseline, claim.setting.steps, claim.setting.dense_steps))
    if isinstance(answer, str):
        return f"no figure: {answer}"
    machine = row["machine"]
    return Answered(answer, machine.get("gpu", machine["cpu"]).removeprefix("1 x "))


def read_records(claims: Claims, folder: Path) -> Records:
    """The lines of every file that claims refer to; none of a file that is not there."""
    names = {claim.ours.record for claim in claims.claims if claim.ours is not None}
    names |= {name for entry in claims.embedded for name in (entry.record, entry.archived) if name}
    return {name: _lines(folder / name) for name in names}


def _lines(path: Path) -> Sequence[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def selected(rows: Sequence[Row], select: Mapping[str, Any], where: str) -> list[int]:
    """Numbers of the rows whose fields have the values; None stands for a field that is not there.

    Raises:
        ValueError: a field that no row has.
    """
    for name, value in select.items():
        if rows and value is not None and all(_field(row, name) is None for row in rows):
            raise ValueError(f"{where} asks for the field {name}, which no line there has; correct it.")
    return [
        number for number, row in enumerate(rows) if all(_field(row, name) == value for name, value in select.items())
    ]


def _field(row: Row, name: str) -> Any:
    value: Any = row
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return tuple(value) if isinstance(value, list) else value


def verdict(claim: Claim, ours: Ours, found: Answered) -> str:
    """What the figures say, in a few words that follow from them alone."""
    formula, published, answer = FORMULAS[ours.formula], claim.published, found.answer
    if formula.better == "same":
        return _sameness(answer.value, published)
    if not _comparable(claim.setting.hardware, found.gpu, formula.depends):
        return f"other hardware ({claim.setting.hardware or 'not known'}): not comparable"
    higher = formula.better == "higher"
    words = _reach(answer.value, published.value, higher)
    if answer.only:
        return f"{words} against {answer.only}"
    if words != "reached" and answer.beside_paper is not None:
        return f"{words}; against {ours.baseline} {_reach(answer.beside_paper, published.value, higher)}"
    return words


def _sameness(value: float, published: Published) -> str:
    """Equal up to the rounding of what was published."""
    last_digit = 10.0 ** int(Decimal(str(published.value)).normalize().as_tuple().exponent)
    if published.value == int(published.value):
        last_digit = 1.0
    off = value - published.value
    return "the same" if abs(off) <= last_digit / 2 else f"{abs(off):.2g} points {'more' if off > 0 else 'less'}"


def _reach(value: float, published: float, higher: bool) -> str:
    missing = 1 - value / published if higher else value / published - 1
    if missing <= 0:
        return "reached"
    percent = "less than 1" if missing < 0.005 else f"{100 * missing:.0f}"
    return f"{percent} % {'short' if higher else 'over'}"


def _comparable(hardware: str, gpu: str, depends: str) -> bool:
    if depends == "nothing":
        return True
    if depends == "GPU":
        return bool(hardware) and gpu.endswith(hardware)
    return ARCHITECTURES.get(hardware) in {family for name, family in ARCHITECTURES.items() if gpu.endswith(name)}
