"""Settings of methods for models, named after where they were published or chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dit_accel.methods import make_method
from dit_accel.methods.base import AttnMethod


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One method's options for one model, and the run they were published for.

    Args:
        source: who published them.
        height, width, num_frames, steps: the run.
        options: the method's options; ``start_percent`` is dense steps / steps.
    """

    source: str
    height: int
    width: int
    num_frames: int
    steps: int
    options: Mapping[str, Any] = field(default_factory=dict)


_RADIAL = {"tile_rule": "strict", "first_distance": "full"}

_SHAPES = {"height": 192, "width": 256, "num_frames": 25, "steps": 16}
_SHAPES_IMAGE = {"height": 512, "width": 512, "num_frames": 1, "steps": 16}

PRESETS: dict[tuple[str, str], Preset] = {
    ("shapes", "radial"): Preset(
        source="chosen here on the embedded pipeline",
        **_SHAPES,
        options={"density": 0.35, "start_percent": 4 / 16},
    ),
    ("shapes", "neighborhood"): Preset(
        source="chosen here on the embedded pipeline",
        **_SHAPES,
        options={"window": (-1, 16, 16), "stride": (1, 8, 8), "start_percent": 6 / 16},
    ),
    ("shapes", "grat"): Preset(
        source="chosen here on the embedded pipeline",
        **_SHAPES,
        options={"pattern": "B", "group": (2, 8, 8), "start_percent": 4 / 16},
    ),
    ("shapes", "sliding_tile"): Preset(
        source="chosen here on the embedded pipeline",
        **_SHAPES,
        options={"tile": (7, 4, 4), "window": (1, 3, 5), "start_percent": 4 / 16},
    ),
    ("shapes", "attention_tile"): Preset(
        source="chosen here on the embedded pipeline",
        **_SHAPES,
        options={"reference_frames": 1, "start_percent": 4 / 16},
    ),
    ("shapes", "clear"): Preset(
        source="chosen here on the embedded pipeline",
        **_SHAPES,
        options={"density": 0.35, "start_percent": 4 / 16},
    ),
    ("shapes", "draft"): Preset(
        source="chosen here on the embedded pipeline",
        **_SHAPES,
        options={"region": (1, 8, 8), "same_frame": True, "density": 0.35, "start_percent": 4 / 16},
    ),
    ("shapes", "log_linear"): Preset(
        source="chosen here on the embedded pipeline",
        **_SHAPES,
        options={"density": 0.2, "start_percent": 4 / 16},
    ),
    ("shapes", "pyramid"): Preset(
        source="chosen here on the embedded pipeline",
        **_SHAPES,
        options={"density": 0.35, "start_percent": 4 / 16},
    ),
    ("shapes", "dit_fast_attn"): Preset(
        source="what dit-accel tune found here on two cores, in every block",
        **_SHAPES,
        options={"every": 2, "between": "reuse", "start_percent": 5 / 16},
    ),
    ("shapes-image", "neighborhood"): Preset(
        source="chosen here for the embedded pipeline of images",
        **_SHAPES_IMAGE,
        options={"window": (1, 24, 24), "stride": (1, 8, 8), "start_percent": 4 / 16},
    ),
    ("shapes-image", "grat"): Preset(
        source="chosen here for the embedded pipeline of images",
        **_SHAPES_IMAGE,
        options={"pattern": "B", "group": (1, 8, 8), "start_percent": 4 / 16},
    ),
    ("shapes-image", "clear"): Preset(
        source="chosen here for the embedded pipeline of images",
        **_SHAPES_IMAGE,
        options={"density": 0.35, "start_percent": 4 / 16},
    ),
    ("shapes-image", "draft"): Preset(
        source="chosen here for the embedded pipeline of images",
        **_SHAPES_IMAGE,
        options={"region": (1, 8, 8), "density": 0.35, "start_percent": 4 / 16},
    ),
    ("shapes-image", "log_linear"): Preset(
        source="chosen here for the embedded pipeline of images",
        **_SHAPES_IMAGE,
        options={"density": 0.2, "start_percent": 4 / 16},
    ),
    ("shapes-image", "dit_fast_attn"): Preset(
        source="chosen here for the embedded pipeline of images",
        **_SHAPES_IMAGE,
        options={"every": 2, "between": "reuse", "start_percent": 5 / 16},
    ),
    ("shapes-image", "pyramid"): Preset(
        source="chosen here for the embedded pipeline of images",
        **_SHAPES_IMAGE,
        options={"density": 0.35, "start_percent": 4 / 16},
    ),
    ("wan2.1-14b", "radial"): Preset(
        source="radial-attention scripts, Wan2.1-14B",
        height=768,
        width=1280,
        num_frames=69,
        steps=50,
        options=_RADIAL | {"decay": 0.2, "dense_blocks": 1, "start_percent": 12 / 50},
    ),
    ("wan2.2-a14b", "radial"): Preset(
        source="radial-attention scripts, Wan2.2-A14B",
        height=768,
        width=1280,
        num_frames=77,
        steps=40,
        options=_RADIAL | {"decay": 0.8, "tile": 64, "dense_blocks": 1, "start_percent": 11 / 40},
    ),
    ("hunyuanvideo", "radial"): Preset(
        source="radial-attention scripts, HunyuanVideo",
        height=768,
        width=1280,
        num_frames=117,
        steps=50,
        options=_RADIAL | {"decay": 0.95, "sink": False, "start_percent": 12 / 50},
    ),
    ("hunyuanvideo", "neighborhood"): Preset(
        source="Generalized Neighborhood Attention paper, HunyuanVideo, 91 % sparse",
        height=768,
        width=1280,
        num_frames=117,
        steps=50,
        options={"window": (18, 24, 24), "stride": (16, 8, 8), "start_percent": 15 / 50},
    ),
    ("flux.1-dev", "neighborhood"): Preset(
        source="Generalized Neighborhood Attention paper, FLUX.1-dev 4K",
        height=4096,
        width=4096,
        num_frames=1,
        steps=28,
        options={"window": (1, 80, 80), "stride": (1, 16, 16), "start_percent": 9 / 28},
    ),
    ("wan2.1-14b", "draft"): Preset(
        source="draft-attention code, Wan2.1-14B, 75 % sparse, dense while t > 925 (with flow_shift 5)",
        height=768,
        width=1280,
        num_frames=81,
        steps=50,
        options={"keep": 0.25, "dense_blocks": 1, "start_percent": 15 / 50},
    ),
    ("hunyuanvideo", "draft"): Preset(
        source="DraftAttention paper, HunyuanVideo, 90 % sparse",
        height=768,
        width=1280,
        num_frames=129,
        steps=50,
        options={"keep": 0.1, "dense_blocks": 2, "start_percent": 0.25},
    ),
    ("hunyuanvideo", "grat"): Preset(
        source="GRAT script, HunyuanVideo (GRAT-X; there with 128 frames)",
        height=768,
        width=1280,
        num_frames=125,
        steps=30,
        options={"pattern": "X", "group": (4, 8, 8)},
    ),
    ("hunyuanvideo", "sliding_tile"): Preset(
        source="Sliding Tile Attention paper, HunyuanVideo, window 30x40x40 without training",
        height=768,
        width=1280,
        num_frames=117,
        steps=50,
        options={"window": (5, 5, 5)},
    ),
    ("flux.1-dev", "clear"): Preset(
        source="CLEAR scripts, FLUX.1-dev (there with weights trained for it)",
        height=4096,
        width=4096,
        num_frames=1,
        steps=20,
        options={"radius": 16},
    ),
    ("flux.1-dev", "grat"): Preset(
        source="GRAT paper, FLUX.1-dev 8192x8192 (GRAT-X)",
        height=8192,
        width=8192,
        num_frames=1,
        steps=28,
        options={"pattern": "X", "group": (1, 16, 16)},
    ),
    ("wan2.1-1.3b", "pyramid"): Preset(
        source="Pyramid-Sparse-Attention settings, Wan2.1-1.3B (there with a cap by the likeness of neighbouring keys)",
        height=480,
        width=832,
        num_frames=81,
        steps=50,
        options={"assign": "mass", "ends": (0.5, 0.6, 0.7, 0.8), "start_percent": 15 / 50},
    ),
    ("wan2.1-14b", "pyramid"): Preset(
        source="Pyramid-Sparse-Attention settings, Wan2.1-14B",
        height=720,
        width=1280,
        num_frames=81,
        steps=50,
        options={"assign": "mass", "ends": (0.4, 0.5, 0.6, 0.8), "start_percent": 15 / 50},
    ),
}


def find_preset(model: str, method: str) -> Preset:
    """The preset of a model and a method; a ValueError lists those of the model."""
    if (model, method) not in PRESETS:
        known = ", ".join(name for owner, name in PRESETS if owner == model) or "none"
        raise ValueError(f"{model} has no preset for {method!r}; it has {known}, and every method takes density=.")
    return PRESETS[model, method]


def preset_method(model: str, method: str, **changes: Any) -> AttnMethod:
    """The method with its preset options, some of them changed."""
    return make_method(method, **(dict(find_preset(model, method).options) | changes))
