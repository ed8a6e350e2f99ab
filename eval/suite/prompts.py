"""Prompt lists: those that ship with the package by name, all others by path."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from dit_accel.eval.suite.document import near

COLUMNS = ("prompt", "Prompt", "Prompts", "caption", "prompt_en")
LISTS = Path(__file__).parent / "prompts"


def read_prompts(source: str, base_folder: Path, first: int | None = None) -> tuple[tuple[str, ...], str]:
    """The texts of a prompt list and the list's name.

    Formats by the file's ending: ``.txt`` a line each, blank lines left out; ``.csv`` and ``.tsv`` with one column of
    ``COLUMNS``; ``.json`` a list of texts or of objects with one such key; ``.jsonl`` a text or such an object a line.

    Args:
        source: name of a shipped list, or a path.
        base_folder: what a relative path is relative to.
        first: so many, from the beginning. Default None: all.

    Raises:
        ValueError: no such list, none or several columns of prompts, a row without a prompt, fewer than ``first``.
    """
    path = shipped_lists().get(source) or base_folder / source
    if not path.is_file():
        known = shipped_lists()
        raise ValueError(f"there is no prompt list {path}, and none of that name is shipped; {near(source, known)}")
    if path.suffix not in _READERS:
        raise ValueError(
            f"{path} must end in {', '.join(_READERS)}, got {path.suffix!r}; save the prompts as one of these."
        )
    try:
        texts = _READERS[path.suffix](path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8.") from error
    if not texts:
        raise ValueError(f"{path} has no prompts; write at least one.")
    if first is not None and first > len(texts):
        raise ValueError(f"{path} has {len(texts)} prompts, got first: {first}; ask for at most {len(texts)}.")
    return tuple(texts[:first]), source if source in shipped_lists() else path.name


def shipped_lists() -> dict[str, Path]:
    """The prompt lists of the package by name."""
    return {path.stem: path for path in sorted(LISTS.glob("*.txt"))}


def _read_lines(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would cut at form feeds too
    return [line.strip() for line in lines if line.strip()]


def _read_table(path: Path) -> list[str]:
    delimiter = "\t" if path.suffix == ".tsv" else ","
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = [cell.strip() for cell in next(rows, [])]
            column = header.index(_column(header, f"{path}"))
            return [_cell(row, column, header, f"line {rows.line_num} of {path}") for row in rows if row]
        except csv.Error as error:
            raise ValueError(f"line {rows.line_num} of {path} is no row ({error}); correct its quotes.") from error


def _cell(row: Sequence[str], column: int, header: Sequence[str], place: str) -> str:
    if len(row) != len(header):
        raise ValueError(
            f"{place} must have {len(header)} cells as the header has, got {len(row)}; put texts with commas in quotes."
        )
    return _text(row[column], place)


def _read_json(path: Path) -> list[str]:
    content = _parse(path.read_text(encoding="utf-8-sig"), str(path))
    if not isinstance(content, list):
        raise ValueError(f"{path} must be a list of texts or objects, got {type(content).__name__}; wrap it in [].")
    return [_entry(row, f"entry {number} of {path}") for number, row in enumerate(content)]


def _read_json_lines(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    places = {f"line {number} of {path}": line for number, line in enumerate(lines, start=1) if line.strip()}
    return [_entry(_parse(line, place), place) for place, line in places.items()]


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is no JSON ({error.msg}, line {error.lineno}); correct it.") from error


def _entry(row: Any, place: str) -> str:
    return _text(row[_column(row, place)] if isinstance(row, dict) else row, place)


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{place} must have a text for its prompt, got {value!r}; write one or remove it.")
    return value.strip()


def _column(names: Collection[str], place: str) -> str:
    """The one column of prompts among those of a table or an object."""
    found = [name for name in names if name in COLUMNS]
    if len(found) != 1:
        raise ValueError(
            f"{place} must have exactly one of the columns {', '.join(COLUMNS)}, got {', '.join(names) or 'none'}; "
            "rename the one with the prompts to prompt."
        )
    return found[0]


_READERS: dict[str, Callable[[Path], list[str]]] = {
    ".txt": _read_lines,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".json": _read_json,
    ".jsonl": _read_json_lines,
}
