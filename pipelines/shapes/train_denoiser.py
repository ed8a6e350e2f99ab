"""The denoiser's training: flow matching on pools of encoded clips."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels.block_sparse.plan import Triple
from dit_accel.pipelines.flow import flow_batch
from dit_accel.pipelines.shapes.batches import LatentPool, drop_captions
from dit_accel.pipelines.shapes.kit import Kit, caption_ids
from dit_accel.pipelines.shapes.optimisation import Clock, Journal, Optimiser, Workers
from dit_accel.pipelines.shapes.recipe import ClipSize, DenoiserRecipe, Recipe

SHORT_TEXT, LONG_TEXT = 32, 512
_ATTENTION_TOKENS = 6000  # tokens at which attention costs as much as the rest of a step
_TEXT_ENCODER_RATE = 0.25


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
    """Everything that one training step of transformer and text encoders needs."""

    def __init__(self, kit: Kit, pipeline: Any, recipe: Recipe, workers: Workers, journal: Journal) -> None:
        self.kit, self.pipeline, self.recipe, self.workers, self.journal = kit, pipeline, recipe, workers, journal
        self.modules = kit.trained(pipeline)
        groups = [
            {
                "params": [p for p in module.parameters() if (p.ndim >= 2) == decayed],
                "weight_decay": 0.02 * decayed,
                "rate": 1.0 if module is pipeline.transformer else _TEXT_ENCODER_RATE,
            }
            for module in self.modules
            for decayed in (True, False)
        ]
        for module in self.modules:
            workers.share_(parameter.data for parameter in module.parameters())
        self.optimiser = Optimiser(groups, workers, betas=(0.9, 0.98), ema_decay=0.999)
        empty = caption_ids(pipeline.tokenizer, [""])
        self._empty = empty.to(workers.device)
        self._pools: dict[str, LatentPool] = {}
        self._drawn: dict[str, int] = {}
        self._generator = torch.Generator(workers.device)

    def loss(self, latents: Tensor, ids: Tensor, text_length: int, grid: Triple) -> Tensor:
        """Mean squared error of the predicted velocity."""
        ids = drop_captions(ids, self._empty, self._generator)
        shift = self.kit.shift(math.prod(grid))
        with torch.autocast(latents.device.type, torch.bfloat16):
            conditions = self.kit.conditions(self.pipeline, ids, text_length, grid)
            batch = flow_batch(latents, shift, self._generator, conditions, self.kit.last_time)
            velocity = batch.predicted_by(self.pipeline.transformer)
        return F.mse_loss(velocity, batch.velocity)

    def compile(self) -> None:
        """Compiles the transformer blocks for any shape; where the compiler fails, says so and stays eager."""
        torch._dynamo.config.cache_size_limit = 64  # all blocks share one compiled function
        transformer = self.pipeline.transformer
        transformer.compile_repeated_blocks(fullgraph=True, dynamic=True)
        try:
            for batch, length, grid in ((4, SHORT_TEXT, (1, 16, 16)), (3, LONG_TEXT, (1, 20, 26))):
                latents = torch.randn(batch, *self.kit.latent_shape(grid), device=self.workers.device)
                self.loss(latents, self._empty.expand(batch, -1), length, grid).backward()
        except Exception as error:  # the compiler's failures have no common class
            print(f"training goes on without compilation: {type(error).__name__}: {str(error)[:500]}", flush=True)
            for module in transformer.modules():
                module._compiled_call_impl = None
        self.optimiser.zero_gradients()

    def _draw(self, name: str, batch: int) -> tuple[Tensor, Tensor]:
        if name not in self._pools:
            offset = 10 + list(self.recipe.denoiser.sizes).index(name) + 7 * self.optimiser.steps
            size, seed = self.recipe.denoiser.sizes[name], self.workers.seed(offset)
            parts = (self.pipeline.vae, self.pipeline.tokenizer)
            self._pools[name] = LatentPool(self.kit, size, *parts, seed, self.recipe.denoiser.reuse, self.workers.world)
        drawn = self._drawn.get(name, 0)
        self._drawn[name] = drawn + batch
        return self._pools[name].draw(batch, drawn, self._generator)

    def _step(self, name: str, text_length: int, learning_rate: float) -> Tensor:
        recipe = self.recipe.denoiser
        batch = max(2, recipe.tokens_per_step // recipe.sizes[name].tokens)
        latents, ids = self._draw(name, batch)
        self.optimiser.zero_gradients()
        loss = self.loss(latents, ids, text_length, recipe.sizes[name].grid)
        loss.backward()
        self.optimiser.step(learning_rate)
        return loss.detach()

    def run(self, clock: Clock, save: Callable[[Clock], None]) -> None:
        """Trains until the clock stops, saving a checkpoint every ``save_every`` seconds."""
        recipe, settings = self.recipe, self.recipe.denoiser
        self._generator.manual_seed(self.workers.seed(5) + self.optimiser.steps)
        rng = random.Random(self.optimiser.steps)  # the same sizes on every worker
        losses, fresh_steps, tokens = _Losses(), 0, 0
        saved = logged = clock.spent
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
