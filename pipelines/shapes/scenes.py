"""What a scene contains, and the captions that say so.

A scene holds one or two objects over a textured background.  An object is a (colour, shape, trait) triple; its trait is
a motion in a clip and a place in an image.  One eighth of the 384 triples is held out: nothing rendered for training
shows them, so prompts that use them test composition.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

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
PLACES: dict[str, tuple[int, int]] = {  # around the middle: right (1) or left (-1) of it, below (1) or above (-1)
    "at the left": (-1, 0),
    "at the top left": (-1, -1),
    "at the top": (0, -1),
    "at the top right": (1, -1),
    "at the right": (1, 0),
    "at the bottom right": (1, 1),
    "at the bottom": (0, 1),
    "at the bottom left": (-1, 1),
}
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


@dataclass(frozen=True)
class Language:
    """What captions of one kind of picture say.

    Args:
        trait: what they say of an object besides its colour and shape, "motion" or "place".
        traits: the eight phrases that say it.
        apart: how far two objects' traits are apart at least, as positions in the cycle of ``traits``.
        example: a caption.
    """

    trait: str
    traits: tuple[str, ...]
    apart: int
    example: str

    @property
    def words(self) -> tuple[str, ...]:
        """Every word of the captions."""
        traits = " ".join(self.traits).split()
        groups = (("a", "an", "and", "over"), COLOUR_NAMES, SHAPES, traits, BACKGROUND_NAMES, TEXTURES)
        return tuple(dict.fromkeys(word for group in groups for word in group))


CLIPS = Language("motion", MOTIONS, 0, "a red circle moving left and a blue star growing over navy stripes")
# Objects at neighbouring places would have to be small to keep apart.
IMAGES = Language(
    "place", tuple(PLACES), 2, "a red circle at the left and a blue star at the top right over navy stripes"
)


@dataclass(frozen=True)
class SceneObject:
    """One object of a caption or of a picture, by the names that captions use."""

    colour: str
    shape: str
    trait: str


@dataclass(frozen=True)
class Scenes:
    """A batch of B scenes as CPU index tensors; the second object of a scene with ``count`` 1 is not shown."""

    count: Tensor  # [B], 1 or 2
    colour: Tensor  # [B, 2] into COLOUR_NAMES
    shape: Tensor  # [B, 2] into SHAPES
    trait: Tensor  # [B, 2] into the language's traits
    background: Tensor  # [B] into BACKGROUND_NAMES
    texture: Tensor  # [B] into TEXTURES
    language: Language = CLIPS

    def __len__(self) -> int:
        return len(self.count)

    def __getitem__(self, index: slice | Tensor) -> Scenes:
        picked: dict[str, Any] = {name: value[index] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **picked)

    def objects(self) -> list[tuple[SceneObject, ...]]:
        """The shown objects of every scene, in caption order."""
        columns = (self.count, self.colour, self.shape, self.trait)
        names = self.language.traits
        return [
            tuple(
                SceneObject(COLOUR_NAMES[colours[slot]], SHAPES[shapes[slot]], names[traits[slot]])
                for slot in range(count)
            )
            for count, colours, shapes, traits in zip(*(column.tolist() for column in columns), strict=True)
        ]


def is_held_out(colour: Tensor, shape: Tensor, trait: Tensor) -> Tensor:
    """True where a (colour, shape, trait) triple is kept out of training; exactly one colour per shape and trait."""
    return (colour + 2 * shape + 3 * trait) % len(COLOUR_NAMES) == 5


def sample_scenes(batch: int, two_objects: float, generator: torch.Generator, language: Language = CLIPS) -> Scenes:
    """Random training scenes.

    Args:
        batch: number of scenes.
        two_objects: probability that a scene shows two objects, of different colours.
        generator: a CPU generator.
        language: of clips or of images.
    """

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape or (batch,), generator=generator)

    first = draw(len(COLOUR_NAMES))
    second = (first + 1 + draw(len(COLOUR_NAMES) - 1)) % len(COLOUR_NAMES)
    colour = torch.stack([first, second], 1)
    traits, apart = len(language.traits), language.apart
    shape, trait = draw(len(SHAPES), batch, 2), draw(traits, batch, 2)
    if apart:
        trait[:, 1] = (trait[:, 0] + apart + draw(traits - 2 * apart + 1)) % traits
    # The next shape of a held-out triple is never held out: it counts 2 more, or 10 less, and neither is 0 modulo 8.
    shape = (shape + is_held_out(colour, shape, trait)) % len(SHAPES)
    count = 1 + (torch.rand(batch, generator=generator) < two_objects).long()
    return Scenes(count, colour, shape, trait, draw(len(BACKGROUND_NAMES)), draw(len(TEXTURES)), language)


def held_out_scenes(batch: int, objects: int, seed: int = 0, language: Language = CLIPS) -> Scenes:
    """Test scenes whose shown triples are all held out, cycling through the 48 of them over varied backgrounds.

    Args:
        batch: number of scenes.
        objects: 1 or 2 objects in every scene; two are of different colours.
        seed: orders the triples and draws the backgrounds.
        language: of clips or of images.

    Raises:
        ValueError: when objects is neither 1 nor 2.
    """
    if objects not in (1, 2):
        raise ValueError(f"a scene shows 1 or 2 objects, got objects={objects}: ask for one of these")
    traits = len(language.traits)
    grid = torch.cartesian_prod(*(torch.arange(size) for size in (len(COLOUR_NAMES), len(SHAPES), traits)))
    triples = grid[is_held_out(*grid.unbind(1))]
    generator = torch.Generator().manual_seed(seed)
    triples = triples[torch.randperm(len(triples), generator=generator)]
    first = torch.arange(batch) % len(triples)
    # Each further cycle pairs the triples anew; a step that meets one that cannot stand beside it goes on to the next.
    second = (first + 7 + 5 * (torch.arange(batch) // len(triples))) % len(triples)
    for _ in triples:
        way = (triples[first, 2] - triples[second, 2]) % traits
        near = torch.minimum(way, traits - way) < language.apart
        second = (second + ((triples[first, 0] == triples[second, 0]) | near)) % len(triples)
    colour, shape, trait = torch.stack([triples[first], triples[second]], 1).unbind(2)
    background = torch.randint(len(BACKGROUND_NAMES), (batch,), generator=generator)
    texture = torch.randint(len(TEXTURES), (batch,), generator=generator)
    return Scenes(torch.full((batch,), objects), colour, shape, trait, background, texture, language)


def caption(objects: tuple[SceneObject, ...], background: str, texture: str) -> str:
    """For example "a red circle moving left and an orange star growing over navy stripes"."""
    phrases = [f"{'an' if o.colour == 'orange' else 'a'} {o.colour} {o.shape} {o.trait}" for o in objects]
    return f"{' and '.join(phrases)} over {background} {texture}"


def captions(scenes: Scenes) -> list[str]:
    """One caption per scene."""
    rows = zip(scenes.objects(), scenes.background.tolist(), scenes.texture.tolist(), strict=True)
    return [caption(objects, BACKGROUND_NAMES[background], TEXTURES[texture]) for objects, background, texture in rows]


@cache
def _object_phrase(language: Language) -> re.Pattern[str]:
    return re.compile(rf"an? ({'|'.join(COLOUR_NAMES)}) ({'|'.join(SHAPES)}) ({'|'.join(language.traits)})")


_BACKGROUND = re.compile(rf"({'|'.join(BACKGROUND_NAMES)}) ({'|'.join(TEXTURES)})")


def parse_caption(text: str, language: Language = CLIPS) -> tuple[SceneObject, ...]:
    """The objects that a caption asks for.

    Raises:
        ValueError: one sentence, when a word is unknown or the words do not form a caption.
    """
    words = text.lower().replace(",", " ").rstrip(". ").split()
    unknown = [word for word in words if word not in language.words]
    if unknown:
        raise ValueError(f"the caption {text!r} has the unknown word {unknown[0]!r}: use {', '.join(language.words)}")
    objects_text, _, background = " ".join(words).partition(" over ")
    matches = [_object_phrase(language).fullmatch(phrase) for phrase in objects_text.split(" and ")]
    objects = tuple(SceneObject(*match.groups()) for match in matches if match)
    distinct = len({o.colour for o in objects}) == len(objects)
    if len(objects) != len(matches) or len(matches) > 2 or not distinct or not _BACKGROUND.fullmatch(background):
        raise ValueError(
            f"the caption {text!r} does not describe one or two objects of different colours over a background: "
            f"write it like {language.example!r}"
        )
    return objects
