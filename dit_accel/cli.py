"""The `dit-accel` command: parses arguments, runs one subcommand, turns a refusal into one sentence and exit code 2."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A subcommand: its module under dit_accel.commands has ``add_arguments(parser)`` and ``run(options) -> int``."""

    module: str
    help: str
    example: str


COMMANDS = {
    "compare": Command(
        "compare",
        "run dense attention and sparse methods on one prompt and seed, side by side",
        'dit-accel compare --prompt "a red star moving up over navy stripes" --method "grat(density=0.4)"',
    ),
    "eval": Command(
        "eval",
        "a suite of models, methods, settings, prompts and seeds: speed and quality beside dense attention",
        "dit-accel eval smoke --dry-run",
    ),
    "score": Command(
        "score",
        "pictures or clips on disk against those that they should equal, file by file",
        "dit-accel score outputs/dense outputs/radial --metric psnr --metric ssim --output scores.jsonl",
    ),
    "report": Command(
        "report",
        "one page, and tables, of what runs of suites measured",
        "dit-accel report runs/smoke",
    ),
    "generate": Command(
        "generate",
        "make one clip or image with a method",
        "dit-accel generate --method neighborhood --output star.mp4",
    ),
    "explain": Command(
        "explain",
        "tokens, tiles, densities and predicted speed-up of a method on a size, without weights",
        "dit-accel explain --model wan2.1-14b --method radial --height 768 --width 1280 --num-frames 69",
    ),
    "tune": Command(
        "tune",
        "find which attention each step and layer can do without, within a budget of quality or time",
        "dit-accel tune --budget psnr=28 --output plan.json",
    ),
    "train": Command(
        "train",
        "train a denoiser from nothing, fine-tune it or distil it, with the attention of a method",
        'dit-accel train --task shapes --loss distill --train attention --method "grat(density=0.4)"',
    ),
    "bench": Command("bench", "speed of the operator and its peers, checked first", "dit-accel bench kernels --quick"),
    "reproduce": Command(
        "reproduce",
        "make the records behind every table again, as far as this machine can, and then the tables",
        "dit-accel reproduce --dry-run",
    ),
    "demo": Command("demo", "a page in the browser: dense and sparse attention side by side", "dit-accel demo"),
    "list": Command("inspect", "methods with their options, models and presets", "dit-accel list"),
    "doctor": Command("doctor", "what this machine can run, and what is missing", "dit-accel doctor"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit code is 0, 2 for a refusal, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="dit-accel", description="Sparse attention for diffusers, measured.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    wanted = _wanted(sys.argv[1:] if arguments is None else arguments)
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=command.help,
            description=f"{command.help[0].upper()}{command.help[1:]}.",
            epilog=f"example:\n  {command.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == wanted:
            _module(command).add_arguments(subparser)
    options = parser.parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = _module(COMMANDS[options.command]).run
    try:
        return run(options)
    except ValueError as error:
        print(f"dit-accel {options.command}: {error}", file=sys.stderr)
        return 2


def _wanted(arguments: Sequence[str]) -> str | None:
    """The subcommand named, so that only its module is imported."""
    return next((argument for argument in arguments if argument in COMMANDS), None)


def _module(command: Command):  # type: ignore[no-untyped-def]
    return importlib.import_module(f"dit_accel.commands.{command.module}")


if __name__ == "__main__":
    sys.exit(main())
