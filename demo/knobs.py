"""What a person can set on a method, read from its dataclass: a new method appears by itself."""

from __future__ import annotations

import ast
import inspect
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import Any, Literal

from dit_accel.methods import METHODS, make_method
from dit_accel.methods.base import AttnMethod

Kind = Literal["share", "choice", "switch", "text", "literal"]

SHARED = tuple(field.name for field in fields(AttnMethod))
# Shares in (0, 1] that every method takes; an option of that kind is a slider.
_SHARES = ("density", "start_percent", "end_percent")
_LABELS = {
    "density": "Density",
    "start_percent": "Dense at the start",
    "end_percent": "Dense from here to the end",
    "dense_blocks": "Dense blocks",
    "min_tokens": "Dense below so many tokens",
    "delta": "Correction",
}
_HELP = {  # where plain words help more than the docstring's
    "density": "share of the query-key pairs to compute; 0: what the settings below come to",
    "start_percent": "share of the denoising steps, from the first, that stay dense",
    "end_percent": "share of the denoising steps after which attention is dense again",
    "delta": "one dense query per tile corrects what the tile left out",
}
LONGEST = 200  # characters of a value
_UNSET = "the method's own"  # what a choice shows for None


@dataclass(frozen=True)
class Knob:
    """One option of a method.

    Args:
        name: of the option.
        label: its heading.
        kind: "share" a slider from 0 to 1, "choice" one of ``choices``, "switch" yes or no, "text" a name, "literal" a
            number or a tuple as Python writes it.
        default: the option's; of a choice as it is shown, of a literal as text.
        help: what its docstring says.
        choices: of a choice.
        in_front: whether it says what the method computes, not when and where it applies.
    """

    name: str
    label: str
    kind: Kind
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    in_front: bool = True

    def read(self, value: Any) -> Any:
        """The option from what the control holds.

        Raises:
            ValueError: text that is no value.
        """
        if self.kind == "choice":
            return None if value == _UNSET else value
        if self.kind == "text":
            return str(value).strip() or None
        if self.kind == "literal":
            return _literal(self.name, str(value).strip())
        return value


@cache
def knobs_of(method: str) -> tuple[Knob, ...]:
    """The options of a method that have a control: density, its own ones, then those that every method has.

    An option that is an object of its own (the assignment of a plan) has none.
    """
    kind = METHODS[method]
    hints = typing.get_type_hints(kind)
    described = {name: text for base in reversed(kind.__mro__) for name, text in _described(base).items()}
    found = []
    for field in fields(kind):
        default = None if field.default is MISSING else field.default
        knob = _knob(field.name, hints[field.name], default, _HELP.get(field.name) or described.get(field.name, ""))
        if knob is not None:
            found.append(knob)
    return tuple(sorted(found, key=lambda knob: (not knob.in_front, knob.name != "density")))


def method_from(name: str, values: Mapping[str, Any]) -> AttnMethod:
    """The method whose controls hold these values; what equals the default is left to the method.

    Args:
        name: of the method.
        values: by name of the knob; a density of 0 or None is none.

    Raises:
        ValueError: what ``Knob.read`` or the method refuses.
    """
    options = {}
    for knob in knobs_of(name):
        if knob.name not in values or values[knob.name] == knob.default:
            continue
        value = knob.read(values[knob.name])
        if knob.name == "density" and not value:
            continue
        options[knob.name] = value
    return make_method(name, **options)


def values_of(method: AttnMethod) -> dict[str, Any]:
    """What the controls hold for a method: the inverse of ``method_from``."""
    given = method.options()
    values = {}
    for knob in knobs_of(method.name):
        if knob.name not in given:
            values[knob.name] = knob.default
        elif knob.kind == "literal":
            values[knob.name] = repr(getattr(method, knob.name))
        else:
            values[knob.name] = given[knob.name]
    return values


def _knob(name: str, hint: Any, default: Any, text: str) -> Knob | None:
    in_front = name == "density" or name not in SHARED
    label = _LABELS.get(name, name.replace("_", " ").capitalize())
    if name in _SHARES:
        return Knob(name, label, "share", default or 0.0, text, in_front=in_front)
    optional = types.NoneType in typing.get_args(hint)
    kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType] if _is_union(hint) else [hint]
    if len(kinds) == 1 and typing.get_origin(kinds[0]) is Literal:
        choices = (*((_UNSET,) if optional else ()), *(str(choice) for choice in typing.get_args(kinds[0])))
        return Knob(name, label, "choice", _UNSET if default is None else default, text, choices, in_front)
    if kinds == [bool]:
        return Knob(name, label, "switch", default, text, in_front=in_front)
    if kinds == [str]:
        return Knob(name, label, "text", default or "", text, in_front=in_front)
    if all(kind in (int, float) or typing.get_origin(kind) is tuple for kind in kinds):
        return Knob(name, label, "literal", "" if default is None else repr(default), text, in_front=in_front)
    return None


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _literal(name: str, text: str) -> Any:
    if not text:
        return None
    try:
        if len(text) > LONGEST:
            raise ValueError
        return ast.literal_eval(text)
    except (ValueError, SyntaxError) as error:
        raise ValueError(
            f"{name} must be a number or a tuple such as (1, 8, 8), got {text[:LONGEST]!r}; leave it empty for the "
            "default."
        ) from error


def _described(kind: type) -> dict[str, str]:
    """Text by option, from the Args of the docstring; what is described together is given to each."""
    text = inspect.cleandoc(kind.__doc__ or "").partition("\nArgs:\n")[2]
    found: dict[str, str] = {}
    for entry in re.findall(r"^    ([a-z_, ]+): (.*(?:\n {8}.*)*)", text.partition("\nRaises:")[0], re.MULTILINE):
        meaning = " ".join(entry[1].replace("``", "").split())
        found |= {name.strip(): meaning for name in entry[0].split(",")}
    return found
