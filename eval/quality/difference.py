"""Where two clips differ, as a picture."""

from __future__ import annotations

from typing import Any

import numpy as np

from dit_accel.eval.colours import colour_map
from dit_accel.eval.frames import Frames, as_pair

GAIN = 4.0


def difference_map(
    frames: Frames,  # [T, H, W, 3]
    reference: Frames,  # [T, H, W, 3]
    gain: float = GAIN,
) -> np.ndarray[Any, np.dtype[np.uint8]]:  # [T, H, W, 3]
    """The absolute difference, averaged over channels and amplified, in a perceptual colour map.

    The gain is fixed, not fitted to each clip, so that maps of different methods can be compared by eye: with the
    default of 4 a difference of a quarter of the range is the brightest colour.

    Raises:
        ValueError: for malformed clips, or a frame count or size that does not match.
    """
    clip, target = as_pair(frames, reference)
    return np.stack(
        [colour_map(((x - y).abs().mean(-1) * gain).cpu().numpy()) for x, y in zip(clip, target, strict=True)]
    )
