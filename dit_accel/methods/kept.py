"""Tensors that wait for a later denoising step: where they are, on the host or in eight bits."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Keep = Literal["device", "cpu", "8bit"]
KEEPS: tuple[str, ...] = get_args(Keep)

_LARGEST = 448.0  # of float8_e4m3fn


class Kept(NamedTuple):
    """A tensor put by.

    Args:
        values: as it was, on the host, or in eight bits.
        scale: of eight-bit values, float32, one for each row of the last axis; None: they are whole.
        like: device and dtype of what it was.
    """

    values: Tensor
    scale: Tensor | None
    like: tuple[torch.device, torch.dtype]

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def restored(self) -> Tensor:
        """The tensor again, rounded where it was kept in eight bits."""
        device, dtype = self.like
        if self.scale is not None:
            return (self.values.float() * self.scale).to(dtype)
        return self.values.to(device)


def put_by(x: Tensor, keep: Keep) -> Kept:
    """A tensor kept for later; never a view of a larger one."""
    like = x.device, x.dtype
    if keep == "8bit":
        scale = x.detach().abs().amax(-1, keepdim=True).float() / _LARGEST
        scale = scale.clamp(min=torch.finfo(torch.float32).tiny)  # of rows of zeros
        return Kept((x.float() / scale).to(torch.float8_e4m3fn), scale, like)
    if keep == "cpu":
        return Kept(x.to("cpu", copy=True), None, like)
    whole = x.is_contiguous() and x.untyped_storage().nbytes() == x.nbytes
    return Kept(x if whole else x.clone(), None, like)


def bytes_of(rows: float, width: int, itemsize: int, keep: Keep) -> float:
    """What ``rows`` rows of ``width`` numbers take when they are put by."""
    return rows * (width + 4 if keep == "8bit" else width * itemsize)
