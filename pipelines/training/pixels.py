"""Images of one object, told its class, by a PixelDiT."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from dit_accel.pipelines import seeds
from dit_accel.pipelines.flow import FlowBatch, flow_batch
from dit_accel.pipelines.pixels.model import PixelDiT
from dit_accel.pipelines.pixels.pipeline import PixelDiTPipeline, noise_shift
from dit_accel.pipelines.shapes.render import render
from dit_accel.pipelines.shapes.scenes import COLOUR_NAMES, SHAPES, Scenes, sample_scenes
from dit_accel.pipelines.specs import find_spec
from dit_accel.pipelines.training.task import Draw, Feed, Task

CLASSES = tuple(f"{colour} {shape}" for colour in COLOUR_NAMES for shape in SHAPES)
_LABEL_DROPOUT = 0.1


def class_labels(scenes: Scenes) -> torch.Tensor:
    """Index into ``CLASSES`` of each scene's first object, [B]."""
    return scenes.colour[:, 0] * len(SHAPES) + scenes.shape[:, 0]


def build(pretrained: Path | None) -> PixelDiTPipeline:
    """A saved pipeline, or a fresh DiT-S."""
    if pretrained is None:
        return PixelDiTPipeline(PixelDiT(num_classes=len(CLASSES)), FlowMatchEulerDiscreteScheduler())
    saved: PixelDiTPipeline = PixelDiTPipeline.from_pretrained(pretrained, dtype=torch.float32)
    return saved


def feed(pipeline: PixelDiTPipeline, feed: Feed) -> Draw:
    """Rendered images, a tenth of them without their label; batch n is the same however many processes there are."""
    _, height, width = feed.size

    def draw(number: int) -> FlowBatch:
        cpu, device = (seeds.generator(kind, feed.seed, number) for kind in ("cpu", feed.device))
        scenes = sample_scenes(feed.batch, 0.0, cpu)
        images = render(scenes, height, width, 1, device)[:, :, 0]
        dropped = torch.rand(feed.batch, generator=cpu) < _LABEL_DROPOUT
        labels = torch.where(dropped, len(CLASSES), class_labels(scenes)).to(feed.device)
        return flow_batch(images, noise_shift(height, width), device, {"class_labels": labels})

    return draw


PIXELS = Task(spec=find_spec("pixel-dit-s"), fresh=True, build=build, feed=feed)
