"""What a denoiser of clips is trained on: pools of encoded clips, drawn from and refreshed on the GPU."""

from __future__ import annotations

import math

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dit_accel.pipelines import seeds
from dit_accel.pipelines.shapes.models import (
    FLOW_SHIFT,
    LATENT_CHANNELS,
    encode_clips,
    latent_statistics,
    whole_clip_passes,
)
from dit_accel.pipelines.shapes.recipe import ClipSize
from dit_accel.pipelines.shapes.render import render
from dit_accel.pipelines.shapes.scenes import captions, sample_scenes
from dit_accel.pipelines.shapes.train_text import CAPTION_TOKENS, caption_ids

_CAPTION_DROPOUT = 0.1


class LatentPool:
    """A ring of encoded clips of one size with their caption ids; fresh clips overwrite the oldest.

    Feeds are numbered and seeded by their number, so a pool whose first draw comes late holds what it would hold had
    all draws before been made.

    Args:
        size: of the clips, and how many are rendered at once, kept, and there at first.
        vae, tokenizer: of the pipeline; latents lie on the VAE's device.
        seed: of the clips.
        reuse: draws of a clip, on average, before a fresh one takes its place.
        share: processes that share the size's clips among them, each with a pool of its own. Default 1.
    """

    def __init__(
        self,
        size: ClipSize,
        vae: AutoencoderKLWan,
        tokenizer: PreTrainedTokenizerFast,
        seed: int,
        reuse: float,
        share: int = 1,
    ) -> None:
        self._size, self._vae, self._tokenizer, self._seed, self._reuse = size, vae, tokenizer, seed, reuse
        self._device = torch.device(vae.device)
        self._rounds = max(1, size.pool // share // size.feed)  # feeds that the ring holds
        self._initial = -(-size.initial // share // size.feed)
        shape = (self._rounds * size.feed, LATENT_CHANNELS, *size.latent_shape)
        self._latents = torch.empty(shape, dtype=torch.bfloat16, device=self._device)
        self._ids = torch.empty(len(self._latents), CAPTION_TOKENS, dtype=torch.long, device=self._device)
        self._mean, self._std = latent_statistics(vae, self._device)
        self._fed = 0

    @torch.no_grad()
    def _feed(self, number: int) -> None:
        size = self._size
        cpu, device = (seeds.generator(kind, self._seed, number) for kind in ("cpu", self._device))
        scenes = sample_scenes(size.feed, size.two_objects, cpu)
        clips = render(scenes, size.height, size.width, size.frames, device)
        with whole_clip_passes(), torch.autocast(self._device.type, torch.bfloat16):
            mean, _ = encode_clips(self._vae, clips)
        first = number % self._rounds * size.feed
        slots = slice(first, first + size.feed)
        self._latents[slots] = ((mean.float() - self._mean) / self._std).to(torch.bfloat16)
        self._ids[slots] = caption_ids(self._tokenizer, captions(scenes)).to(self._device, non_blocking=True)

    def draw(self, batch: int, before: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random latents [batch, 16, t, h, w] and caption ids [batch, 24], of clips as fresh as they should be.

        Args:
            batch: clips to draw.
            before: clips drawn up to now.
            generator: on the pool's device.
        """
        wanted = self._initial + int((before + batch) / self._reuse / self._size.feed)
        for number in range(max(self._fed, wanted - self._rounds), wanted):
            self._feed(number)
        self._fed = wanted
        filled = min(wanted, self._rounds) * self._size.feed
        index = torch.randint(filled, (batch,), device=self._device, generator=generator)
        return self._latents[index].float(), self._ids[index]


def clip_shift(tokens: int, default_tokens: int) -> float:
    """How much more noise a clip's size needs in training, around the sampler's own shift at the default size."""
    return FLOW_SHIFT * min(2.0, max(2 / 3, math.sqrt(tokens / default_tokens)))


def drop_captions(ids: Tensor, empty: Tensor, generator: torch.Generator) -> Tensor:
    """Caption ids [B, 24] with a tenth replaced by those of the empty caption [1, 24], for guidance."""
    dropped = torch.rand(len(ids), 1, device=ids.device, generator=generator) < _CAPTION_DROPOUT
    return torch.where(dropped, empty, ids)
