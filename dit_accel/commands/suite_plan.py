"""What a suite comes to on this machine: every call of a pipeline, checked before the first one runs."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import torch

from dit_accel.commands.arguments import method_call, parse_method
from dit_accel.commands.baselines import ExactKernel, compare_kernels, floor_kernel
from dit_accel.commands.models import Model, Request, check_steps, load
from dit_accel.eval.records import Job
from dit_accel.eval.suite.items import Chunk, chunks
from dit_accel.eval.suite.schema import Setting, Suite
from dit_accel.methods import make_method
from dit_accel.methods.assigned import AssignedAttention
from dit_accel.methods.base import AttnMethod
from dit_accel.plugin import apply
from dit_accel.tuned_plan import PlanAttnProcessor

Role = Literal["reference", "floor", "method"]

DENSE = "dense"
_ONE_LESS = "dense, one step less"


@dataclass(frozen=True)
class Entry:
    """What each sample of one model and setting runs with.

    Args:
        label: as tables call it: the method with its options written out, ``@FOLDER`` behind it or not.
        role: the dense reference, a noise floor or a method.
        method: the processor.
        pipeline: the model's name, or the folder of another pipeline.
        fewer_steps: than the setting has.
        ideal: density of a sparse call by the method's exact rule; None where calls differ.
    """

    label: str
    role: Role
    method: AttnMethod
    pipeline: str
    fewer_steps: int = 0
    ideal: float | None = None

    @property
    def calls(self) -> tuple[object, ...]:
        """What tells it from other entries, whatever they are called."""
        return self.pipeline, self.method.name, self.method.options(), self.fewer_steps


@dataclass(frozen=True)
class Task:
    """One chunk with one entry: one call of a pipeline, or a few timed ones.

    Args:
        chunk: its samples.
        entry: what they run with.
        requests, jobs: one per sample.
        references: ids of the dense records, one per sample.
        flops: floating-point operations of denoising all of them, if attention were dense.
    """

    chunk: Chunk
    entry: Entry
    requests: tuple[Request, ...]
    jobs: tuple[Job, ...]
    references: tuple[str, ...]
    flops: float


@dataclass(frozen=True)
class Plan:
    """A suite on this machine.

    Args:
        chunks: all of them.
        tasks: in the order to carry them out: of a model its own pipeline first, in it chunk by chunk dense, floors and
            methods, then the methods that run in another pipeline.
    """

    chunks: Sequence[Chunk]
    tasks: Sequence[Task]

    @property
    def made_with(self) -> dict[str, str]:
        """Options that all records share."""
        return {name: self.tasks[0].jobs[0].options[name] for name in ("dtype", "backend", "device")}


class Shelf:
    """The pipeline at work; another one takes its place.

    Args:
        device, dtype: as ``load`` takes them.
    """

    def __init__(self, device: str | None, dtype: str | None) -> None:
        self._device, self._dtype = device, dtype
        self._model: Model | None = None

    def get(self, name: str) -> Model:
        """The pipeline of that name, loaded unless it is the latest.

        Raises:
            ValueError: what ``load`` refuses.
        """
        if self._model is None or self._model.name != name:
            self._model = None
            gc.collect()  # pipelines hold themselves in cycles: room for the next one
            self._model = load(name, self._device, self._dtype)
        return self._model


class Kernels:
    """The exact dense kernels of each model and setting, measured once per run folder, in its ``kernels.json``.

    A run that goes on, and every process of it, has the same noise floor on a kind of device and in a dtype.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "kernels.json"
        self._found: dict[str, dict[str, list[list[Any]]]] = (
            json.loads(self._path.read_text()) if self._path.is_file() else {}
        )

    def of(self, model: Model, setting: str, request: Request) -> list[ExactKernel]:
        """Fastest first."""
        dtype = model.pipe.transformer.dtype
        known = self._found.setdefault(f"{model.name}, {model.device.type}, {dtype}", {})
        if setting not in known:
            measured = compare_kernels(model.device, dtype, model.spec, model.layout(request))
            known[setting] = [list(kernel) for kernel in measured]
        return [ExactKernel(*kernel) for kernel in known[setting]]

    def save(self) -> None:
        """Writes what was measured; one process of a run does it."""
        unfinished = self._path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(self._found, indent=1) + "\n", encoding="utf-8")
        os.replace(unfinished, self._path)  # whole at any moment, for the other processes


def make_plan(suite: Suite, limit: int | None, shelf: Shelf, backend: str, kernels: Kernels) -> Plan:
    """Every call of the suite, each of them checked.

    Raises:
        ValueError: a model that is not there, a size that it cannot make, or a method or floor that cannot run on it.
    """
    every = chunks(suite, limit)
    tasks: list[Task] = []
    for name in suite.models:
        mine = [chunk for chunk in every if chunk.model == name]
        tasks += _tasks(suite, shelf.get(name), mine, shelf, backend, kernels)
    return Plan(every, tasks)


def _tasks(
    suite: Suite, own: Model, mine: Sequence[Chunk], shelf: Shelf, backend: str, kernels: Kernels
) -> Iterator[Task]:
    bases = {setting.name: _base(own, setting) for setting in suite.settings}
    entries = {setting.name: _entries(suite, own, setting, bases[setting.name], kernels) for setting in suite.settings}
    asked = [(chunk, _requests(chunk, bases[chunk.setting.name])) for chunk in mine]
    dense, name = make_method(DENSE), own.name
    references = [
        tuple(own.job(dense, request, backend, setting=chunk.setting.name).key for request in requests)
        for chunk, requests in asked
    ]
    del own  # one pipeline is in memory at a time
    for pipeline in dict.fromkeys(entry.pipeline for group in entries.values() for entry in group):
        model = shelf.get(pipeline)
        against = {} if pipeline == name else {"against": name}
        if suite.runs or suite.trajectory:
            check_steps(model)
        here = {name: [entry for entry in group if entry.pipeline == pipeline] for name, group in entries.items()}
        for setting, group in here.items():
            for entry in group:
                _check(model, entry, setting, bases[setting], backend)
        for (chunk, requests), keys in zip(asked, references, strict=True):
            for entry in here[chunk.setting.name]:
                own_requests = tuple(replace(request, steps=request.steps - entry.fewer_steps) for request in requests)
                place = {"setting": chunk.setting.name, **against}
                jobs = tuple(model.job(entry.method, request, backend, **place) for request in own_requests)
                yield Task(chunk, entry, own_requests, jobs, keys, sum(map(model.flops, own_requests)))
        del model


def _base(model: Model, setting: Setting) -> Request:
    """What all samples of a setting share."""
    try:
        return model.request(setting, "", 0)
    except ValueError as error:
        raise ValueError(f"setting {setting.name}: {error}") from error


def _requests(chunk: Chunk, base: Request) -> tuple[Request, ...]:
    return tuple(replace(base, prompt=sample.prompt, seed=sample.noise) for sample in chunk.samples)


def _entries(suite: Suite, model: Model, setting: Setting, base: Request, kernels: Kernels) -> list[Entry]:
    """The dense reference, the floors and the methods; a method that is a floor here is run once, as the floor."""
    place = f"setting {setting.name} of {model.name}"
    methods = {}
    for text in suite.methods:
        try:
            methods[text] = _method_entry(text, model, setting, base)
        except ValueError as error:
            raise ValueError(f"method {text} at {place}: {error}") from error
    entries = [Entry(DENSE, "reference", make_method(DENSE), model.name, ideal=1.0)]
    if "step" in suite.floors:
        if base.steps < 2:
            raise ValueError(
                f"floors: step takes one step off setting {setting.name}, which has {base.steps}; drop it."
            )
        entries.append(Entry(_ONE_LESS, "floor", make_method(DENSE), model.name, fewer_steps=1, ideal=1.0))
    if "backend" in suite.floors and (kernel := floor_kernel(kernels.of(model, setting.name, base))):
        floor = make_method(DENSE, kernel=kernel)
        entries.append(Entry(method_call(floor), "floor", floor, model.name, ideal=1.0))
    floors = [entry.label for entry in entries if entry.role == "floor"]
    others = {text: entry for text, entry in methods.items() if entry.label not in floors}
    named = [*((entry.label, entry) for entry in entries), *others.items()]
    for (text, entry), (other_text, other) in combinations(named, 2):
        if entry.label == other.label or entry.calls == other.calls:
            raise ValueError(f"{text} and {other_text} are the same run at {place}; drop one of them.")
    return [*entries, *others.values()]


def _method_entry(text: str, model: Model, setting: Setting, base: Request) -> Entry:
    """A method of the suite, with the setting's options where it names none itself; dense takes none."""
    call, _, folder = text.partition("@")
    if folder and not Path(folder).is_dir():
        raise ValueError(f"the pipeline folder {folder} does not exist; save a pipeline there.")
    options = {} if call.partition("(")[0].strip() == DENSE else setting.options
    method = parse_method(call, model.name, **options)
    layout = model.layout(base)
    attention = method.attention(layout)
    ideal = None
    if not isinstance(attention, AssignedAttention):  # what a call computes differs by step and block
        ideal = layout.joint_density(method.ideal_density(layout)) if attention else 1.0
    digest = f"({method.plan.digest[:8]})" if isinstance(method, PlanAttnProcessor) else ""  # its path may have another
    label = method_call(method) + digest + (f"@{folder}" if folder else "")
    return Entry(label, "method", method, folder or model.name, ideal=ideal)


def _check(model: Model, entry: Entry, setting: str, base: Request, backend: Any) -> None:
    """Raise a ValueError if the entry cannot run in the pipeline at the size."""
    try:
        layout, spec = model.layout(base), model.spec
        with apply(model.pipe, entry.method, backend=backend):
            attention = entry.method.attention(layout, model.device)
        if attention:
            token = torch.empty(
                1, 1, spec.heads, spec.head_dim, dtype=model.pipe.transformer.dtype, device=model.device
            )
            attention.check(token.expand(-1, layout.num_tokens, -1, -1), backend)
    except ValueError as error:
        raise ValueError(f"{entry.label} at setting {setting} of {model.name}: {error}") from error
