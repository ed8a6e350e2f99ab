"""Published claims as data: what a paper reports, where, and which record answers it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING as REQUIRED
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from dit_accel.eval.claims.formulas import FORMULAS, UNITS
from dit_accel.eval.suite.document import Node, distinct, read_document

Kind = Literal["attention", "layer", "step", "end-to-end", "training", "quality"]
Read = Literal["paper", "abstract", "repository", "notes"]

SHIPPED = Path(__file__).parent / "claims.yaml"


@dataclass(frozen=True)
class Setting:
    """What was run, as far as it is known.

    Args:
        model: its name.
        size: of the sample, or the grid of tokens.
        tokens: of the self-attention, text left out.
        density: share of the pairs that a sparse call computes, as published.
        steps, dense_steps: of a run; a quarter of 50 steps is 12.5.
        hardware: GPUs; "" where it is not stated, "any" for counts, which depend on none.
        baseline: the dense attention; "" where it is not stated.
    """

    model: str
    size: str = ""
    tokens: int | None = None
    density: float | None = None
    steps: int | None = None
    dense_steps: float | None = None
    hardware: str = ""
    baseline: str = ""


@dataclass(frozen=True)
class Published:
    """The figure. ``note`` is what it was made of, such as the two times behind a ratio."""

    value: float
    unit: str
    note: str = ""


@dataclass(frozen=True)
class Ours:
    """The record that answers a claim.

    Args:
        record: file in eval/results/.
        select: fields and their values; a dot goes into a field, null is a field that is not there.
        formula: name in ``formulas.FORMULAS``.
        baseline: the dense kernel that the paper compares with, as the record calls it; "" where that is not known.
    """

    record: str
    select: Mapping[str, Any]
    formula: str
    baseline: str = ""


@dataclass(frozen=True)
class Claim:
    """One figure of one paper.

    Args:
        id: unique.
        method: name of the method here.
        kind: what was measured.
        says: the claim, one line.
        paper: arXiv number.
        where: table or section.
        read: where it was read; all but the paper itself are marked on the page.
        headline: the one claim of its method that stands in the README.
        ours: what answers it, or
        unchecked: the sentence that says why nothing here does.
        differs: names of the ways in which our setting differs.
    """

    id: str
    method: str
    kind: Kind
    says: str
    paper: str
    where: str
    read: Read
    setting: Setting
    published: Published
    headline: bool = False
    ours: Ours | None = None
    unchecked: str = ""
    differs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Embedded:
    """Quality of a method on an embedded pipeline, which stands for no model of a paper.

    Args:
        method: its name.
        call: what was applied.
        record, select: its records, one for each prompt and seed.
        archived: a file that no command makes, read where the record is not there; "" without one.
    """

    method: str
    call: str
    record: str
    select: Mapping[str, Any]
    archived: str = ""


@dataclass(frozen=True)
class Claims:
    """All of claims.yaml.

    Args:
        titles: what a method's section is called.
        stages: record -> the stage of `dit-accel reproduce` that makes it.
        differences: ways in which settings differ, name -> sentence.
        claims: in the order of the page.
        embedded: quality on embedded pipelines.
    """

    titles: Mapping[str, str]
    stages: Mapping[str, str]
    differences: Mapping[str, str]
    claims: tuple[Claim, ...]
    embedded: tuple[Embedded, ...]

    def command(self, record: str) -> str:
        """What makes a record again."""
        return f"dit-accel reproduce --only {self.stages[record]}"


def load_claims(path: Path = SHIPPED) -> Claims:
    """Claims from a YAML file.

    Raises:
        ValueError: unknown, missing or contradictory keys; the sentence names the place in the file.
    """
    top = _entries(read_document(path), Claims)
    titles, stages, differences = (
        {name: node.text() for name, node in top[key].mapping().items()} for key in ("titles", "stages", "differences")
    )
    distinct((node.mapping()["id"] for node in top["claims"].elements()), Node.text)
    claims = tuple(_claim(node, titles, stages, differences) for node in top["claims"].elements())
    for method in titles:
        heads = [claim.id for claim in claims if claim.method == method and claim.headline]
        if len(heads) != 1:
            raise top["claims"].error(f"must have one headline of {method}, got {len(heads)}; mark one claim.")
    for name in differences:
        if not any(name in claim.differs for claim in claims):
            raise top["differences"].error(f"holds {name}, which no claim refers to; remove it.")
    embedded = tuple(_embedded(node, titles, stages) for node in top["embedded"].elements())
    return Claims(titles, stages, differences, claims, embedded)


def _claim(node: Node, titles: Mapping[str, str], stages: Mapping[str, str], differences: Mapping[str, str]) -> Claim:
    entries = _entries(node, Claim)
    if ("ours" in entries) == ("unchecked" in entries):
        raise node.error("must have either ours or unchecked; give one of them.")
    published = _published(entries["published"])
    ours = _ours(entries["ours"], stages) if "ours" in entries else None
    if ours is not None and FORMULAS[ours.formula].unit != published.unit:
        wanted = FORMULAS[ours.formula].unit
        raise entries["published"].error(f"must be in {wanted}, as {ours.formula} is, got {published.unit}.")
    setting = _setting(entries["setting"])
    if ours is not None and ours.formula == "run_speedup" and None in (setting.steps, setting.dense_steps):
        raise entries["setting"].error("must have steps and dense_steps, which run_speedup adds up; add them.")
    return Claim(
        id=entries["id"].name(),
        method=entries["method"].choice(titles),
        kind=entries["kind"].choice(get_args(Kind)),  # type: ignore[arg-type]
        says=entries["says"].text(),
        paper=entries["paper"].text(),
        where=entries["where"].text(),
        read=entries["read"].choice(get_args(Read)),  # type: ignore[arg-type]
        setting=setting,
        published=published,
        headline="headline" in entries and entries["headline"].flag(),
        ours=ours,
        unchecked=entries["unchecked"].text() if "unchecked" in entries else "",
        differs=distinct(entries["differs"].elements(), lambda name: name.choice(differences))
        if "differs" in entries
        else (),
    )


def _setting(node: Node) -> Setting:
    entries = _entries(node, Setting)
    read: dict[str, Callable[[Node], Any]] = {
        **dict.fromkeys(("model", "size", "hardware", "baseline"), Node.text),
        **dict.fromkeys(("tokens", "steps"), Node.integer),
        **dict.fromkeys(("density", "dense_steps"), Node.number),
    }
    return Setting(**{name: read[name](value) for name, value in entries.items()})


def _published(node: Node) -> Published:
    entries = _entries(node, Published)
    note = entries["note"].text() if "note" in entries else ""
    return Published(entries["value"].number(), entries["unit"].choice(UNITS), note)


def _ours(node: Node, stages: Mapping[str, str]) -> Ours:
    entries = _entries(node, Ours)
    return Ours(
        record=entries["record"].choice(stages),
        select=entries["select"].options(),
        formula=entries["formula"].choice(FORMULAS),
        baseline=entries["baseline"].text() if "baseline" in entries else "",
    )


def _embedded(node: Node, titles: Mapping[str, str], stages: Mapping[str, str]) -> Embedded:
    entries = _entries(node, Embedded)
    return Embedded(
        method=entries["method"].choice(titles),
        call=entries["call"].text(),
        record=entries["record"].choice(stages),
        select=entries["select"].options(),
        archived=entries["archived"].name() if "archived" in entries else "",
    )


def _entries(node: Node, cls: type) -> dict[str, Node]:
    """The entries of a mapping whose keys are the fields of a dataclass."""
    known = fields(cls)
    return node.mapping([item.name for item in known], [item.name for item in known if item.default is REQUIRED])
