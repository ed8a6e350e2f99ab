"""Files of weights that the user gives: read and checked before anything runs, and placed where frames are."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor


def load_tensors(metric: str, path: str | os.PathLike[str], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Tensors of a file that ``torch.save`` wrote, as float32; what else the file holds is left out.

    Args:
        metric: that needs them, for errors.
        path: of the file.
        shapes: wanted shape by name.

    Raises:
        ValueError: when there is no such file, it is no state dict, or a tensor is missing or has another shape.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"{metric} needs the weights file {path}, which does not exist; correct the path.")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever the bytes make it raise
        raise ValueError(f"{metric} cannot read {path} as PyTorch weights ({type(error).__name__}).") from error
    for name, shape in shapes.items():
        found = content.get(name) if isinstance(content, dict) else None
        if not isinstance(found, Tensor) or found.shape != shape:
            got = list(found.shape) if isinstance(found, Tensor) else "nothing of that name"
            raise ValueError(f"{metric} needs {name} of shape {list(shape)} in {path}, got {got}; give another file.")
    return {name: content[name].float() for name in shapes}


@contextmanager
def visiting(network: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """The network on ``device``, and back on the CPU afterwards: a judge's memory must not count as a method's."""
    network.to(device)
    try:
        yield
    finally:
        network.to("cpu")
