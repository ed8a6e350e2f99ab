"""`dit-accel generate`: one clip or image with one method."""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from dit_accel.commands.arguments import add_run, method_call, parse_method
from dit_accel.commands.compare import FPS
from dit_accel.commands.models import generate, load
from dit_accel.eval.frames import as_uint8
from dit_accel.eval.media import write_mp4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("--method", default="dense", help="a name, name(option=value, ...) or a plan (default dense)")
    parser.add_argument("--density", type=float, help="in place of the method's own settings, in (0, 1]")
    parser.add_argument("--output", type=Path, help="file: .mp4 for a video, .png for an image (default output.*)")


def run(options: argparse.Namespace) -> int:
    method = parse_method(options.method, options.model, options.density)
    if options.output and not options.output.parent.is_dir():
        raise ValueError(f"the folder {options.output.parent} of --output does not exist; make it first.")
    model = load(options.model, options.device, options.dtype)
    request = model.request(options, options.prompt, options.seed)
    method.attention(model.layout(request))
    suffix = ".mp4" if request.num_frames > 1 else ".png"
    path: Path = options.output or Path(f"output{suffix}")
    if path.suffix != suffix:
        raise ValueError(f"--output must end in {suffix} for {model.name}, got {path.name}.")
    generation = generate(model, request, method, options.backend)
    frames = as_uint8(generation.frames, f"the output of {method_call(method)}")
    if request.num_frames > 1:
        write_mp4(path, frames, FPS)
    else:
        Image.fromarray(frames[0]).save(path)
    print(
        f"{path}: denoising {generation.denoise:.2f} s, of it attention {generation.attention:.2f} s, "
        f"{generation.density:.1%} of the query-key pairs computed."
    )
    return 0
