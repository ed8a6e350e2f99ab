"""Which parameters are trained, and whether gradients reach them."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from dit_accel.pipelines.families import denoisers_of
from dit_accel.pipelines.flow import FlowBatch
from dit_accel.pipelines.training.settings import Trained


def choose_parameters(denoiser: nn.Module, trained: Trained) -> list[nn.Parameter]:
    """The parameters to train; the others of ``denoiser`` are frozen.

    Args:
        denoiser: of a known family.
        trained: "all", or "attention" for the modules whose attention a method can replace.
    """
    [(_, family)] = denoisers_of(denoiser)
    attention = re.compile("|".join(rf"{target}\..*" for target in family.targets + family.visual_targets))
    chosen = []
    for name, parameter in denoiser.named_parameters():
        parameter.requires_grad_(trained == "all" or attention.fullmatch(name) is not None)
        if parameter.requires_grad:
            chosen.append(parameter)
    return chosen


def check_gradients(denoiser: nn.Module, batch: FlowBatch, method: str) -> None:
    """One forward and backward, whose gradients are thrown away.

    Raises:
        ValueError: they do not reach every parameter that is to be trained.
    """
    reason = _why_no_gradients(denoiser, batch)
    denoiser.zero_grad(set_to_none=True)
    if reason:
        raise ValueError(f"{method} cannot be trained because {reason}; choose another --backend or --method.")


def _why_no_gradients(denoiser: nn.Module, batch: FlowBatch) -> str | None:
    try:
        loss: Tensor = (batch.predicted_by(denoiser) - batch.velocity).square().mean()
        loss.backward()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # what torch says of an operator without a derivative
        return str(error).strip().splitlines()[0].rstrip(".")
    missing = [
        name for name, parameter in denoiser.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    return f"no gradient reaches {missing[0]}" if missing else None
