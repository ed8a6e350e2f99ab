"""The methods by name, and the exact mask that a method computes."""

from __future__ import annotations

import ast
import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse.plan import Triple
from dit_accel.kernels.block_sparse.reference import token_mask as mask_of_plan
from dit_accel.layout import TextPosition, TokenLayout
from dit_accel.methods.attention_tile import AttentionTileAttnProcessor
from dit_accel.methods.band import BandAttnProcessor
from dit_accel.methods.base import AttnMethod, DynamicMethod, StaticMethod
from dit_accel.methods.clear import CLEARAttnProcessor
from dit_accel.methods.dense import DenseAttnProcessor
from dit_accel.methods.dit_fast_attn import DiTFastAttnProcessor
from dit_accel.methods.draft import DraftAttnProcessor
from dit_accel.methods.grat import GRATAttnProcessor
from dit_accel.methods.log_linear import LogLinearAttnProcessor
from dit_accel.methods.neighborhood import NeighborhoodAttnProcessor
from dit_accel.methods.pyramid import PyramidAttnProcessor
from dit_accel.methods.radial import RadialAttnProcessor
from dit_accel.methods.sliding_tile import SlidingTileAttnProcessor

METHODS: dict[str, type[AttnMethod]] = {
    method.name: method
    for method in (
        DenseAttnProcessor,
        RadialAttnProcessor,
        NeighborhoodAttnProcessor,
        GRATAttnProcessor,
        SlidingTileAttnProcessor,
        AttentionTileAttnProcessor,
        BandAttnProcessor,
        CLEARAttnProcessor,
        DraftAttnProcessor,
        LogLinearAttnProcessor,
        PyramidAttnProcessor,
        DiTFastAttnProcessor,
    )
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
    values: dict[str, Any] = {name: _tuples(value) for name, value in options.items()}
    return chosen(**values) if isinstance(method, str) else dataclasses.replace(method, **values)


def parse_method_call(text: str, kind: str = "method") -> tuple[str, dict[str, Any]]:
    """Name and options of a method as people write it: ``radial`` or ``radial(decay=0.2)``; values are literals.

    Args:
        text: the call.
        kind: what errors call it, where something else is written the same way. Default "method".

    Raises:
        ValueError: anything else.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        if isinstance(tree, ast.Name):
            return tree.id, {}
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and not tree.args:
            return tree.func.id, {str(item.arg): ast.literal_eval(item.value) for item in tree.keywords}
    except (SyntaxError, ValueError):
        pass
    raise ValueError(f"a {kind} is written as a name or as name(option=value, ...), got {text!r}.")


def token_mask(
    processor: AttnMethod,
    grid: Triple,
    text_tokens: int = 0,
    text_position: TextPosition = "none",
    *,
    query: Tensor | None = None,
    key: Tensor | None = None,
) -> Tensor:
    """Which keys each query sees when ``processor`` runs on a small grid, schedule options left out.

    Args:
        processor: a method that keeps or drops pairs of tokens.
        grid: latent grid after patchify, (frames, rows, columns).
        text_tokens: text tokens in the same sequence.
        text_position: "prefix", "suffix" or "none".
        query, key: [1, L, H, D], for a dynamic method, with L all tokens.

    Returns:
        bool [1 or H, L, L], queries by keys, exactly what is computed.

    Raises:
        ValueError: a dynamic method without query and key, or a method whose keys are means of tokens.
    """
    layout = TokenLayout(grid, text_tokens, text_position)
    if isinstance(processor, StaticMethod):
        plan = processor.plan(layout)
    elif isinstance(processor, DynamicMethod):
        if query is None or key is None:
            raise ValueError(f"{processor.name} chooses by queries and keys, got none; pass query= and key=.")
        plan = processor.select(layout, query, key)
    else:
        raise ValueError(f"{processor.name} attends to means of tokens, which no mask over tokens shows.")
    if plan is None:
        return torch.ones(1, layout.num_tokens, layout.num_tokens, dtype=torch.bool)
    return mask_of_plan(plan)[0]


def _tuples(value: Any) -> Any:
    """Lists, and lists inside them, as tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _instead(wrong: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(wrong, known, n=1)
    return f"did you mean {near[0]!r}" if near else f"choose one of {', '.join(sorted(known))}"
