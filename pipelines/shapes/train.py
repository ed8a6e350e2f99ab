"""Trains an embedded pipeline from nothing: shapes to a stock WanPipeline folder, shapes-image to a FluxPipeline's.

    python -m dit_accel.pipelines.shapes.train --out outputs/shapes --seconds 900
    python -m dit_accel.pipelines.shapes.train --model shapes-image --out outputs/image --vae-seconds 60 --seconds 280
    torchrun --nproc_per_node 2 -m dit_accel.pipelines.shapes.train --out outputs/shapes --seconds 900

The VAE comes first, then the text encoder, then the denoiser.  ``--session-seconds`` ends this process early but
cleanly; the same command with ``--resume`` goes on.  OUT gets train.jsonl (losses), progress.json and pipeline.tar.00,
.01, … (the pipeline folder in parts, see transfer.py), all renewed at every checkpoint.  WORK keeps the full state and
WORK/pipeline is the pipeline folder itself.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

import dit_accel.pipelines.shapes_image.models as image_models
import dit_accel.pipelines.shapes_image.recipe as image_recipe
from dit_accel.pipelines.shapes import models, recipe
from dit_accel.pipelines.shapes.kit import Kit
from dit_accel.pipelines.shapes.optimisation import Clock, Journal, Workers
from dit_accel.pipelines.shapes.recipe import Recipe
from dit_accel.pipelines.shapes.train_denoiser import DenoiserTraining
from dit_accel.pipelines.shapes.train_text import train_text_encoder
from dit_accel.pipelines.shapes.train_vae import train_vae
from dit_accel.pipelines.shapes.transfer import join_folder, split_folder

_SAVE_MARGIN = 6.0  # seconds at the end of a session for the last checkpoint


MODELS = {  # kit, recipe, recipe of toy size
    "shapes": (models.KIT, recipe.FULL, recipe.TINY),
    "shapes-image": (image_models.KIT, image_recipe.FULL, image_recipe.TINY),
}


def save_pipeline(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Writes a bfloat16 copy of the pipeline, loadable by transformers of before and after its tokenizers' renaming."""
    parts: dict[str, Any] = {
        name: torch.nn.Module.to(copy.deepcopy(part), "cpu", torch.bfloat16)
        if isinstance(part, torch.nn.Module)
        else part
        for name, part in pipeline.components.items()
    }
    type(pipeline)(**parts).save_pretrained(folder)
    for file in (folder / "model_index.json", *folder.glob("tokenizer*/tokenizer_config.json")):
        file.write_text(file.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))


@dataclass(frozen=True)
class Checkpoints:
    """Where a run keeps its state (``work``) and puts what it hands over (``out``)."""

    work: Path
    out: Path
    part_mib: int

    @property
    def pipeline(self) -> Path:
        return self.work / "pipeline"

    @property
    def state(self) -> Path:
        return self.work / "state.pt"

    def save(self, pipeline: DiffusionPipeline, seconds: float) -> None:
        """Saves the pipeline as it is and how long its denoiser has trained, in seconds."""
        save_pipeline(pipeline, self.pipeline)
        split_folder(self.pipeline, self.out, self.part_mib)
        (self.out / "progress.json").write_text(json.dumps({"denoiser_seconds": seconds}))

    def save_training(self, training: DenoiserTraining, averaged: DiffusionPipeline, clock: Clock) -> None:
        """Saves the full state, and the pipeline with averaged weights."""
        state = {"optimiser": training.optimiser.state_dict(), "denoiser_seconds": clock.spent}
        torch.save(state, self.state.with_suffix(".new"))
        self.state.with_suffix(".new").replace(self.state)
        live, targets = (
            [parameter for module in modules for parameter in module.parameters()]
            for modules in (training.modules, training.kit.trained(averaged))
        )
        averages = {id(p): a for p, a in zip(training.optimiser.parameters, training.optimiser.ema, strict=True)}
        with torch.no_grad():
            for target, parameter in zip(targets, live, strict=True):
                target.copy_(averages[id(parameter)])
        self.save(averaged, clock.spent)

    def fetch(self, resume: Path) -> float:
        """Makes ``self.pipeline`` from this run's work folder or else from handed-over parts; returns its seconds."""
        if self.state.exists():
            return float(torch.load(self.state, map_location="cpu", weights_only=True)["denoiser_seconds"])
        join_folder(resume, self.pipeline)
        return float(json.loads((resume / "progress.json").read_text())["denoiser_seconds"])


def train(
    kit: Kit,
    recipe: Recipe,
    checkpoints: Checkpoints,
    vae_seconds: float,
    seconds: float,
    session_seconds: float,
    resume: Path | None,
    compile_blocks: bool,
) -> None:
    """The whole run; see the module's text."""
    session_end = time.time() + session_seconds - _SAVE_MARGIN
    workers = Workers.from_environment()
    for folder in (checkpoints.work, checkpoints.out):
        folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(checkpoints.out / "train.jsonl", workers)
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True

    spent = 0.0
    if resume:
        if workers.first:
            spent = checkpoints.fetch(resume)
        workers.share_([agreed := torch.tensor([spent], device=workers.device)])
        spent = float(agreed)
        pipeline = kit.pipeline.from_pretrained(checkpoints.pipeline, dtype=torch.float32).to(workers.device)
        pipeline.vae.eval().requires_grad_(False)
    else:
        checkpoints.state.unlink(missing_ok=True)
        pipeline = kit.build(*recipe.layers).to(workers.device)
        train_vae(kit, pipeline.vae, recipe, Clock(vae_seconds, 0.0, session_end, workers), workers, journal)
        train_text_encoder(kit, pipeline, recipe.denoiser, workers, journal)
        if workers.first:
            checkpoints.save(pipeline, spent)
    averaged = copy.deepcopy(pipeline.to("cpu"))
    pipeline.to(workers.device)
    clock = Clock(seconds, spent, session_end, workers)
    training = DenoiserTraining(kit, pipeline, recipe, workers, journal)
    if resume and checkpoints.state.exists():
        state = torch.load(checkpoints.state, map_location=workers.device, weights_only=True)
        training.optimiser.load_state_dict(state["optimiser"])
    pipeline.transformer.train()
    if workers.device.type == "cuda":
        pipeline.transformer.set_attention_backend(kit.gpu_attention)
    if compile_blocks and kit.compiles and workers.device.type == "cuda":
        training.compile()
        journal.write("compiled", seconds=clock.spent - spent)

    def save(clock: Clock) -> None:
        if workers.first:
            checkpoints.save_training(training, averaged, clock)
            journal.write("checkpoint", step=training.optimiser.steps, share=clock.share)

    training.run(clock, save)
    journal.write("finished" if clock.share >= 1 else "session over, resume", share=clock.share)
    workers.leave()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="shapes", help="the embedded pipeline (default shapes)")
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and the pipeline's parts")
    parser.add_argument("--work", type=Path, default=Path("/tmp/dit_accel_shapes"), help="folder for the full state")
    parser.add_argument("--vae-seconds", type=float, default=115, help="time of the VAE stage")
    parser.add_argument("--seconds", type=float, default=900, help="time of the denoiser stage, all sessions together")
    parser.add_argument("--session-seconds", type=float, default=1e9, help="time after which this process must end")
    parser.add_argument("--resume", type=Path, metavar="PARTS", help="go on from WORK, or if it is empty from PARTS")
    parser.add_argument("--split-mib", type=int, default=15, help="largest file of the handed-over pipeline")
    parser.add_argument("--eager", action="store_true", help="do not compile the transformer's blocks")
    parser.add_argument("--tiny", action="store_true", help="every stage at toy size: a check, nothing is learnt")
    args = parser.parse_args()
    kit, full, tiny = MODELS[args.model]
    train(
        kit,
        tiny if args.tiny else full,
        Checkpoints(args.work, args.out, args.split_mib),
        vae_seconds=args.vae_seconds,
        seconds=args.seconds,
        session_seconds=args.session_seconds,
        resume=args.resume,
        compile_blocks=not args.eager,
    )


if __name__ == "__main__":
    main()
