"""`dit-accel tune`: finds which attention each step and layer can do without on this machine, as a plan on disk."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch

from dit_accel.commands.arguments import add_settings, read_prompts
from dit_accel.commands.models import Model, Request, call_arguments, generate, load, target_device, warm_up
from dit_accel.eval.machine import machine
from dit_accel.eval.rates import matmul_rate
from dit_accel.methods.base import AttnMethod
from dit_accel.methods.kept import KEEPS
from dit_accel.pipelines.families import FAMILIES
from dit_accel.pipelines.specs import SPECS, ModelSpec
from dit_accel.tuned_plan import Metric, TunedPlan
from dit_accel.tuning.budget import parse_budget
from dit_accel.tuning.candidates import METHODS, REUSING
from dit_accel.tuning.forecast import forecast
from dit_accel.tuning.profile import onlooker
from dit_accel.tuning.report import in_words, plot, table, write_curve
from dit_accel.tuning.runner import Facts, Runner, Sample
from dit_accel.tuning.search import DEFAULT_BUDGET, Found, Options
from dit_accel.tuning.searches import SEARCHES

_DTYPES = {"cpu": "float32", "cuda": "bfloat16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser)
    parser.add_argument(
        "--budget",
        help="psnr=DB, relative_error=SHARE or kept_mass=SHARE to keep in the least time, or seconds=S or speedup=X to "
        "reach with the best quality (default psnr=28; none for the published searches)",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[*METHODS, *REUSING],
        metavar="METHOD",
        help="what to choose from: methods, method(option=value, ...), or actions in turn such as full/reuse, "
        f"full/band+residual, full+share (default {' '.join([*METHODS, *REUSING])})",
    )
    parser.add_argument(
        "--prompts", default="2", help="file with a prompt a line, or how many of the embedded model's (default 2)"
    )
    parser.add_argument(
        "--groups", type=int, help="groups of steps that choose for themselves (default steps / 3, to 5)"
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="own: begin no run that would end later (default 5)")
    parser.add_argument("--search", default="own", choices=tuple(SEARCHES), help="own (default) or a published one")
    parser.add_argument("--keep", default="device", choices=KEEPS, help="where tensors wait for later steps")
    parser.add_argument("--delta", type=float, default=0.05, help="threshold of the published searches (default 0.05)")
    parser.add_argument("--dry-run", action="store_true", help="predict from a short measurement; needs no weights")
    parser.add_argument("--output", type=Path, default=Path("plan.json"), help="file of the plan (default plan.json)")


def run(options: argparse.Namespace) -> int:
    settings = _settings(options)
    if options.dry_run:
        return _predict(options, settings)
    if options.output.suffix != ".json" or not options.output.absolute().parent.is_dir():
        raise ValueError(f"--output must be a .json file in a folder that exists, got {options.output}.")
    prompts = read_prompts(options.prompts, options.model)
    model = load(options.model, options.device, options.dtype)
    first = model.request(options, prompts[0], options.seed)
    requests = [replace(first, prompt=prompt, seed=options.seed + number) for number, prompt in enumerate(prompts)]
    facts = facts_of(model.spec, first, model.device, model.pipe.transformer.dtype, options.backend)
    print(
        f"{model.name}: {len(prompts)} prompts, {facts.layout.num_tokens:,} tokens, "
        f"{settings.budget or f'delta={settings.delta:g}'}, {model.device}"
    )
    try:
        found = SEARCHES[options.search](_runner(model, requests, facts, settings, options), settings)
    except KeyboardInterrupt:
        print("\nstopped; nothing is written.")
        return 130
    _write(options, settings, model, requests, facts, found)
    return 0


def _settings(options: argparse.Namespace) -> Options:
    if options.minutes <= 0:
        raise ValueError(f"--minutes must be above 0, got {options.minutes:g}.")
    if options.groups is not None and options.groups < 1:
        raise ValueError(f"--groups must be at least 1, got {options.groups}.")
    own = DEFAULT_BUDGET if options.search == "own" else None
    budget = own if options.budget is None else parse_budget(options.budget)
    return Options(budget, tuple(options.methods), options.groups, options.delta)


def facts_of(spec: ModelSpec, request: Request, device: torch.device, dtype: torch.dtype, backend: Any) -> Facts:
    """A model at the size of a request."""
    guidance = next(family.guidance for family in FAMILIES if family.name == spec.family)
    guided = request.guidance > 1
    calls = spec.guidance_calls if guided else 1
    batch = 2 if guided and guidance == "batched" else 1
    return Facts(
        layout=spec.layout(request.height, request.width, request.num_frames),
        blocks=spec.num_blocks,
        heads=spec.heads,
        head_dim=spec.head_dim,
        steps=request.steps,
        visual_blocks=spec.visual_blocks,
        calls=calls,
        batch=batch,
        guided=calls * batch > 1,
        device=device,
        dtype=dtype,
        backend=backend,
    )


def _runner(
    model: Model, requests: Sequence[Request], facts: Facts, settings: Options, options: argparse.Namespace
) -> Runner:
    deadline = time.monotonic() + 60 * options.minutes
    frames = settings.budget is None or not settings.budget.on_latents
    looking = onlooker(facts)
    warm_up(model, requests[0], looking, options.backend)

    def run_once(number: int, method: AttnMethod) -> Sample:
        kind: Literal["np", "latent"] = "np" if frames else "latent"
        done = generate(model, requests[number], method, options.backend, progress=False, output_type=kind)
        return Sample(torch.from_numpy(done.frames), done.denoise, done.attention, done.density)

    def together() -> None:
        model.pipe.set_progress_bar_config(disable=True)
        model.pipe(**call_arguments(model, *requests) | {"output_type": "latent"})

    return Runner(
        facts,
        run_once,
        len(requests),
        frames,
        dense=looking.tables.dense,
        keep=options.keep,
        deadline=deadline,
        pipe=model.pipe,
        together=together,
    )


def _write(
    options: argparse.Namespace,
    settings: Options,
    model: Model,
    requests: Sequence[Request],
    facts: Facts,
    found: Found,
) -> None:
    """The plan, its curve and picture; prints the table."""
    best, path, request, budget = found.best, options.output, requests[0], settings.budget
    where: dict[str, Any] = {
        "search": options.search,
        "dense_seconds": found.dense_seconds,
        "size": [request.num_frames, request.height, request.width],
        "seed": options.seed,
        "prompts": [request.prompt for request in requests],
        "machine": machine(),
    }
    plan = TunedPlan.for_pipeline(
        model.pipe,
        best.assignment,
        grids=[facts.layout.grid],
        metric=Metric(options.search, settings.delta) if budget is None else Metric(budget.kind, budget.value),
        guidance_scale=request.guidance,
        measured=asdict(best.measured) | where,
        keep=options.keep,
    )
    plan.save(path)
    curve, picture = path.with_suffix(".curve.jsonl"), path.with_suffix(".curve.png")
    write_curve(
        curve, found.curve, best, where | {"budget": None if budget is None else str(budget), "model": model.name}
    )
    title = f"{model.name}, {facts.layout.num_tokens:,} tokens, {facts.steps} steps, {facts.device}"
    drawn = plot(picture, found.curve, best, found.dense_seconds, title)
    print(f"\n{table(found.curve, best, found.dense_seconds)}\n")
    print(f"The plan: {best.measured}, {best.measured.density:.1%} of the query-key pairs computed.")
    for line in in_words(best.assignment):
        print(line)
    print(f"plan: {path}\ncurve: {curve}" + (f"\npicture: {picture}" if drawn else ""))
    print(f"use it: dit-accel compare --model {model.name} --method {path}")


def _predict(options: argparse.Namespace, settings: Options) -> int:
    """What each candidate would give, from the model's shape."""
    device = target_device(options.device)
    spec = SPECS[options.model] if options.model in SPECS else load(options.model, str(device), options.dtype).spec
    given = {name: getattr(options, name) for name in ("height", "width", "num_frames", "steps", "guidance")}
    size = {name: getattr(spec, name) if value is None else value for name, value in given.items()}
    if size["steps"] < 1:
        raise ValueError(f"--steps must be at least 1, got {size['steps']}.")
    request = Request(prompt="", seed=options.seed, **size)
    facts = facts_of(spec, request, device, getattr(torch, options.dtype or _DTYPES[device.type]), options.backend)
    forwards = facts.calls * facts.batch * facts.steps
    rest = forwards * spec.linear_flops(facts.layout) / matmul_rate(device, facts.dtype)
    prompts = int(options.prompts) if options.prompts.isdecimal() else len(read_prompts(options.prompts, options.model))
    print(forecast(facts, settings, rest, prompts, spec.name))
    return 0
