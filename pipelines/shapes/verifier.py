"""Reads a picture back into the objects it shows, without being told the prompt, and scores it against a caption.

Pixels near a palette colour form connected components in every frame.  The largest component of a colour is its
object: its shape is the template it overlaps best over several frames, its motion follows from its centre and area,
in an image its place from its centre.  Other components of notable size are duplicates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F

from dit_accel.pipelines.shapes.render import shape_atlas
from dit_accel.pipelines.shapes.scenes import (
    CLIPS,
    COLOUR_NAMES,
    COLOURS,
    IMAGES,
    PLACES,
    SHAPES,
    Language,
    parse_caption,
)

Array = npt.NDArray[Any]

_COLOUR_DISTANCE = 0.27  # in RGB of [0, 1]: halfway between the closest pair of palette colours
_COLOUR_BITS = 5
_MINIMUM_AREA = 0.0035  # of the frame, for a component to be notable
_MINIMUM_FRAGMENT = 0.12  # of the object's area, for a second component of its colour to be a duplicate
_VISIBLE_SHARE = 0.75  # of the frames, for a colour to be an object
_STRAY_SHARE = 0.10  # of the frames, for anything notable that is not an object to spoil the clip
_TEMPLATE_CELLS = 32
_SHAPE_FRAMES = 8
_MINIMUM_OVERLAP = 0.60  # intersection over union with the best template
_AREA_RATIO = 1.6  # last to first, for growing
_STILL = 0.10  # of the short side: the net displacement of an object that does not travel
_DIAGONAL = (24.0, 66.0)  # degrees from the horizontal
_MIDDLE = 0.11  # of the frame's width or height: an object whose centre is within is at neither of its ends


@dataclass(frozen=True)
class SeenObject:
    """An object read from a picture; a shape or trait that fits no word is None."""

    colour: str
    shape: str | None
    trait: str | None
    duplicated: bool


@dataclass(frozen=True)
class ClipReading:
    """Everything notable in a clip: objects by falling area, and colours that flash up without being an object."""

    objects: tuple[SeenObject, ...]
    stray_colours: tuple[str, ...]


@dataclass(frozen=True)
class ClipScore:
    """How a clip agrees with its caption.

    ``wanted`` objects were asked for; of these ``colours`` are there, ``shapes`` and ``traits`` count those with the
    right shape and trait, ``objects`` those with everything right.  ``extra`` counts what was not asked for: other
    colours and duplicates.
    """

    wanted: int
    colours: int
    shapes: int
    traits: int
    objects: int
    extra: int
    reading: ClipReading

    @property
    def correct(self) -> bool:
        """Every wanted object is right and there is nothing else."""
        return self.objects == self.wanted and self.extra == 0


@dataclass(frozen=True)
class _Components:
    """Connected components of one colour in one frame each, as parallel arrays."""

    frame: Array
    colour: Array
    area: Array
    x: Array  # centroid
    y: Array
    box: Array  # [N, 4]: left, top, right, bottom, the last two exclusive


@cache
def _colour_table() -> Array:
    """Index into COLOUR_NAMES, or -1, of every RGB cell with 5 bits a channel."""
    levels = (np.arange(1 << _COLOUR_BITS) + 0.5) / (1 << _COLOUR_BITS)
    cells = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 1, 3)
    distance = np.linalg.norm(cells - np.array(list(COLOURS.values())), axis=-1)
    return np.where(distance.min(1) < _COLOUR_DISTANCE, distance.argmin(1), -1).astype(np.int8)


@cache
def _templates() -> Array:
    """Masks [6, 32, 32] of SHAPES, each stretched to its bounding box."""
    fine = F.interpolate(shape_atlas(), scale_factor=4, mode="bilinear")[:, 0].numpy() < 0
    return np.stack([_stretch(mask) for mask in fine])


def _stretch(mask: Array) -> Array:
    """The bounding box of a mask, sampled on 32x32 cell centres."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    steps = (np.arange(_TEMPLATE_CELLS) + 0.5) / _TEMPLATE_CELLS
    y = (rows[0] + steps * (rows[-1] + 1 - rows[0])).astype(int)
    x = (columns[0] + steps * (columns[-1] + 1 - columns[0])).astype(int)
    return mask[np.ix_(y, x)]


def _as_bytes(clip: Any) -> Array:
    frames = np.asarray(clip)
    if frames.ndim != 4 or frames.shape[3] != 3:
        raise ValueError(f"a clip must have the shape [frames, height, width, 3], got {list(frames.shape)}: permute it")
    if frames.dtype == np.uint8:
        return frames
    frames = frames.astype(np.float32)
    if not (frames.min() >= -1e-3 and frames.max() <= 1 + 1e-3):
        raise ValueError(
            f"a float clip must lie in [0, 1], got [{frames.min():.3g}, {frames.max():.3g}]: "
            "pass (clip + 1) / 2 for values in [-1, 1]"
        )
    result: Array = (frames.clip(0, 1) * 255 + 0.5).astype(np.uint8)
    return result


def _classify(frames: Array) -> Array:
    """Palette labels [T, H, W] of a byte clip, -1 for the background."""
    cells = (frames >> (8 - _COLOUR_BITS)).astype(np.int32)
    index = (cells[..., 0] << 2 * _COLOUR_BITS) | (cells[..., 1] << _COLOUR_BITS) | cells[..., 2]
    labels: Array = _colour_table()[index]
    return labels


def _core(labels: Array) -> Array:
    """Pixels whose four neighbours carry their label: blended edges, a pixel or two thin, have none."""
    core = labels >= 0
    core[:, 1:] &= labels[:, 1:] == labels[:, :-1]
    core[:, :-1] &= labels[:, :-1] == labels[:, 1:]
    core[:, :, 1:] &= labels[:, :, 1:] == labels[:, :, :-1]
    core[:, :, :-1] &= labels[:, :, :-1] == labels[:, :, 1:]
    return core


def _joined_runs(frame: Array, row: Array, first: Array, last: Array, label: Array, width: int) -> Array:
    """The component number of every horizontal run; runs of one label join where they touch, diagonally too.

    Runs come sorted by flat position, ``first`` and ``last`` (exclusive) are flat positions, ``width`` the row length.
    """
    low = np.searchsorted(last, first + width - 1, side="right")
    high = np.searchsorted(first, last + width, side="right")
    count = high - low
    upper = np.repeat(np.arange(len(first)), count)
    lower = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count) + np.repeat(low, count)
    joined = (label[upper] == label[lower]) & (frame[upper] == frame[lower]) & (row[lower] == row[upper] + 1)
    upper, lower = upper[joined], lower[joined]
    root = np.arange(len(first))
    while True:
        smallest = np.minimum(root[upper], root[lower])
        previous = root.copy()
        for end in (upper, lower):
            np.minimum.at(root, previous[end], smallest)
            np.minimum.at(root, end, smallest)
        root = root[root]
        if np.array_equal(root, previous):
            return np.unique(root, return_inverse=True)[1]


def _components(labels: Array) -> _Components:
    """All components with a core and a notable area."""
    _, height, width = labels.shape
    flat, core = labels.ravel(), _core(labels).ravel()
    starts = np.ones(flat.size, bool)
    starts[1:] = flat[1:] != flat[:-1]
    starts[::width] = True
    first = np.flatnonzero(starts)
    last = np.append(first[1:], flat.size)
    shown = flat[first] >= 0
    first, last = first[shown], last[shown]
    core_sum = np.append(0, core.cumsum())
    frame, row = first // (height * width), first // width % height
    column, length = first % width, last - first
    number = _joined_runs(frame, row, first, last, flat[first], width)
    total = int(number.max()) + 1 if number.size else 0

    def add(values: Array) -> Array:
        return np.bincount(number, values, total)

    area, cores = add(length), add(core_sum[last] - core_sum[first])
    box = np.tile([width, height, 0, 0], (total, 1))
    np.minimum.at(box[:, 0], number, column)
    np.minimum.at(box[:, 1], number, row)
    np.maximum.at(box[:, 2], number, column + length)
    np.maximum.at(box[:, 3], number, row + 1)
    x, y = add(length * (column + (length - 1) / 2)) / area, add(length * row) / area
    one_frame, one_colour = np.zeros(total, int), np.zeros(total, int)
    one_frame[number], one_colour[number] = frame, flat[first]
    keep = (area >= _MINIMUM_AREA * height * width) & (cores >= 0.2 * area)
    return _Components(one_frame[keep], one_colour[keep], area[keep], x[keep], y[keep], box[keep])


def _read_shape(labels: Array, found: _Components, largest: Array, colour: int) -> str | None:
    overlap = np.zeros(len(SHAPES))
    picks = largest[np.linspace(0, len(largest) - 1, _SHAPE_FRAMES).round().astype(int)]
    for pick in picks:
        left, top, right, bottom = found.box[pick]
        mask = _stretch(labels[found.frame[pick], top:bottom, left:right] == colour)
        overlap += (mask & _templates()).sum((1, 2)) / (mask | _templates()).sum((1, 2))
    best = int(overlap.argmax())
    return SHAPES[best] if overlap[best] >= _MINIMUM_OVERLAP * _SHAPE_FRAMES else None


def _read_motion(found: _Components, largest: Array, side: int) -> str | None:
    x, y, area = found.x[largest], found.y[largest], found.area[largest]
    ends = max(1, len(largest) // 6)
    dx, dy = (float(track[-ends:].mean() - track[:ends].mean()) / side for track in (x, y))
    ratio = float(area[-ends:].mean() / area[:ends].mean())
    distance = math.hypot(dx, dy)
    if distance < _STILL:
        if 1 / _AREA_RATIO < ratio < _AREA_RATIO:
            return "resting"
        return "growing" if ratio > 1 else "shrinking"
    if not 1 / _AREA_RATIO < ratio < _AREA_RATIO:
        return None
    angle = math.degrees(math.atan2(abs(dy), abs(dx)))
    if angle <= _DIAGONAL[0]:
        return "moving right" if dx > 0 else "moving left"
    if angle >= _DIAGONAL[1]:
        return "moving down" if dy > 0 else "moving up"
    return "moving diagonally"


def _read_place(found: _Components, largest: Array, height: int, width: int) -> str | None:
    along = (found.x[largest].mean() + 0.5) / width - 0.5, (found.y[largest].mean() + 0.5) / height - 0.5
    sides = tuple(0 if abs(value) < _MIDDLE else round(math.copysign(1, value)) for value in along)
    return next((place for place, where in PLACES.items() if where == sides), None)


def read_clip(clip: Any, language: Language = CLIPS) -> ClipReading:
    """What a clip shows.

    Args:
        clip: array or CPU tensor [T, H, W, 3], uint8 or float in [0, 1] (what ``output_type="np"`` returns per clip).
        language: ``IMAGES`` reads places, of the one frame or the mean of them.

    Raises:
        ValueError: on another shape or range.
    """
    labels = _classify(_as_bytes(clip))
    frames, height, width = labels.shape
    found = _components(labels)
    seen: list[tuple[float, SeenObject]] = []
    stray: list[str] = []
    for colour, name in enumerate(COLOUR_NAMES):
        own = np.flatnonzero(found.colour == colour)
        own = own[np.lexsort((-found.area[own], found.frame[own]))]
        visible, first = np.unique(found.frame[own], return_index=True)
        largest = own[first]
        if len(visible) < _VISIBLE_SHARE * frames:
            if len(visible) > _STRAY_SHARE * frames:
                stray.append(name)
            continue
        area_in_frame = np.zeros(frames)
        area_in_frame[visible] = found.area[largest]
        others = np.setdiff1d(own, largest)
        notable = others[found.area[others] >= _MINIMUM_FRAGMENT * area_in_frame[found.frame[others]]]
        seen.append(
            (
                float(found.area[largest].mean()),
                SeenObject(
                    colour=name,
                    shape=_read_shape(labels, found, largest, colour),
                    trait=_read_place(found, largest, height, width)
                    if language is IMAGES
                    else _read_motion(found, largest, min(height, width)),
                    duplicated=len(np.unique(found.frame[notable])) > _STRAY_SHARE * frames,
                ),
            )
        )
    seen.sort(key=lambda pair: -pair[0])
    return ClipReading(tuple(item for _, item in seen), tuple(stray))


def score_clip(clip: Any, caption: str, language: Language = CLIPS) -> ClipScore:
    """Reads a clip and compares it with a caption.

    Args:
        clip, language: as in ``read_clip``.
        caption: a caption that ``parse_caption`` understands.

    Raises:
        ValueError: when the clip or the caption cannot be read.
    """
    wanted = parse_caption(caption, language)
    reading = read_clip(clip, language)
    by_colour = {item.colour: item for item in reading.objects}
    pairs = [(want, by_colour[want.colour]) for want in wanted if want.colour in by_colour]
    shapes = [want.shape == seen.shape for want, seen in pairs]
    traits = [want.trait == seen.trait for want, seen in pairs]
    colours = {want.colour for want in wanted}
    duplicates = sum(item.duplicated for item in reading.objects if item.colour in colours)
    unwanted = len({item.colour for item in reading.objects} - colours) + len(set(reading.stray_colours) - colours)
    return ClipScore(
        wanted=len(wanted),
        colours=len(pairs),
        shapes=sum(shapes),
        traits=sum(traits),
        objects=sum(shape and trait for shape, trait in zip(shapes, traits, strict=True)),
        extra=duplicates + unwanted,
        reading=reading,
    )
