"""The training loop, on accelerate: one process or several, bfloat16 autocast on GPUs."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor
from tqdm import tqdm

from dit_accel.pipelines.flow import FlowBatch
from dit_accel.pipelines.training.checkpoints import Checkpoints
from dit_accel.pipelines.training.journal import Journal
from dit_accel.pipelines.training.run import Attach, Run, prepare
from dit_accel.pipelines.training.settings import Settings
from dit_accel.pipelines.training.task import Task


def losses(batch: FlowBatch, predicted: Tensor, taught: Tensor | None, flow_weight: float) -> dict[str, Tensor]:
    """The loss to minimise and its parts: flow matching, or the distance to a teacher's velocity beside it."""
    flow = F.mse_loss(predicted, batch.velocity)
    if taught is None:
        return {"loss": flow}
    distance = F.mse_loss(predicted, taught)
    return {"loss": distance + flow_weight * flow, "distill": distance, "flow": flow}


def train(task: Task, settings: Settings, attach: Attach, resume: bool = False) -> Path | None:
    """A whole training session; every process calls this.

    Args:
        task: what to train on.
        settings: how.
        attach: puts the attention method into the denoiser.
        resume: go on from the last checkpoint in ``settings.out``.

    Returns:
        The last checkpoint, on the first process; None on the others.

    Raises:
        ValueError: a size that the task cannot make, a checkpoint of other settings, attention without gradients, or a
            loss that is no longer finite.
    """
    cuda = torch.cuda.is_available()
    accelerator = Accelerator(
        mixed_precision="bf16" if cuda else "no", cpu=not cuda, gradient_accumulation_steps=settings.accumulation
    )
    checkpoints = Checkpoints(settings.out, settings.fixed() | {"processes": accelerator.num_processes})
    begin = checkpoints.begin(resume)
    settings.out.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()  # nobody writes before everybody has looked
    run = prepare(task, settings, attach, accelerator)
    if begin is not None:
        accelerator.load_state(str(begin / "state"))
        run.ema.to(accelerator.device)
    _loop(run, checkpoints)
    accelerator.end_training()
    return checkpoints.latest() if accelerator.is_main_process else None


def _step(run: Run) -> dict[str, Tensor]:
    """One update; the losses of this process, on the device."""
    accelerator, settings = run.accelerator, run.settings
    totals: dict[str, Tensor] = {}
    for part in range(settings.accumulation):
        forward = run.progress.step * settings.accumulation + part
        batch = run.draw(forward * accelerator.num_processes + accelerator.process_index)
        taught = None
        if run.teacher is not None:
            with torch.no_grad(), accelerator.autocast():
                taught = batch.predicted_by(run.teacher)
        with accelerator.accumulate(run.denoiser):
            found = losses(batch, batch.predicted_by(run.denoiser), taught, settings.flow_weight)
            accelerator.backward(found["loss"])
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(run.parameters, settings.clip)
            run.optimiser.step()
            run.optimiser.zero_grad()
        for name, value in found.items():
            totals[name] = totals.get(name, 0) + value.detach() / settings.accumulation
    run.schedule.step()
    run.ema.step(run.parameters)
    run.progress.step += 1
    return totals


def _loop(run: Run, checkpoints: Checkpoints) -> None:
    """Steps until the run or the session is over, journal lines and checkpoints on the way."""
    settings, accelerator, progress = run.settings, run.accelerator, run.progress
    samples = settings.batch * settings.accumulation * accelerator.num_processes
    journal = Journal(settings.out / "journal.jsonl", accelerator, samples, run.tokens)
    seconds = saved_at = 0.0
    first = accelerator.is_main_process
    with tqdm(total=settings.max_steps, initial=progress.step, unit="step", disable=not first) as bar:
        over = progress.step >= settings.max_steps
        while not over:
            rate = run.schedule.get_last_lr()[0]
            journal.add(_step(run))
            bar.update()
            over = progress.step >= settings.max_steps
            if over or progress.step % settings.log_steps == 0:
                bar.set_postfix(loss=journal.write(progress.step, rate))
                seconds = _agreed(journal.seconds, accelerator)
                over = over or (settings.max_seconds is not None and seconds >= settings.max_seconds)
            if over or progress.step % settings.save_steps == 0 or seconds - saved_at >= settings.save_seconds:
                checkpoints.save(progress.step, accelerator, lambda folder: _save_averaged(run, folder))
                saved_at = seconds


def _agreed(seconds: float, accelerator: Accelerator) -> float:
    """The first process's time, on every process."""
    return float(broadcast(torch.tensor(seconds, dtype=torch.float64, device=accelerator.device)))


def _save_averaged(run: Run, folder: Path) -> None:
    """The pipeline with averaged weights, in diffusers' format."""
    run.ema.store(run.parameters)
    run.ema.copy_to(run.parameters)
    run.pipeline.save_pretrained(folder)
    run.ema.restore(run.parameters)
