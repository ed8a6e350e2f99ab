"""PixelDiTPipeline: images from noise, without a VAE."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

from dit_accel.pipelines.flow import shift_times
from dit_accel.pipelines.pixels.model import PixelDiT

_SIDE_WITHOUT_SHIFT = 64


def noise_shift(height: int, width: int) -> float:
    """How much more noise large images need: the mean side over 64."""
    return math.sqrt(height * width) / _SIDE_WITHOUT_SHIFT


class PixelDiTPipeline(DiffusionPipeline):  # type: ignore[misc]  # diffusers hides its types
    """Class-conditional images straight from pixels.

    Args:
        transformer: the model.
        scheduler: flow matching by Euler steps, without a shift of its own.
    """

    model_cpu_offload_seq = "transformer"
    vae_scale_factor = 1

    def __init__(self, transformer: PixelDiT, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | list[int] | None = None,
        height: int = 256,
        width: int = 256,
        num_inference_steps: int = 20,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Images, one a class label.

        Args:
            class_labels: one or several labels; None for one image of no class.
            height, width: in pixels, any. Default 256.
            num_inference_steps: default 20.
            guidance_scale: of classifier-free guidance, none at 1 (default).
            generator: of the initial noise.
            output_type: "pil" (default), "np", "pt" or "latent", the last in [-1, 1] without a clamp.
            return_dict: False returns a tuple.

        Returns:
            An ``ImagePipelineOutput``.

        Raises:
            ValueError: labels or guidance for a model without classes, or a label that it does not have.
        """
        batch, guided = len(class_labels) if isinstance(class_labels, list) else 1, guidance_scale != 1
        self._check(class_labels, guided)
        device, dtype = self._execution_device, self.transformer.dtype
        shape = (batch, self.transformer.config.channels, height, width)
        images = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        times = shift_times(np.linspace(1, 1 / num_inference_steps, num_inference_steps), noise_shift(height, width))
        self.scheduler.set_timesteps(sigmas=times.tolist(), device=device)
        labels = None if class_labels is None else torch.tensor(class_labels, device=device).view(batch)
        if guided and labels is not None:
            labels = torch.cat([labels, torch.full_like(labels, self.transformer.config.num_classes)])
        for time in self.progress_bar(self.scheduler.timesteps):
            noisy = (torch.cat([images, images]) if guided else images).to(dtype)
            velocity = self.transformer(noisy, time.expand(len(noisy)), labels, return_dict=False)[0].float()
            if guided:
                wanted, plain = velocity.chunk(2)
                velocity = plain + guidance_scale * (wanted - plain)
            images = self.scheduler.step(velocity, time, images, return_dict=False)[0]
        if output_type != "latent":
            images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images) if return_dict else (images,)

    def _check(self, class_labels: int | list[int] | None, guided: bool) -> None:
        """Raise a ValueError for labels that the model cannot draw, and for guidance without labels."""
        if guided and class_labels is None:
            raise ValueError("guidance_scale other than 1 needs class_labels, got None; pass labels or leave it at 1.")
        classes = self.transformer.config.num_classes or 0
        given = [class_labels] if isinstance(class_labels, int) else class_labels or []
        wrong = [label for label in given if not 0 <= label < classes]
        if wrong:
            known = f"in 0 to {classes - 1}" if classes else "None, because the model knows no classes"
            raise ValueError(f"class_labels must be {known}, got {wrong[0]}.")
