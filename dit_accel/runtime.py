"""A method at work in one denoiser: what each attention call computes, and how much of it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.interception import AttentionCall, Layer, install, uninstall
from dit_accel.kernels.block_sparse.backends import Backend
from dit_accel.layout import TokenLayout
from dit_accel.marks import Mark, mark, seconds_between
from dit_accel.methods.assigned import AssignedAttention, Run, kept_tensors
from dit_accel.methods.attention import AttnCall, BoundAttention, Memory, ModuleCall, Place
from dit_accel.methods.base import AttnMethod
from dit_accel.methods.dense import kernel_of
from dit_accel.methods.fidelity import ProbedCall, probed_call
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


Kind = tuple[str | None, int]  # guidance branch and batch of a call

Binder = Callable[[TokenLayout, torch.device], BoundAttention | None]


def binder(method: AttnMethod) -> Binder:
    """The method on a layout and device, the latest few kept; None where it is dense."""
    return functools.lru_cache(maxsize=_LAYOUTS_KEPT)(method.attention)


def check_schedule(method: AttnMethod, schedule: Schedule) -> None:
    """Raise a ValueError if the method needs denoising steps that cannot be known."""
    if schedule.known:
        return
    if method.whole_modules:
        raise ValueError(
            f"{method.name} follows denoising steps, which a model without its pipeline does not know; "
            "apply the method to the pipeline."
        )
    if method.start_percent > 0 or method.end_percent < 1:
        raise ValueError(
            f"start_percent={method.start_percent} and end_percent={method.end_percent} count denoising steps, which "
            "a model without its pipeline does not know; apply the method to the pipeline."
        )


@functools.cache
def _say(text: str) -> None:
    _LOG.warning("%s.", text)


def _size(number: float) -> str:
    unit, size = next(pair for pair in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 1)) if number >= pair[1])
    return f"{number / max(size, 2**10):.2f} {unit}"


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
        probes: what collects measurements of the sparse calls, shared likewise.
        state: the call the model is in.
        peers: the other denoisers of the pipeline; what they keep is dropped when this one begins.
    """

    method: AttnMethod
    family: Family
    bind: Binder
    backend: Backend
    schedule: Schedule
    tallies: list[Tally]
    probes: list[list[ProbedCall]]
    state: DenoisingState = field(default_factory=DenoisingState)
    peers: Sequence[Denoiser] = field(default=(), repr=False)
    # Of one run: what layers keep, by block and kind of call, and the step that each kind of call was at last. A kind
    # is the guidance branch and the batch.
    _memory: dict[tuple[int, Kind], Memory] = field(default_factory=dict, repr=False)
    _latest: dict[Kind, int] = field(default_factory=dict, repr=False)
    _layout: TokenLayout | None = field(default=None, repr=False)
    _conditional: slice | None = field(default=None, repr=False)
    _unnamed: bool = field(default=False, repr=False)
    _num_blocks: int = field(default=0, repr=False)

    def attach(self, model: nn.Module) -> None:
        """Enter ``model``: a forward pre-hook, the guidance branch, the attention modules."""
        self._hook = model.register_forward_pre_hook(self.observe, with_kwargs=True)
        if hasattr(model, "cache_context"):
            vars(model)["cache_context"] = _recording_cache_context.__get__(model)
        vars(model)[_ATTRIBUTE] = self
        around = self.around if self.method.whole_modules else None
        self._num_blocks = install(
            model, self.family.targets, self.family.visual_targets, self.attend, around, kernel_of(self.method)
        )

    def detach(self, model: nn.Module) -> None:
        """Leave ``model`` as it was found."""
        uninstall(model)
        del vars(model)[_ATTRIBUTE]
        vars(model).pop("cache_context", None)
        self._hook.remove()
        self.forget()

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
        first = self._first_of_its_kind()
        if tokens.layout is None:
            _notice(type(model).__name__, tokens.irregular)
            return
        attention = self.bind(tokens.layout, arguments["hidden_states"].device)
        if attention is not None and attention.splits_guidance:
            # At first two items that are no halves of guidance may begin with the same noise.
            self._conditional = None if first else self._conditional_half(arguments["hidden_states"])
            if first and isinstance(attention, AssignedAttention):
                for peer in self.peers:
                    peer.forget()
                self._check_kept(attention, model, arguments["hidden_states"])

    def forget(self) -> None:
        """Drop what layers keep from step to step; a run has ended."""
        self._memory.clear()
        self._latest.clear()
        self._unnamed = False

    @property
    def guided(self) -> bool:
        """Whether the other branch of guidance is in this call too, or in another call of each step."""
        return self._conditional is not None or len(self._latest) > 1

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Calls of the model's ``forward`` within leave nothing behind in what layers keep and in ``state``."""
        kept, state = _copied(self._memory), dict(vars(self.state))
        try:
            yield
        finally:
            self._memory.clear()
            self._memory.update(kept)
            vars(self.state).update(state)

    @property
    def kept_bytes(self) -> int:
        """What the layers keep at the moment."""
        kept = (kept for memory in self._memory.values() for kept in kept_tensors(memory))
        return sum({id(tensor.values): tensor.nbytes for tensor in kept}.values())

    def _first_of_its_kind(self) -> bool:
        """Whether this call is the first of its kind in a run; a call no later than one of its kind begins another.

        Two of a kind at one step are branches that nobody named, of which neither may take what the other kept.
        """
        state = self.state
        latest = self._latest.get(self._kind, max(self._latest.values(), default=0) - 1)
        same_run = self._layout == state.layout and state.step >= latest
        unnamed = same_run and (self._unnamed or self._latest.get(self._kind) == state.step)
        if unnamed or not same_run:
            self.forget()
        self._layout, self._unnamed = state.layout, unnamed
        first = self._kind not in self._latest
        self._latest[self._kind] = state.step
        return first

    @property
    def _kind(self) -> Kind:
        return self.state.branch, self.state.batch

    def _conditional_half(self, hidden_states: Tensor) -> slice | None:
        """The half of the batch that is conditional, where guidance doubles it: then both halves denoise the same."""
        half, rest = divmod(len(hidden_states), 2)
        if self.family.guidance != "batched" or rest or not torch.equal(hidden_states[:half], hidden_states[half:]):
            return None
        return slice(half) if self.family.cond_half == "first" else slice(half, None)

    def _check_kept(self, attention: AssignedAttention, model: nn.Module, hidden_states: Tensor) -> None:
        """Say what calls of this kind will keep; raise a ValueError if there is no room or the plan does not fit."""
        shape, state = self.family.shape(model.config), self.state
        size = (state.num_steps, self._num_blocks, state.batch, shape["heads"], shape["head_dim"])
        run, separate = Run(*size, hidden_states.element_size()), self.family.guidance == "separate"
        attention.check_heads(run)
        guided = separate or self._conditional_half(hidden_states) is not None
        kept = attention.kept_bytes(run, guided=guided, separate=separate)
        branch = " in each guidance branch" if separate else ""
        if kept:
            _say(f"{self.method.name} keeps up to {_size(kept)} from step to step{branch}")
        free = _free_bytes(hidden_states.device)
        needed = kept * len(self._latest) - self.kept_bytes  # both branches, once both have been called
        if free is not None and needed > free and attention.keeps_on_device:
            raise ValueError(
                f"{self.method.name} would keep {_size(kept)} from step to step{branch}, and "
                f'{_size(free)} of the GPU are free; use keep="cpu", keep="8bit" or a plan that reuses less.'
            )

    def around(self, layer: Layer, module: ModuleCall) -> Any:
        """Answer one call of a whole targeted attention module."""
        attention = self._bound(layer, module.device)
        if attention is None:
            return module()
        out, computed = attention.around(self._place(layer), module)
        if not computed:
            for tally in self.tallies:
                tally.add(0.0, None)
        return out

    def _place(self, layer: Layer) -> Place:
        state = self.state
        branch, batch = self._kind
        conditional = self._memory.get((layer.block, ("cond", batch))) if branch == "uncond" else None
        return Place(
            block=layer.block,
            num_blocks=self._num_blocks,
            step=state.step,
            num_steps=state.num_steps,
            memory=self._memory.setdefault((layer.block, self._kind), {}),
            conditional=self._conditional,
            of_conditional=conditional,
            shared_later=branch == "cond" and self._latest.get(("uncond", batch), state.step) < state.step,
        )

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
        items = len(call.query)
        if lengths is not None and len(lengths) != items:
            lengths = lengths[self._conditional]
        method_call = AttnCall(
            call.query,
            call.key,
            call.value,
            scale=call.scale,
            text_lengths=lengths if lengths is None else lengths.to(call.query.device),
            mask=call.mask,
            backend=self.backend,
            with_lse=bool(self.probes),
            place=self._place(layer),
            dense=lambda part: layer.dense(AttentionCall(part.q, part.k, part.v, part.mask, part.scale)),
        )
        with torch.autocast(call.query.device.type, enabled=False):  # q, k and v are cast; what is chosen by is float32
            result = attention.attend(method_call)
            if self.probes:
                probed = probed_call(method_call, attention, result, state.branch)
                for probe in self.probes:
                    probe.append(probed)
        return result.out, result.density * (items / state.batch)  # one half of the batch may stand for both

    def _attention(self, layer: Layer, call: AttentionCall) -> BoundAttention | None:
        """The method for this call, None where it is dense; a call that does not fit is refused at any step."""
        state = self.state
        attention = self._bound(layer, call.query.device)
        if attention is None:
            return None
        self._check(call, attention)
        step, tokens = state.step, attention.layout.num_tokens
        dense = self.method.is_dense_at(block=layer.block, step=step, num_steps=state.num_steps, num_tokens=tokens)
        return None if dense else attention

    def _bound(self, layer: Layer, device: torch.device) -> BoundAttention | None:
        """The method on the tokens that a layer sees; None where they are no grid, or it is dense there."""
        layout = self.state.layout
        if layout is None:
            return None
        return self.bind(layout.without_text() if layer.visual else layout, device)

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


def _free_bytes(device: torch.device) -> int | None:
    """Memory of a GPU that torch has free or can have; None for other devices."""
    if device.type != "cuda":
        return None
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def _copied(memory: dict[Any, Any]) -> dict[Any, Any]:
    """Dictionaries within dictionaries anew, with the same tensors."""
    return {key: _copied(value) if isinstance(value, dict) else value for key, value in memory.items()}


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
