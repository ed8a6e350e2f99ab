"""Clips of coloured shapes with captions, by the embedded pipeline or one of its kind."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import WanPipeline

from dit_accel.pipelines import seeds, shapes
from dit_accel.pipelines.flow import FlowBatch, flow_batch
from dit_accel.pipelines.shapes.batches import LatentPool, drop_captions
from dit_accel.pipelines.shapes.kit import caption_ids
from dit_accel.pipelines.shapes.models import KIT, clip_shift, embed
from dit_accel.pipelines.shapes.recipe import FULL, ClipSize
from dit_accel.pipelines.specs import find_spec
from dit_accel.pipelines.training.task import Draw, Feed, Task

_SPEC = find_spec("shapes")
_DEFAULT = FULL.denoiser.sizes["default"]
_BATCHES_KEPT, _BATCHES_AT_FIRST = 256, 8  # of latents, in the pools of all processes together


def build(pretrained: Path | None) -> WanPipeline:
    """A saved pipeline, or the embedded one."""
    return shapes.load() if pretrained is None else WanPipeline.from_pretrained(pretrained, dtype=torch.float32)


def feed(pipeline: WanPipeline, feed: Feed) -> Draw:
    """Latents of rendered clips, a tenth of them without their caption; every process has a pool of its own."""
    frames, height, width = feed.size
    tokens = _SPEC.layout(height, width, frames).num_tokens
    at_once = max(1, min(_DEFAULT.feed, _DEFAULT.feed * _DEFAULT.tokens // tokens))
    joint = feed.batch * feed.processes
    size = ClipSize(
        height, width, frames, at_once, _BATCHES_KEPT * joint, _BATCHES_AT_FIRST * joint, _DEFAULT.two_objects
    )
    seed = feed.seed * feed.processes + feed.process
    pool = LatentPool(KIT, size, pipeline.vae, pipeline.tokenizer, seed, FULL.denoiser.reuse, feed.processes)
    empty = caption_ids(pipeline.tokenizer, [""]).to(feed.device)

    @torch.no_grad()
    def draw(number: int) -> FlowBatch:
        generator = seeds.generator(feed.device, feed.seed, number)
        latents, ids = pool.draw(feed.batch, number // feed.processes * feed.batch, generator)
        text = embed(pipeline.text_encoder, drop_captions(ids, empty, generator), shapes.DEFAULT_TEXT_LENGTH)
        return flow_batch(latents, clip_shift(tokens), generator, {"encoder_hidden_states": text})

    return draw


SHAPES = Task(spec=_SPEC, fresh=False, build=build, feed=feed)
