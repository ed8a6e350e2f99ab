"""What one query sees under a method, on the token grid of any model: as a picture and as figures."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from dit_accel.eval.rates import Rates
from dit_accel.eval.report import tile_picture
from dit_accel.explanation import Explanation, explain_spec, measure_rates
from dit_accel.kernels.block_sparse.plan import BlockPlan, Triple
from dit_accel.kernels.block_sparse.reference import token_mask
from dit_accel.layout import TokenLayout
from dit_accel.methods.attention import BoundAttention, PlannedAttention
from dit_accel.methods.base import AttnMethod, DynamicMethod, StaticMethod
from dit_accel.pipelines.specs import SPECS

CHANNELS = 16  # of the synthetic queries and keys
_KEPT = 16  # plans and rates


@dataclass(frozen=True)
class Place:
    """A size of a model, and a query in its grid.

    Args:
        model: name of a spec.
        height, width, num_frames: of the output; None: the model's own.
        query: place of the query per axis (frame, row, column), as a share from 0 to 1.
    """

    model: str
    height: int | None
    width: int | None
    num_frames: int | None
    query: tuple[float, float, float]

    @property
    def layout(self) -> TokenLayout:
        """Raises a ValueError for a size that the model cannot make."""
        return SPECS[self.model].layout(self.height, self.width, self.num_frames)

    @property
    def at(self) -> Triple:
        """The query's (frame, row, column)."""
        frame, row, column = (
            min(int(share * size), size - 1) for share, size in zip(self.query, self.layout.grid, strict=True)
        )
        return frame, row, column


def picture(place: Place, method: AttnMethod) -> Image.Image | None:
    """The keys that the query sees, frame by frame; None where no picture of tokens shows it.

    A method that chooses in each call sees a scene made up for the purpose.

    Raises:
        ValueError: a size or a method that does not fit.
    """
    layout, at = place.layout, place.at
    plan = _plan(method, layout)
    if plan is None:
        return None
    position = layout.prefix + (at[0] * layout.grid[1] + at[1]) * layout.grid[2] + at[2]
    seen = token_mask(plan, torch.tensor([position]))[0, :, 0].float().mean(0)
    grid = seen[layout.prefix : layout.prefix + layout.visual_tokens].reshape(layout.grid)
    return tile_picture(grid.numpy(), at, columns=6)


@dataclass(frozen=True)
class Densities:
    """Shares of the query-key pairs of one sparse call, and what it is cut into."""

    tokens: int
    executed: float
    ideal: float
    tile: Triple | None


def densities(place: Place, method: AttnMethod) -> Densities:
    """Without measuring anything."""
    layout = place.layout
    bound = _bound(method, layout)
    if bound is None:
        return Densities(layout.num_tokens, 1.0, 1.0, None)
    ideal = layout.joint_density(method.ideal_density(layout))
    return Densities(layout.num_tokens, bound.density, ideal, bound.tile)


def explain(place: Place, method: AttnMethod, device: str) -> Explanation:
    """Densities and the predicted speed-up; the machine is measured once for each kind of method."""
    spec = SPECS[place.model]
    kind = "static" if isinstance(method, StaticMethod) else method.name
    measured = _rates(kind, method, spec.head_dim, device)
    return explain_spec(
        spec,
        method,
        height=place.height,
        width=place.width,
        num_frames=place.num_frames,
        device=device,
        measured=measured,
    )


_RATES: dict[tuple[str, int, str], Rates] = {}


def _rates(kind: str, method: AttnMethod, head_dim: int, device: str) -> Rates:
    key = (kind, head_dim, device)
    if key not in _RATES:
        _RATES[key] = measure_rates(method, head_dim, device)
    return _RATES[key]


@functools.lru_cache(_KEPT)
def _bound(method: AttnMethod, layout: TokenLayout) -> BoundAttention | None:
    return method.attention(layout)


@functools.lru_cache(_KEPT)
def _plan(method: AttnMethod, layout: TokenLayout) -> BlockPlan | None:
    if isinstance(method, DynamicMethod):
        scene = synthetic_scene(layout)
        return method.select(layout, scene, scene)
    bound = _bound(method, layout)
    return bound.plan if isinstance(bound, PlannedAttention) else None


@functools.lru_cache(_KEPT)
def synthetic_scene(layout: TokenLayout) -> Tensor:
    """Queries or keys, float32 [1, L, 1, CHANNELS], of two objects that move over a smooth background.

    Tokens of one object are alike in all frames, and neighbours are alike: what attention in trained models looks for.
    """
    axes = (torch.linspace(0, 1, size) for size in layout.grid)
    f, r, c = torch.meshgrid(*axes, indexing="ij")
    waves = [wave(2 * torch.pi * k * axis) for axis in (f, r, c) for k in (1, 2) for wave in (torch.sin, torch.cos)]
    objects = [
        2 * torch.exp(-((r - at_r) ** 2 + (c - at_c) ** 2) / 0.02)
        for at_r, at_c in ((0.3 + 0.4 * f, 0.25 + 0.1 * f), (0.6 - 0.2 * f, 0.7 - 0.3 * f))
    ]
    fields = [*waves, *objects]
    fields += [torch.ones_like(f)] * (CHANNELS - len(fields))
    scene = torch.zeros(1, layout.num_tokens, 1, CHANNELS)
    scene[0, layout.prefix : layout.prefix + layout.visual_tokens, 0] = torch.stack(fields, -1).reshape(-1, CHANNELS)
    return 3 * scene
