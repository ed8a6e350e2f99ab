"""What training needs to know of an embedded pipeline, as data: images and clips are trained by the same code."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dit_accel.kernels.block_sparse.plan import Triple
from dit_accel.pipelines.shapes.scenes import CLIPS, Language

SPATIAL_RATIO, TEMPORAL_RATIO = 8, 4  # pixels along a side, and frames after the first, of a token
CAPTION_TOKENS = 24  # of the longest caption, and a few


@dataclass(frozen=True, kw_only=True)
class Kit:
    """One embedded pipeline.

    An image is a clip of one frame: pixels are [B, 3, T, H, W] in [-1, 1] throughout, a grid is (frames, rows,
    columns) of tokens.

    Args:
        language: of its captions.
        pipeline: its class.
        build: the untrained pipeline, from numbers of layers.
        text_encoders: names of its encoders; the first one learns to bind before the denoiser is trained.
        passes: within this context ``encode`` and ``decode`` work.
        encode: the VAE's mean and log-variance of pixels.
        decode: pixels, not clamped, of a latent as ``encode`` gives it.
        standardise: tells a VAE the mean and deviation of each latent channel.
        latent_shape: shape of one sample as the denoiser takes it, from the grid.
        clean: samples as the denoiser takes them, from the VAE and what it encoded.
        embed: text states [B, length, C] of caption ids [B, 24], as the pipeline makes them from an encoder.
        conditions: the denoiser's further arguments, from the pipeline, caption ids, text length and grid.
        shift: how far training times move towards noise at so many tokens.
        last_time: the denoiser's timestep at pure noise.
        gpu_attention: diffusers' attention backend that training takes on a GPU. Default: its own choice.
        compiles: whether the compiler takes the denoiser's blocks for any shape. Default True.
    """

    language: Language
    pipeline: Any
    build: Callable[..., Any]
    text_encoders: tuple[str, ...]
    passes: Callable[[], AbstractContextManager[None]]
    encode: Callable[[Any, Tensor], tuple[Tensor, Tensor]]
    decode: Callable[[Any, Tensor], Tensor]
    standardise: Callable[[Any, Tensor, Tensor], None]
    latent_shape: Callable[[Triple], tuple[int, ...]]
    clean: Callable[[Any, Tensor], Tensor]
    embed: Callable[[Any, Tensor, int], Tensor]
    conditions: Callable[[Any, Tensor, int, Triple], dict[str, Tensor]]
    shift: Callable[[int], float]
    last_time: float
    gpu_attention: str = "native"
    compiles: bool = True

    def trained(self, pipeline: Any) -> list[Any]:
        """What the denoiser's training trains: the transformer, then the text encoders."""
        return [pipeline.transformer, *(getattr(pipeline, name) for name in self.text_encoders)]


def build_tokenizer(language: Language = CLIPS, max_length: int = 512) -> PreTrainedTokenizerFast:
    """One token a word of the captions, lower-cased, ended by ``</s>``; other words become ``<unk>``."""
    vocabulary = {word: index for index, word in enumerate(("<pad>", "</s>", "<unk>", *language.words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>", model_max_length=max_length
    )


def caption_ids(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """Token ids [B, 24], padded with 0."""
    ids: Tensor = tokenizer(texts, padding="max_length", max_length=CAPTION_TOKENS, return_tensors="pt").input_ids
    return ids


def pad_tokens(values: Tensor, length: int) -> Tensor:
    """Token ids [B, T] or states [B, T, C] with zeros behind, up to ``length`` tokens."""
    return F.pad(values, (*(0, 0) * (values.ndim - 2), 0, length - values.shape[1]))
