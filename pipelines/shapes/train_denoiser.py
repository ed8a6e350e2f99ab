"""The denoiser's training: flow matching on pools of encoded clips that are drawn from and refreshed on the GPU."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dit_accel.pipelines.shapes.models import (
    FLOW_SHIFT,
    LATENT_CHANNELS,
    encode_clips,
    latent_statistics,
    whole_clip_passes,
)
from dit_accel.pipelines.shapes.optimisation import Clock, Journal, Optimiser, Workers
from dit_accel.pipelines.shapes.recipe import ClipSize, DenoiserRecipe, Recipe
from dit_accel.pipelines.shapes.render import render
from dit_accel.pipelines.shapes.scenes import captions, sample_scenes
from dit_accel.pipelines.shapes.train_text import caption_ids, embed

SHORT_TEXT, LONG_TEXT = 32, 512
_CAPTION_DROPOUT = 0.1
_UNIFORM_TIME_SHARE = 0.1
_ATTENTION_TOKENS = 6000  # tokens at which attention costs as much as the rest of a step
_TEXT_ENCODER_RATE = 0.25


class LatentPool:
    """A ring of encoded clips of one size with their caption ids; fresh clips overwrite the oldest."""

    def __init__(
        self, size: ClipSize, vae: AutoencoderKLWan, tokenizer: PreTrainedTokenizerFast, workers: Workers, seed: int
    ) -> None:
        self.size, self._vae, self._tokenizer = size, vae, tokenizer
        self._cpu, self._device = (
            torch.Generator(kind).manual_seed(workers.seed(seed)) for kind in ("cpu", workers.device)
        )
        capacity = size.pool // workers.world // size.feed * size.feed
        self._latents = torch.empty(
            capacity, LATENT_CHANNELS, *size.latent_shape, dtype=torch.bfloat16, device=workers.device
        )
        self._ids = torch.empty(capacity, len(self._tokenize([""])[0]), dtype=torch.long, device=workers.device)
        self._mean, self._std = latent_statistics(vae, workers.device)
        self._filled = self._next = 0
        self._owed = 0.0
        for _ in range(-(-size.initial // workers.world // size.feed)):
            self._feed()

    def _tokenize(self, texts: list[str]) -> Tensor:
        return caption_ids(self._tokenizer, texts)

    @torch.no_grad()
    def _feed(self) -> None:
        size = self.size
        scenes = sample_scenes(size.feed, size.two_objects, self._cpu)
        clips = render(scenes, size.height, size.width, size.frames, self._device)
        with torch.autocast(clips.device.type, torch.bfloat16):
            mean, _ = encode_clips(self._vae, clips)
        slots = slice(self._next, self._next + size.feed)
        self._latents[slots] = (mean.float() - self._mean) / self._std
        self._ids[slots] = self._tokenize(captions(scenes)).to(self._ids.device, non_blocking=True)
        self._filled = max(self._filled, slots.stop)
        self._next = slots.stop % len(self._latents)

    def draw(self, batch: int, reuse: float) -> tuple[Tensor, Tensor]:
        """Random latents [batch, 16, t, h, w] and caption ids; renders one fresh clip for every ``reuse`` drawn."""
        self._owed += batch / reuse
        while self._owed >= self.size.feed:
            self._feed()
            self._owed -= self.size.feed
        index = torch.randint(self._filled, (batch,), device=self._ids.device)
        return self._latents[index].float(), self._ids[index]


@dataclass
class _Losses:
    """Losses by clip size, kept on the device until they are read."""

    values: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, name: str, loss: Tensor) -> None:
        self.values.setdefault(name, []).append(loss)

    def read(self) -> dict[str, float]:
        means = {name: float(torch.stack(losses).mean()) for name, losses in self.values.items()}
        self.values.clear()
        return means


def _noise_times(batch: int, tokens: int, default_tokens: int, device: torch.device) -> Tensor:
    """Noise shares [B] in [0, 1]: mostly logit-normal, shifted to more noise for larger clips."""
    shift = FLOW_SHIFT * min(2.0, max(2 / 3, math.sqrt(tokens / default_tokens)))
    time = torch.randn(batch, device=device).sigmoid()
    time = torch.where(torch.rand(batch, device=device) < _UNIFORM_TIME_SHARE, torch.rand_like(time), time)
    return shift * time / (1 + (shift - 1) * time)


def _choose_size(sizes: dict[str, ClipSize], recipe: DenoiserRecipe, share: float, rng: random.Random) -> str:
    """A clip size, such that the phase's shares of the time hold although steps of large clips take longer."""
    phase = next(phase for phase in reversed(recipe.phases) if share >= phase.start)
    cost = {name: 1 + sizes[name].tokens / _ATTENTION_TOKENS for name in phase.shares}
    return rng.choices(list(cost), [phase.shares[name] / cost[name] for name in cost])[0]


def _learning_rate(recipe: DenoiserRecipe, steps: int, share: float) -> float:
    warm = min(1.0, (steps + 1) / recipe.warmup_steps)
    decay = max(0.0, (share - recipe.decay_start) / (1 - recipe.decay_start))
    return recipe.learning_rate * warm * max(0.02, 0.5 * (1 + math.cos(math.pi * min(1.0, decay))))


class DenoiserTraining:
    """Everything that one training step of transformer and text encoder needs."""

    def __init__(self, pipeline: WanPipeline, recipe: Recipe, workers: Workers, journal: Journal) -> None:
        self.pipeline, self.recipe, self.workers, self.journal = pipeline, recipe, workers, journal
        self.transformer: WanTransformer3DModel = pipeline.transformer
        modules = {self.transformer: 1.0, pipeline.text_encoder: _TEXT_ENCODER_RATE}
        groups = [
            {
                "params": [p for p in module.parameters() if (p.ndim >= 2) == decayed],
                "weight_decay": 0.02 * decayed,
                "rate": rate,
            }
            for module, rate in modules.items()
            for decayed in (True, False)
        ]
        for module in modules:
            workers.share_(parameter.data for parameter in module.parameters())
        self.optimiser = Optimiser(groups, workers, betas=(0.9, 0.98), ema_decay=0.999)
        empty = caption_ids(pipeline.tokenizer, [""])
        self._empty = empty.to(workers.device)
        self._default_tokens = recipe.denoiser.sizes["default"].tokens
        self._pools: dict[str, LatentPool] = {}

    def loss(self, latents: Tensor, ids: Tensor, text_length: int) -> Tensor:
        """Mean squared error of the predicted velocity."""
        device, batch = latents.device, len(latents)
        ids = torch.where(torch.rand(batch, 1, device=device) < _CAPTION_DROPOUT, self._empty, ids)
        time = _noise_times(batch, latents[0, 0].numel(), self._default_tokens, device)
        share = time.view(-1, 1, 1, 1, 1)
        noise = torch.randn_like(latents)
        with torch.autocast(device.type, torch.bfloat16):
            velocity = self.transformer(
                hidden_states=torch.lerp(latents, noise, share).to(torch.bfloat16),
                timestep=time * 1000,
                encoder_hidden_states=embed(self.pipeline.text_encoder, ids, text_length),
                return_dict=False,
            )[0]
        return F.mse_loss(velocity.float(), noise - latents)

    def compile(self) -> None:
        """Compiles the transformer blocks for any shape; where the compiler fails, says so and stays eager."""
        torch._dynamo.config.cache_size_limit = 64  # all blocks share one compiled function
        self.transformer.compile_repeated_blocks(fullgraph=True, dynamic=True)
        try:
            for shape, length in (((4, 3, 16, 16), SHORT_TEXT), ((3, 5, 20, 26), LONG_TEXT)):
                latents = torch.randn(shape[0], LATENT_CHANNELS, *shape[1:], device=self.workers.device)
                self.loss(latents, self._empty.expand(shape[0], -1), length).backward()
        except Exception as error:  # the compiler's failures have no common class
            print(f"training goes on without compilation: {type(error).__name__}: {str(error)[:500]}", flush=True)
            for block in self.transformer.blocks:
                block._compiled_call_impl = None
        self.optimiser.zero_gradients()

    def _pool(self, name: str) -> LatentPool:
        if name not in self._pools:
            seed = 10 + list(self.recipe.denoiser.sizes).index(name) + 7 * self.optimiser.steps
            size = self.recipe.denoiser.sizes[name]
            self._pools[name] = LatentPool(size, self.pipeline.vae, self.pipeline.tokenizer, self.workers, seed)
        return self._pools[name]

    def _step(self, name: str, text_length: int, learning_rate: float) -> Tensor:
        recipe = self.recipe.denoiser
        batch = max(2, recipe.tokens_per_step // recipe.sizes[name].tokens)
        latents, ids = self._pool(name).draw(batch, recipe.reuse)
        self.optimiser.zero_gradients()
        loss = self.loss(latents, ids, text_length)
        loss.backward()
        self.optimiser.step(learning_rate)
        return loss.detach()

    def run(self, clock: Clock, save: Callable[[Clock], None]) -> None:
        """Trains until the clock stops, saving a checkpoint every ``save_every`` seconds."""
        recipe, settings = self.recipe, self.recipe.denoiser
        torch.manual_seed(self.workers.seed(5) + self.optimiser.steps)
        rng = random.Random(self.optimiser.steps)  # the same sizes on every worker
        losses, fresh_steps, tokens = _Losses(), 0, 0
        saved = logged = clock.spent
        with whole_clip_passes():
            while True:
                if fresh_steps % recipe.check_every == 0:
                    clock.look()
                    if clock.stop:
                        break
                    if clock.spent - saved > recipe.save_every:
                        save(clock)
                        saved = clock.spent
                name = _choose_size(settings.sizes, settings, clock.share, rng)
                long_text = clock.share >= settings.phases[1].start and rng.random() < settings.long_text_share
                rate = _learning_rate(settings, fresh_steps, clock.share)
                losses.add(name, self._step(name, LONG_TEXT if long_text else SHORT_TEXT, rate))
                fresh_steps += 1
                tokens += max(2, settings.tokens_per_step // settings.sizes[name].tokens) * settings.sizes[name].tokens
                if fresh_steps % recipe.log_every == 0:
                    means = losses.read()
                    self.journal.write(
                        "denoiser",
                        step=self.optimiser.steps,
                        share=clock.share,
                        learning_rate=rate,
                        tokens_per_second=round(tokens * self.workers.world / (clock.spent - logged)),
                        loss={key: round(value, 4) for key, value in means.items()},
                    )
                    tokens, logged = 0, clock.spent
        save(clock)
