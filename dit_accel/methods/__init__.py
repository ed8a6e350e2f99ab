"""The methods by name, and the exact mask that a method computes."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse.plan import Triple
from dit_accel.kernels.block_sparse.reference import token_mask as mask_of_plan
from dit_accel.layout import TextPosition, TokenLayout
from dit_accel.methods.base import AttnMethod
from dit_accel.methods.dense import DenseAttnProcessor
from dit_accel.methods.grat import GRATAttnProcessor
from dit_accel.methods.neighborhood import NeighborhoodAttnProcessor
from dit_accel.methods.radial import RadialAttnProcessor

METHODS: dict[str, type[AttnMethod]] = {
    method.name: method
    for method in (DenseAttnProcessor, RadialAttnProcessor, NeighborhoodAttnProcessor, GRATAttnProcessor)
}


def make_method(method: str | AttnMethod, **options: Any) -> AttnMethod:
    """A method from its name, or a given one with some options replaced.

    Args:
        method: a name in ``METHODS`` or a processor.
        options: the processor's own arguments; lists are taken as tuples.

    Raises:
        ValueError: a name or an option that does not exist, with the nearest that does, or a value out of range.
    """
    if isinstance(method, str) and method not in METHODS:
        raise ValueError(f"there is no method {method!r}; {_instead(method, METHODS)}.")
    chosen = METHODS[method] if isinstance(method, str) else type(method)
    known = [field.name for field in dataclasses.fields(chosen)]
    for option in options:
        if option not in known:
            raise ValueError(f"method {chosen.name} has no option {option!r}; {_instead(option, known)}.")
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in options.items()
    }
    return chosen(**values) if isinstance(method, str) else dataclasses.replace(method, **values)


def token_mask(
    processor: AttnMethod, grid: Triple, text_tokens: int = 0, text_position: TextPosition = "none"
) -> Tensor:
    """Which keys each query sees when ``processor`` runs on a small grid, schedule options left out.

    Args:
        processor: a static method.
        grid: latent grid after patchify, (frames, rows, columns).
        text_tokens: text tokens in the same sequence.
        text_position: "prefix", "suffix" or "none".

    Returns:
        bool [1, L, L] with L all tokens, queries by keys, exactly what is computed.
    """
    layout = TokenLayout(grid, text_tokens, text_position)
    plan = processor.plan(layout)
    if plan is None:
        return torch.ones(1, layout.num_tokens, layout.num_tokens, dtype=torch.bool)
    return mask_of_plan(plan)[0]


def _instead(wrong: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(wrong, known, n=1)
    return f"did you mean {near[0]!r}" if near else f"choose one of {', '.join(sorted(known))}"
