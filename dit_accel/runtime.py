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
from dit_accel.kernels.block_sparse.backends import Backend
from dit_accel.layout import TokenLayout
from dit_accel.marks import Mark, mark, seconds_between
from dit_accel.methods.attention import AttnCall, AttnResult, BoundAttention
from dit_accel.methods.base import AttnMethod
from dit_accel.methods.correction import dense_anchors, discarded_mass
from dit_accel.pipelines.families import Family
from dit_accel.state import DenoisingState, Schedule, bind_arguments

_LOG = logging.getLogger(__name__)
_ATTRIBUTE = "_dit_accel"
_LAYOUTS_KEPT = 8


@dataclass
class Tally:
    """Attention calls that a handle intercepted.

    Args:
        timed: also take the time of each call.
        sparse_calls: calls that the operator computed.
        dense_calls: calls handed back to diffusers.
        density_sum: over all calls, the share of query-key pairs computed, 1.0 for a dense one; on the device where
            a method chooses there.
    """

    timed: bool = False
    sparse_calls: int = 0
    dense_calls: int = 0
    density_sum: float | Tensor = 0.0
    _spans: list[tuple[Mark, Mark]] = field(default_factory=list, repr=False)

    @property
    def calls(self) -> int:
        return self.sparse_calls + self.dense_calls

    @property
    def density(self) -> float:
        """Share of query-key pairs computed, the mean over all calls; 1.0 before the first."""
        return float(self.density_sum) / self.calls if self.calls else 1.0

    @property
    def sparse_density(self) -> float:
        """Share of query-key pairs computed, the mean over the sparse calls; 1.0 before the first."""
        return (float(self.density_sum) - self.dense_calls) / self.sparse_calls if self.sparse_calls else 1.0

    @property
    def attention_seconds(self) -> float:
        """Time spent in the calls; on a GPU, of its stream, and reading it waits for the last call."""
        return sum(seconds_between(begin, end) for begin, end in self._spans)

    def add(self, density: float | Tensor | None, span: tuple[Mark, Mark] | None) -> None:
        """Count one call; ``density`` is None for a dense one."""
        if density is None:
            self.dense_calls += 1
        else:
            self.sparse_calls += 1
        # Not in place, which is refused for a tensor made in inference mode.
        self.density_sum = self.density_sum + (1.0 if density is None else density)
        if self.timed and span is not None:
            self._spans.append(span)


@dataclass(frozen=True, eq=False)
class Discarded:
    """What one sparse call left out.

    Args:
        step, block, branch: the call.
        mass: softmax share of the keys that were left out, float32 [B, H, query groups] in [0, 1], as measured on one
            query of each group.
    """

    step: int
    block: int
    branch: str | None
    mass: Tensor


Binder = Callable[[TokenLayout, torch.device], BoundAttention | None]


def binder(method: AttnMethod) -> Binder:
    """The method on a layout and device, the latest few kept; None where it is dense."""
    return functools.lru_cache(maxsize=_LAYOUTS_KEPT)(method.attention)


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
        bind: the method on a layout, shared by the denoisers of a pipeline.
        backend: the operator's backend.
        schedule: where the denoising step is read.
        tallies: what counts the calls, shared likewise.
        probes: what collects the discarded mass of the calls, shared likewise.
        state: the call the model is in.
    """

    method: AttnMethod
    family: Family
    bind: Binder
    backend: Backend
    schedule: Schedule
    tallies: list[Tally]
    probes: list[list[Discarded]]
    state: DenoisingState = field(default_factory=DenoisingState)
    # By block and guidance branch, and the layout, batch and step that each branch was in last; of one run.
    _memory: dict[tuple[int, str | None], dict[str, Any]] = field(default_factory=dict, repr=False)
    _latest: dict[str | None, tuple[TokenLayout | None, int, int]] = field(default_factory=dict, repr=False)

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
        step, num_steps = self.schedule.position(arguments["timestep"], self.family.timestep_scale)
        state.layout, state.batch, state.text_lengths = tokens.layout, tokens.batch, tokens.text_lengths
        state.step, state.num_steps = step, num_steps
        if self.family.guidance == "batched":
            state.branch = "batched"
        self._forget_another_run()
        if tokens.layout is None:
            _notice(type(model).__name__, tokens.irregular)
        else:
            self.bind(tokens.layout, arguments["hidden_states"].device)

    def _forget_another_run(self) -> None:
        """Empty the memory where this call's branch is no later in the same run than it was."""
        state = self.state
        layout, batch, step = self._latest.get(state.branch, (state.layout, state.batch, -1))
        if (layout, batch) != (state.layout, state.batch) or state.step <= step:
            self._memory.clear()
            self._latest.clear()
        self._latest[state.branch] = state.layout, state.batch, state.step

    def attend(self, layer: Layer, call: AttentionCall) -> Tensor:
        """Answer one attention call of a targeted layer."""
        attention = self._attention(layer, call)
        timed = any(tally.timed for tally in self.tallies)
        begin = mark(call.query.device) if timed else None
        density: float | Tensor | None = None
        if attention is None:
            out = layer.dense(call)
        else:
            out, density = self._sparse(layer, call, attention)
        span = None if begin is None else (begin, mark(call.query.device))
        for tally in self.tallies:
            tally.add(density, span)
        return out

    def _sparse(self, layer: Layer, call: AttentionCall, attention: BoundAttention) -> tuple[Tensor, float | Tensor]:
        state = self.state
        lengths = state.text_lengths if call.mask is not None else None
        method_call = AttnCall(
            call.query,
            call.key,
            call.value,
            scale=call.scale,
            text_lengths=lengths if lengths is None else lengths.to(call.query.device),
            backend=self.backend,
            with_lse=bool(self.probes),
            step=state.step,
            memory=self._memory.setdefault((layer.block, state.branch), {}),
        )
        with torch.autocast(call.query.device.type, enabled=False):  # q, k and v are cast; what is chosen by is float32
            result = attention.attend(method_call)
            if self.probes:
                self._probe(layer, method_call, attention, result)
        return result.out, result.density

    @torch.no_grad()
    def _probe(self, layer: Layer, call: AttnCall, attention: BoundAttention, result: AttnResult) -> None:
        """Note what the call left out."""
        assert result.lse is not None, "asked for"
        mass = discarded_mass(dense_anchors(call, attention.layout, attention.groups()), result.lse)
        for probe in self.probes:
            probe.append(Discarded(call.step, layer.block, self.state.branch, mass))

    def _attention(self, layer: Layer, call: AttentionCall) -> BoundAttention | None:
        """The method for this call, None where it is dense; a call that does not fit is refused at any step."""
        state, method = self.state, self.method
        if state.layout is None:
            return None
        attention = self.bind(state.layout, call.query.device)
        if attention is None:
            return None
        self._check(call, attention)
        tokens = state.layout.num_tokens
        if method.is_dense_at(block=layer.block, step=state.step, num_steps=state.num_steps, num_tokens=tokens):
            return None
        return attention

    def _check(self, call: AttentionCall, attention: BoundAttention) -> None:
        lengths, tokens = [call.query.shape[1], call.key.shape[1]], attention.layout.num_tokens
        if lengths != [tokens] * 2:
            raise ValueError(
                f"{self.family.name} was read as a sequence of {tokens} tokens, but its attention got "
                f"{lengths[0]} queries and {lengths[1]} keys; call dit_accel.restore on the model for such calls."
            )
        if call.mask is not None and not self._is_key_mask(call.mask, tokens):
            raise ValueError(
                f"{self.family.name} passed attention a mask of {call.mask.dtype} {list(call.mask.shape)} that a "
                "sparse method does not understand; call dit_accel.restore on the model for such calls."
            )
        attention.check(call.query, self.backend)

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
