"""The embedded pipeline of images: a small FluxPipeline of coloured shapes at places."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from diffusers import FluxPipeline

DEFAULT_HEIGHT = 512
DEFAULT_WIDTH = 512
DEFAULT_STEPS = 16
DEFAULT_GUIDANCE = 3.5
DEFAULT_TEXT_LENGTH = 32

EXAMPLE_PROMPTS = (
    "a red circle at the left and a blue star at the top right over navy stripes",
    "a yellow triangle at the top over teal checks",
    "a white ring at the bottom left and an orange square at the right over plum dots",
    "a green cross at the bottom right over slate waves",
    "a pink star at the top left over maroon bars",
)


def load(dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> FluxPipeline:
    """The packaged pipeline, a stock FluxPipeline.

    Call it as ``pipe(prompt, negative_prompt="", true_cfg_scale=DEFAULT_GUIDANCE, height=DEFAULT_HEIGHT,
    width=DEFAULT_WIDTH, num_inference_steps=DEFAULT_STEPS, max_sequence_length=DEFAULT_TEXT_LENGTH)``.

    Args:
        dtype: of the weights, float32 unless told.
        device: where the pipeline goes.
    """
    from importlib.resources import as_file, files

    import torch
    from diffusers import FluxPipeline

    with as_file(files("dit_accel.pipelines.shapes_image").joinpath("weights")) as folder:
        pipeline: Any = FluxPipeline.from_pretrained(folder, dtype=dtype or torch.float32)
    return pipeline.to(device)
