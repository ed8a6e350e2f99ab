"""The text encoder's own training, on captions alone, before the denoiser's.

Drawing two objects fails on binding: which shape and motion (in images, place) belong to which colour.  Every token of
an object phrase learns to tell all three, and every token of the background its colour and texture, so the denoiser
finds them bound.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from dit_accel.pipelines.shapes.kit import CAPTION_TOKENS, Kit, caption_ids
from dit_accel.pipelines.shapes.optimisation import Journal, Optimiser, Workers
from dit_accel.pipelines.shapes.recipe import DenoiserRecipe
from dit_accel.pipelines.shapes.scenes import (
    BACKGROUND_NAMES,
    COLOUR_NAMES,
    SHAPES,
    TEXTURES,
    Scenes,
    captions,
    sample_scenes,
)

_IGNORED = -100


def binding_targets(ids: Tensor, scenes: Scenes, tokenizer: PreTrainedTokenizerFast) -> list[Tensor]:
    """What each token must tell, [B, 24] for colour, shape, trait, background and texture; -100 where nothing."""
    and_id, over_id = tokenizer.convert_tokens_to_ids(["and", "over"])
    behind = (ids == over_id).cumsum(1) > 0
    owner = (ids == and_id).cumsum(1)
    padding = ids == 0
    objects = [
        values.gather(1, owner).masked_fill(behind | padding, _IGNORED)
        for values in (scenes.colour, scenes.shape, scenes.trait)
    ]
    background = [
        values[:, None].expand_as(ids).masked_fill(~behind | padding, _IGNORED)
        for values in (scenes.background, scenes.texture)
    ]
    return objects + background


def train_text_encoder(
    kit: Kit,
    pipeline: Any,
    recipe: DenoiserRecipe,
    workers: Workers,
    journal: Journal,
) -> None:
    """Trains the first text encoder in place; all workers end with the first one's weights."""
    encoder, tokenizer, traits = kit.trained(pipeline)[1], pipeline.tokenizer, kit.language.traits
    classes = [len(names) for names in (COLOUR_NAMES, SHAPES, traits, BACKGROUND_NAMES, TEXTURES)]
    generator = torch.Generator().manual_seed(4)
    heads = nn.Linear(encoder.config.d_model, sum(classes)).to(workers.device)
    optimiser = Optimiser(
        [{"params": [*encoder.parameters(), *heads.parameters()], "weight_decay": 0.0}],
        workers,
        betas=(0.9, 0.98),
        ema_decay=0.99,
    )
    loss = torch.zeros(())
    for step in range(recipe.text_steps):
        scenes = sample_scenes(recipe.text_batch, 0.75, generator, kit.language)
        ids = caption_ids(tokenizer, captions(scenes))
        targets = [target.to(workers.device) for target in binding_targets(ids, scenes, tokenizer)]
        logits = heads(kit.embed(encoder, ids.to(workers.device), CAPTION_TOKENS)).split(classes, -1)
        pairs = zip(logits, targets, strict=True)
        loss = torch.stack([F.cross_entropy(values.flatten(0, 1), target.flatten()) for values, target in pairs]).sum()
        optimiser.zero_gradients()
        loss.backward()
        share = step / recipe.text_steps
        optimiser.step(2e-3 * min(1.0, (step + 1) / 50, 2 * (1 - share)))
    optimiser.use_ema()
    workers.share_(encoder.parameters())
    journal.write("text done", steps=recipe.text_steps, loss=float(loss.detach()))
