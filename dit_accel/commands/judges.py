"""Metrics that bring a model of their own: evaluation judges with them, the commands load them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_accel.eval.frames import as_uint8
from dit_accel.eval.quality import Metric, SetMetric, make_metric
from dit_accel.eval.quality.clip import ClipEncoder
from dit_accel.eval.quality.weights import visiting

_BATCH = 16  # frames at once


def make_metrics(calls: Iterable[tuple[str, Mapping[str, Any]]]) -> list[Metric | SetMetric]:
    """Metrics of which each is called by a name and options, as ``make_metric`` takes them.

    Raises:
        ValueError: whatever is wrong with a name, an option or a file that it names.
    """
    return [make_metric(name, options, load_clip=load_clip) for name, options in calls]


def load_clip(folder: Path) -> ClipEncoder:
    """The encoder of a folder that holds a transformers ``CLIPModel``, its tokenizer and its image processor.

    Frames are scaled and cropped as the folder's image processor says, which for CLIP is to the square in their middle.
    Prompts are cut to as many tokens as the model has positions for.

    Raises:
        ValueError: when one of the three cannot be loaded from the folder; nothing is downloaded.
    """
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

    try:
        model, loaded = CLIPModel.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"clip_score needs a CLIPModel of transformers in {folder}, got: {reason}") from error
    if loaded["missing_keys"]:
        missing = min(loaded["missing_keys"])
        raise ValueError(
            f"clip_score needs {missing} of a CLIPModel, which {folder} does not have; give another folder."
        )
    positions = model.config.text_config.max_position_embeddings

    def images(clip: Tensor) -> Tensor:
        pixels = processor(images=list(as_uint8(clip)), return_tensors="pt")["pixel_values"]
        with visiting(model, clip.device):
            parts = [model.get_image_features(part.to(clip.device)).pooler_output for part in pixels.split(_BATCH)]
        return torch.cat(parts)

    def text(prompt: str) -> Tensor:
        tokens = tokenizer(prompt, truncation=True, max_length=positions, return_tensors="pt")
        features: Tensor = model.get_text_features(tokens["input_ids"], tokens["attention_mask"]).pooler_output[0]
        return features

    return ClipEncoder(images, text)
