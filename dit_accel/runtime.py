"""A method at work in one denoiser: what each attention call computes, and how much of it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.interception import AttentionCall, Layer, install, uninstall
from dit_accel.kernels import BlockPlan, block_sparse_attention, can_run
from dit_accel.kernels.block_sparse.backends import Backend
from dit_accel.layout import TokenLayout
from dit_accel.marks import Mark, mark, seconds_between
from dit_accel.methods.base import AttnMethod
from dit_accel.pipelines.families import Family
from dit_accel.state import DenoisingState, Schedule, bind_arguments

_LOG = logging.getLogger(__name__)
_ATTRIBUTE = "_dit_accel"
_PLANS_KEPT = 8


@dataclass
class Tally:
    """Attention calls that a handle intercepted.

    Args:
        timed: also take the time of each call.
        sparse_calls: calls that the operator computed.
        dense_calls: calls handed back to diffusers.
        density_sum: over all calls, the share of query-key pairs computed, 1.0 for a dense one.
    """

    timed: bool = False
    sparse_calls: int = 0
    dense_calls: int = 0
    density_sum: float = 0.0
    _spans: list[tuple[Mark, Mark]] = field(default_factory=list, repr=False)

    @property
    def calls(self) -> int:
        return self.sparse_calls + self.dense_calls

    @property
    def density(self) -> float:
        """Share of query-key pairs computed, the mean over all calls; 1.0 before the first."""
        return self.density_sum / self.calls if self.calls else 1.0

    @property
    def attention_seconds(self) -> float:
        """Time spent in the calls; on a GPU, of its stream, and reading it waits for the last call."""
        return sum(seconds_between(begin, end) for begin, end in self._spans)

    def add(self, density: float | None, span: tuple[Mark, Mark] | None) -> None:
        """Count one call; ``density`` is None for a dense one."""
        if density is None:
            self.dense_calls += 1
        else:
            self.sparse_calls += 1
        self.density_sum += 1.0 if density is None else density
        if self.timed and span is not None:
            self._spans.append(span)


@dataclass(frozen=True, eq=False)
class PlannedLayout:
    """A method's plan for one layout, on one device, and the share of pairs it computes."""

    plan: BlockPlan
    density: float


Planner = Callable[[TokenLayout, torch.device], PlannedLayout | None]


def planner(method: AttnMethod) -> Planner:
    """The method's plans, the latest few kept per layout and device; None where it is dense."""

    @functools.lru_cache(maxsize=_PLANS_KEPT)
    def planned(layout: TokenLayout, device: torch.device) -> PlannedLayout | None:
        plan = method.plan_or_dense(layout)
        return None if plan is None else PlannedLayout(plan.to(device), plan.density)

    return planned


def check_schedule(method: AttnMethod, schedule: Schedule) -> None:
    """Raise a ValueError if the method needs denoising steps that cannot be known."""
    if not schedule.known and (method.start_percent > 0 or method.end_percent < 1):
        raise ValueError(
            f"start_percent={method.start_percent} and end_percent={method.end_percent} count denoising steps, which "
            "a model without its pipeline does not know; apply the method to the pipeline."
        )


@functools.cache
def _notice(model_name: str, reason: str) -> None:
    _LOG.warning("%s runs dense attention in this call because %s.", model_name, reason)


@dataclass(eq=False)
class Denoiser:
    """One denoiser model with a method applied.

    Args:
        method: which tiles to compute, and when.
        family: how to read the model's calls.
        plans: the method's plans, shared by the denoisers of a pipeline.
        backend: the operator's backend.
        schedule: where the denoising step is read.
        tallies: what counts the calls, shared likewise.
        state: the call the model is in.
    """

    method: AttnMethod
    family: Family
    plans: Planner
    backend: Backend
    schedule: Schedule
    tallies: list[Tally]
    state: DenoisingState = field(default_factory=DenoisingState)

    def attach(self, model: nn.Module) -> None:
        """Enter ``model``: a forward pre-hook, the guidance branch, the attention modules."""
        self._hook = model.register_forward_pre_hook(self.observe, with_kwargs=True)
        if hasattr(model, "cache_context"):
            vars(model)["cache_context"] = _recording_cache_context.__get__(model)
        vars(model)[_ATTRIBUTE] = self
        install(model, self.family.targets, self.attend)

    def detach(self, model: nn.Module) -> None:
        """Leave ``model`` as it was found."""
        uninstall(model)
        del vars(model)[_ATTRIBUTE]
        vars(model).pop("cache_context", None)
        self._hook.remove()

    @torch.compiler.disable
    def observe(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note what the call that begins is about, and fail here if the method cannot serve it."""
        check_schedule(self.method, self.schedule)
        arguments = bind_arguments(model, args, kwargs)
        tokens = self.family.read(arguments, model.config)
        state = self.state
        state.layout, state.batch, state.text_lengths = tokens.layout, tokens.batch, tokens.text_lengths
        state.step, state.num_steps = self.schedule.position(arguments["timestep"], self.family.timestep_scale)
        if self.family.guidance == "batched":
            state.branch = "batched"
        if tokens.layout is None:
            _notice(type(model).__name__, tokens.irregular)
        else:
            self.plans(tokens.layout, arguments["hidden_states"].device)

    def attend(self, layer: Layer, call: AttentionCall) -> Tensor:
        """Answer one attention call of a targeted layer."""
        planned = self._planned(layer, call)
        timed = any(tally.timed for tally in self.tallies)
        begin = mark(call.query.device) if timed else None
        out = layer.dense(call) if planned is None else self._sparse(call, planned.plan)
        span = None if begin is None else (begin, mark(call.query.device))
        for tally in self.tallies:
            tally.add(None if planned is None else planned.density, span)
        return out

    def _sparse(self, call: AttentionCall, plan: BlockPlan) -> Tensor:
        lengths = self.state.text_lengths if call.mask is not None else None
        return block_sparse_attention(
            call.query,
            call.key,
            call.value,
            plan,
            scale=call.scale,
            text_lengths=lengths if lengths is None else lengths.to(call.query.device),
            backend=self.backend,
        )

    def _planned(self, layer: Layer, call: AttentionCall) -> PlannedLayout | None:
        """The plan for this call, None where it is dense; a call that does not fit is refused at any step."""
        state, method = self.state, self.method
        if state.layout is None:
            return None
        planned = self.plans(state.layout, call.query.device)
        if planned is None:
            return None
        self._check(call, planned.plan)
        tokens = state.layout.num_tokens
        if method.is_dense_at(block=layer.block, step=state.step, num_steps=state.num_steps, num_tokens=tokens):
            return None
        return planned

    def _check(self, call: AttentionCall, plan: BlockPlan) -> None:
        lengths = [call.query.shape[1], call.key.shape[1]]
        if lengths != [plan.num_tokens] * 2:
            raise ValueError(
                f"{self.family.name} was read as a sequence of {plan.num_tokens} tokens, but its attention got "
                f"{lengths[0]} queries and {lengths[1]} keys; call dit_accel.restore on the model for such calls."
            )
        if call.mask is not None and not self._is_key_mask(call.mask, plan.num_tokens):
            raise ValueError(
                f"{self.family.name} passed attention a mask of {call.mask.dtype} {list(call.mask.shape)} that a "
                "sparse method does not understand; call dit_accel.restore on the model for such calls."
            )
        if self.backend != "auto":
            can_run(self.backend, call.query, plan, raise_error=True)

    def _is_key_mask(self, mask: Tensor, num_tokens: int) -> bool:
        """Whether the model's mask is the one that hides text padding, which ``text_lengths`` repeats."""
        lengths = self.state.text_lengths
        return lengths is not None and mask.dtype == torch.bool and mask.shape == (len(lengths), 1, 1, num_tokens)


def denoiser_of(model: nn.Module) -> Denoiser | None:
    """The denoiser applied to ``model``, if any."""
    return vars(model).get(_ATTRIBUTE)


@contextmanager
def _recording_cache_context(model: Any, name: str, **kwargs: Any) -> Iterator[None]:
    """A model's ``cache_context``, bound to the instance, that also notes which guidance branch it names."""
    state: DenoisingState = vars(model)[_ATTRIBUTE].state
    outer, state.branch = state.branch, name
    try:
        with type(model).cache_context(model, name, **kwargs):
            yield
    finally:
        state.branch = outer
