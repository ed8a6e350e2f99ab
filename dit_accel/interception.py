"""How diffusers' attention is entered: wrapped processors that select one private attention backend.

The only file, with state.py, that knows names diffusers keeps private. A wrapped processor is a subclass of the stock
one with its projections, norms and position embeddings; it only marks which layer is running and asks for the private
backend, which gives the call to that layer.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import itertools
import re
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    _check_attention_backend_requirements,
    dispatch_attention_fn,
)
from torch import Tensor, nn

from dit_accel.legacy_processors import REPLACEMENTS, check_norms
from dit_accel.methods.attention import ModuleCall


class AttentionCall(NamedTuple):
    """One attention call as diffusers makes it: tensors [B, L, H, D], the mask as the model built it."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    scale: float | None = None


Attend = Callable[["Layer", AttentionCall], Tensor]
Around = Callable[["Layer", ModuleCall], Any]


class Layer:
    """One targeted attention module.

    Args:
        block: index of its transformer block, double-stream blocks before single-stream ones, ``visual`` ones last.
        attend: what answers its calls.
        dense_backend: the attention backend the user chose for it, None for diffusers' active one.
        visual: whether it sees the grid alone in a model whose other layers see text too.
        around: what answers calls of the whole module, projections included; None: the stock processor.
        kernel: the attention backend of its dense calls while it is wrapped; None: the user's.
    """

    def __init__(
        self,
        block: int,
        attend: Attend,
        dense_backend: AttentionBackendName | None,
        visual: bool = False,
        around: Around | None = None,
        kernel: AttentionBackendName | None = None,
    ) -> None:
        self.block = block
        self.visual = visual
        self.attend = attend
        self.around = around
        self.dense_backend = dense_backend
        self.kernel = kernel
        number = next(_NUMBERS)
        _LAYERS[number] = self
        # A tensor, because a compiled block is specialised on Python integers: one graph per layer.
        self.number = torch.tensor(number)

    def __deepcopy__(self, memo: dict[int, Any]) -> Layer:
        attend, around = deepcopy((self.attend, self.around), memo)
        return Layer(self.block, attend, self.dense_backend, self.visual, around, self.kernel)

    def dense(self, call: AttentionCall) -> Tensor:
        """The call as diffusers would have made it, by ``kernel`` where there is one."""
        query, key, value, mask, scale = call
        backend = self.kernel or self.dense_backend
        out: Tensor = dispatch_attention_fn(query, key, value, attn_mask=mask, scale=scale, backend=backend)
        return out


_NUMBERS = itertools.count()
_LAYERS: weakref.WeakValueDictionary[int, Layer] = weakref.WeakValueDictionary()


class _Running(threading.local):
    """The layer whose processor is running in this thread."""

    def __init__(self) -> None:
        self.layer: Layer | None = None


_RUNNING = _Running()


def _private_backend_name(name: str) -> AttentionBackendName:
    """A member that passes isinstance() and is in none of the enum's maps, so that nobody selects it by name."""
    member = str.__new__(AttentionBackendName, name)
    member._name_ = name.upper()
    member._value_ = name
    return member


_BACKEND = _private_backend_name("dit_accel")


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: Any = None,
) -> Tensor:
    layer = _RUNNING.layer
    assert layer is not None, "only wrapped processors select this backend"
    if dropout_p or is_causal or enable_gqa or _parallel_config is not None:
        raise ValueError(
            "dit_accel runs attention without dropout, causal mask, grouped queries and context parallelism, "
            f"got dropout_p={dropout_p}, is_causal={is_causal}, enable_gqa={enable_gqa} and "
            f"{'a' if _parallel_config is not None else 'no'} parallel config; "
            "call dit_accel.restore on the model to use them."
        )
    if torch.is_autocast_enabled(query.device.type):  # as autocast does for torch's own attention
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    call = AttentionCall(query, key, value, attn_mask, scale)
    if not torch.compiler.is_compiling():
        return layer.attend(layer, call)
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        out: Tensor = _attend_outside(layer.number, call)
        return out
    out = _attend_op(query, key, value, layer.number, attn_mask, scale)
    return out


_AttentionBackendRegistry.register(_BACKEND)(_attention)


def _fa4_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """FlashAttention-4's dense kernel as its package has it; diffusers knows it only as a download from the hub.

    It takes no mask: keys that one hides at the end of the only sequence are cut off.
    """
    from flash_attn.cute import flash_attn_func

    length = key.shape[1] if attn_mask is None else _valid_length(attn_mask)
    out: Tensor = flash_attn_func(query, key[:, :length], value[:, :length], softmax_scale=scale)[0]
    return out


def _valid_length(mask: Tensor) -> int:
    """How many keys a mask shows, if it hides just the last ones of one sequence."""
    length = int(mask.sum()) if mask.dtype == torch.bool else 0
    if mask.shape != (1, 1, 1, mask.shape[-1]) or not length or not bool(mask[..., :length].all()):
        raise ValueError(
            f"kernel='fa4' takes a mask that hides the last keys of one sequence, got {mask.dtype} {list(mask.shape)}; "
            "use kernel='native', or a batch of one."
        )
    return length


_FA4 = _private_backend_name("fa4")
_AttentionBackendRegistry.register(_FA4)(_fa4_attention)


def dense_kernel(name: str | None) -> AttentionBackendName | None:
    """The attention backend of that name: one of diffusers', or "fa4" where the package flash-attn-4 is installed.

    None has none.

    Raises:
        ValueError: an unknown name, a backend that is not installed, or one that would be downloaded.
    """
    if name is None:
        return None
    if name == _FA4.value:
        if importlib.util.find_spec("flash_attn") is None or importlib.util.find_spec("flash_attn.cute") is None:
            raise ValueError("kernel='fa4' needs the package flash-attn-4; pip install 'dit-accel[flash]'.")
        return _FA4
    known = [member.value for member in AttentionBackendName if not member.value.endswith("_hub")]
    if name not in known:
        raise ValueError(f"kernel must be fa4 or one of {', '.join(known)}, got {name!r}.")
    backend = AttentionBackendName(name)
    try:
        _check_attention_backend_requirements(backend)
    except RuntimeError as error:
        raise ValueError(f"kernel={name!r} cannot run here: {error}") from error
    return backend


@torch.compiler.disable
def _attend_outside(layer: Tensor, call: AttentionCall) -> Tensor:
    """The same call between two compiled graphs, where autograd records what the method does."""
    running = _LAYERS[int(layer)]
    return running.attend(running, call)


@torch.compiler.disable(reason="a plan decides at each step what a module computes; compile without fullgraph=True")
def _around(layer: Layer, module: ModuleCall) -> Any:
    """The whole module outside compiled graphs, which would be cut to the first step's action."""
    assert layer.around is not None, "asked by the caller"
    return layer.around(layer, module)


@torch.library.custom_op("dit_accel::attend", mutates_args=())
def _attend_op(
    query: Tensor, key: Tensor, value: Tensor, layer: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """The same call inside a compiled graph, where Python state may not be read."""
    running = _LAYERS[int(layer)]
    return running.attend(running, AttentionCall(query, key, value, mask, scale)).contiguous()


@_attend_op.register_fake
def _attend_shape(
    query: Tensor, key: Tensor, value: Tensor, layer: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    return query.new_empty(query.shape)


@functools.cache
def _wrapped_class(stock: Any) -> Any:
    """One subclass per processor class, so that all layers of a model share their compiled graph."""
    base: Any = REPLACEMENTS.get(stock, stock)

    def project_and_attend(self: Any, *args: Any, **kwargs: Any) -> Any:
        outer, _RUNNING.layer = _RUNNING.layer, self._dit_accel_layer
        try:
            return base.__call__(self, *args, **kwargs)
        finally:
            _RUNNING.layer = outer

    signature = inspect.signature(stock.__call__)

    @functools.wraps(stock.__call__)  # diffusers drops keywords that the signature does not name
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._dit_accel_layer.around is None:
            return project_and_attend(self, *args, **kwargs)
        return _around(self._dit_accel_layer, ModuleCall(project_and_attend, signature, (self, *args), kwargs))

    def set_dense_backend(self: Any, name: AttentionBackendName | None) -> None:
        if name is not _BACKEND:  # written back by code that saves and restores the attribute
            self._dit_accel_layer.dense_backend = name

    backend = property(lambda self: _BACKEND, set_dense_backend)
    wrapped = type(f"Wrapped{stock.__name__}", (base,), {"__call__": call, "_attention_backend": backend})
    with contextlib.suppress(ValueError):  # diffusers may have no entry for the stock class either
        AttentionProcessorRegistry.register(wrapped, AttentionProcessorRegistry.get(stock))
    return wrapped


def _wrap(processor: Any, layer: Layer) -> Any:
    wrapped = object.__new__(_wrapped_class(processor.__class__))
    wrapped.__dict__.update(processor.__dict__)
    wrapped.__dict__.pop("_attention_backend", None)
    wrapped._dit_accel_layer = layer
    wrapped._dit_accel_stock = processor
    return wrapped


def _targets(model: nn.Module, patterns: tuple[str, ...]) -> list[Any]:
    """The attention modules whose whole name matches, in the order of the patterns, then of the model."""
    names = [(name.replace("_orig_mod.", ""), module) for name, module in model.named_modules()]
    return [module for pattern in patterns for name, module in names if re.fullmatch(pattern, name)]


def _wrapped_modules(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if hasattr(getattr(module, "processor", None), "_dit_accel_layer"))


def check_targets(model: nn.Module, patterns: tuple[str, ...]) -> None:
    """Raise a ValueError unless every target of ``model`` can be wrapped; changes nothing."""
    targets = _targets(model, patterns)
    if not targets:
        raise ValueError(f"{type(model).__name__} has no attention module named like {' or '.join(patterns)}.")
    for module in targets:
        processor = module.processor
        stock = type(getattr(processor, "_dit_accel_stock", processor))
        name = stock.__name__
        if isinstance(processor, nn.Module):
            raise ValueError(
                f"{type(model).__name__} carries the processor {name} with weights of its own; "
                "unload the IP-Adapter before applying a method."
            )
        code = inspect.unwrap(stock.__call__).__code__
        if stock not in REPLACEMENTS and "dispatch_attention_fn" not in code.co_names:
            raise ValueError(
                f"{type(model).__name__} carries the processor {name}, which does not call diffusers' "
                "dispatch_attention_fn; set the stock processors before applying a method."
            )
        if getattr(processor, "_parallel_config", None) is not None:
            raise ValueError(
                f"{type(model).__name__} has context parallelism enabled, which no method supports; "
                "load the model without it before applying a method."
            )
        check_norms(module)


def install(
    model: nn.Module,
    joint: tuple[str, ...],
    visual: tuple[str, ...],
    attend: Attend,
    around: Around | None = None,
    kernel: str | None = None,
) -> int:
    """Put a wrapped processor on every target, those that see the grid alone last; returns how many there are.

    Args:
        model: the denoiser.
        joint, visual: names of its targets.
        attend: what answers their attention calls.
        around: what answers calls of the whole modules; None: the stock processors.
        kernel: name of the attention backend of dense calls; None: the user's.
    """
    dense = dense_kernel(kernel)
    seeing_text = _targets(model, joint)
    targets = seeing_text + _targets(model, visual)
    for block, module in enumerate(targets):
        processor = module.processor
        # A processor without the attribute calls torch's own attention, whichever backend is active.
        backend = getattr(processor, "_attention_backend", AttentionBackendName.NATIVE)
        module.processor = _wrap(processor, Layer(block, attend, backend, block >= len(seeing_text), around, dense))
    return len(targets)


def uninstall(model: nn.Module) -> None:
    """Put the stock processors back, the very same objects, with the dense backend that the user chose meanwhile."""
    for module in _wrapped_modules(model):
        stock, layer = module.processor._dit_accel_stock, module.processor._dit_accel_layer
        if layer.dense_backend is not getattr(stock, "_attention_backend", layer.dense_backend):
            stock._attention_backend = layer.dense_backend
        module.processor = stock


def watch_runs(pipe: Any, ended: Sequence[Callable[[], None]]) -> None:
    """Have all ``ended`` called when a run of the pipeline ends, in whatever way; a model alone has no runs.

    A run of a diffusers pipeline lasts as long as the progress bar that it asks itself for.
    """
    if hasattr(type(pipe), "progress_bar"):
        vars(pipe)["progress_bar"] = _RunWatch(pipe, ended)


def unwatch_runs(pipe: Any) -> None:
    """Give the pipeline, if it still exists, its own progress bar back."""
    if pipe is not None and isinstance(vars(pipe).get("progress_bar"), _RunWatch):
        del vars(pipe)["progress_bar"]


class _RunWatch:
    """A pipeline's ``progress_bar`` that tells when the bars it makes are done with."""

    def __init__(self, pipe: Any, ended: Sequence[Callable[[], None]]) -> None:
        self._pipe, self._ended = weakref.ref(pipe), ended

    def __deepcopy__(self, memo: dict[int, Any]) -> _RunWatch:
        pipe = self._pipe()
        return _RunWatch(memo.get(id(pipe), pipe), deepcopy(self._ended, memo))

    def __call__(self, iterable: Any = None, total: int | None = None) -> Any:
        pipe = self._pipe()
        return _WatchedBar(type(pipe).progress_bar(pipe, iterable, total), self._ended)  # type: ignore[union-attr]


class _WatchedBar:
    """A progress bar that tells when it is done with, as a context manager or as an iterator."""

    def __init__(self, bar: Any, ended: Sequence[Callable[[], None]]) -> None:
        self._bar, self._ended = bar, ended

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)

    def __enter__(self) -> Any:
        return self._bar.__enter__()

    def __exit__(self, *error: Any) -> Any:
        self._end()
        return self._bar.__exit__(*error)

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._bar
        finally:
            self._end()

    def _end(self) -> None:
        for ended in self._ended:
            ended()
