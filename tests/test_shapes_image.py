"""The embedded pipeline of images: its scenes, its parts as the stock pipeline calls them, and its training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from PIL import Image

from dit_accel.cli import main
from dit_accel.commands.arguments import read_prompts
from dit_accel.eval.records import read_records
from dit_accel.pipelines import shapes_image
from dit_accel.pipelines.shapes.kit import caption_ids
from dit_accel.pipelines.shapes.optimisation import Journal, Workers
from dit_accel.pipelines.shapes.render import REACH, place_objects, render
from dit_accel.pipelines.shapes.scenes import (
    IMAGES,
    PLACES,
    Scenes,
    captions,
    held_out_scenes,
    is_held_out,
    parse_caption,
    sample_scenes,
)
from dit_accel.pipelines.shapes.train import Checkpoints, save_pipeline, train
from dit_accel.pipelines.shapes.train_denoiser import DenoiserTraining
from dit_accel.pipelines.shapes.verifier import read_clip, score_clip
from dit_accel.pipelines.shapes_image.evaluate import Setting, evaluate, sample_images, wilson_interval
from dit_accel.pipelines.shapes_image.models import KIT, build_pipeline, build_vae, image_shift, pack, standardise
from dit_accel.pipelines.shapes_image.recipe import TINY
from dit_accel.pipelines.specs import find_spec, spec_of

SIZES = [(128, 128), (256, 256), (320, 512)]
TEXTS = [
    "a red circle at the left over navy dots",
    "a blue star at the top and an orange ring at the right over teal bars",
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rendered(height: int, width: int, objects: int) -> tuple[list[np.ndarray], Scenes]:
    scenes = held_out_scenes(16, objects, seed=1, language=IMAGES)
    clips = (render(scenes, height, width, 1, generator(2)) + 1) / 2
    return list(clips.clamp(0, 1).permute(0, 2, 3, 4, 1).numpy()), scenes


@pytest.fixture(scope="module")
def pipeline() -> FluxPipeline:
    torch.manual_seed(0)
    return build_pipeline(1, 1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    folder = tmp_path_factory.mktemp("image")
    checkpoints = Checkpoints(folder / "work", folder / "out", part_mib=15)
    train(KIT, replace(TINY, save_every=60.0), checkpoints, 0.5, 1.0, 1e9, resume=None, compile_blocks=False)
    return checkpoints


def test_parsing_a_caption_gives_back_its_objects() -> None:
    scenes = sample_scenes(300, 0.6, generator(), IMAGES)
    assert [parse_caption(text, IMAGES) for text in captions(scenes)] == scenes.objects()


def test_captions_of_clips_and_of_images_do_not_mix() -> None:
    with pytest.raises(ValueError, match="unknown word 'moving'"):
        parse_caption("a red circle moving left over navy dots", IMAGES)
    with pytest.raises(ValueError, match="unknown word 'at'"):
        parse_caption(TEXTS[0])


def test_objects_of_a_scene_are_at_places_a_quarter_turn_apart() -> None:
    training, held_out = sample_scenes(5000, 1.0, generator(), IMAGES), held_out_scenes(200, 2, language=IMAGES)
    assert not is_held_out(training.colour, training.shape, training.trait).any()
    assert is_held_out(held_out.colour, held_out.shape, held_out.trait).all()
    places = torch.tensor(list(PLACES.values())).float()
    for scenes in (training, held_out):
        first, second = places[scenes.trait].unbind(1)
        cosine = (first * second).sum(1) / (first.norm(dim=1) * second.norm(dim=1))
        assert (cosine < 1e-6).all()
        assert len(scenes.trait[:, 1].unique()) == len(PLACES)


@pytest.mark.parametrize("objects", [1, 2])
@pytest.mark.parametrize(("height", "width"), SIZES, ids=lambda side: str(side))
def test_rendered_images_are_read_without_error(height: int, width: int, objects: int) -> None:
    images, scenes = rendered(height, width, objects)
    for image, text, wanted in zip(images, captions(scenes), scenes.objects(), strict=True):
        assert score_clip(image, text, IMAGES).correct, text
        seen = read_clip(image, IMAGES).objects
        assert {(o.colour, o.shape, o.trait) for o in seen} == {(o.colour, o.shape, o.trait) for o in wanted}


def test_swapped_captions_fail() -> None:
    images, scenes = rendered(128, 128, 2)
    texts = captions(scenes)
    assert not any(score_clip(i, t, IMAGES).correct for i, t in zip(images, texts[1:] + texts[:1], strict=True))


def test_an_object_in_the_middle_is_at_no_place() -> None:
    square = np.full((1, 100, 100, 3), 0.2, dtype=np.float32)
    square[0, 35:65, 35:65] = (0.92, 0.15, 0.15)
    assert [(o.shape, o.trait) for o in read_clip(square, IMAGES).objects] == [("square", None)]
    assert [o.trait for o in read_clip(np.roll(square, 20, 2), IMAGES).objects] == ["at the right"]


@pytest.mark.parametrize(("height", "width"), SIZES, ids=lambda side: str(side))
def test_two_objects_never_touch(height: int, width: int) -> None:
    tracks = place_objects(sample_scenes(300, 1.0, generator(), IMAGES), height, width, 1, generator())
    distance = torch.hypot(tracks.x[:, 0] - tracks.x[:, 1], tracks.y[:, 0] - tracks.y[:, 1])
    assert (distance > REACH * tracks.radius.sum(1)).all()


@torch.no_grad()
@pytest.mark.parametrize("length", [32, 40])
def test_training_hears_what_the_stock_pipeline_says(pipeline: FluxPipeline, length: int) -> None:
    states, pooled, text_ids = pipeline.encode_prompt(TEXTS, None, max_sequence_length=length)
    ours = KIT.conditions(pipeline, caption_ids(pipeline.tokenizer, TEXTS), length, (1, 4, 6))
    torch.testing.assert_close(ours["encoder_hidden_states"], states)
    torch.testing.assert_close(ours["pooled_projections"], pooled)
    assert torch.equal(ours["txt_ids"], text_ids)
    latents, image_ids = pipeline.prepare_latents(1, 4, 32, 48, torch.float32, torch.device("cpu"), generator())
    assert torch.equal(ours["img_ids"], image_ids)
    assert latents.shape[1:] == KIT.latent_shape((1, 4, 6))


def test_every_caption_fits_both_tokenizers(pipeline: FluxPipeline) -> None:
    texts = captions(sample_scenes(300, 0.8, generator(), IMAGES))
    ids = caption_ids(pipeline.tokenizer, texts)
    assert torch.equal(ids, caption_ids(pipeline.tokenizer_2, texts))
    assert (ids != pipeline.tokenizer.unk_token_id).all() and (ids[:, -1] == pipeline.tokenizer.pad_token_id).all()


@torch.no_grad()
def test_a_standardised_vae_reconstructs_as_before_from_standardised_latents() -> None:
    torch.manual_seed(0)
    vae = build_vae().eval()
    clips = torch.rand(2, 3, 1, 32, 48) * 2 - 1
    mean, logvar = KIT.encode(vae, clips)
    decoded = KIT.decode(vae, mean)
    offset, scale = mean.mean((0, 2, 3)), mean.std((0, 2, 3))
    standardise(vae, offset, scale)
    mean, narrower = KIT.encode(vae, clips)
    torch.testing.assert_close(mean.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(mean.std((0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(narrower, logvar - 2 * scale.log().view(1, 4, 1, 1))
    torch.testing.assert_close(KIT.decode(vae, mean), decoded, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(vae.decode(vae.encode(clips[:, :, 0]).latent_dist.mean).sample, decoded[:, :, 0])


def test_packed_latents_unpack_in_the_stock_pipeline(pipeline: FluxPipeline) -> None:
    latents = torch.randn(2, 4, 8, 12)
    packed = pack(pipeline.vae, latents)
    assert torch.equal(pipeline._unpack_latents(packed, 32, 48, pipeline.vae_scale_factor), latents)


@pytest.mark.parametrize("tokens", [256, 1024, 4096, 16384])
def test_training_times_are_shifted_as_the_sampler_shifts_them(pipeline: FluxPipeline, tokens: int) -> None:
    config = pipeline.scheduler.config
    points = [config[f"{end}_{what}"] for what in ("image_seq_len", "shift") for end in ("base", "max")]
    mu = calculate_shift(tokens, *points)
    pipeline.scheduler.set_timesteps(sigmas=[0.5], mu=mu)
    shift = image_shift(tokens)
    assert pipeline.scheduler.sigmas[0] == pytest.approx(shift / (1 + shift))


def test_the_loss_falls_on_one_batch(pipeline: FluxPipeline, tmp_path: Path) -> None:
    workers = Workers(rank=0, world=1, device=torch.device("cpu"))
    training = DenoiserTraining(KIT, build_pipeline(1, 1), TINY, workers, Journal(tmp_path / "log", workers))
    latents, ids = torch.randn(8, 12, 16, generator=generator()) * 0.1, caption_ids(pipeline.tokenizer, TEXTS * 4)
    losses = []
    for _ in range(15):
        training.optimiser.zero_gradients()
        loss = training.loss(latents, ids, 32, (1, 3, 4))
        loss.backward()
        training.optimiser.step(2e-3)
        losses.append(loss.item())
    assert np.mean(losses[-3:]) < 0.8 * losses[0]


def test_the_saved_pipeline_is_small(tmp_path: Path) -> None:
    save_pipeline(build_pipeline(), tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= 16_000_000
    assert "TokenizersBackend" not in (tmp_path / "model_index.json").read_text()


def test_the_trained_folder_is_a_stock_pipeline_and_images_do_not_depend_on_the_batch(trained: Checkpoints) -> None:
    stages = [json.loads(line)["stage"] for line in (trained.out / "train.jsonl").read_text().splitlines()]
    assert {"vae done", "text done", "finished"} <= set(stages)
    loaded = FluxPipeline.from_pretrained(trained.pipeline, dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    together = list(sample_images(loaded, TEXTS, Setting(48, 64, 2, guidance=3.0)))
    (alone,) = sample_images(loaded, TEXTS[:1], Setting(48, 64, 2, guidance=3.0))
    assert together[0].shape == (48, 64, 3)
    np.testing.assert_allclose(together[0], alone, atol=1e-3)


def test_evaluation_writes_a_record_and_a_sheet(trained: Checkpoints, tmp_path: Path) -> None:
    loaded = FluxPipeline.from_pretrained(trained.pipeline, dtype=torch.float32)
    record = evaluate(loaded, Setting(32, 32, 1, 1.0), 4, tmp_path, "sheet.png")
    written = json.loads((tmp_path / "evaluation.jsonl").read_text())
    assert written["right"] == record["right"] and written["interval"] == list(record["interval"])
    assert written["one_object"]["clips"] == written["two_objects"]["clips"] == 2
    assert written["one_object"].keys() >= {"colours", "shapes", "places"}
    assert (tmp_path / "sheet.png").stat().st_size > 0


def test_wilson_interval() -> None:
    assert wilson_interval(45, 50) == pytest.approx((0.7864, 0.9565), abs=1e-4)
    assert wilson_interval(0, 10)[0] == 0 and wilson_interval(10, 10)[1] == 1


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("untrained")
    torch.manual_seed(0)
    save_pipeline(build_pipeline(), folder)
    return str(folder)


def test_compare_writes_pictures_and_scores_of_images(untrained: str, tmp_path: Path) -> None:
    size = ["--height", "64", "--width", "96", "--steps", "2", "--prompt", TEXTS[0]]
    arguments = ["compare", "--model", untrained, *size, "--method", "neighborhood(window=(1, 3, 3))"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows] == ["dense", "neighborhood"]
    assert all(row["quality"]["prompt_accuracy"]["value"] is not None for row in rows)
    assert {Image.open(path).size for path in (tmp_path / "clips").glob("*.png")} == {(96, 64)}
    script = rows and (tmp_path / "index.html").read_text()
    assert "true_cfg_scale=3.5" in script and "negative_prompt" in script


def test_eval_takes_a_batch_of_its_own_prompts(untrained: str, tmp_path: Path) -> None:
    prompts = read_prompts("4", "shapes-image")
    assert [len(parse_caption(prompt, IMAGES)) for prompt in prompts] == [1, 2, 1, 2]
    suite = tmp_path / "images.yaml"
    suite.write_text(
        f"name: images\nmodels: [{untrained}]\nmethods: ['grat(density=1)']\n"
        "prompts: {file: shapes-image, first: 2}\n"
        "settings: [{name: small, height: 64, width: 64, steps: 1}]\nruns: 0\nbatch: 2\nfloors: []\n"
    )
    assert main(["eval", str(suite), "--output", str(tmp_path / "out")]) == 0
    rows = read_records(tmp_path / "out" / "records.jsonl")
    assert [row["prompt"] for row in rows] == [*prompts[:2]] * 2
    assert all(row["quality"]["clip_correct"]["value"] in (0, 1) for row in rows)


def test_the_spec_is_that_of_the_built_pipeline() -> None:
    assert spec_of(build_pipeline()) == find_spec("shapes-image")
    assert find_spec("shapes-image").layout().grid == (1, 64, 64)


def test_the_packaged_pipeline_draws_its_first_example_prompt() -> None:
    pipe: Any = shapes_image.load()
    pipe.set_progress_bar_config(disable=True)
    image = pipe(
        shapes_image.EXAMPLE_PROMPTS[0],
        negative_prompt="",
        true_cfg_scale=shapes_image.DEFAULT_GUIDANCE,
        height=128,
        width=128,
        num_inference_steps=2,
        max_sequence_length=shapes_image.DEFAULT_TEXT_LENGTH,
        generator=generator(),
        output_type="np",
    ).images[0]
    assert spec_of(pipe).name == "shapes-image"
    assert image.shape == (128, 128, 3) and image.std() > 0.05
