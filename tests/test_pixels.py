"""PixelDiT, its pipeline and its training data."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb

import dit_accel
from dit_accel.pipelines.flow import noise_times, shift_times
from dit_accel.pipelines.pixels.model import PixelDiT, rotary_embedding
from dit_accel.pipelines.pixels.pipeline import PixelDiTPipeline, noise_shift
from dit_accel.pipelines.shapes.scenes import COLOURS
from dit_accel.pipelines.training.pixels import CLASSES, PIXELS
from dit_accel.pipelines.training.task import Feed

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [(1, 1), (7, 13), (16, 5)], ids=str)
def test_images_of_any_size_keep_their_shape(tiny: ModuleType, size: tuple[int, int]) -> None:
    out = tiny.forward(tiny.model("pixel_dit"), tiny.inputs("pixel_dit", batch=2, grid=(1, *size)))
    assert out.shape == (2, 3, *size)
    assert out.isfinite().all()


def test_a_fresh_model_predicts_nothing() -> None:
    model = PixelDiT(num_attention_heads=1, attention_head_dim=8, num_layers=1, ffn_dim=8)
    assert not model(torch.randn(1, 3, 4, 5), torch.tensor([7.0])).sample.any()


def test_rotations_depend_on_relative_positions_only() -> None:
    rows, columns = 6, 9
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    rotations = rotary_embedding(rows, columns, 16, 10000.0, CPU)
    turned_q, turned_k = (
        apply_rotary_emb(x.expand(1, rows * columns, 1, 16), rotations, sequence_dim=1) for x in (q, k)
    )
    scores = torch.einsum("inhd,imhd->nm", turned_q, turned_k).view(rows, columns, rows, columns)
    torch.testing.assert_close(scores[:-2, :-3, :-2, :-3], scores[2:, 3:, 2:, 3:], atol=1e-5, rtol=0)
    assert scores[0, 0].flatten().unique().numel() > rows * columns // 2


def test_rows_and_columns_are_told_apart(tiny: ModuleType) -> None:
    model, arguments = tiny.model("pixel_dit"), tiny.inputs("pixel_dit", grid=(1, 6, 6))
    turned = arguments | {"hidden_states": arguments["hidden_states"].mT}
    assert not torch.allclose(tiny.forward(model, turned).mT, tiny.forward(model, arguments), atol=1e-3)


@pytest.mark.parametrize("method", ["radial(density=0.5)", "grat(density=0.5)"])
def test_methods_change_the_model_and_leave_it_as_it_was(tiny: ModuleType, method: str) -> None:
    model, arguments = tiny.model("pixel_dit"), tiny.inputs("pixel_dit", grid=(1, 24, 20))
    stock = tiny.forward(model, arguments)
    with dit_accel.apply(model, method.partition("(")[0], density=0.5) as handle:
        changed = tiny.forward(model, arguments)
    assert handle.tally.sparse_calls == 2
    assert handle.tally.density < 0.9
    assert not torch.equal(changed, stock)
    assert torch.equal(tiny.forward(model, arguments), stock)


def test_checkpointed_gradients_are_the_same(tiny: ModuleType) -> None:
    arguments, found = tiny.inputs("pixel_dit"), []
    for checkpointing in (False, True):
        model = tiny.model("pixel_dit").train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        dit_accel.apply(model, tiny.Tiles(everything=False))
        model(**arguments)[0].square().sum().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_a_saved_pipeline_makes_the_same_images(tiny: ModuleType, tmp_path: Path) -> None:
    pipe = tiny.pipeline("pixel_dit")
    pipe.save_pretrained(tmp_path)
    loaded = PixelDiTPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    arguments = {"class_labels": [1, 4], "height": 9, "width": 14, "num_inference_steps": 3, "guidance_scale": 2.0}
    images, again = (
        each(**arguments, output_type="np", generator=torch.Generator().manual_seed(0)).images
        for each in (pipe, loaded)
    )
    assert images.shape == (2, 9, 14, 3)
    np.testing.assert_array_equal(images, again)


def test_guidance_is_a_step_from_the_unconditional_velocity(tiny: ModuleType) -> None:
    pipe = tiny.pipeline("pixel_dit")
    plain, wanted, guided = (
        tiny.run(pipe, steps=1, height=5, width=7, class_labels=label, guidance_scale=scale)
        for label, scale in ((None, 1.0), (3, 1.0), (3, 3.0))
    )
    torch.testing.assert_close(guided, plain + 3 * (wanted - plain), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("classes", "arguments", "message"),
    [
        (5, {"class_labels": 5}, "class_labels must be in 0 to 4, got 5"),
        (None, {"class_labels": 0}, "knows no classes, got 0"),
        (5, {"class_labels": None, "guidance_scale": 2.0}, "needs class_labels, got None"),
    ],
    ids=["no such class", "no classes", "guidance alone"],
)
def test_labels_that_the_model_cannot_draw_are_refused(
    tiny: ModuleType, classes: int | None, arguments: dict[str, object], message: str
) -> None:
    pipe = PixelDiTPipeline(tiny.pixel_dit_model(num_classes=classes), tiny.pipeline("pixel_dit").scheduler)
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


def test_shifts_of_times_multiply() -> None:
    times = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(shift_times(shift_times(times, 2.0), 3.0), shift_times(times, 6.0))
    assert shift_times(times, 4.0)[[0, -1]].tolist() == [0, 1]
    assert [noise_shift(*size) for size in ((128, 128), (256, 256), (64, 256))] == [2, 4, 2]


def test_larger_shifts_draw_more_noise() -> None:
    few, many = (noise_times(4000, shift, torch.Generator().manual_seed(0)) for shift in (1.0, 4.0))
    assert few.mean() == pytest.approx(0.5, abs=0.02)
    torch.testing.assert_close(many, shift_times(few, 4.0))


def feed(processes: int = 1, process: int = 0, batch: int = 64) -> Feed:
    return Feed((1, 24, 32), batch, seed=3, device=CPU, process=process, processes=processes)


def test_batches_depend_on_their_number_alone() -> None:
    first, again, other = (PIXELS.feed(None, feed(*place))(5) for place in ((1, 0), (2, 1), (1, 0)))
    assert torch.equal(first.clean, again.clean) and torch.equal(first.noise, again.noise)
    assert torch.equal(first.times, other.times)
    assert not torch.equal(first.clean, PIXELS.feed(None, feed())(6).clean)


def test_labels_name_the_colour_that_is_drawn_and_a_tenth_is_dropped() -> None:
    batch = PIXELS.feed(None, feed(batch=400))(0)
    labels = batch.conditions["class_labels"]
    dropped = labels == len(CLASSES)
    assert 0.05 < dropped.float().mean() < 0.15
    palette = torch.tensor(list(COLOURS.values())) * 2 - 1
    for image, label in zip(batch.clean[~dropped][:50], labels[~dropped][:50], strict=True):
        colour = palette[list(COLOURS).index(CLASSES[label].split()[0])]
        assert (image - colour[:, None, None]).abs().sum(0).min() < 0.01
