"""What `dit-accel bench steps` measures: forwards of real models with random weights, at the sizes that papers use."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from dit_accel.commands.arguments import method_call, parse_method
from dit_accel.commands.baselines import compare_kernels
from dit_accel.eval.bench.steps import Candidate, Forwards, Rounds, StepCase
from dit_accel.layout import TokenLayout
from dit_accel.methods.base import AttnMethod
from dit_accel.methods.dense import DenseAttnProcessor
from dit_accel.methods.dit_fast_attn import DiTFastAttnProcessor
from dit_accel.pipelines.random_models import batch_of, random_call, random_denoiser
from dit_accel.pipelines.specs import ModelSpec, find_spec
from dit_accel.plugin import apply

EFFORTS = {  # by device and whether it is the short run
    ("cuda", False): Rounds(fewest=3, most=15, seconds=40.0),
    ("cuda", True): Rounds(fewest=3, most=9, seconds=10.0),
    ("cpu", False): Rounds(fewest=5, most=5, seconds=0.0),
    ("cpu", True): Rounds(fewest=3, most=3, seconds=0.0),
}


@dataclass(frozen=True)
class Setting:
    """A model at a size, and the methods that it runs with.

    Args:
        model: name of its spec.
        height, width, num_frames: of what it makes.
        methods: as ``--method`` takes them; a bare name is the model's preset. Their dense steps are left out.
        blocks: of each kind of block, in place of the model's. Default None: all.
    """

    model: str
    height: int
    width: int
    num_frames: int
    methods: tuple[str, ...]
    blocks: int | None = None

    @property
    def name(self) -> str:
        frames = f", {self.num_frames} frames" if self.num_frames > 1 else ""
        blocks = "" if self.blocks is None else f", {self.blocks} blocks of a kind"
        return f"{self.model}, {self.height}x{self.width}{frames}, {self.layout.num_tokens:,} tokens{blocks}"

    @property
    def layout(self) -> TokenLayout:
        return find_spec(self.model).layout(self.height, self.width, self.num_frames)

    @property
    def spec(self) -> ModelSpec:
        """The spec of the model that is made, square ones for this size."""
        spec = dataclasses.replace(find_spec(self.model), height=self.height, width=self.width)
        most = spec.num_blocks if self.blocks is None else self.blocks
        names = ("blocks", "single_blocks", "visual_blocks")
        return dataclasses.replace(spec, **{name: min(getattr(spec, name), most) for name in names})


_FIXED = ("dit_fast_attn", "dit_fast_attn(every=2, between='reuse')")
_EVERY_PAIR = "neighborhood(density=1.0)"  # beside a mask of text padding, which of the dense kernels few take

# The quick ones first: a run that is stopped keeps what it has. Published settings where there is a preset.
GPU_SETTINGS: tuple[Setting, ...] = (
    Setting("dit-xl-2-512", 512, 512, 1, _FIXED),
    Setting("pixart-sigma-1k", 1024, 1024, 1, _FIXED),
    Setting("sd3.5-large", 1024, 1024, 1, _FIXED),
    Setting("flux.1-dev", 1024, 1024, 1, ("neighborhood(density=0.1)", "grat", "clear")),
    Setting("pixart-sigma-2k", 2048, 2048, 1, _FIXED),
    Setting("pixel-dit-s", 256, 256, 1, ("log_linear(top_k=8, exclude_covered=False)", "log_linear(top_k=8)")),
    Setting("flux.1-dev", 2048, 2048, 1, ("neighborhood(density=0.1)", "grat", "clear", "dit_fast_attn")),
    Setting("wan2.1-1.3b", 480, 832, 81, ("radial", "draft(keep=0.25)", "log_linear(top_k=16)", "pyramid")),
    Setting("flux.1-dev", 4096, 4096, 1, ("neighborhood", "grat", "clear", "draft(keep=0.1)")),
    Setting("wan2.1-14b", 768, 1280, 69, ("radial",)),
    Setting("wan2.1-14b", 768, 1280, 81, ("draft", "draft(dense_blocks=1, keep=0.45)")),
    Setting(
        "wan2.1-14b",
        720,
        1280,
        81,
        ("radial", "neighborhood(density=0.2)", "grat(density=0.2)", "draft", "log_linear(top_k=16)"),
    ),
    Setting(
        "hunyuanvideo",
        768,
        1280,
        129,
        (*(f"draft(dense_blocks=2, keep={keep})" for keep in (0.1, 0.2, 0.4)), _EVERY_PAIR),
    ),
    Setting(
        "hunyuanvideo",
        768,
        1280,
        117,
        (
            "radial",
            "neighborhood",
            "neighborhood(window=(18, 24, 24))",
            "neighborhood(window=(30, 40, 40), stride=(1, 32, 8))",
            "grat",
            _EVERY_PAIR,
        ),
    ),
)
CPU_SETTINGS: tuple[Setting, ...] = (
    Setting(
        "shapes",
        96,
        128,
        9,
        ("radial", "radial(density=1.0)", "neighborhood(density=0.35)", "draft", "log_linear", "dit_fast_attn"),
        blocks=2,
    ),
    Setting("shapes-image", 128, 128, 1, ("clear", "dit_fast_attn"), blocks=1),
)


def settings(device: torch.device, quick: bool) -> tuple[Setting, ...]:
    """What fits the device; the short run makes two blocks of each kind."""
    if device.type == "cpu":
        return CPU_SETTINGS
    return tuple(dataclasses.replace(setting, blocks=2) for setting in GPU_SETTINGS) if quick else GPU_SETTINGS


def make_case(setting: Setting, device: torch.device, dtype: torch.dtype) -> StepCase:
    """The denoiser, and a copy of its modules around the same weights for each way of attention."""
    spec, layout = setting.spec, setting.layout
    model = random_denoiser(spec, device, dtype)
    arguments = random_call(spec, layout, device, dtype)
    methods = [*_dense(spec, layout, device, dtype), *_sparse(setting)]
    return StepCase(
        name=setting.name,
        model=spec.name,
        batch=batch_of(spec),
        tokens=layout.num_tokens,
        text_tokens=layout.text_tokens,
        heads=spec.heads,
        head_dim=spec.head_dim,
        dtype=dtype,
        blocks=spec.num_blocks,
        model_blocks=find_spec(setting.model).num_blocks,
        model_bytes=sum(parameter.nbytes for parameter in model.parameters()),
        warm_share=_warm_share(model),
        candidates=[_candidate(model, spec, method, arguments) for method in methods],
    )


def _dense(
    spec: ModelSpec, layout: TokenLayout, device: torch.device, dtype: torch.dtype
) -> Iterator[DenseAttnProcessor]:
    """By torch's own choice, and by every exact kernel that is faster; one that is slower is no baseline."""
    yield DenseAttnProcessor(kernel="native")
    kernels = compare_kernels(device, dtype, spec, layout)
    native = next(kernel.seconds for kernel in kernels if kernel.name == "native")
    for kernel in kernels:
        if kernel.seconds < native and not kernel.is_native:
            yield DenseAttnProcessor(kernel=kernel.name)


def _sparse(setting: Setting) -> Iterator[AttnMethod]:
    for text in setting.methods:
        method = parse_method(text, setting.model)
        yield dataclasses.replace(method, start_percent=0.0, end_percent=1.0)


@dataclass(eq=False)
class _Run:
    """As much of a pipeline as a method asks for: the denoiser and where its run is."""

    transformer: nn.Module
    scheduler: Any

    @property
    def components(self) -> dict[str, Any]:
        return {"transformer": self.transformer, "scheduler": self.scheduler}


def _candidate(model: nn.Module, spec: ModelSpec, method: AttnMethod, arguments: Mapping[str, Any]) -> Candidate:
    weights = chain(model.parameters(), model.buffers())
    own = copy.deepcopy(model, {id(tensor): tensor for tensor in weights})
    run = _Run(own, FlowMatchEulerDiscreteScheduler())
    run.scheduler.set_timesteps(spec.steps)
    handle = apply(run, method)
    forwards = method.every if isinstance(method, DiTFastAttnProcessor) else 1

    def forward() -> Forwards:
        with handle.timing() as tally:
            for step in range(forwards):
                run.scheduler.set_begin_index(step)
                output = own(**arguments)[0]
        return Forwards(output, tally)

    def warm() -> Forwards:
        with shortened(own):
            return forward()

    return Candidate(
        name=method_call(method),
        dense=isinstance(method, DenseAttnProcessor),
        run=forward,
        warm=warm,
        forwards=forwards,
        attention_only=not method.whole_modules,
    )


def _block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    return {name: child for name, child in model.named_children() if isinstance(child, nn.ModuleList)}


@contextmanager
def shortened(model: nn.Module) -> Iterator[None]:
    """The model with the first and the last block of each kind, for as long as the context lasts."""
    blocks = _block_lists(model)
    try:
        for name, found in blocks.items():
            setattr(model, name, nn.ModuleList(_ends(found)))
        yield
    finally:
        for name, found in blocks.items():
            setattr(model, name, found)


def _ends(blocks: nn.ModuleList) -> list[nn.Module]:
    """The first block, which a method may leave dense, and the last one."""
    return [blocks[0], blocks[-1]] if len(blocks) > 1 else [*blocks]


def _warm_share(model: nn.Module) -> float:
    found = _block_lists(model).values()
    return sum(len(_ends(blocks)) for blocks in found) / sum(map(len, found))


def cases(device: torch.device, dtype: torch.dtype, quick: bool) -> dict[str, Callable[[], StepCase]]:
    """What fits the device by name, each to be made when its turn comes."""
    return {setting.name: functools.partial(make_case, setting, device, dtype) for setting in settings(device, quick)}
