"""What a plan has to keep, or how long it may take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast, get_args

Kind = Literal["psnr", "relative_error", "kept_mass", "seconds", "speedup"]
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True)
class Measured:
    """What a plan was measured to give, the mean over prompts unless said otherwise.

    Args:
        seconds: of the denoising loop.
        speedup: over dense attention.
        relative_error: norm of the difference to the dense output over that of the dense output, of the worst prompt.
        psnr: in dB; None where runs end at latents.
        density: share of the query-key pairs computed.
    """

    seconds: float
    speedup: float
    relative_error: float
    psnr: float | None
    density: float

    def __str__(self) -> str:
        quality = f"a relative error of {self.relative_error:.3f}" if self.psnr is None else f"{self.psnr:.1f} dB"
        return f"{quality} at {self.speedup:.2f}x"


@dataclass(frozen=True)
class Budget:
    """A floor of quality, under which time is least, or a limit of time, under which quality is best.

    Args:
        kind: "psnr" in dB against dense attention, of the mean prompt; "relative_error" of the final latents, of the
            worst prompt; "kept_mass", the share of the softmax that every layer keeps in the mean over its heads;
            "seconds" of the denoising loop; "speedup" of it.
        value: what is asked for.
    """

    kind: Kind
    value: float

    def __post_init__(self) -> None:
        ranges = {"kept_mass": (0.0, 1.0), "relative_error": (0.0, 1.0), "speedup": (1.0, float("inf"))}
        low, high = ranges.get(self.kind, (0.0, float("inf")))
        if not low < self.value < high:
            raise ValueError(f"--budget {self.kind} must be above {low:g} and below {high:g}, got {self.value:g}.")

    def __str__(self) -> str:
        return f"{self.kind}={self.value:g}"

    @property
    def of_quality(self) -> bool:
        """Whether it is a floor of quality."""
        return self.kind in ("psnr", "relative_error", "kept_mass")

    @property
    def on_latents(self) -> bool:
        """Whether runs need to go no further than latents."""
        return self.kind == "relative_error"

    def met(self, measured: Measured) -> bool:
        """Whether a plan does what is asked; a kept mass is seen to by the choice itself."""
        if self.kind == "psnr":
            return measured.psnr is not None and measured.psnr >= self.value
        if self.kind == "relative_error":
            return measured.relative_error <= self.value
        if self.kind == "seconds":
            return measured.seconds <= self.value
        return self.kind == "kept_mass" or measured.speedup >= self.value


def parse_budget(text: str) -> Budget:
    """A budget as it is written: ``psnr=28``.

    Raises:
        ValueError: anything else, or a value out of range.
    """
    kind, _, value = text.partition("=")
    try:
        if kind in KINDS:
            return Budget(cast(Kind, kind), float(value))
    except ValueError as error:
        if "--budget" in str(error):
            raise
    examples = "psnr=28, relative_error=0.05, kept_mass=0.95, seconds=12 or speedup=1.8"
    raise ValueError(f"--budget is written like {examples}, got {text!r}.")
