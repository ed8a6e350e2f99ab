"""Reading a YAML file strictly: every value carries its place, so that what is wrong with it can be said there."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Collection, Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, TypeVar

import yaml

Key = TypeVar("Key", bound=Hashable)
_WORDS = ((True, "true"), (False, "false"), (None, "nothing"))  # as YAML has them
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Node:
    """A value of a YAML file and where it stands.

    Args:
        value: as YAML has it.
        file: that it is in.
        key: its place in the file, such as ``settings[1].height``; empty for the whole file.
    """

    value: Any
    file: Path
    key: str = ""

    def error(self, problem: str) -> ValueError:
        """The error that begins with the file and the place."""
        return ValueError(f"{self.file}: {f'{self.key} ' if self.key else ''}{problem}")

    def mapping(self, known: Collection[str] | None = None, required: Iterable[str] = ()) -> dict[str, Node]:
        """The entries of a mapping, in the order of the file.

        Args:
            known: the only keys allowed. Default: any text.
            required: keys that must be there.
        """
        if not isinstance(self.value, dict):
            raise self._mistyped("keys with values", "write KEY: VALUE")
        entries = {name: Node(value, self.file, self._below(name)) for name, value in self.value.items()}
        for name, node in entries.items():
            if not isinstance(name, str):
                raise node.error(f"is no key, which must be text, got {_shown(name)}; {_quotes(name)}.")
            if known is not None and name not in known:
                raise node.error(f"is not known; {near(name, known)}")
        for name in required:
            if name not in entries:
                raise Node(None, self.file, self._below(name)).error("is missing; add it.")
        return entries

    def elements(self, *, may_be_empty: bool = False) -> list[Node]:
        """The elements of a list."""
        if not isinstance(self.value, list):
            raise self._mistyped("a list", "begin each element with a dash, or put all of them in brackets")
        if not self.value and not may_be_empty:
            raise self.error("is an empty list; name at least one or leave the key out where it has a default.")
        return [Node(value, self.file, f"{self.key}[{place}]") for place, value in enumerate(self.value)]

    def text(self) -> str:
        """A text that is not blank, without the space around it."""
        if not isinstance(self.value, str):
            raise self._mistyped("text", _quotes(self.value))
        if not self.value.strip():
            raise self.error("is blank; write a text.")
        return self.value.strip()

    def name(self) -> str:
        """A text that may be part of a file name."""
        text = self.text()
        if not _NAME.fullmatch(text):
            raise self.error(f"must be letters, digits, '.', '_' and '-', got {_shown(text)}; rename it.")
        return text

    def choice(self, known: Collection[str]) -> str:
        """One of a few words."""
        if self.value not in known:
            remedy = near(self.value, known, "take one of these.")
            raise self.error(f"must be one of {', '.join(known)}, got {_shown(self.value)}; {remedy}")
        return str(self.value)

    def flag(self) -> bool:
        """True or false."""
        if not isinstance(self.value, bool):
            raise self._mistyped("true or false", "write one of them without quotes")
        return self.value

    def integer(self, least: int = 0, most: int | None = None) -> int:
        """A whole number in a range; true and false are none."""
        if not isinstance(self.value, int) or isinstance(self.value, bool):
            raise self._mistyped("a whole number", "write it without quotes and without a point")
        if self.value < least or (most is not None and self.value > most):
            bounds = f"at least {least}" if most is None else f"between {least} and {most}"
            raise self.error(f"must be {bounds}, got {self.value}; change it.")
        return self.value

    def number(self) -> float:
        """A finite number of at least 0; true and false are none."""
        if not isinstance(self.value, (int, float)) or isinstance(self.value, bool):
            raise self._mistyped("a number", "write it like 4.0, or 1.0e-3 with a point")
        if not math.isfinite(self.value) or self.value < 0:
            raise self.error(f"must be a finite number of at least 0, got {self.value}; change it.")
        return float(self.value)

    def options(self) -> dict[str, Any]:
        """Names with plain values or lists of them, which become tuples."""
        return {name: node._plain() for name, node in self.mapping().items()}

    def _plain(self) -> Any:
        if isinstance(self.value, list):
            return tuple(Node(value, self.file, self.key)._scalar() for value in self.value)
        return self._scalar()

    def _scalar(self) -> Any:
        if self.value is not None and not isinstance(self.value, (str, bool, int, float)):
            raise self._mistyped("text, a number, true, false or a list of these", "write a plain value")
        return self.value

    def _below(self, name: Any) -> str:
        return f"{self.key}.{name}" if self.key else str(name)

    def _mistyped(self, wanted: str, remedy: str) -> ValueError:
        return self.error(f"must be {wanted}, got {_shown(self.value)}; {remedy}.")


def distinct(nodes: Iterable[Node], read: Callable[[Node], Key]) -> tuple[Key, ...]:
    """What the nodes say, each only once.

    Raises:
        ValueError: when two nodes say the same, or what ``read`` refuses.
    """
    seen: dict[Key, Node] = {}
    for node in nodes:
        value = read(node)
        if value in seen:
            raise node.error(f"repeats {seen[value].key}, {_shown(value)}; remove one of them.")
        seen[value] = node
    return tuple(seen)


def near(name: Any, known: Collection[str], otherwise: str | None = None) -> str:
    """The end of a sentence about an unknown name: the nearest known one, else ``otherwise``, else all of them."""
    matches = difflib.get_close_matches(str(name), known, n=1)
    return f"did you mean {matches[0]}?" if matches else otherwise or f"use {', '.join(known)}."


def read_document(path: Path) -> Node:
    """The YAML document of a file.

    Raises:
        ValueError: what is no YAML, no single document, or has a key twice; the sentence has the line.
    """
    try:
        return Node(yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader), path)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}{line}: this is no YAML ({error.problem}); correct it there.") from error
    except (yaml.YAMLError, ValueError) as error:  # characters that YAML does not allow, a date that does not exist
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: this is no YAML in UTF-8 ({reason}); correct it.") from error


class _StrictLoader(yaml.SafeLoader):
    """YAML of plain values whose mappings have each key once; the stock loader keeps the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is not None and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key} is there twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _shown(value: Any) -> str:
    word = next((word for singleton, word in _WORDS if value is singleton), None)
    return word or shorten(repr(value), 60, placeholder="...")


def _quotes(value: Any) -> str:
    if isinstance(value, bool):
        return "YAML reads on, off, yes and no as true or false, so put it in quotes"
    return "write a text, in quotes where YAML would read something else"
