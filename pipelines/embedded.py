"""The models that ship with the package, by the name that commands call them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from dit_accel.pipelines import shapes, shapes_image
from dit_accel.pipelines.shapes.scenes import CLIPS, IMAGES, Language


@dataclass(frozen=True)
class Call:
    """What a pipeline's call takes besides prompt, size, steps and seed.

    Args:
        guidance: the name that it has for the guidance scale.
        arguments: the same in every call; a text is meant for each prompt.
    """

    guidance: str = "guidance_scale"
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def of(self, guidance: float, prompts: int) -> dict[str, Any]:
        """The arguments of a call with a list of so many prompts."""
        each = {name: [value] * prompts for name, value in self.arguments.items() if isinstance(value, str)}
        return {self.guidance: guidance, **self.arguments, **each}


@dataclass(frozen=True)
class Embedded:
    """One packaged pipeline.

    Args:
        package: name of its package below ``dit_accel.pipelines``.
        prompts: examples; the first one is the default.
        language: of its captions; a verifier reads what it makes.
        call: how it is called.
    """

    package: str
    prompts: tuple[str, ...]
    language: Language
    call: Call

    def load(self, *arguments: Any) -> Any:
        """The pipeline in a dtype and on a device."""
        return import_module(f"dit_accel.pipelines.{self.package}").load(*arguments)


EMBEDDED: dict[str, Embedded] = {
    "shapes": Embedded(
        "shapes",
        shapes.EXAMPLE_PROMPTS,
        CLIPS,
        Call(arguments={"max_sequence_length": shapes.DEFAULT_TEXT_LENGTH}),
    ),
    "shapes-image": Embedded(
        "shapes_image",
        shapes_image.EXAMPLE_PROMPTS,
        IMAGES,
        Call("true_cfg_scale", {"negative_prompt": "", "max_sequence_length": shapes_image.DEFAULT_TEXT_LENGTH}),
    ),
}
