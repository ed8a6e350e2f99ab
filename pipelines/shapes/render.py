"""Scenes to pixels: anti-aliased shapes on straight tracks or at places, over textures, batched, on any device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.pipelines.shapes.scenes import BACKGROUNDS, COLOURS, IMAGES, MOTIONS, PLACES, TEXTURES, Scenes

REACH = 1.15  # the farthest point of any shape from its centre, in radii
_ATLAS_CELLS = 160
_ATLAS_EXTENT = 1.6
_REFERENCE_SIDE = 192
_CANDIDATES = 384
_SMALLEST_SCALE = 0.5
_OFF_MIDDLE, _NEAR_MIDDLE = (0.65, 1.0), (-0.15, 0.15)  # of the free range: along an axis that a place names, or not
# Unit direction (x right, y down) of each motion; diagonal motion draws its two signs.
_DIRECTIONS = {"moving left": (-1, 0), "moving right": (1, 0), "moving up": (0, -1), "moving down": (0, 1)}


@dataclass(frozen=True)
class Tracks:
    """Where objects are, in pixels: centre and radius per scene, object and frame."""

    x: Tensor  # [B, 2, T]
    y: Tensor  # [B, 2, T]
    radius: Tensor  # [B, 2, T]


def _polygon_distance(points: Tensor, vertices: Tensor) -> Tensor:
    """Signed distance (negative inside) of points [..., 2] to a closed polygon with vertices [N, 2]."""
    distance = torch.full(points.shape[:-1], math.inf)
    sign = torch.ones(points.shape[:-1])
    for a, b in zip(vertices, vertices.roll(1, 0), strict=True):
        edge, offset = b - a, points - a
        nearest = offset - edge * ((offset @ edge) / (edge @ edge)).clamp(0, 1)[..., None]
        distance = torch.minimum(distance, nearest.square().sum(-1))
        above, below = points[..., 1] >= a[1], points[..., 1] < b[1]
        left = edge[0] * offset[..., 1] > edge[1] * offset[..., 0]
        sign = torch.where((above & below & left) | (~above & ~below & ~left), -sign, sign)
    return sign * distance.sqrt()


def _star_polygon(points: int, outer: float, inner: float) -> Tensor:
    angle = torch.arange(2 * points) * math.pi / points
    radius = torch.tensor([outer, inner]).repeat(points)
    return torch.stack([radius * angle.sin(), -radius * angle.cos()], 1)


@cache
def shape_atlas() -> Tensor:
    """Signed distances [6, 1, 160, 160] of SHAPES at radius 1, over the square of half-width 1.6."""
    line = (torch.arange(_ATLAS_CELLS) + 0.5) / _ATLAS_CELLS * 2 * _ATLAS_EXTENT - _ATLAS_EXTENT
    y, x = torch.meshgrid(line, line, indexing="ij")
    points, norm = torch.stack([x, y], -1), torch.hypot(x, y)
    half = 0.8
    square = torch.tensor([[-half, -half], [half, -half], [half, half], [-half, half]])
    triangle = _star_polygon(3, 1.12, 0.56)[::2]
    long, arm = 0.98, 0.32
    horizontal, vertical = (torch.tensor([w, h]) for w, h in ((long, arm), (arm, long)))
    # The union of two bars; their exact distance outside is all that anti-aliasing needs.
    bars = [(torch.stack([x, y], -1).abs() - size).amax(-1) for size in (horizontal, vertical)]
    distances = [
        norm - 0.9,
        _polygon_distance(points, square),
        _polygon_distance(points, triangle),
        _polygon_distance(points, _star_polygon(5, 1.12, 0.48)),
        (norm - 0.74).abs() - 0.22,
        torch.minimum(*bars),
    ]
    return torch.stack(distances)[:, None]


@cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    palette = torch.tensor(list(COLOURS.values()), device=device)
    return shape_atlas().to(device), palette, torch.tensor(list(BACKGROUNDS.values()), device=device)


def _uniform(low: float, high: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, device=generator.device, generator=generator) * (high - low) + low


def _displacement(motion: Tensor, height: int, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Total displacement in pixels along x and y, each [B, 2]."""
    shape = tuple(motion.shape)
    share = _uniform(0.28, 0.40, shape, generator)
    dx, dy = torch.zeros_like(share), torch.zeros_like(share)
    for name, (x, y) in _DIRECTIONS.items():
        moving = motion == MOTIONS.index(name)
        dx, dy = dx + moving * x * share * width, dy + moving * y * share * height
    diagonal = (motion == MOTIONS.index("moving diagonally")) * 0.8 * share * min(height, width)
    return (
        dx + diagonal * torch.sign(_uniform(-1, 1, shape, generator)),
        dy + diagonal * torch.sign(_uniform(-1, 1, shape, generator)),
    )


def _motion(scenes: Scenes, height: int, width: int, time: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What happens to objects over the frames: their swelling [B, 2, T] and total displacement [B, 2, 2] in pixels."""
    device = generator.device
    still = torch.ones(len(scenes), 2, len(time), device=device)
    if scenes.language is IMAGES:
        return still, torch.zeros(len(scenes), 2, 2, device=device)
    motion = scenes.trait.to(device)
    growing, shrinking = ((motion == MOTIONS.index(name))[..., None] for name in ("growing", "shrinking"))
    swell = 0.65 + 0.5 * time
    swell = torch.where(growing, swell, torch.where(shrinking, swell.flip(0), still))
    return swell, torch.stack(_displacement(motion, height, width, generator), -1)


def _candidate_centres(scenes: Scenes, generator: torch.Generator) -> Tensor:
    """Centres in [-1, 1] of the free range, [K, B, 2 objects, 2 axes]: random ones, then a grid of them.

    In clips these are anywhere, and every pair of a 3x3 grid; in images around the objects' places, and right there.
    """
    shape, device = (_CANDIDATES, len(scenes), 2, 2), generator.device
    if scenes.language is IMAGES:
        places = torch.tensor(list(PLACES.values()), dtype=torch.float32, device=device)[scenes.trait.to(device)]
        off, near = (_uniform(*bounds, shape, generator) for bounds in (_OFF_MIDDLE, _NEAR_MIDDLE))
        return torch.cat([places * off + (places == 0) * near, places[None]])
    axis = torch.arange(-1.0, 2.0, device=device)
    grid = torch.cartesian_prod(axis, axis, axis, axis).view(-1, 1, 2, 2).expand(-1, len(scenes), -1, -1)
    return torch.cat([_uniform(-1, 1, shape, generator), grid])


def place_objects(scenes: Scenes, height: int, width: int, frames: int, generator: torch.Generator) -> Tracks:
    """Tracks on which no object leaves the frame and two objects never touch, on the generator's device.

    Candidate placements come in order of falling object size, and the first one that keeps the objects apart wins;
    the last candidates, a grid of the smallest objects, always hold one.
    """
    device, side = generator.device, min(height, width)
    batch = len(scenes)
    # Objects grow more slowly than the frame, so that large clips have room and small ones stay legible.
    nominal = _uniform(0.165, 0.225, (batch, 2), generator) * side**0.75 * _REFERENCE_SIDE**0.25
    time = torch.linspace(0, 1, frames, device=device)
    swell, delta = _motion(scenes, height, width, time, generator)

    centres = _candidate_centres(scenes, generator)  # [K, B, 2, 2]
    scale = torch.linspace(1, _SMALLEST_SCALE, _CANDIDATES, device=device)
    scale = torch.cat([scale, scale.new_full((len(centres) - _CANDIDATES,), _SMALLEST_SCALE)])
    radius = nominal[..., None] * swell  # [B, 2, T]
    margin = REACH * scale[:, None, None, None] * radius.amax(-1)[..., None] + delta.abs() / 2 + 1  # [K, B, 2, 2]
    size = torch.tensor([width, height], device=device)
    middle = size / 2 + centres * (size / 2 - margin)
    path = middle[..., None] + delta[..., None] * (time - 0.5)  # [K, B, 2 objects, 2 axes, T]
    distance = (path[:, :, 0] - path[:, :, 1]).norm(dim=2)  # [K, B, T]
    gap = (distance - REACH * scale[:, None, None] * radius.sum(1)).amin(-1)  # [K, B]
    apart = (gap > 0.05 * side) | (scenes.count.to(device) == 1)
    fits = apart & (margin <= size / 2).flatten(2).all(-1)
    first = fits.int().argmax(0)
    chosen = path[first, torch.arange(batch, device=device)]  # [B, 2, 2, T]
    return Tracks(chosen[:, :, 0], chosen[:, :, 1], radius * scale[first][:, None, None])


def _background(scenes: Scenes, height: int, width: int, time: Tensor, generator: torch.Generator) -> Tensor:
    """Drifting textures in their muted colours, [B, 3, T, H, W] in [0, 1]."""
    device, side, batch, frames = generator.device, min(height, width), len(scenes), len(time)
    per_scene = (batch, 1, 1, 1)
    period = _uniform(22, 38, per_scene, generator) * (side / _REFERENCE_SIDE) ** 0.5
    angle = _uniform(-0.9, 0.9, per_scene, generator)
    drift_x, drift_y = (_uniform(-0.08, 0.08, per_scene, generator) * side for _ in range(2))
    when = time.view(1, -1, 1, 1)
    x = (torch.arange(width, device=device) + 0.5) - drift_x * when  # [B, T, 1, W]
    y = (torch.arange(height, device=device) + 0.5)[:, None] - drift_y * when  # [B, T, H, 1]
    wave, edge = 2 * math.pi / period, period / 9
    values = {
        "stripes": (torch.sin((x * angle.cos() + y * angle.sin()) * wave) * edge + 0.5).clamp(0, 1),
        "checks": (torch.sin(x * wave) * torch.sin(y * wave) * edge + 0.5).clamp(0, 1),
        "dots": (((torch.cos(x * wave) + torch.cos(y * wave)) * 0.5 - 0.25) * edge * 1.4 + 0.5).clamp(0, 1),
        "waves": 0.5 + 0.5 * torch.sin(y * wave * 0.8 + 1.6 * torch.sin(x * wave * 0.45)),
        "bars": (torch.sin(y * wave) * edge + 0.5).clamp(0, 1),
    }
    texture = scenes.texture.to(device).view(per_scene)
    pattern = torch.zeros(batch, frames, height, width, device=device)
    for index, name in enumerate(TEXTURES):
        pattern = torch.where(texture == index, values[name], pattern)
    colour = _constants(device)[2][scenes.background.to(device)].view(batch, 3, 1, 1, 1)
    return colour * (0.74 + 0.52 * pattern)[:, None]


def draw_objects(canvas: Tensor, scenes: Scenes, tracks: Tracks) -> Tensor:
    """The canvas [B, 3, T, H, W] in [0, 1] with the shown objects painted on it."""
    batch, _, frames, height, width = canvas.shape
    device = canvas.device
    atlas, palette, _ = _constants(device)
    x = (torch.arange(width, device=device) + 0.5).view(1, 1, 1, width)
    y = (torch.arange(height, device=device) + 0.5).view(1, 1, height, 1)
    shape, colour, count = (index.to(device) for index in (scenes.shape, scenes.colour, scenes.count))
    for slot in range(2):
        centre_x, centre_y, radius = (
            track[:, slot].view(batch, frames, 1, 1) for track in (tracks.x, tracks.y, tracks.radius)
        )
        where = torch.stack(torch.broadcast_tensors((x - centre_x) / radius, (y - centre_y) / radius), -1)
        where = where.reshape(batch, frames * height, width, 2) / _ATLAS_EXTENT
        distance = F.grid_sample(atlas[shape[:, slot]], where, padding_mode="border", align_corners=False)
        cover = (0.5 - distance.view(batch, frames, height, width) * radius).clamp(0, 1)
        cover = cover * (count > slot).view(batch, 1, 1, 1)
        canvas = torch.lerp(canvas, palette[colour[:, slot]].view(batch, 3, 1, 1, 1), cover[:, None])
    return canvas


def render(scenes: Scenes, height: int, width: int, frames: int, generator: torch.Generator) -> Tensor:
    """Clips [B, 3, T, H, W] in [-1, 1] on the generator's device; the generator draws sizes, places and drifts."""
    time = torch.linspace(0, 1, frames, device=generator.device)
    tracks = place_objects(scenes, height, width, frames, generator)
    canvas = _background(scenes, height, width, time, generator)
    return draw_objects(canvas, scenes, tracks) * 2 - 1
