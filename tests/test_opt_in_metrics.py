"""Metrics with weights that the user gives: real architectures with random weights, and equal references."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor, nn

from dit_accel.commands.judges import load_clip, make_metrics
from dit_accel.eval.aggregate import is_better_high
from dit_accel.eval.quality import MAKERS, Metric, SetMetric, make_metric, measure
from dit_accel.eval.quality.clip import ClipEncoder, clip_score
from dit_accel.eval.quality.frechet import Moments, frechet_distance

torchmetrics_lpips = pytest.importorskip("torchmetrics.functional.image.lpips", reason="the oracle, and its heads")


def random_clip(frames: int = 2, height: int = 33, width: int = 47, seed: int = 0) -> Tensor:
    return torch.rand(frames, height, width, 3, generator=torch.Generator().manual_seed(seed))


def noisy(clip: Tensor, amount: float) -> Tensor:
    noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(1))
    return (clip + amount * noise).clamp(0, 1)


def alexnet_features() -> nn.Sequential:
    """Torchvision's AlexNet without its classifier, random."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
    )


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What torchvision saves: the classifier is in the file too, and is not wanted."""
    path = tmp_path_factory.mktemp("alexnet") / "alexnet.pth"
    weights = {f"features.{name}": tensor for name, tensor in alexnet_features().state_dict().items()}
    torch.save(weights | {"classifier.6.bias": torch.zeros(1000)}, path)
    return path


@pytest.fixture(scope="module")
def lpips(backbone: Path) -> Metric:
    metric = make_metric("lpips", {"backbone": str(backbone)})
    assert isinstance(metric, Metric)
    return metric


@pytest.mark.parametrize("size", [(31, 31), (64, 64), (45, 83)], ids=str)
def test_lpips_agrees_with_torchmetrics(lpips: Metric, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchmetrics_lpips, "_get_tv_model_features", lambda *_: alexnet_features())
    oracle = torchmetrics_lpips._LPIPS(net="alex")
    x, y = random_clip(3, *size), random_clip(3, *size, seed=5)
    expected = oracle(x.movedim(-1, 1), y.movedim(-1, 1), normalize=True).flatten()
    values = measure(x, y, [lpips])["lpips"].values
    assert min(values) > 1e-3
    np.testing.assert_allclose(values, expected.numpy(), rtol=1e-4)


def test_lpips_agrees_with_the_formula_of_one_layer(tmp_path: Path, backbone: Path) -> None:
    """All heads but the first are zero, so that what is left is a sum over the first convolution, by hand."""
    channels = (64, 192, 384, 256, 256)
    heads = {f"lin{n}.model.1.weight": torch.zeros(1, count, 1, 1) for n, count in enumerate(channels)}
    heads["lin0.model.1.weight"][0, 7] = 2.0
    torch.save(heads, tmp_path / "heads.pth")
    metric = make_metric("lpips", {"backbone": str(backbone), "heads": str(tmp_path / "heads.pth")})
    assert isinstance(metric, Metric)
    x, y = random_clip(1), random_clip(1, seed=2)

    def unit(clip: Tensor) -> Tensor:
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        first = alexnet_features()[:2](((2 * clip - 1 - shift) / scale).movedim(-1, 1))
        return first / first.square().sum(1, keepdim=True).sqrt()

    with torch.no_grad():
        expected = 2 * (unit(x) - unit(y))[:, 7].square().mean()
    assert measure(x, y, [metric])["lpips"].value == pytest.approx(float(expected), rel=1e-5)


def test_lpips_is_zero_for_identical_clips_and_grows_with_noise(lpips: Metric) -> None:
    clip = random_clip()
    scores = [measure(noisy(clip, amount), clip, [lpips])["lpips"] for amount in (0, 0.02, 0.05, 0.1, 0.2)]
    values = [score.value for score in scores]
    assert values[0] == 0
    assert values == sorted(set(values))
    assert len(scores[0].values) == len(clip)


def test_lpips_is_skipped_without_reference_and_below_its_smallest_size(lpips: Metric) -> None:
    assert measure(random_clip(), metrics=[lpips])["lpips"].skipped == "lpips needs a reference clip."
    small = random_clip(1, 30, 64)
    assert "sides of at least 31" in str(measure(small, small, [lpips])["lpips"].skipped)


def test_lpips_refuses_files_of_other_weights(tmp_path: Path, backbone: Path) -> None:
    torch.save({"features.0.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"features.0.weight of shape \[64, 3, 11, 11\] .* got \[64, 3, 7, 7\]"):
        make_metric("lpips", {"backbone": str(tmp_path / "other.pth")})
    with pytest.raises(ValueError, match="lin0.model.1.weight .* got nothing of that name"):
        make_metric("lpips", {"backbone": str(backbone), "heads": str(backbone)})
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    with pytest.raises(ValueError, match="cannot read .*page.pth as PyTorch weights"):
        make_metric("lpips", {"backbone": str(tmp_path / "page.pth")})


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Callable[[Path], None]) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    tiny_clip(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_clip() -> Callable[[Path], None]:
    """Writes a CLIPModel of 16 x 16 pixels and 12 positions, its tokenizer of a few words and its image processor."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerFast

    def write(folder: Path) -> None:
        torch.manual_seed(0)
        words = ["<start>", "<end>", "a", "red", "blue", "square", "circle", "moving"]
        tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="a"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)]
        )
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<start>", eos_token="<end>", pad_token="<end>"
        ).save_pretrained(folder)
        layers = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
        text = {"vocab_size": len(words), "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 1}
        config = CLIPConfig(
            text_config=layers | text, vision_config=layers | {"image_size": 16, "patch_size": 8}, projection_dim=24
        )
        model = CLIPModel(config)
        model.text_projection.weight.data.neg_()  # these random weights have negative cosines, which all score 0
        model.save_pretrained(folder)
        CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)

    return write


def clip_metric(folder: Path) -> Metric:
    [metric] = make_metrics([("clip_score", {"folder": str(folder)})])
    assert isinstance(metric, Metric)
    return metric


def test_clip_score_is_the_models_own_similarity(clip_folder: Path) -> None:
    """``logits_per_image`` is the cosine times the model's temperature."""
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

    model = CLIPModel.from_pretrained(clip_folder)
    frames, prompt = random_clip(19), "a red square moving"
    pixels = CLIPImageProcessorPil.from_pretrained(clip_folder)(
        images=list((frames * 255).round().byte().numpy()), return_tensors="pt"
    )
    with torch.no_grad():
        output = model(**AutoTokenizer.from_pretrained(clip_folder)(prompt, return_tensors="pt"), **pixels)
        expected = 100 * output.logits_per_image[:, 0] / model.logit_scale.exp()
    score = measure(frames, metrics=[clip_metric(clip_folder)], prompt=prompt)["clip_score"]
    assert expected.min() > 1
    np.testing.assert_allclose(score.values, expected.numpy(), atol=1e-4)
    assert score.value == pytest.approx(float(expected.mean()), abs=1e-4)


def test_clip_score_is_a_hundred_times_the_cosine_and_never_negative(tmp_path: Path) -> None:
    images = torch.tensor([[2.0, 0.0], [3.0, 4.0], [-1.0, 0.0]])
    encoder = ClipEncoder(images=lambda clip: images, text=lambda prompt: torch.tensor([0.5, 0.0]))
    metric = clip_score(tmp_path, lambda folder: encoder)
    assert measure(random_clip(3), metrics=[metric], prompt="")["clip_score"].values == pytest.approx((100, 60, 0))


def test_clip_score_depends_on_the_prompt_and_is_skipped_without_one(clip_folder: Path) -> None:
    metric, frames = clip_metric(clip_folder), random_clip()
    scores = [measure(frames, metrics=[metric], prompt=text)["clip_score"].value for text in ("red", "blue circle")]
    assert scores[0] != scores[1]
    assert measure(frames, metrics=[metric])["clip_score"].skipped == "clip_score needs the clip's prompt."


def test_clip_score_takes_prompts_beyond_the_models_positions(clip_folder: Path) -> None:
    metric, frames = clip_metric(clip_folder), random_clip()
    long = measure(frames, metrics=[metric], prompt="red " * 40)["clip_score"].value
    longer = measure(frames, metrics=[metric], prompt="red " * 80)["clip_score"].value
    assert long == longer


def test_clip_score_refuses_folders_without_the_model(tmp_path: Path, tiny_clip: Callable[[Path], None]) -> None:
    with pytest.raises(ValueError, match="model folder .* does not exist"):
        clip_metric(tmp_path / "none")
    with pytest.raises(ValueError, match="clip_score needs a CLIPModel of transformers in"):
        load_clip(tmp_path)
    tiny_clip(tmp_path)
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="visual_projection.weight of a CLIPModel, which .* does not have"):
        load_clip(tmp_path)


def gaussian(features: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(features, features, generator=generator, dtype=torch.float64)
    return torch.randn(features, generator=generator, dtype=torch.float64), factor @ factor.T


def test_frechet_distance_of_gaussians_with_equal_axes_is_the_closed_form() -> None:
    """With diagonal covariances it is |mean difference|^2 + sum of (difference of standard deviations)^2."""
    mean_x, mean_y = torch.tensor([0.0, 1, 2]).double(), torch.tensor([1.0, 1, 0]).double()
    std_x, std_y = torch.tensor([1.0, 2, 0]).double(), torch.tensor([3.0, 2, 0.5]).double()
    distance = frechet_distance(mean_x, std_x.square().diag(), mean_y, std_y.square().diag())
    assert distance == pytest.approx(5 + 4 + 0 + 0.25)


def test_frechet_distance_agrees_with_the_matrix_root() -> None:
    (mean_x, x), (mean_y, y) = gaussian(7, 0), gaussian(7, 1)
    root = np.real(sqrtm((x @ y).numpy()))
    expected = float((mean_x - mean_y).square().sum() + x.trace() + y.trace()) - 2 * np.trace(root)
    assert frechet_distance(mean_x, x, mean_y, y) == pytest.approx(expected)
    assert frechet_distance(mean_y, y, mean_x, x) == pytest.approx(expected)
    assert frechet_distance(mean_x, x, mean_x, x) == pytest.approx(0, abs=1e-9)


def test_moments_of_parts_are_those_of_the_whole() -> None:
    vectors = torch.randn(101, 5, generator=torch.Generator().manual_seed(0)) + 1000
    moments = Moments()
    for part in vectors.split([1, 50, 20, 30]):
        moments.add(part)
    mean, covariance = moments.gaussian()
    torch.testing.assert_close(mean, vectors.double().mean(0))
    torch.testing.assert_close(covariance, vectors.double().T.cov(), rtol=1e-6, atol=1e-6)


class Colours(nn.Module):
    """Mean colour of uint8 images, with and without the argument that says which output is wanted."""

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        means = images.float().mean([2, 3])
        return means if return_features else means.sum(1, keepdim=True)


class Plain(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean([2, 3])


@pytest.fixture(params=[Colours, Plain])
def colours(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.jit.script(request.param()).save(str(tmp_path / "network.pt"))
    return tmp_path / "network.pt"


def fid(network: Path, **options: str) -> SetMetric:
    metric = make_metric("fid", {"network": str(network), **options})
    assert isinstance(metric, SetMetric)
    return metric


def test_fid_is_the_frechet_distance_of_rounded_frames_features(colours: Path) -> None:
    frames, reference = random_clip(37, 5, 4), random_clip(37, 5, 4, seed=1) ** 2
    judge = fid(colours).start()
    for start in (0, 20):
        judge.add(frames[start : start + 20], reference[start : start + 20])
    score = judge.result()
    x, y = ((255 * clip.double()).round().mean((1, 2)) for clip in (frames, reference))
    assert score.value == pytest.approx(frechet_distance(x.mean(0), x.T.cov(), y.mean(0), y.T.cov()), rel=1e-6)
    assert score.samples == 37


def test_fid_agrees_with_torchmetrics(colours: Path) -> None:
    fid_oracle = pytest.importorskip("torchmetrics.image.fid", reason="the oracle").FrechetInceptionDistance
    frames, reference = random_clip(40, 5, 4), random_clip(40, 5, 4, seed=1) ** 2
    oracle = fid_oracle(feature=Plain()).set_dtype(torch.float64)
    for clip, real in ((frames, False), (reference, True)):
        oracle.update((clip.movedim(-1, 1) * 255).round().byte(), real=real)
    judge = fid(colours).start()
    judge.add(frames, reference)
    assert judge.result().value == pytest.approx(float(oracle.compute()), rel=1e-4)


def test_fid_does_not_depend_on_the_order_of_clips(colours: Path) -> None:
    pairs = [(random_clip(9, 5, 4, seed), random_clip(9, 5, 4, seed + 10)) for seed in range(4)]
    values = []
    for order in (pairs, pairs[::-1]):
        judge = fid(colours).start()
        for frames, reference in order:
            judge.add(frames, reference)
        values.append(judge.result().value)
    assert values[0] == pytest.approx(values[1], rel=1e-9)


def test_fid_of_fewer_frames_than_features_is_skipped_with_the_count(colours: Path) -> None:
    judge = fid(colours).start()
    assert judge.result().skipped == "fid needs clips and reference clips."
    judge.add(random_clip(3, 5, 4), random_clip(3, 5, 4, seed=1))
    score = judge.result()
    assert score.value is None
    assert score.samples == 3
    assert score.skipped == "fid needs at least 4 frames of each set, one more than features, got 3."
    judge.add(random_clip(1, 5, 4, seed=2), random_clip(1, 5, 4, seed=3))
    value = judge.result().value
    assert value is not None and math.isfinite(value)


def test_fid_against_statistics_is_that_against_their_images(colours: Path, tmp_path: Path) -> None:
    frames, images = random_clip(37, 5, 4), random_clip(37, 5, 4, seed=1) ** 2
    moments = Moments()
    moments.add((images * 255).round().mean((1, 2)))
    mean, covariance = moments.gaussian()
    np.savez(tmp_path / "statistics.npz", mu=mean, sigma=covariance)
    paired, fixed = fid(colours).start(), fid(colours, statistics=str(tmp_path / "statistics.npz")).start()
    assert fixed.result().skipped == "fid needs clips."
    paired.add(frames, images)
    fixed.add(frames, frames)  # the reference does not count
    assert fixed.result().value == pytest.approx(paired.result().value, rel=1e-5)


def test_fid_refuses_statistics_of_other_features(colours: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "four.npz", mu=np.zeros(4), sigma=np.eye(4))
    judge = fid(colours, statistics=str(tmp_path / "four.npz")).start()
    judge.add(random_clip(9, 5, 4), None)
    assert judge.result().skipped == "fid needs statistics of its network's 3 features, got 4."
    np.save(tmp_path / "array.npz", np.zeros(3))
    for name in ("array.npz.npy", "network.pt"):
        with pytest.raises(ValueError, match="with the arrays mu and sigma, which .* does not hold"):
            fid(colours, statistics=str(tmp_path / name))


def test_fid_refuses_a_file_that_is_no_torchscript(tmp_path: Path, backbone: Path) -> None:
    with pytest.raises(ValueError, match="as TorchScript"):
        fid(backbone)
    with pytest.raises(ValueError, match="does not exist"):
        fid(tmp_path / "none.pt")


@pytest.mark.parametrize("name", ["lpips", "clip_score", "fid", "image_reward", "vbench_imaging_quality"])
def test_missing_and_unknown_options_are_one_sentence(name: str) -> None:
    for options in ({}, {"wieghts": "x"}):
        with pytest.raises(ValueError, match=f"metric {name} takes the options") as caught:
            make_metric(name, options, load_clip=load_clip)
        assert str(caught.value).count("\n") == 0
        assert "load_clip" not in str(caught.value)


def test_a_callable_cannot_be_given_as_an_option() -> None:
    with pytest.raises(ValueError, match="load_clip"):
        make_metrics([("clip_score", {"folder": ".", "load_clip": "os.system"})])


def test_every_maker_is_named_after_its_metric_and_tables_know_which_way_is_better(
    backbone: Path, colours: Path, clip_folder: Path
) -> None:
    outside = {"python": sys.executable, "weights": str(clip_folder)}
    options: dict[str, dict[str, Any]] = {
        **{name: {"tile": (1, 8, 8)} for name in ("seam", "seam_step")},
        "border": {},
        "lpips": {"backbone": str(backbone)},
        "clip_score": {"folder": str(clip_folder)},
        "fid": {"network": str(colours)},
        **{name: outside for name in MAKERS if name.startswith(("vbench_", "image_reward"))},
    }
    assert options.keys() == MAKERS.keys()
    made = make_metrics(options.items())
    assert [metric.name for metric in made] == list(options)
    for metric in made:
        assert is_better_high(metric.name) == (metric.higher_is_better is not False), metric.name
