"""Records put in order: every model and setting by itself, its methods in rows, their samples by prompt and seed."""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from dit_accel.eval.records import Item, Record
from dit_accel.eval.statistics import Sample

Role = Literal["reference", "floor", "method"]
Samples = Mapping[Sample, Record]
Placed = tuple[Record, Item]

RUN_OPTIONS = ("dtype", "backend", "device", "setting", "against")  # where a method was run, not what it is
PART = "part of "  # before the name of a list of prompts of which not all have a record
_ROLES: tuple[Role, ...] = ("reference", "floor", "method")


@dataclass(frozen=True)
class Row:
    """One method of a study.

    Args:
        label: its name.
        role: the dense reference, dense attention in another way (a noise floor), or a method.
        samples: the records of the samples that it finished, sorted.
    """

    label: str
    role: Role
    samples: Samples


@dataclass(frozen=True)
class Study:
    """One setting of one model in one run.

    Args:
        run, setting, model: names.
        size: frames, height, width in pixels.
        steps: of the reference.
        guidance: scale.
        prompt_list: name of the list of prompts, "part of ..." where not all of it has a record; "" without a name.
        prompts: the texts that have a record, in the order of their list.
        seeds: rising.
        machine, versions, commit: of the reference.
        rows: the reference, noise floors and methods, by label within each.
    """

    run: str
    setting: str
    model: str
    size: tuple[int, int, int]
    steps: int
    guidance: float
    prompt_list: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    machine: Mapping[str, str]
    versions: Mapping[str, str]
    commit: str
    rows: tuple[Row, ...]

    @property
    def size_words(self) -> str:
        return _size_words(self.size, self.steps, self.guidance)

    @property
    def prompt_hash(self) -> str:
        return prompt_hash(self.prompts)

    @property
    def reference(self) -> Row | None:
        return next((row for row in self.rows if row.role == "reference"), None)


def studies(records: Iterable[Record], run: str = "") -> list[Study]:
    """One study per suite, model and setting, smaller settings first; the order of the records does not matter.

    Args:
        records: of one run; of several with one id the earliest counts.
        run: its name. Default: that of the suite.

    Raises:
        ValueError: when two records are of the same method, prompt and seed, or one setting has two sizes.
    """
    latest_first = sorted(records, key=lambda record: (record["created"], json.dumps(record)), reverse=True)
    unique = sorted({record["id"]: record for record in latest_first}.values(), key=lambda record: record["id"])
    models = {record["id"]: record["model"] for record in unique}  # a method may run in a pipeline of its own
    groups: dict[tuple[str, str, str], list[Placed]] = defaultdict(list)
    for record, item in _placed(unique):
        groups[item["suite"], models.get(record["baseline"] or "", record["model"]), item["setting"]].append(
            (record, item)
        )
    found = [_study(run or suite, model, setting, members) for (suite, model, setting), members in groups.items()]
    return sorted(found, key=lambda study: (study.run, study.model, math.prod(study.size), study.steps, study.setting))


def call_of(record: Record, hidden: Sequence[str] = RUN_OPTIONS) -> str:
    """The method of a record as the command line takes it, without the hidden options."""
    options = {name: value for name, value in record["options"].items() if name not in hidden}
    inner = ", ".join(f"{name}={_python(value)!r}" for name, value in options.items())
    return f"{record['method']}({inner})" if inner else record["method"]


def prompt_hash(prompts: Sequence[str]) -> str:
    """Hash of the texts, 16 hex digits."""
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16]


def _placed(records: Sequence[Record]) -> list[Placed]:
    """Each record with its item; one without is numbered by its seed and then by its prompt."""
    plain = {(record["seed"], record["prompt"]) for record in records if "item" not in record}
    order = list(dict.fromkeys(prompt for _, prompt in sorted(plain)))
    return [
        (record, record["item"] if "item" in record else _item(record, order.index(record["prompt"])))
        for record in records
    ]


def _item(record: Record, number: int) -> Item:
    """What a record that is of no suite says of its place."""
    dense: Role = "floor" if record["baseline"] else "reference"
    return Item(
        suite="",
        setting=_size_words(record["size"], record["steps"], record["guidance"]),
        label=call_of(record),
        role=dense if record["method"] == "dense" else "method",
        prompt_list="",
        prompt_hash="",
        number=number,
        seed=record["seed"],
    )


def _study(run: str, model: str, setting: str, members: Sequence[Placed]) -> Study:
    numbered = sorted({(item["number"], record["prompt"]) for record, item in members})
    prompts = tuple(dict.fromkeys(prompt for _, prompt in numbered))
    rows = _rows(members)
    first = next(iter(rows[0].samples.values()))
    if any((record["size"], record["guidance"]) != (first["size"], first["guidance"]) for record, _ in members):
        raise ValueError(f"the setting {setting} of {model} has more than one size or guidance; report them apart.")
    return Study(
        run=run,
        setting=setting,
        model=model,
        size=cast(tuple[int, int, int], tuple(first["size"])),
        steps=first["steps"],
        guidance=first["guidance"],
        prompt_list=_list_name({item["prompt_hash"]: item["prompt_list"] for _, item in members}, prompts),
        prompts=prompts,
        seeds=tuple(sorted({item["seed"] for _, item in members})),
        machine=first["machine"],
        versions=first["versions"],
        commit=first["commit"],
        rows=rows,
    )


def _list_name(lists: Mapping[str, str], prompts: Sequence[str]) -> str:
    whole = lists.get(prompt_hash(prompts))
    return whole or " and ".join(sorted({PART + name for name in lists.values() if name}))


def _rows(members: Sequence[Placed]) -> tuple[Row, ...]:
    found: dict[tuple[Role, str], dict[Sample, Record]] = defaultdict(dict)
    for record, item in members:
        samples, sample = found[item["role"], item["label"]], (record["prompt"], item["seed"])
        if sample in samples:
            raise ValueError(
                f"{item['label']} has two records of the prompt {sample[0]!r} and seed {sample[1]} "
                f"({samples[sample]['id']}, {record['id']}); report different machines and types apart."
            )
        samples[sample] = record
    order = sorted(found, key=lambda key: (_ROLES.index(key[0]), key[1]))
    return tuple(Row(label, role, dict(sorted(found[role, label].items()))) for role, label in order)


def _size_words(size: Sequence[int], steps: int, guidance: float) -> str:
    frames, height, width = size
    clip = f", {frames} frames" if frames > 1 else ""
    return f"{width}×{height}{clip}, {steps} steps, guidance {guidance:g}"


def _python(value: Any) -> Any:
    """JSON's lists as the tuples that methods take."""
    return tuple(_python(item) for item in value) if isinstance(value, list) else value
