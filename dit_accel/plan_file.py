"""A plan's file: where it is found, and its assignment of actions as JSON."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from dit_accel.methods import METHODS, make_method
from dit_accel.methods.actions import Action, Assignment

FILE_NAME = "dit_accel_plan.json"
NUMBER = int | float
_ON_HUB = re.compile(r"\w[\w.-]*/\w[\w.-]*(?<!\.json)(/[\w./-]+\.json)?")


def names_plan(text: str) -> bool:
    """Whether a text is a plan's place rather than a method's name or call."""
    return (
        text not in (*METHODS, "")
        and "(" not in text
        and (text.endswith(".json") or "/" in text or Path(text).is_dir())
    )


def find_plan(source: str | os.PathLike[str]) -> Path:
    """The plan's file, downloaded if it is on the hub.

    Raises:
        ValueError: there is none.
    """
    path, name = Path(source), os.fspath(source)
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / FILE_NAME).is_file():
            raise ValueError(f"the folder {path} holds no {FILE_NAME}; save a plan there or name its file.")
        return path / FILE_NAME
    if not _ON_HUB.fullmatch(name):
        raise ValueError(f"there is no plan {name}; give a file, a folder that holds {FILE_NAME}, or owner/name.")
    return _download(name)


def _download(name: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    owner, repository, *file = name.split("/", 2)
    try:
        return Path(huggingface_hub.hf_hub_download(f"{owner}/{repository}", file[0] if file else FILE_NAME))
    except (OSError, ValueError, EntryNotFoundError) as error:
        reason = str(error).strip().partition("\n")[0].removesuffix(".")
        raise ValueError(
            f"there is no file or folder {name}, nor could the plan be had from the hub ({reason}); check the name."
        ) from error


def assignment_lists(assignment: Assignment) -> dict[str, list[dict[str, Any]]]:
    """The actions, and the table by runs of equal steps, each with the share of the run at which it ends."""
    runs: list[dict[str, Any]] = []
    end = 0
    for blocks, rows in groupby(assignment.table.tolist()):
        end += len(list(rows))
        runs.append({"until": end / assignment.steps, "blocks": blocks})
    return {"actions": [_action_json(action) for action in assignment.actions], "table": runs}


def assignment_from(actions: Iterable[Any], table: Iterable[Any], steps: int) -> Assignment:
    """What ``assignment_lists`` made lists of; a ValueError if it did not."""
    read = tuple(_action(row, f"action {number}") for number, row in enumerate(actions))
    return Assignment(read, _table(table, steps))


def text_of(facts: Mapping[str, Any], lists: Mapping[str, Iterable[Any]]) -> str:
    """A JSON object with a line for each fact and for each entry of a list.

    Raises:
        ValueError: what JSON does not have.
    """
    lines = [f'  "{key}": {json.dumps(value, allow_nan=False)}' for key, value in facts.items()]
    for key, rows in lists.items():
        inner = ",\n".join(f"    {json.dumps(row, allow_nan=False)}" for row in rows)
        lines.append(f'  "{key}": [\n{inner}\n  ]')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def plain(value: Any) -> Any:
    """The value as JSON has it: infinities and NaN as text."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def fields_of(value: Any, where: str, **kinds: Any) -> dict[str, Any]:
    """An object that must have exactly these keys, with values of these kinds."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object, got {value!r:.60}")
    for key in sorted(value.keys() ^ kinds.keys()):
        raise ValueError(f"{where} {'has the unknown' if key in value else 'lacks the'} key {key!r}")
    for key, kind in kinds.items():
        if type(value[key]) not in (get_args(kind) or (kind,)):  # exactly: true is no number
            raise ValueError(f"{key} of {where} must be {getattr(kind, '__name__', kind)}, got {value[key]!r:.60}")
    return dict(value)


def _action_json(action: Action) -> dict[str, Any]:
    method = action.method
    if method is not None and METHODS.get(method.name) is not type(method):
        raise ValueError(f"a plan's methods are found by name, and {method.name} is none of {', '.join(METHODS)}.")
    return {
        "method": None if method is None else method.name,
        "options": {} if method is None else method.options(),
        "residual": action.residual,
        "share": action.share,
        "reuse": action.reuse,
    }


def _action(row: Any, where: str) -> Action:
    fields = fields_of(row, where, method=str | None, options=dict, residual=bool, share=bool, reuse=bool)
    name, options = fields.pop("method"), fields.pop("options")
    if name is None and options:
        raise ValueError(f"{where} has options but no method, got {options}")
    return Action(None if name is None else make_method(name, **options), **fields)


def _table(runs: Iterable[Any], steps: int) -> Tensor:
    """The rows of all steps, integers [steps, blocks, heads or 1]."""
    rows: list[Any] = []
    for number, run in enumerate(runs):
        fields = fields_of(run, f"row {number} of the table", until=NUMBER, blocks=list)
        end = round(fields["until"] * steps) if 0 < fields["until"] <= 1 else 0
        if abs(fields["until"] * steps - end) > 1e-6 or not len(rows) < end <= steps:
            raise ValueError(f"row {number} of the table must end at a later one of {steps} steps, got {run['until']}")
        rows += [fields["blocks"]] * (end - len(rows))
    if len(rows) < steps:
        raise ValueError(f"the table must end with the run, got {len(rows)} of {steps} steps")
    try:
        return torch.tensor(rows)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError("blocks must be as many lists of as many indices in each row of the table") from error
