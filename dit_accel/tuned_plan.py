"""Plans on disk: which attention each step, block and head of a model's run takes, and what the plan was tuned for."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import diffusers
import torch

from dit_accel import __version__
from dit_accel.kernels.block_sparse.plan import Triple
from dit_accel.layout import TokenLayout
from dit_accel.methods import make_method
from dit_accel.methods.actions import Assignment
from dit_accel.methods.assigned import AssignedAttention
from dit_accel.methods.base import AttnMethod, check_triple
from dit_accel.methods.dit_fast_attn import DiTFastAttnProcessor
from dit_accel.methods.kept import Keep
from dit_accel.pipelines.families import denoisers_of
from dit_accel.plan_file import (
    FILE_NAME,
    NUMBER,
    assignment_from,
    assignment_lists,
    fields_of,
    find_plan,
    names_plan,
    plain,
    text_of,
)

SCHEMA = 1
GUIDANCE = ("batched", "separate", "none")
_KEYS: dict[str, Any] = {
    "schema": int,
    "model": dict,
    "scheduler": str,
    "steps": int,
    "guidance": dict,
    "grids": dict,
    "keep": str,
    "max_age": int | None,
    "metric": dict,
    "measured": dict,
    "versions": dict,
    "actions": list,
    "table": list,
}


class TunedModel(NamedTuple):
    """Class of the (first) denoiser, and ``config_hash`` of all of them."""

    name: str
    config: str


class Guidance(NamedTuple):
    """How a step computes its branches ("batched", "separate", "none"), and the scale it was tuned with, if known."""

    mode: str
    scale: float | None = None


class Metric(NamedTuple):
    """What was held, and within what budget."""

    name: str
    budget: float


@dataclass(frozen=True, eq=False)
class TunedPlan:
    """A plan with what it was tuned for. Plans are equal if their files are.

    Args:
        assignment: the actions, with one row for each step of the tuned run; a run of another number of steps takes the
            row at the same share of the run.
        model: the denoiser.
        scheduler: its class.
        guidance: mode and scale; another mode does not fit, the scale is for people to read.
        grids: smallest and largest latent grid it was tuned for, (frame, row, column); grids between them fit.
        metric: what was held.
        measured: what was found, JSON values; infinities and NaN become text.
        versions: of the libraries.
        keep, max_age: as in ``DiTFastAttnProcessor``. Default "device" and None.

    Raises:
        ValueError: a value out of its range.
    """

    assignment: Assignment
    model: TunedModel
    scheduler: str
    guidance: Guidance
    grids: tuple[Triple, Triple]
    metric: Metric
    measured: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=lambda: library_versions())
    keep: Keep = "device"
    max_age: int | None = None

    def __post_init__(self) -> None:
        if self.guidance.mode not in GUIDANCE:
            raise ValueError(f"guidance must be one of {', '.join(GUIDANCE)}, got {self.guidance.mode!r}.")
        smallest, largest = self.grids
        check_triple("the smallest grid", smallest)
        check_triple("the largest grid", largest)
        if any(low > high for low, high in zip(smallest, largest, strict=True)):
            raise ValueError(f"the smallest grid must be no larger than the largest on any axis, got {self.grids}.")
        self.processor()  # refuses the rest

    @classmethod
    def for_pipeline(
        cls,
        pipe: Any,
        assignment: Assignment,
        *,
        grids: Iterable[Triple],
        metric: Metric,
        guidance_scale: float | None = None,
        measured: Mapping[str, Any] | None = None,
        keep: Keep = "device",
        max_age: int | None = None,
    ) -> TunedPlan:
        """A plan tuned on this pipeline, for the sizes between ``grids``; the rest as in ``TunedPlan``."""
        frames, rows, columns = zip(*grids, strict=True)
        model, scheduler, mode = _facts(pipe)
        return cls(
            assignment=assignment,
            model=model,
            scheduler=scheduler,
            guidance=Guidance(mode, guidance_scale),
            grids=((min(frames), min(rows), min(columns)), (max(frames), max(rows), max(columns))),
            metric=metric,
            measured=measured or {},
            keep=keep,
            max_age=max_age,
        )

    @property
    def steps(self) -> int:
        """Steps of the run it was tuned on."""
        return self.assignment.steps

    def processor(self, source: str = "") -> PlanAttnProcessor:
        """The method that follows this plan; ``source`` is where it was read, for people."""
        return PlanAttnProcessor(
            plan=self, source=source, assignment=self.assignment, keep=self.keep, max_age=self.max_age
        )

    def check(self, pipe: Any) -> None:
        """Raise a ValueError that says why the plan does not fit a pipeline, if it does not."""
        model, scheduler, mode = _facts(pipe)
        for fact, own, found in (
            ("denoiser", self.model.name, model.name),
            ("configuration", self.model.config[:12], model.config[:12]),
            ("scheduler", self.scheduler, scheduler),
            ("guidance", self.guidance.mode, mode),
        ):
            if own != found:
                raise ValueError(
                    f"the plan was tuned with the {fact} {own}, this pipeline has {found}; "
                    "tune one for it with dit-accel tune."
                )

    def check_grid(self, grid: Triple) -> None:
        """Raise a ValueError if the plan was not tuned for so large or small a grid."""
        smallest, largest = self.grids
        if not all(low <= size <= high for low, size, high in zip(smallest, grid, largest, strict=True)):
            raise ValueError(
                f"the plan was tuned for latent grids from {_sized(smallest)} to {_sized(largest)}, this run has "
                f"{_sized(grid)}; choose a size between them or tune a plan for this one with dit-accel tune."
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON.

        Raises:
            ValueError: a method that has no name to be found by.
        """
        Path(path).write_text(self._text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TunedPlan:
        """A plan that ``save`` wrote.

        Raises:
            ValueError: a file that cannot be read or is anything else.
        """
        try:
            return _from_document(json.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise ValueError(f"the plan {path} cannot be read ({error.strerror}); check the path.") from error
        except ValueError as error:
            reason = str(error).removesuffix(".")
            raise ValueError(f"{path} is no plan that can be used ({reason}); write it with dit-accel tune.") from error

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the plan into a folder, such as a pipeline's, as ``dit_accel_plan.json``."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.save(Path(folder) / FILE_NAME)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str]) -> TunedPlan:
        """A plan from its file, a folder that holds one, or the hub: ``owner/name`` or ``owner/name/file.json``.

        Raises:
            ValueError: there is none, or ``load`` refuses it.
        """
        return cls.load(find_plan(source))

    @functools.cached_property
    def digest(self) -> str:
        """Of the file, 16 hex digits."""
        return hashlib.sha256(self._text.encode()).hexdigest()[:16]

    @functools.cached_property
    def _text(self) -> str:
        """The file: one line for each key, action and run of equal steps."""
        facts = {
            "schema": SCHEMA,
            "model": self.model._asdict(),
            "scheduler": self.scheduler,
            "steps": self.steps,
            "guidance": self.guidance._asdict(),
            "grids": {"smallest": self.grids[0], "largest": self.grids[1]},
            "keep": self.keep,
            "max_age": self.max_age,
            "metric": self.metric._asdict(),
            "measured": plain(self.measured),
            "versions": dict(self.versions),
        }
        return text_of(facts, assignment_lists(self.assignment))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TunedPlan) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self.digest)


@dataclass(frozen=True, kw_only=True)
class PlanAttnProcessor(DiTFastAttnProcessor):
    """A tuned plan at work.

    Args:
        plan: the plan.
        source: where it was read, as the command line takes it.

    Raises:
        ValueError: when bound to a layout whose grid the plan was not tuned for.
    """

    name: ClassVar[str] = "plan"

    plan: TunedPlan
    source: str = ""

    def bind(self, layout: TokenLayout, device: torch.device) -> AssignedAttention:
        self.plan.check_grid(layout.grid)
        return super().bind(layout, device)

    def options(self) -> dict[str, Any]:
        """As for every method; the plan by its digest."""
        own = {name: value for name, value in super().options().items() if name not in ("assignment", "source")}
        return own | {"plan": self.plan.digest}


# What may be applied: a method's name or processor, a plan or its place.
Applicable = str | os.PathLike[str] | TunedPlan | AttnMethod


def method_for(pipe: Any, method: Applicable, **options: Any) -> AttnMethod:
    """``method_of`` for a pipeline.

    Raises:
        ValueError: what that refuses, or a plan tuned for another pipeline.
    """
    found = method_of(method, **options)
    if isinstance(found, PlanAttnProcessor):
        found.plan.check(pipe)
    return found


def method_of(method: Applicable, **options: Any) -> AttnMethod:
    """``make_method`` for what may be a plan too: the plan itself, or what ``TunedPlan.from_pretrained`` takes.

    Raises:
        ValueError: what either refuses.
    """
    if isinstance(method, TunedPlan):
        return make_method(method.processor(), **options)
    if isinstance(method, os.PathLike) or (isinstance(method, str) and names_plan(method)):
        return make_method(TunedPlan.from_pretrained(method).processor(os.fspath(method)), **options)
    return make_method(method, **options)


def config_hash(models: Iterable[Any]) -> str:
    """SHA-256 of the public configurations of denoisers, the same whether saved and loaded meanwhile or not."""
    configs = [{key: value for key, value in model.config.items() if not key.startswith("_")} for model in models]
    return hashlib.sha256(json.dumps(configs, sort_keys=True, default=str).encode()).hexdigest()


def library_versions() -> dict[str, str]:
    """Versions of what a plan's figures depend on."""
    return {
        "python": platform.python_version(),
        "dit-accel": __version__,
        "torch": str(torch.__version__),
        "diffusers": diffusers.__version__,
    }


def _facts(pipe: Any) -> tuple[TunedModel, str, str]:
    """Denoiser, scheduler and mode of guidance of a pipeline."""
    if not hasattr(pipe, "scheduler"):
        raise ValueError(
            f"a plan counts denoising steps, which a {type(pipe).__name__} by itself does not know; "
            "apply it to the pipeline."
        )
    models, families = zip(*denoisers_of(pipe), strict=True)
    name = type(models[0]).__name__
    return TunedModel(name, config_hash(models)), type(pipe.scheduler).__name__, families[0].guidance


def _from_document(document: Any) -> TunedPlan:
    if isinstance(document, dict) and document.get("schema") != SCHEMA:
        raise ValueError(f"schema must be {SCHEMA}, got {document.get('schema')!r}")
    facts = fields_of(document, "the plan", **_KEYS)
    grids = fields_of(facts["grids"], "grids", smallest=list, largest=list)
    return TunedPlan(
        assignment=assignment_from(facts["actions"], facts["table"], facts["steps"]),
        model=TunedModel(**fields_of(facts["model"], "model", name=str, config=str)),
        scheduler=facts["scheduler"],
        guidance=Guidance(**fields_of(facts["guidance"], "guidance", mode=str, scale=NUMBER | None)),
        grids=(tuple(grids["smallest"]), tuple(grids["largest"])),
        metric=Metric(**fields_of(facts["metric"], "metric", name=str, budget=NUMBER)),
        measured=facts["measured"],
        versions=facts["versions"],
        keep=facts["keep"],
        max_age=facts["max_age"],
    )


def _sized(grid: Triple) -> str:
    return "x".join(map(str, grid))
