"""Processors equal to those of diffusers that call torch's attention directly, but by way of ``dispatch_attention_fn``.

DiT, PixArt and Stable Diffusion 3 carry such processors, which no attention backend reaches. A wrapped processor of
theirs derives from the class that ``REPLACEMENTS`` gives for the stock one; outputs are bit-identical.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import (
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    FusedJointAttnProcessor2_0,
    JointAttnProcessor2_0,
)
from torch import Tensor

QueryKeyValue = tuple[Tensor, Tensor, Tensor]


class _SelfAttention:
    """Attention of a sequence [B, L, C] or an image [B, C, H, W] to itself."""

    # The stock class says whether projections are fused: a module's own flag outlives unfuse_qkv_projections.
    fused: ClassVar[bool]
    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if encoder_hidden_states is not None:
            raise ValueError(
                "dit_accel entered this attention as self-attention, but it got encoder_hidden_states; "
                "call dit_accel.restore on the model for such calls."
            )
        residual, image = hidden_states, hidden_states.shape
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        if len(image) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attention_mask is not None:
            batch, tokens, _ = hidden_states.shape
            attention_mask = attn.prepare_attention_mask(attention_mask, tokens, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        projections = (attn.to_qkv,) if self.fused else (attn.to_q, attn.to_k, attn.to_v)
        qkv = _heads(attn, hidden_states, projections, (attn.norm_q, attn.norm_k))
        hidden_states = _project_out(attn, _attend(self, qkv, attention_mask))
        if len(image) == 4:
            hidden_states = hidden_states.transpose(-1, -2).reshape(image)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        out: Tensor = hidden_states / attn.rescale_output_factor
        return out


class _JointAttention:
    """Attention of an image [B, L, C] and the text after it to both, or of the image alone."""

    fused: ClassVar[bool]
    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        projections = (attn.to_qkv,) if self.fused else (attn.to_q, attn.to_k, attn.to_v)
        image = _heads(attn, hidden_states, projections, (attn.norm_q, attn.norm_k))
        if encoder_hidden_states is None:
            return _project_out(attn, _attend(self, image))
        projections = (attn.to_added_qkv,) if self.fused else (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text = _heads(attn, encoder_hidden_states, projections, (attn.norm_added_q, attn.norm_added_k))
        query, key, value = (torch.cat(parts, dim=1) for parts in zip(image, text, strict=True))
        lengths = [hidden_states.shape[1], encoder_hidden_states.shape[1]]
        image_out, text_out = _attend(self, (query, key, value)).split(lengths, dim=1)
        if not attn.context_pre_only:
            text_out = attn.to_add_out(text_out)
        return _project_out(attn, image_out), text_out


class SelfAttnProcessor(_SelfAttention, AttnProcessor2_0):  # type: ignore[misc]  # diffusers hides its types
    """``AttnProcessor2_0`` for self-attention."""

    fused = False


class FusedSelfAttnProcessor(_SelfAttention, FusedAttnProcessor2_0):  # type: ignore[misc]
    """``FusedAttnProcessor2_0`` for self-attention."""

    fused = True


class JointAttnProcessor(_JointAttention, JointAttnProcessor2_0):  # type: ignore[misc]
    """``JointAttnProcessor2_0``."""

    fused = False


class FusedJointAttnProcessor(_JointAttention, FusedJointAttnProcessor2_0):  # type: ignore[misc]
    """``FusedJointAttnProcessor2_0``, for modules without query and key norms: the stock class leaves them out."""

    fused = True


REPLACEMENTS: dict[type, type] = {
    AttnProcessor2_0: SelfAttnProcessor,
    FusedAttnProcessor2_0: FusedSelfAttnProcessor,
    JointAttnProcessor2_0: JointAttnProcessor,
    FusedJointAttnProcessor2_0: FusedJointAttnProcessor,
}


def check_norms(module: Any) -> None:
    """Raise a ValueError if a module's stock processor leaves out its norms."""
    if type(module.processor) is FusedJointAttnProcessor2_0 and module.norm_q is not None:
        raise ValueError(
            "the projections of a joint attention with query and key norms are fused, for which diffusers' "
            "FusedJointAttnProcessor2_0 leaves the norms out; call unfuse_qkv_projections before applying a method."
        )


def _heads(attn: Any, states: Tensor, projections: tuple[Any, ...], norms: tuple[Any, Any]) -> QueryKeyValue:
    """Queries, keys and values [B, L, H, D], from one projection of all three or from three."""
    parts = projections[0](states).chunk(3, dim=-1) if len(projections) == 1 else [each(states) for each in projections]
    query, key, value = (part.unflatten(-1, (attn.heads, -1)) for part in parts)
    query, key = (x if norm is None else norm(x) for norm, x in zip(norms, (query, key), strict=True))
    return query, key, value


def _attend(processor: Any, qkv: QueryKeyValue, mask: Tensor | None = None) -> Tensor:
    """Attention, [B, L, H * D]."""
    out: Tensor = dispatch_attention_fn(
        *qkv, attn_mask=mask, backend=processor._attention_backend, parallel_config=processor._parallel_config
    )
    return out.flatten(2).to(qkv[0].dtype)


def _project_out(attn: Any, hidden_states: Tensor) -> Tensor:
    linear, dropout = attn.to_out
    out: Tensor = dropout(linear(hidden_states))
    return out
