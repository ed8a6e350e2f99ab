"""CLIP score (Hessel et al. 2021): how well frames fit their prompt, to a network that maps both into one space."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from dit_accel.eval.quality.metrics import Against, Metric


@dataclass(frozen=True)
class ClipEncoder:
    """Both halves of a CLIP model.

    Args:
        images: float [T, H, W, 3] in [0, 1], on any device -> [T, features].
        text: prompt -> [features], on any device.
    """

    images: Callable[[Tensor], Tensor]
    text: Callable[[str], Tensor]


def clip_score(folder: str | os.PathLike[str], load_clip: Callable[[Path], ClipEncoder]) -> Metric:
    """The metric ``clip_score``: 100 max(cos, 0) of each frame and the prompt, in CLIP's space.

    The paper's scale is 2.5 instead of 100. The factor here is that of torchmetrics and of papers on generation.

    Args:
        folder: of the CLIP model.
        load_clip: reads it, such as ``dit_accel.commands.judges.load_clip``; evaluation loads no model by itself.

    Raises:
        ValueError: when there is no such folder, or ``load_clip`` refuses it.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ValueError(f"clip_score needs the model folder {folder}, which does not exist; correct the path.")
    encoder = load_clip(path)

    def scores(clip: Tensor, prompt: Against) -> Tensor:
        assert isinstance(prompt, str), "measure() skips metrics whose prompt is missing"
        with torch.no_grad():
            images, text = encoder.images(clip), encoder.text(prompt)
        return 100 * cosine_similarity(images.double(), text.to(images.device).double()[None]).clamp(min=0)

    return Metric(
        "clip_score", needs_reference=False, higher_is_better=True, unit="", compute=scores, needs_prompt=True
    )
