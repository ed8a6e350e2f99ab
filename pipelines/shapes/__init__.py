"""The embedded pipeline: a small text-to-video WanPipeline of coloured shapes, its scenes and its verifier."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from diffusers import WanPipeline

DEFAULT_HEIGHT = 192
DEFAULT_WIDTH = 256
DEFAULT_FRAMES = 25
DEFAULT_STEPS = 16
DEFAULT_GUIDANCE = 4.0
DEFAULT_TEXT_LENGTH = 32

EXAMPLE_PROMPTS = (
    "a red circle moving left and a blue star growing over navy stripes",
    "a yellow triangle moving up over teal checks",
    "a white ring shrinking and an orange square moving right over plum dots",
    "a green cross moving diagonally over slate waves",
    "a pink star resting over maroon bars",
)


def load(dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> WanPipeline:
    """The packaged pipeline, a stock WanPipeline.

    Call it as ``pipe(prompt, height=DEFAULT_HEIGHT, width=DEFAULT_WIDTH, num_frames=DEFAULT_FRAMES,
    num_inference_steps=DEFAULT_STEPS, guidance_scale=DEFAULT_GUIDANCE, max_sequence_length=DEFAULT_TEXT_LENGTH)``.

    Args:
        dtype: of the weights, float32 unless told.
        device: where the pipeline goes.
    """
    from importlib.resources import as_file, files

    import torch
    from diffusers import WanPipeline

    with as_file(files("dit_accel.pipelines.shapes").joinpath("weights")) as folder:
        pipeline: Any = WanPipeline.from_pretrained(folder, dtype=dtype or torch.float32)
    return pipeline.to(device)
