"""Putting a method into a pipeline and taking it out again."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import nn

from dit_accel.interception import check_targets, dense_kernel, unwatch_runs, watch_runs
from dit_accel.kernels import BACKENDS
from dit_accel.kernels.block_sparse.backends import Backend
from dit_accel.layout import TokenLayout
from dit_accel.methods import METHODS
from dit_accel.methods.base import AttnMethod
from dit_accel.methods.dense import kernel_of
from dit_accel.methods.fidelity import ProbedCall
from dit_accel.pipelines.families import denoisers_of
from dit_accel.plan_file import names_plan
from dit_accel.runtime import Denoiser, Tally, binder, check_schedule, denoiser_of
from dit_accel.state import DenoisingState, Schedule
from dit_accel.tuned_plan import Applicable, TunedPlan, method_for


class Handle:
    """A method applied to the denoisers of a pipeline; as a context manager it restores them at the end.

    Args:
        method: what was applied.
        tally: the attention calls intercepted since then.
    """

    def __init__(
        self, method: AttnMethod, tallies: list[Tally], denoisers: list[tuple[nn.Module, Denoiser]], pipe_or_model: Any
    ) -> None:
        self.method = method
        self._pipe_or_model = weakref.ref(pipe_or_model)
        self.tally = tallies[0]
        self._tallies = tallies
        self._denoisers = denoisers
        self._probes = denoisers[0][1].probes

    @property
    def states(self) -> tuple[DenoisingState, ...]:
        """What each denoiser is doing, in the pipeline's order."""
        return tuple(denoiser.state for _, denoiser in self._denoisers)

    @property
    def kept_bytes(self) -> int:
        """What the method keeps at the moment for later steps: nothing between two runs."""
        return sum(denoiser.kept_bytes for _, denoiser in self._denoisers)

    def prepare(self, layout: TokenLayout, device: torch.device) -> None:
        """Make now what the method needs on a layout, which the first call would make, so that no timed run does."""
        for _, denoiser in self._denoisers:
            denoiser.bind(layout, device)
            if denoiser.family.visual_targets:
                denoiser.bind(layout.without_text(), device)

    @contextmanager
    def timing(self) -> Iterator[Tally]:
        """A tally of the calls within, timed: ``attention_seconds``, ``calls``, ``density``.

        On a GPU nothing waits until ``attention_seconds`` is read.
        """
        tally = Tally(timed=True)
        self._tallies.append(tally)
        try:
            yield tally
        finally:
            self._tallies[:] = [other for other in self._tallies if other is not tally]

    @contextmanager
    def probing(self) -> Iterator[list[ProbedCall]]:
        """What each sparse call within leaves out of the softmax and gets wrong in its output, per head.

        Costs one dense query per query tile.

        Raises:
            ValueError: a plan, which reuses what has no softmax of its own.
        """
        if self.method.whole_modules:
            raise ValueError(
                f"{self.method.name} takes earlier outputs again, which no softmax tells; probe the methods it names."
            )
        probe: list[ProbedCall] = []
        self._probes.append(probe)
        try:
            yield probe
        finally:
            self._probes[:] = [other for other in self._probes if other is not probe]

    def restore(self) -> None:
        """Give the denoisers their stock attention back, unless another method has replaced this one meanwhile."""
        for model, denoiser in self._denoisers:
            if denoiser_of(model) is denoiser:
                denoiser.detach(model)
        if not any(denoiser_of(model) for model, _ in self._denoisers):
            unwatch_runs(self._pipe_or_model())

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


def apply(pipe_or_model: Any, method: Applicable, *, backend: Backend = "auto", **options: Any) -> Handle:
    """Run a pipeline's self- or joint-attention by ``method``, in all its denoisers; replaces what was applied before.

    Args:
        pipe_or_model: a diffusers pipeline, or a denoiser alone, which knows no denoising steps.
        method: a method's name, a processor object, or a tuned plan: the object, its file, a folder that holds one, or
            ``owner/name`` on the hub.
        backend: of the operator: "auto" (default), "triton", "torch" or "reference".
        options: the method's options.

    Returns:
        A handle that restores and counts.

    Raises:
        ValueError: an unknown method or option, no supported denoiser, attention that cannot be entered, a schedule
            for a model without its pipeline, or a plan tuned for another pipeline.
    """
    method = method_for(pipe_or_model, method, **options)
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}, got {backend!r}.")
    is_model = isinstance(pipe_or_model, nn.Module)
    schedule = Schedule(None if is_model else pipe_or_model)
    check_schedule(method, schedule)
    dense_kernel(kernel_of(method))
    models = denoisers_of(pipe_or_model)
    for model, family in models:
        check_targets(model, family.targets + family.visual_targets)
    restore(pipe_or_model)
    tallies, probes, bind = [Tally()], list[list[ProbedCall]](), binder(method)
    denoisers = [
        (model, Denoiser(method, family, bind, backend, schedule, tallies, probes)) for model, family in models
    ]
    for model, denoiser in denoisers:
        denoiser.peers = [other for _, other in denoisers if other is not denoiser]
        denoiser.attach(model)
    watch_runs(pipe_or_model, [denoiser.forget for _, denoiser in denoisers])
    return Handle(method, tallies, denoisers, pipe_or_model)


def restore(pipe_or_model: Any) -> None:
    """Give every denoiser its stock attention back, bit-identical to never having applied a method."""
    unwatch_runs(pipe_or_model)
    for model, _ in denoisers_of(pipe_or_model):
        denoiser = denoiser_of(model)
        if denoiser is not None:
            denoiser.detach(model)


def set_attn_processor(pipe: Any, processor: Applicable | None) -> None:
    """The verb that diffusers' models have, for pipelines: ``apply`` with default options, or ``restore`` for None.

    Args:
        pipe: a diffusers pipeline.
        processor: a method's name, a processor object, a tuned plan or its place, or None.

    Raises:
        ValueError: anything else, and what ``apply`` refuses.
    """
    if processor is None:
        restore(pipe)
    elif isinstance(processor, AttnMethod | TunedPlan | os.PathLike) or (
        isinstance(processor, str) and (processor in METHODS or names_plan(processor))
    ):
        apply(pipe, processor)
    else:
        raise ValueError(
            f"set_attn_processor takes a method's name ({', '.join(METHODS)}), a dit_accel processor object, a tuned "
            f"plan (plan.json, a folder that holds one, owner/name) or None to restore, got {processor!r}."
        )
