"""The suite file: what a run compares, checked to the last key before anything runs."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from dit_accel.eval.quality import MAKERS, METRICS
from dit_accel.eval.suite.document import Node, distinct, near, read_document
from dit_accel.eval.suite.prompts import read_prompts

FLOORS = ("backend", "step")
SUITES = Path(__file__).parents[1] / "suites"
MOST_PROMPTS = 10_000  # a sample's noise is 10,000 × seed + prompt number, and no two share theirs
_MOST_SEED = 2**32 - 1


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One size and step count that every method runs at.

    Args:
        name: its own within the suite.
        height, width: pixels. Default None: the model's own, as for the others.
        num_frames: of a video.
        steps: denoising steps.
        guidance: guidance scale.
        options: of every method that does not name them itself.
    """

    name: str
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    steps: int | None = None
    guidance: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Everything that a run compares.

    Args:
        name: of the suite, and of its run folder.
        models: embedded names, pipeline folders or hub ids.
        methods: as ``--method`` takes them; dense is not among them, it is always run.
        settings: each with its own name.
        prompts: texts; a prompt's number is its place.
        prompt_list: where they come from: the name of a shipped list or of a file, or "inline".
        seeds: each prompt is sampled with each of them.
        metrics: name -> options of each metric, as ``make_metric`` takes them. Default: all of ``METRICS``.
        floors: noise floors: "backend", dense by another exact kernel; "step", dense with one step less.
        runs: timed runs of each clip; 0: nothing is timed.
        batch: clips sampled at once; more than 1 only where nothing is timed.
        attention: so many prompts, of the first seed, have their attention probed in an untimed run.
        trajectory: whether latents are compared with dense ones at each step.
        show: so many prompts, of the first seed, have their clips kept.
    """

    name: str
    models: tuple[str, ...]
    methods: tuple[str, ...]
    prompts: tuple[str, ...]
    prompt_list: str = "inline"
    settings: tuple[Setting, ...] = (Setting(name="default"),)
    seeds: tuple[int, ...] = (0,)
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {name: {} for name in METRICS})
    floors: tuple[str, ...] = ("backend",)
    runs: int = 1
    batch: int = 1
    attention: int = 0
    trajectory: bool = False
    show: int = 4

    @property
    def prompt_hash(self) -> str:
        """Hash of the texts in their order, 16 hex digits."""
        return hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()[:16]


def load_suite(source: str | os.PathLike[str]) -> Suite:
    """The suite of a YAML file, or a shipped one by its name; its prompts are read too.

    Raises:
        ValueError: whatever is wrong with it, in one sentence with the file, the place and the remedy.
    """
    top = read_document(_find(source))
    entries = top.mapping([*_KEYS, "prompts"], required=("name", "models", "methods", "prompts"))
    values = {name: _KEYS[name](node) for name, node in entries.items() if name != "prompts"}
    texts, prompt_list = _prompts(entries["prompts"])
    suite = Suite(prompts=texts, prompt_list=prompt_list, **values)
    if suite.batch > 1 and suite.runs:
        raise entries["batch"].error(f"must be 1 where clips are timed, got {suite.batch}; set runs: 0.")
    return suite


def dump_suite(suite: Suite) -> str:
    """The YAML text that ``load_suite`` reads back as an equal suite wherever it lies: its prompts are written out."""
    content = {entry.name: getattr(suite, entry.name) for entry in fields(suite) if entry.name != "prompt_list"}
    content["settings"] = [_entries(setting) for setting in suite.settings]
    content["prompts"] = {"list": suite.prompt_list, "texts": suite.prompts}
    content["metrics"] = [{name: dict(options)} if options else name for name, options in suite.metrics.items()]
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)


def shipped_suites() -> dict[str, Path]:
    """The suites of the package by name."""
    return {path.stem: path for path in sorted(SUITES.glob("*.yaml"))}


def _find(source: str | os.PathLike[str]) -> Path:
    path, shipped = Path(source), shipped_suites()
    if path.is_file():
        return path
    if str(source) in shipped:
        return shipped[str(source)]
    raise ValueError(f"there is no suite {str(source)!r}, neither a file nor a shipped one; {near(source, shipped)}")


def _entries(setting: Setting) -> dict[str, Any]:
    values = {entry.name: getattr(setting, entry.name) for entry in fields(setting)}
    return {name: value for name, value in values.items() if value not in (None, {})}


def _method(node: Node) -> str:
    text = node.text()
    if text in ("dense", "dense()"):
        raise node.error("is dense, which is always run by itself; remove it.")
    return text


def _settings(node: Node) -> tuple[Setting, ...]:
    elements = [(element, element.mapping(_SETTING_KEYS, required=("name",))) for element in node.elements()]
    distinct([entries["name"] for _, entries in elements], Node.name)
    return tuple(
        Setting(**{name: _SETTING_KEYS[name](value) for name, value in entries.items()}) for _, entries in elements
    )


def _metrics(node: Node) -> dict[str, dict[str, Any]]:
    calls = [_metric(element) for element in node.elements()]
    names = distinct([name for name, _ in calls], lambda name: name.choice(list(METRICS | MAKERS)))
    return dict(zip(names, (options for _, options in calls), strict=True))


def _metric(node: Node) -> tuple[Node, dict[str, Any]]:
    if isinstance(node.value, str):
        return node, {}
    entries = node.mapping()
    if len(entries) != 1:
        raise node.error(f"must be one metric, got {len(entries)} keys; begin each metric with a dash of its own.")
    [(name, options)] = entries.items()
    return Node(name, node.file, node.key), options.options()


def _prompts(node: Node) -> tuple[tuple[str, ...], str]:
    if isinstance(node.value, list):
        texts, prompt_list = tuple(element.text() for element in node.elements()), "inline"
    elif isinstance(node.value, dict) and "texts" in node.value:
        entries = node.mapping(("list", "texts"), required=("list", "texts"))
        texts, prompt_list = tuple(text.text() for text in entries["texts"].elements()), entries["list"].text()
    elif isinstance(node.value, dict):
        entries = node.mapping(("file", "first"), required=("file",))
        first = entries["first"].integer(1) if "first" in entries else None
        texts, prompt_list = read_prompts(entries["file"].text(), node.file.parent, first)
    else:
        raise node.error(
            f"must be {{file: LIST, first: NUMBER}} or a list of texts, got {node.value!r}; write one of them."
        )
    if len(texts) > MOST_PROMPTS:
        raise node.error(f"has {len(texts)} texts, more than {MOST_PROMPTS}; take fewer with first.")
    text, count = Counter(texts).most_common(1)[0]
    if count > 1:
        raise node.error(f"has {text!r} {count} times; keep one of them, and add seeds for more samples of it.")
    return texts, prompt_list


_KEYS: dict[str, Callable[[Node], Any]] = {
    "name": Node.name,
    "models": lambda node: distinct(node.elements(), Node.text),
    "methods": lambda node: distinct(node.elements(), _method),
    "settings": _settings,
    "seeds": lambda node: distinct(node.elements(), lambda seed: seed.integer(0, _MOST_SEED)),
    "metrics": _metrics,
    "floors": lambda node: distinct(node.elements(may_be_empty=True), lambda floor: floor.choice(FLOORS)),
    "runs": Node.integer,
    "batch": lambda node: node.integer(1),
    "attention": Node.integer,
    "trajectory": Node.flag,
    "show": Node.integer,
}
_SETTING_KEYS: dict[str, Callable[[Node], Any]] = {
    "name": Node.name,
    **dict.fromkeys(("height", "width", "num_frames", "steps"), lambda node: node.integer(1)),
    "guidance": Node.number,
    "options": Node.options,
}
