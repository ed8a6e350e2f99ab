"""One attention call as a method sees it, and a method at work on one layout."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels import block_sparse_attention, can_run
from dit_accel.kernels.block_sparse.backends import Backend
from dit_accel.kernels.block_sparse.plan import BlockPlan, TileGrid, Triple
from dit_accel.kernels.pyramid.list_operator import ListBackend, check_backend
from dit_accel.layout import TokenLayout

Memory = dict[Any, Any]


@dataclass(frozen=True, eq=False)
class Place:
    """Where in a run, in the model and in the guidance an attention call is.

    Args:
        block: index of its transformer block, of ``num_blocks``.
        step: denoising step, from 0, of ``num_steps``.
        memory: what a method keeps from step to step in this layer and guidance branch; empty when a run begins.
        conditional: the items of the batch that are guidance's conditional half; None: the call does not hold both.
        of_conditional: the memory of this layer in the conditional call of the same step, in the unconditional one.
        shared_later: an unconditional call of the same step is to follow this one.
    """

    block: int = 0
    num_blocks: int = 1
    step: int = 0
    num_steps: int = 1
    memory: Memory = field(default_factory=dict)
    conditional: slice | None = None
    of_conditional: Memory | None = None
    shared_later: bool = False


def torch_dense(call: AttnCall) -> Tensor:
    """Dense attention by torch, for calls outside a pipeline."""
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=call.mask, scale=call.scale).transpose(1, 2)


@dataclass(frozen=True, eq=False)
class AttnCall:
    """One attention call.

    Args:
        q, k, v: [B, L, H, D], any strides.
        scale: factor on the scores; None: head_dim ** -0.5.
        text_lengths: valid text tokens per batch item, int32 [B]; None: all of them.
        mask: the same as the model gives it to dense attention.
        backend: of the operator.
        with_lse: whether the result must have its LSE.
        place: where the call is.
        dense: dense attention as the pipeline would compute it.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float | None = None
    text_lengths: Tensor | None = None
    mask: Tensor | None = None
    backend: Backend = "auto"
    with_lse: bool = False
    place: Place = field(default_factory=Place)
    dense: Callable[[AttnCall], Tensor] = torch_dense

    def of_heads(self, heads: Sequence[int]) -> AttnCall:
        """The call of some heads; a mask that differs by head is not known here."""
        index = torch.tensor(heads, device=self.q.device)
        return replace(self, q=self.q[:, :, index], k=self.k[:, :, index], v=self.v[:, :, index])


class AttnResult(NamedTuple):
    """What a method answers.

    Args:
        out: [B, L, H, D].
        lse: natural-log LSE of each query's scores, [B, H, L]; None unless it was asked for.
        density: share of all query-key pairs computed, text included; a 0-dim tensor where only the device knows it.
    """

    out: Tensor
    lse: Tensor | None
    density: float | Tensor


@dataclass(frozen=True, eq=False)
class ModuleCall:
    """A call of a whole attention module, projections included.

    Args:
        run: the stock processor.
        signature: of its parameters.
        args, kwargs: what the module was called with.
    """

    run: Callable[..., Any]
    signature: inspect.Signature
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def device(self) -> torch.device:
        return next(value.device for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor))

    def __call__(self) -> Any:
        """The module's output: a tensor, or one for the grid and one for the text."""
        return self.run(*self.args, **self.kwargs)

    def of_items(self, items: slice) -> Any:
        """Its output for some items of the batch."""
        part = self.signature.bind(*self.args, **self.kwargs)
        given = part.arguments
        given.update({name: value[items] for name in _BATCHED if isinstance(value := given.get(name), Tensor)})
        return self.run(*part.args, **part.kwargs)


# Arguments of attention modules that have a batch dimension; position embeddings have none in the models concerned.
_BATCHED = ("hidden_states", "encoder_hidden_states", "attention_mask")


class QueryGroups(NamedTuple):
    """Queries that share one set of keys.

    Args:
        anchors: one query in the middle of each group, int64 [groups], positions on the grid.
        group_of: the group of each grid token, int64 [grid tokens].
    """

    anchors: Tensor
    group_of: Tensor


class BoundAttention(ABC):
    """A method at work on one layout and device.

    Args:
        layout: the sequence.
        density: share of all query-key pairs a call computes, text included; expected, where it depends on the call.
        tile: tokens of one query tile per axis, for people to read.
        groups: the queries that share keys; asked for by corrections and diagnostics only.
        splits_guidance: whether it asks for ``Place.conditional``, which takes a look at the hidden states.
    """

    splits_guidance: ClassVar[bool] = False

    layout: TokenLayout
    density: float
    tile: Triple

    @abstractmethod
    def attend(self, call: AttnCall) -> AttnResult:
        """The call's output."""

    def around(self, place: Place, module: ModuleCall) -> tuple[Any, bool]:
        """The output of a whole attention module, and whether any of it was computed."""
        return module(), True

    @abstractmethod
    def groups(self) -> QueryGroups:
        """The queries that share keys."""

    @abstractmethod
    def check(self, q: Tensor, backend: Backend) -> None:
        """Raise a ValueError, in one sentence, if ``backend`` cannot run calls on tensors like ``q``."""


class PlannedAttention(BoundAttention):
    """The operator on a plan that holds for every call."""

    def __init__(self, layout: TokenLayout, plan: BlockPlan) -> None:
        self.layout, self.plan = layout, plan
        self.density, self.tile = plan.density, plan.tiles.tile

    def attend(self, call: AttnCall) -> AttnResult:
        return attend_by_plan(call, self.plan, self.density)

    def groups(self) -> QueryGroups:
        return tile_groups(self.plan.tiles, self.plan.device)

    def check(self, q: Tensor, backend: Backend) -> None:
        if backend != "auto":
            can_run(backend, q, self.plan, raise_error=True)


class SelectedAttention(BoundAttention):
    """The operator on a plan made for each call from its queries and keys.

    Args:
        layout: the sequence.
        device: of the calls.
        tiles: the grid cut into query tiles.
        density: what a plan is expected to compute, text included.
        select: the plan of one call, from its q and k.
        refresh: a plan is kept for this many steps of a layer and guidance branch.
    """

    def __init__(
        self,
        layout: TokenLayout,
        device: torch.device,
        tiles: TileGrid,
        density: float,
        select: Callable[[Tensor, Tensor], BlockPlan],
        refresh: int = 1,
    ) -> None:
        self.layout, self.density, self.tile = layout, density, tiles.tile
        self._tiles, self._select, self._refresh = tiles, select, refresh
        counts = torch.zeros(1, 1, tiles.num_tiles, dtype=torch.int32, device=device)
        self._empty = BlockPlan(tiles, counts, counts, counts[..., None], layout.prefix, layout.suffix)

    def attend(self, call: AttnCall) -> AttnResult:
        plan, density = self._planned(call)
        return attend_by_plan(call, plan, density)

    def _planned(self, call: AttnCall) -> tuple[BlockPlan, Tensor]:
        place = call.place
        kept = place.memory.get("plan")
        if kept is not None and place.step - kept[0] < self._refresh:
            return kept[1], kept[2]
        with torch.no_grad():
            plan = self._select(call.q, call.k)
            density = plan.computed_share()
        if self._refresh > 1:
            place.memory["plan"] = (place.step, plan, density)
        return plan, density

    def groups(self) -> QueryGroups:
        return tile_groups(self._tiles, self._empty.device)

    def check(self, q: Tensor, backend: Backend) -> None:
        if backend != "auto":
            can_run(backend, q, self._empty, raise_error=True)


def attend_by_plan(call: AttnCall, plan: BlockPlan, density: float | Tensor) -> AttnResult:
    """The block-sparse operator as a method's answer."""
    if call.with_lse:
        out, lse = block_sparse_attention(
            call.q,
            call.k,
            call.v,
            plan,
            scale=call.scale,
            text_lengths=call.text_lengths,
            backend=call.backend,
            return_lse=True,
        )
        return AttnResult(out, lse, density)
    out = block_sparse_attention(
        call.q, call.k, call.v, plan, scale=call.scale, text_lengths=call.text_lengths, backend=call.backend
    )
    return AttnResult(out, None, density)


def tile_groups(tiles: TileGrid, device: torch.device | None = None) -> QueryGroups:
    """Each tile is a group, its anchor the token in the middle of what lies on the grid."""
    middles = [
        torch.arange(tiles.tiles[axis], device=device) * tiles.tile[axis] + tiles.axis_sizes(axis, device) // 2
        for axis in range(3)
    ]
    _, rows, columns = tiles.grid
    frame, row, column = middles
    anchors = (frame[:, None, None] * rows + row[:, None]) * columns + column
    return QueryGroups(anchors.flatten(), tiles.token_tile(device))


def curve_groups(curve: Tensor, size: int) -> QueryGroups:
    """Each run of ``size`` tokens along ``curve``, grid positions [grid tokens], is a group."""
    curve = curve.long()
    starts = torch.arange(0, len(curve), size, device=curve.device)
    middles = starts + (len(curve) - starts).clamp(max=size) // 2
    run = torch.arange(len(curve), device=curve.device) // size
    return QueryGroups(curve[middles], torch.empty_like(curve).index_copy(0, curve, run))


def check_list_backend(q: Tensor, backend: Backend) -> None:
    """Raise a ValueError if attention over block lists does not have ``backend``, or it cannot run on ``q``."""
    known = get_args(ListBackend)
    if backend not in known:
        raise ValueError(f"attention to means runs on the backends {', '.join(known)}, got {backend!r}.")
    check_backend(q, cast(ListBackend, backend))
