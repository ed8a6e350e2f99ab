"""HTML that is escaped unless it says that it is markup."""

from __future__ import annotations

import html
from collections.abc import Iterable
from importlib.resources import files
from string import Template


class Html(str):
    """Text that is markup already."""


def element(tag: str, content: object = "", **attributes: object) -> Html:
    """``<tag attributes>content</tag>``; a trailing underscore of an attribute name is dropped, others become "-".

    An image has no content and no end tag.
    """
    named = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"' for name, value in attributes.items()
    )
    return Html(f"<{tag}{named}>" + ("" if tag == "img" else f"{_escape(content)}</{tag}>"))


def join(parts: Iterable[Html]) -> Html:
    return Html("\n".join(parts))


def fill(template: str, **values: object) -> Html:
    """The package's HTML file ``template`` with its ``$names`` replaced."""
    return Html(Template(asset(template)).substitute({name: _escape(value) for name, value in values.items()}))


def asset(name: str) -> Html:
    """The package's file ``name``, such as a style sheet, as it is."""
    return Html(files("dit_accel.eval.report").joinpath(name).read_text(encoding="utf-8").rstrip())


def _escape(value: object) -> str:
    return value if isinstance(value, Html) else html.escape(str(value))
