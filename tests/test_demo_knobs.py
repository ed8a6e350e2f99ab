"""Controls read from the methods' dataclasses, without a browser."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import pytest

from dit_accel.demo import knobs
from dit_accel.demo.knobs import knobs_of, method_from, values_of
from dit_accel.methods import METHODS, make_method
from dit_accel.methods.base import AttnMethod
from dit_accel.methods.dense import DenseAttnProcessor
from dit_accel.pipelines.presets import PRESETS, preset_method


@pytest.mark.parametrize("name", METHODS)
def test_every_option_but_objects_has_a_described_control(name: str) -> None:
    found = {knob.name: knob for knob in knobs_of(name)}
    assert {field.name for field in fields(METHODS[name])} - found.keys() <= {"assignment"}
    assert all(knob.help and knob.label for knob in found.values())
    assert next(iter(found)) == "density"


@pytest.mark.parametrize("name", METHODS)
def test_untouched_controls_are_the_method_itself(name: str) -> None:
    assert method_from(name, {knob.name: knob.default for knob in knobs_of(name)}) == make_method(name)


@pytest.mark.parametrize(("model", "name"), PRESETS, ids="-".join)
def test_controls_hold_presets(model: str, name: str) -> None:
    method = preset_method(model, name)
    assert method_from(name, values_of(method)) == method


@pytest.mark.parametrize(
    ("name", "values", "options"),
    [
        ("radial", {"density": 0.3, "decay": "0.2"}, {"density": 0.3, "decay": 0.2}),
        (
            "draft",
            {"region": "(1, 8, 8)", "select_by": "row", "sink": True},
            {"region": (1, 8, 8), "select_by": "row", "sink": True},
        ),
        ("neighborhood", {"window": " (3, 5, 5) ", "density": 0}, {"window": (3, 5, 5)}),
        ("dense", {"kernel": " _native_math "}, {"kernel": "_native_math"}),
        ("grat", {"delta": "add"}, {"delta": "add"}),
        ("radial", {"dense_blocks": "(0, 2)"}, {"dense_blocks": (0, 2)}),
    ],
)
def test_controls_set_options(name: str, values: dict[str, Any], options: dict[str, Any]) -> None:
    assert method_from(name, values) == make_method(name, **options)


@pytest.mark.parametrize(
    "text", ["8 8", "__import__('os')", "(1, 8", "-" * 100_000 + "1"], ids=["two", "call", "half", "long"]
)
def test_what_is_no_value_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^region must be a number or a tuple such as \(1, 8, 8\)"):
        method_from("draft", {"region": text})


def test_what_the_method_refuses_is_refused() -> None:
    with pytest.raises(ValueError, match="start_percent"):
        method_from("radial", {"start_percent": 0.8, "end_percent": 0.2})


def test_a_new_method_appears_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Striped(DenseAttnProcessor):
        """Stripes.

        Args:
            width: of a stripe, in tokens. Default 3.
            along: which axis.
        """

        name: ClassVar[str] = "striped"
        width: int = 3
        along: Literal["row", "column"] = "row"

    monkeypatch.setitem(METHODS, "striped", Striped)
    monkeypatch.setattr(knobs, "knobs_of", knobs_of.__wrapped__)
    found = {knob.name: knob for knob in knobs.knobs_of("striped")}
    assert (found["width"].kind, found["width"].default) == ("literal", "3")
    assert found["width"].help == "of a stripe, in tokens. Default 3."
    assert found["along"].choices == ("row", "column")
    made: AttnMethod = method_from("striped", {"width": "5", "along": "column"})
    assert made == Striped(width=5, along="column")
