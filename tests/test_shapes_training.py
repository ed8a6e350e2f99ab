from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import diffusers.models.autoencoders.autoencoder_kl_wan as wan_vae
import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from dit_accel.pipelines.shapes.evaluate import Setting, evaluate, sample_clips
from dit_accel.pipelines.shapes.kit import CAPTION_TOKENS, build_tokenizer, caption_ids
from dit_accel.pipelines.shapes.models import (
    KIT,
    build_pipeline,
    build_vae,
    decode_latents,
    encode_clips,
    whole_clip_passes,
)
from dit_accel.pipelines.shapes.optimisation import Optimiser, Workers
from dit_accel.pipelines.shapes.recipe import FULL, TINY
from dit_accel.pipelines.shapes.scenes import captions, parse_caption, sample_scenes
from dit_accel.pipelines.shapes.train import Checkpoints, save_pipeline, train
from dit_accel.pipelines.shapes.train_denoiser import _choose_size
from dit_accel.pipelines.shapes.train_text import binding_targets
from dit_accel.pipelines.shapes.transfer import join_folder, split_folder

CPU = Workers(rank=0, world=1, device=torch.device("cpu"))


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 5, 9], ids=lambda frames: f"{frames} frames")
def test_whole_clip_vae_passes_equal_the_stock_ones(frames: int) -> None:
    torch.manual_seed(0)
    vae = build_vae().eval()
    clips, latents = torch.rand(1, 3, frames, 16, 32) * 2 - 1, torch.randn(1, 16, (frames + 3) // 4, 2, 4)
    with whole_clip_passes():
        mean, logvar = encode_clips(vae, clips)
        decoded = decode_latents(vae, latents)
    stock = vae.encode(clips).latent_dist
    torch.testing.assert_close(mean, stock.mean, atol=1e-4, rtol=0)
    torch.testing.assert_close(logvar, stock.logvar, atol=1e-4, rtol=0)
    torch.testing.assert_close(decoded.clamp(-1, 1), vae.decode(latents).sample, atol=1e-4, rtol=0)


def test_the_vae_classes_are_restored_after_an_error() -> None:
    stock = wan_vae.WanResample.forward, wan_vae.WanRMS_norm.forward
    with whole_clip_passes():
        assert wan_vae.WanResample.forward is not stock[0]
    with pytest.raises(ValueError, match="within"), whole_clip_passes():
        raise ValueError("within")
    assert (wan_vae.WanResample.forward, wan_vae.WanRMS_norm.forward) == stock


@pytest.mark.parametrize("mib", [1, 15])
def test_a_split_folder_joins_again(tmp_path: Path, mib: int) -> None:
    content = {"a.bin": random.Random(0).randbytes(2_500_000), "deep/b.json": b"{}", "deep/empty": b""}
    for name, data in content.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(data)
    split_folder(tmp_path / "folder", tmp_path / "parts", 1)
    parts = split_folder(tmp_path / "folder", tmp_path / "parts", mib)
    assert len(parts) == (3 if mib == 1 else 1) == len(list((tmp_path / "parts").iterdir()))
    assert all(part.stat().st_size <= mib << 20 for part in parts)
    join_folder(tmp_path / "parts", tmp_path / "joined")
    joined = {path.relative_to(tmp_path / "joined").as_posix(): path for path in (tmp_path / "joined").rglob("*")}
    assert {name: path.read_bytes() for name, path in joined.items() if path.is_file()} == content


def test_joining_a_folder_without_parts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no pipeline.tar.00"):
        join_folder(tmp_path, tmp_path / "joined")


def test_every_caption_fits_the_tokenizer() -> None:
    tokenizer = build_tokenizer()
    ids = caption_ids(tokenizer, captions(sample_scenes(500, 0.8, torch.Generator().manual_seed(0))))
    assert ids.shape == (500, CAPTION_TOKENS)
    assert (ids != tokenizer.unk_token_id).all() and (ids[:, -1] == tokenizer.pad_token_id).all()


def test_binding_targets_name_the_object_that_a_token_belongs_to() -> None:
    scenes = sample_scenes(50, 0.5, torch.Generator().manual_seed(0))
    tokenizer, texts = build_tokenizer(), captions(scenes)
    targets = torch.stack(binding_targets(caption_ids(tokenizer, texts), scenes, tokenizer), -1)  # [B, 24, 5]
    for row, text in enumerate(texts):
        words = text.split()
        for slot, wanted in enumerate(parse_caption(text)):
            place = words.index(wanted.colour)
            expected = [int(values[row, slot]) for values in (scenes.colour, scenes.shape, scenes.trait)]
            assert targets[row, place].tolist() == [*expected, -100, -100]
            assert targets[row, place + 1].tolist() == [*expected, -100, -100]
        background = [-100, -100, -100, int(scenes.background[row]), int(scenes.texture[row])]
        assert targets[row, len(words) - 1].tolist() == background
        assert (targets[row, len(words) + 1 :] == -100).all()


def test_time_shares_hold_although_large_clips_take_longer() -> None:
    recipe, rng = FULL.denoiser, random.Random(0)
    drawn = Counter(_choose_size(recipe.sizes, recipe, 0.9, rng) for _ in range(4000))
    spent = {name: count * (1 + recipe.sizes[name].tokens / 6000) for name, count in drawn.items()}
    for name, share in recipe.phases[-1].shares.items():
        assert spent[name] / sum(spent.values()) == pytest.approx(share, abs=0.05)


def test_a_gradient_that_is_not_finite_leaves_the_parameters_finite() -> None:
    parameter = torch.nn.Parameter(torch.ones(3, 2))
    optimiser = Optimiser([{"params": [parameter], "weight_decay": 0.0}], CPU, betas=(0.9, 0.95), ema_decay=0.9)
    (parameter * torch.tensor([1.0, float("nan")])).sum().backward()
    assert optimiser.step(0.1).isnan()
    assert torch.equal(parameter, torch.ones(3, 2))
    optimiser.zero_gradients()
    (parameter.sum() * 100).backward()
    assert optimiser.step(0.1) == pytest.approx(100 * 6**0.5)
    assert (parameter < 1).all() and (optimiser.ema[0] > parameter).all()


def test_the_saved_pipeline_is_small(tmp_path: Path) -> None:
    save_pipeline(build_pipeline(), tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= 24_000_000
    assert "PreTrainedTokenizerFast" in (tmp_path / "model_index.json").read_text()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    folder = tmp_path_factory.mktemp("shapes")
    checkpoints = Checkpoints(folder / "work", folder / "out", part_mib=15)
    tiny = replace(TINY, save_every=60.0)
    train(KIT, tiny, checkpoints, 0.5, 1.0, 1e9, resume=None, compile_blocks=False)
    return checkpoints


def test_training_goes_on_from_parts_alone(trained: Checkpoints, tmp_path: Path) -> None:
    spent = json.loads((trained.out / "progress.json").read_text())["denoiser_seconds"]
    assert spent >= 1
    resumed = Checkpoints(tmp_path / "work", tmp_path / "out", part_mib=15)
    train(KIT, TINY, resumed, 0.0, spent + 0.5, 1e9, resume=trained.out, compile_blocks=False)
    lines = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    assert lines[-1]["stage"] == "finished"
    assert not any(line["stage"].startswith(("vae", "text")) for line in lines)
    assert (
        resumed.pipeline.joinpath("vae/diffusion_pytorch_model.safetensors").read_bytes()
        == trained.pipeline.joinpath("vae/diffusion_pytorch_model.safetensors").read_bytes()
    )


def test_the_trained_folder_is_a_stock_pipeline_and_batched_sampling_equals_its_call(trained: Checkpoints) -> None:
    pipeline = WanPipeline.from_pretrained(trained.pipeline, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.vae.config.latents_std != [1.0] * 16
    texts = ["a red ring resting over navy dots", "a blue star growing over teal bars"]
    setting = Setting(32, 48, 5, steps=2, guidance=4.0)
    ours = sample_clips(pipeline, texts, setting, seed=3)
    for index, text in enumerate(texts):
        stock = sample_clips(pipeline, [text], setting, seed=3 + index, stock_decode=True)
        np.testing.assert_allclose(ours[index], stock[0], atol=1e-3)


def test_evaluation_writes_a_record_and_a_sheet(trained: Checkpoints, tmp_path: Path) -> None:
    pipeline = WanPipeline.from_pretrained(trained.pipeline, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    record = evaluate(pipeline, Setting(32, 48, 5, 1, 4.0), 2, 1, 2, tmp_path, "sheet.png")
    assert json.loads((tmp_path / "evaluation.jsonl").read_text()) == record
    assert record["one_object"]["clips"] == 2 and record["two_objects"]["clips"] == 1
    assert (tmp_path / "sheet.png").stat().st_size > 0
