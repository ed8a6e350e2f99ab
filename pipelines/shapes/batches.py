"""What a denoiser is trained on: pools of encoded clips, drawn from and refreshed on the GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dit_accel.pipelines import seeds
from dit_accel.pipelines.shapes.kit import CAPTION_TOKENS, Kit, caption_ids
from dit_accel.pipelines.shapes.recipe import ClipSize
from dit_accel.pipelines.shapes.render import render
from dit_accel.pipelines.shapes.scenes import captions, sample_scenes

_CAPTION_DROPOUT = 0.1


class LatentPool:
    """A ring of encoded clips of one size with their caption ids; fresh clips overwrite the oldest.

    Feeds are numbered and seeded by their number, so a pool whose first draw comes late holds what it would hold had
    all draws before been made.

    Args:
        kit: of the pipeline.
        size: of the clips, and how many are rendered at once, kept, and there at first.
        vae, tokenizer: of the pipeline; latents lie on the VAE's device.
        seed: of the clips.
        reuse: draws of a clip, on average, before a fresh one takes its place.
        share: processes that share the size's clips among them, each with a pool of its own. Default 1.
    """

    def __init__(
        self,
        kit: Kit,
        size: ClipSize,
        vae: Any,
        tokenizer: PreTrainedTokenizerFast,
        seed: int,
        reuse: float,
        share: int = 1,
    ) -> None:
        self._kit, self._size, self._vae, self._tokenizer = kit, size, vae, tokenizer
        self._seed, self._reuse = seed, reuse
        self._device = torch.device(vae.device)
        self._rounds = max(1, size.pool // share // size.feed)  # feeds that the ring holds
        self._initial = -(-size.initial // share // size.feed)
        shape = (self._rounds * size.feed, *kit.latent_shape(size.grid))
        self._latents = torch.empty(shape, dtype=torch.bfloat16, device=self._device)
        self._ids = torch.empty(len(self._latents), CAPTION_TOKENS, dtype=torch.long, device=self._device)
        self._fed = 0

    @torch.no_grad()
    def _feed(self, number: int) -> None:
        size = self._size
        cpu, device = (seeds.generator(kind, self._seed, number) for kind in ("cpu", self._device))
        scenes = sample_scenes(size.feed, size.two_objects, cpu, self._kit.language)
        clips = render(scenes, size.height, size.width, size.frames, device)
        with self._kit.passes(), torch.autocast(self._device.type, torch.bfloat16):
            mean, _ = self._kit.encode(self._vae, clips)
        first = number % self._rounds * size.feed
        slots = slice(first, first + size.feed)
        self._latents[slots] = self._kit.clean(self._vae, mean.float()).to(torch.bfloat16)
        self._ids[slots] = caption_ids(self._tokenizer, captions(scenes)).to(self._device, non_blocking=True)

    def draw(self, batch: int, before: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random latents [batch, ...], as the denoiser takes them, and caption ids [batch, 24], as fresh as need be.

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


def drop_captions(ids: Tensor, empty: Tensor, generator: torch.Generator) -> Tensor:
    """Caption ids [B, 24] with a tenth replaced by those of the empty caption [1, 24], for guidance."""
    dropped = torch.rand(len(ids), 1, device=ids.device, generator=generator) < _CAPTION_DROPOUT
    return torch.where(dropped, empty, ids)
