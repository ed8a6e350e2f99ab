"""The VAE's training: whole clips in one pass, small clips first, the rate falling to nearly zero with an EMA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dit_accel.pipelines.shapes.kit import Kit
from dit_accel.pipelines.shapes.optimisation import Clock, Journal, Optimiser, Workers
from dit_accel.pipelines.shapes.recipe import Recipe
from dit_accel.pipelines.shapes.render import render
from dit_accel.pipelines.shapes.scenes import captions, sample_scenes
from dit_accel.pipelines.shapes.verifier import score_clip

_WARMUP_STEPS = 60
_TWO_OBJECTS = 0.5


def _loss(kit: Kit, vae: Any, clips: Tensor) -> tuple[Tensor, Tensor]:
    """The training loss, and the mean squared error [] of the reconstruction."""
    with torch.autocast(clips.device.type, torch.bfloat16):
        mean, logvar = kit.encode(vae, clips)
        mean, logvar = mean.float(), logvar.float().clamp(-20, 10)
        sampled = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        error = kit.decode(vae, sampled).float() - clips
    gradient = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    # Squared error keeps small bright objects, which absolute error alone, favouring the median, would drop.
    squared = error.square().mean()
    return 0.3 * error.abs().mean() + 3 * squared + 0.3 * gradient + 1e-4 * divergence, squared.detach()


def _psnr(squared: Tensor) -> Tensor:
    """Decibels for a mean squared error of values in [-1, 1]."""
    return -10 * torch.log10(squared / 4)


def train_vae(kit: Kit, vae: Any, recipe: Recipe, clock: Clock, workers: Workers, journal: Journal) -> None:
    """Trains the VAE in place until the clock stops, and tells it the mean and deviation of its latents."""
    settings = recipe.vae
    cpu, device = (torch.Generator(kind).manual_seed(workers.seed(1)) for kind in ("cpu", workers.device))
    torch.manual_seed(workers.seed(2))
    optimiser = Optimiser(
        [{"params": list(vae.parameters()), "weight_decay": 0.0}], workers, betas=(0.9, 0.95), ema_decay=0.995
    )
    errors: list[Tensor] = []
    with kit.passes():
        while True:
            if optimiser.steps % recipe.check_every == 0:
                clock.look()
                if clock.stop:
                    break
            later = settings.sizes[1 + optimiser.steps % (len(settings.sizes) - 1)]
            height, width, frames, batch = settings.sizes[0] if clock.share < settings.first_share else later
            clips = render(sample_scenes(batch, _TWO_OBJECTS, cpu, kit.language), height, width, frames, device)
            optimiser.zero_gradients()
            loss, squared = _loss(kit, vae, clips)
            loss.backward()
            warm = min(1.0, (optimiser.steps + 1) / _WARMUP_STEPS)
            optimiser.step(settings.learning_rate * warm * max(0.01, min(1.0, (1 - clock.share) / 0.6)))
            errors.append(squared)
            if optimiser.steps % recipe.log_every == 0:
                psnr = float(_psnr(torch.stack(errors).mean()))
                journal.write("vae", step=optimiser.steps, share=clock.share, psnr=psnr)
                errors = []
        optimiser.use_ema()
        vae.eval().requires_grad_(False)
        _measure(kit, vae, recipe, workers, journal)


@torch.no_grad()
def _measure(kit: Kit, vae: Any, recipe: Recipe, workers: Workers, journal: Journal) -> None:
    height, width, frames, batch = recipe.vae.evaluation
    cpu, device = (torch.Generator(kind).manual_seed(workers.seed(3)) for kind in ("cpu", workers.device))
    moments, squared, correct = [], [], 0
    for _ in range(recipe.vae.evaluation_batches):
        scenes = sample_scenes(batch, _TWO_OBJECTS, cpu, kit.language)
        clips = render(scenes, height, width, frames, device)
        with torch.autocast(workers.device.type, torch.bfloat16):
            latents = kit.encode(vae, clips)[0]
            decoded = kit.decode(vae, latents).float().clamp(-1, 1)
        latents = latents.float().transpose(0, 1).flatten(1)
        moments.append(torch.stack([latents.mean(1), latents.square().mean(1)]))
        squared.append((decoded - clips).square().mean((1, 2, 3, 4)))
        shown = ((decoded + 1) / 2).permute(0, 2, 3, 4, 1).cpu().numpy()
        pairs = zip(shown, captions(scenes), strict=True)
        correct += sum(score_clip(clip, text, kit.language).correct for clip, text in pairs)
    mean, square = workers.average_(torch.stack(moments).mean(0))
    std = (square - mean.square()).sqrt()
    kit.standardise(vae, mean, std)
    psnr = _psnr(torch.cat(squared))
    journal.write(
        "vae done",
        psnr=float(psnr.mean()),
        lowest_psnr=float(psnr.min()),
        verified=correct / (batch * recipe.vae.evaluation_batches),
        latents_mean=[round(value, 3) for value in mean.tolist()],
        latents_std=[round(value, 3) for value in std.tolist()],
    )
