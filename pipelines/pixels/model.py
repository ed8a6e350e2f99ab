"""PixelDiT: a diffusion transformer on single pixels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import AttentionMixin, FeedForward
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, get_1d_rotary_pos_embed
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import Tensor, nn

Rotations = tuple[Tensor, Tensor]


class PixelAttention(FluxAttention):  # type: ignore[misc]  # diffusers hides its types
    """Self-attention with RMS-normalised queries and keys, rotary embeddings and an output projection."""

    def forward(self, hidden_states: Tensor, rotations: Rotations) -> Tensor:
        """Tokens [B, N, dim] to the same; Flux's processor alone leaves the output projection to its block."""
        attended = self.processor(self, hidden_states, image_rotary_emb=rotations)
        out: Tensor = self.to_out[0](attended)
        return out


class PixelDiTBlock(nn.Module):
    """Attention and feed-forward, each scaled, shifted and gated by the timestep.

    Args:
        dim: width.
        heads, head_dim: of the attention.
        ffn_dim: hidden width of the feed-forward.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = PixelAttention(dim, heads=heads, dim_head=head_dim, bias=True, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.ffn = FeedForward(dim, inner_dim=ffn_dim, activation_fn="gelu-approximate")
        self.modulation = nn.Parameter(torch.zeros(6, dim))

    def forward(self, hidden_states: Tensor, modulation: Tensor, rotations: Rotations) -> Tensor:
        """Tokens [B, N, dim] to the same, by the model's modulation [B, 6, dim]: scale, shift and gate, twice."""
        # Torch 2.11 loses the shape of views that are handed from one compiled graph to the next, and attention may
        # stand between two: what is taken of the table before it is not used after it.
        table = (self.modulation + modulation).unsqueeze(2)
        attended = self.attn(self.norm1(hidden_states) * (1 + table[:, 0]) + table[:, 1], rotations)
        hidden_states = hidden_states + table[:, 2] * attended
        normed = self.norm2(hidden_states) * (1 + table[:, 3]) + table[:, 4]
        out: Tensor = hidden_states + table[:, 5] * self.ffn(normed)
        return out


class PixelDiT(ModelMixin, ConfigMixin, AttentionMixin):  # type: ignore[misc]  # diffusers hides its types
    """A transformer over the pixels of an image, any height and width, that predicts the flow's velocity.

    Blocks share one modulation network and add a table of their own (adaLN-zero: every block starts as the identity).
    Rotary embeddings turn half of each head by the row and half by the column; queries and keys are RMS-normalised.

    Args:
        channels: of the image, in and out. Default 3.
        num_attention_heads, attention_head_dim: default 6 and 64 (DiT-S).
        num_layers: default 12.
        ffn_dim: hidden width of the feed-forward. Default 1536.
        num_classes: class labels; None (default) for a model without. One more embedding stands for "no label".
        freq_dim: sinusoids of the timestep. Default 256.
        rope_theta: base of the rotary frequencies. Default 10000.

    Raises:
        ValueError: a head size that is not a multiple of 4, two axes of pairs.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("PixelDiTBlock",)
    _repeated_blocks = ("PixelDiTBlock",)

    @register_to_config
    def __init__(
        self,
        channels: int = 3,
        num_attention_heads: int = 6,
        attention_head_dim: int = 64,
        num_layers: int = 12,
        ffn_dim: int = 1536,
        num_classes: int | None = None,
        freq_dim: int = 256,
        rope_theta: float = 10000.0,
    ) -> None:
        super().__init__()
        if attention_head_dim % 4:
            raise ValueError(f"attention_head_dim must be a multiple of 4, got {attention_head_dim}.")
        dim = num_attention_heads * attention_head_dim
        self.gradient_checkpointing = False
        self.proj_in = nn.Linear(channels, dim)
        self.time_sinusoids = Timesteps(freq_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedder = TimestepEmbedding(freq_dim, dim)
        self.class_embedder = None if num_classes is None else nn.Embedding(num_classes + 1, dim)
        self.modulation = nn.Linear(dim, 6 * dim)
        self.blocks = nn.ModuleList(
            PixelDiTBlock(dim, num_attention_heads, attention_head_dim, ffn_dim) for _ in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.modulation_out = nn.Parameter(torch.zeros(2, dim))
        self.proj_out = nn.Linear(dim, channels)
        for layer in (self.modulation, self.proj_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> Any:
        """The velocity, noise minus image.

        Args:
            hidden_states: noisy images [B, channels, H, W].
            timestep: 1000 times the share of noise, [B].
            class_labels: int64 [B] in [0, num_classes], the last for "no label", which None stands for too.
            return_dict: False returns a tuple.

        Returns:
            A ``Transformer2DModelOutput`` whose sample is [B, channels, H, W].
        """
        batch, _, rows, columns = hidden_states.shape
        rotations = rotary_embedding(
            rows, columns, self.config.attention_head_dim, self.config.rope_theta, hidden_states.device
        )
        tokens = self.proj_in(hidden_states.flatten(2).transpose(1, 2))
        condition = self.time_embedder(self.time_sinusoids(timestep).to(self.dtype))
        if self.class_embedder is not None:
            if class_labels is None:
                class_labels = timestep.new_full((batch,), self.config.num_classes, dtype=torch.long)
            condition = condition + self.class_embedder(class_labels)
        modulation = self.modulation(F.silu(condition)).unflatten(1, (6, -1))
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(block, tokens, modulation, rotations)
            else:
                tokens = block(tokens, modulation, rotations)
        shift, scale = (self.modulation_out + condition.unsqueeze(1)).unsqueeze(2).unbind(1)
        pixels = self.proj_out(self.norm_out(tokens) * (1 + scale) + shift)
        sample = pixels.transpose(1, 2).unflatten(2, (rows, columns))
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


def rotary_embedding(rows: int, columns: int, head_dim: int, theta: float, device: torch.device) -> Rotations:
    """Cosines and sines [rows * columns, head_dim], float32, of angles that grow with the row, then with the column."""
    axes = (
        get_1d_rotary_pos_embed(head_dim // 2, torch.arange(size, device=device), theta, use_real=True)
        for size in (rows, columns)
    )
    (row_cos, row_sin), (column_cos, column_sin) = axes
    cos, sin = (
        torch.cat([of_row.repeat_interleave(columns, 0), of_column.repeat(rows, 1)], 1)
        for of_row, of_column in ((row_cos, column_cos), (row_sin, column_sin))
    )
    return cos, sin
