"""LPIPS (Zhang et al. 2018), version 0.1 on AlexNet: a distance of frames, learned from what people see."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import conv2d, max_pool2d, relu

from dit_accel.eval.quality.metrics import Metric, paired
from dit_accel.eval.quality.weights import load_tensors

_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet's colours, for inputs in [-1, 1]
_EPSILON = 1e-10


@dataclass(frozen=True)
class _Layer:
    """A convolution of AlexNet and the ReLU behind it, whose output is compared.

    Args:
        place: in torchvision's ``features``.
        shape: of its weight.
        stride, padding: of the convolution.
        pooled: whether its input is max-pooled first, 3 x 3 with stride 2.
    """

    place: int
    shape: tuple[int, int, int, int]
    stride: int
    padding: int
    pooled: bool


_TRUNK = (
    _Layer(0, (64, 3, 11, 11), stride=4, padding=2, pooled=False),
    _Layer(3, (192, 64, 5, 5), stride=1, padding=2, pooled=True),
    _Layer(6, (384, 192, 3, 3), stride=1, padding=1, pooled=True),
    _Layer(8, (256, 384, 3, 3), stride=1, padding=1, pooled=False),
    _Layer(10, (256, 256, 3, 3), stride=1, padding=1, pooled=False),
)
_BACKBONE_SHAPES: dict[str, tuple[int, ...]] = {
    **{f"features.{layer.place}.weight": layer.shape for layer in _TRUNK},
    **{f"features.{layer.place}.bias": layer.shape[:1] for layer in _TRUNK},
}
_HEAD_SHAPES: dict[str, tuple[int, ...]] = {
    f"lin{number}.model.1.weight": (1, layer.shape[0], 1, 1) for number, layer in enumerate(_TRUNK)
}


def lpips(backbone: str | os.PathLike[str], heads: str | os.PathLike[str] | None = None) -> Metric:
    """The metric ``lpips``: the learned distance of each frame from the reference's, 0 for identical frames.

    Args:
        backbone: torchvision's AlexNet weights trained on ImageNet, ``alexnet-owt-*.pth``.
        heads: the linear heads of version 0.1, ``alex.pth``. Default: the file that torchmetrics ships.

    Raises:
        ValueError: when a file is missing or does not hold these weights.
    """
    weights = load_tensors("lpips", backbone, _BACKBONE_SHAPES) | load_tensors(
        "lpips", _shipped_heads() if heads is None else heads, _HEAD_SHAPES
    )

    def distances(clip: Tensor, target: Tensor) -> Tensor:
        dtype = torch.float64 if clip.is_cuda else torch.float32  # float32 is TF32 to cuDNN, with three digits
        placed = {name: tensor.to(clip.device, dtype) for name, tensor in weights.items()}
        with torch.no_grad():
            return torch.stack([_distance(x.to(dtype), y.to(dtype), placed) for x, y in zip(clip, target, strict=True)])

    return Metric(
        "lpips",
        needs_reference=True,
        higher_is_better=False,
        unit="",
        compute=paired(distances),
        min_side=31,  # the smallest that leaves a pixel after both poolings
    )


def _shipped_heads() -> Path:
    found = importlib.util.find_spec("torchmetrics")
    if found is None or found.origin is None:
        raise ValueError("lpips needs the option heads where torchmetrics is missing; name its file alex.pth.")
    return Path(found.origin).parent / "functional" / "image" / "lpips_models" / "alex.pth"


def _distance(
    x: Tensor,  # [H, W, 3] in [0, 1]
    y: Tensor,  # [H, W, 3]
    weights: Mapping[str, Tensor],
) -> Tensor:
    """Squared differences of unit-length features, weighted by channel, averaged over places, summed over layers."""
    images = 2 * torch.stack([x, y]).movedim(-1, 1) - 1
    features = (images - images.new_tensor(_SHIFT).view(3, 1, 1)) / images.new_tensor(_SCALE).view(3, 1, 1)
    total = images.new_zeros((), dtype=torch.float64)
    for number, layer in enumerate(_TRUNK):
        weight, bias = (weights[f"features.{layer.place}.{part}"] for part in ("weight", "bias"))
        features = max_pool2d(features, 3, 2) if layer.pooled else features
        features = relu(conv2d(features, weight, bias, layer.stride, layer.padding))
        unit = features / (features.norm(dim=1, keepdim=True) + _EPSILON)
        channels = (unit[0] - unit[1]).square().mean(dim=(1, 2), dtype=torch.float64)
        total += channels @ weights[f"lin{number}.model.1.weight"].flatten().double()
    return total
