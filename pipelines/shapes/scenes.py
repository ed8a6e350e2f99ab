"""What a scene contains, and the captions that say so.

A scene holds one or two objects, each a (colour, shape, motion) triple, over a textured background.  One eighth of
the 384 triples is held out: a rendered training clip never shows them, so prompts that use them test composition.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

import torch
from torch import Tensor

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.92, 0.15, 0.15),
    "green": (0.15, 0.80, 0.25),
    "blue": (0.20, 0.35, 0.98),
    "yellow": (0.97, 0.88, 0.15),
    "pink": (0.98, 0.35, 0.75),
    "cyan": (0.20, 0.88, 0.92),
    "orange": (0.98, 0.55, 0.10),
    "white": (0.97, 0.97, 0.97),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
MOTIONS = (
    "moving left",
    "moving right",
    "moving up",
    "moving down",
    "moving diagonally",
    "growing",
    "shrinking",
    "resting",
)
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "gray": (0.36, 0.36, 0.38),
    "navy": (0.10, 0.13, 0.30),
    "olive": (0.33, 0.34, 0.14),
    "brown": (0.33, 0.22, 0.14),
    "plum": (0.30, 0.14, 0.32),
    "teal": (0.10, 0.32, 0.33),
    "maroon": (0.35, 0.09, 0.13),
    "slate": (0.22, 0.28, 0.36),
}
TEXTURES = ("stripes", "checks", "dots", "waves", "bars")

COLOUR_NAMES = tuple(COLOURS)
BACKGROUND_NAMES = tuple(BACKGROUNDS)
WORDS = tuple(
    dict.fromkeys(
        ("a", "an", "and", "over", *COLOUR_NAMES, *SHAPES, *" ".join(MOTIONS).split(), *BACKGROUND_NAMES, *TEXTURES)
    )
)


@dataclass(frozen=True)
class SceneObject:
    """One object of a caption or of a clip, by the names that captions use."""

    colour: str
    shape: str
    motion: str


@dataclass(frozen=True)
class Scenes:
    """A batch of B scenes as CPU index tensors; the second object of a scene with ``count`` 1 is not shown."""

    count: Tensor  # [B], 1 or 2
    colour: Tensor  # [B, 2] into COLOUR_NAMES
    shape: Tensor  # [B, 2] into SHAPES
    motion: Tensor  # [B, 2] into MOTIONS
    background: Tensor  # [B] into BACKGROUND_NAMES
    texture: Tensor  # [B] into TEXTURES

    def __len__(self) -> int:
        return len(self.count)

    def __getitem__(self, index: slice | Tensor) -> Scenes:
        return Scenes(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    def objects(self) -> list[tuple[SceneObject, ...]]:
        """The shown objects of every scene, in caption order."""
        columns = (self.count, self.colour, self.shape, self.motion)
        return [
            tuple(
                SceneObject(COLOUR_NAMES[colours[slot]], SHAPES[shapes[slot]], MOTIONS[motions[slot]])
                for slot in range(count)
            )
            for count, colours, shapes, motions in zip(*(column.tolist() for column in columns), strict=True)
        ]


def is_held_out(colour: Tensor, shape: Tensor, motion: Tensor) -> Tensor:
    """True where a (colour, shape, motion) triple is kept out of training; exactly one colour per shape and motion."""
    return (colour + 2 * shape + 3 * motion) % len(COLOUR_NAMES) == 5


def sample_scenes(batch: int, two_objects: float, generator: torch.Generator) -> Scenes:
    """Random training scenes.

    Args:
        batch: number of scenes.
        two_objects: probability that a scene shows two objects, of different colours.
        generator: a CPU generator.
    """

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape or (batch,), generator=generator)

    first = draw(len(COLOUR_NAMES))
    second = (first + 1 + draw(len(COLOUR_NAMES) - 1)) % len(COLOUR_NAMES)
    colour = torch.stack([first, second], 1)
    shape, motion = draw(len(SHAPES), batch, 2), draw(len(MOTIONS), batch, 2)
    # The next motion of a held-out triple is never held out, because 3 is not a multiple of 8.
    motion = (motion + is_held_out(colour, shape, motion)) % len(MOTIONS)
    count = 1 + (torch.rand(batch, generator=generator) < two_objects).long()
    return Scenes(count, colour, shape, motion, draw(len(BACKGROUND_NAMES)), draw(len(TEXTURES)))


def held_out_scenes(batch: int, objects: int, seed: int = 0) -> Scenes:
    """Test scenes whose shown triples are all held out, cycling through the 48 of them over varied backgrounds.

    Args:
        batch: number of scenes.
        objects: 1 or 2 objects in every scene; two are of different colours.
        seed: orders the triples and draws the backgrounds.

    Raises:
        ValueError: when objects is neither 1 nor 2.
    """
    if objects not in (1, 2):
        raise ValueError(f"a scene shows 1 or 2 objects, got objects={objects}: ask for one of these")
    grid = torch.cartesian_prod(*(torch.arange(len(names)) for names in (COLOUR_NAMES, SHAPES, MOTIONS)))
    triples = grid[is_held_out(*grid.unbind(1))]
    generator = torch.Generator().manual_seed(seed)
    triples = triples[torch.randperm(len(triples), generator=generator)]
    first = torch.arange(batch) % len(triples)
    # Each further cycle pairs the triples anew; a step that meets the same colour goes on to the next triple.
    second = (first + 7 + 5 * (torch.arange(batch) // len(triples))) % len(triples)
    for _ in triples:
        same = triples[first, 0] == triples[second, 0]
        second = (second + same) % len(triples)
    colour, shape, motion = torch.stack([triples[first], triples[second]], 1).unbind(2)
    background = torch.randint(len(BACKGROUND_NAMES), (batch,), generator=generator)
    texture = torch.randint(len(TEXTURES), (batch,), generator=generator)
    return Scenes(torch.full((batch,), objects), colour, shape, motion, background, texture)


def caption(objects: tuple[SceneObject, ...], background: str, texture: str) -> str:
    """For example "a red circle moving left and an orange star growing over navy stripes"."""
    phrases = [f"{'an' if o.colour == 'orange' else 'a'} {o.colour} {o.shape} {o.motion}" for o in objects]
    return f"{' and '.join(phrases)} over {background} {texture}"


def captions(scenes: Scenes) -> list[str]:
    """One caption per scene."""
    rows = zip(scenes.objects(), scenes.background.tolist(), scenes.texture.tolist(), strict=True)
    return [caption(objects, BACKGROUND_NAMES[background], TEXTURES[texture]) for objects, background, texture in rows]


_OBJECT = re.compile(rf"an? ({'|'.join(COLOUR_NAMES)}) ({'|'.join(SHAPES)}) ({'|'.join(MOTIONS)})")
_BACKGROUND = re.compile(rf"({'|'.join(BACKGROUND_NAMES)}) ({'|'.join(TEXTURES)})")


def parse_caption(text: str) -> tuple[SceneObject, ...]:
    """The objects that a caption asks for.

    Raises:
        ValueError: one sentence, when a word is unknown or the words do not form a caption.
    """
    words = text.lower().replace(",", " ").rstrip(". ").split()
    unknown = [word for word in words if word not in WORDS]
    if unknown:
        raise ValueError(f"the caption {text!r} has the unknown word {unknown[0]!r}: use {', '.join(WORDS)}")
    objects_text, _, background = " ".join(words).partition(" over ")
    matches = [_OBJECT.fullmatch(phrase) for phrase in objects_text.split(" and ")]
    objects = tuple(SceneObject(*match.groups()) for match in matches if match)
    distinct = len({o.colour for o in objects}) == len(objects)
    if len(objects) != len(matches) or len(matches) > 2 or not distinct or not _BACKGROUND.fullmatch(background):
        raise ValueError(
            f"the caption {text!r} does not describe one or two objects of different colours over a background: "
            "write it like 'a red circle moving left and a blue star growing over navy stripes'"
        )
    return objects
