"""Plans on disk: what is written is what is read, each plan finds its pipeline, and the wrong one is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError

import dit_accel
from dit_accel import explanation
from dit_accel.commands.arguments import apply_call, method_call, parse_method
from dit_accel.eval.rates import Rates
from dit_accel.methods import BandAttnProcessor, make_method
from dit_accel.methods.actions import FULL, REUSE, Action, Assignment
from dit_accel.tuned_plan import Guidance, Metric, PlanAttnProcessor, TunedModel, TunedPlan, config_hash

ACTIONS = (
    FULL,
    REUSE,
    Action(share=True),
    Action(BandAttnProcessor(share=0.1, tile=16), residual=True),
    Action(make_method("neighborhood", window=(1, 3, -1), density=None, delta="add"), share=True),
    Action(make_method("draft", density=1 / 3, region=(1, 4, 8))),
)
TABLE = torch.tensor([[[0], [2]], [[3], [1]], [[3], [1]], [[0], [4]], [[5], [1]]], dtype=torch.int16)


def a_plan(table: torch.Tensor = TABLE, **changes: Any) -> TunedPlan:
    facts: dict[str, Any] = {
        "assignment": Assignment(ACTIONS, table),
        "model": TunedModel("SomeTransformer", "0123456789abcdef"),
        "scheduler": "SomeScheduler",
        "guidance": Guidance("batched", 4.5),
        "grids": ((1, 32, 24), (1, 64, 64)),
        "metric": Metric("relative error", 0.05),
        "measured": {"speedup": 1.5, "by prompt": [0.1, 2, None]},
        "keep": "8bit",
        "max_age": 7,
    }
    return TunedPlan(**(facts | changes))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    a_plan().save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


HEADS = torch.tensor([[[0, 1, 5]], [[1, 1, 1]], [[3, 0, 5]]])


@pytest.mark.parametrize("table", [TABLE, TABLE.long(), HEADS, TABLE[:1]], ids=["int16", "int64", "heads", "one-step"])
def test_what_is_written_is_what_is_read(tmp_path: Path, table: torch.Tensor) -> None:
    plan = a_plan(table)
    plan.save(tmp_path / "plan.json")
    read = TunedPlan.load(tmp_path / "plan.json")
    assert read == plan
    assert hash(read) == hash(plan)
    assert read.assignment.actions == ACTIONS
    assert torch.equal(read.assignment.table, table.long())
    for name in (
        "model",
        "scheduler",
        "guidance",
        "grids",
        "metric",
        "measured",
        "versions",
        "keep",
        "max_age",
        "steps",
    ):
        assert getattr(read, name) == getattr(plan, name)


def test_what_json_does_not_have_is_written_as_text(tmp_path: Path) -> None:
    plan = a_plan(measured={"psnr": float("inf"), "by prompt": (1.0, float("nan"))})
    plan.save(tmp_path / "plan.json")
    read = TunedPlan.load(tmp_path / "plan.json")
    assert read.measured == {"psnr": "inf", "by prompt": [1.0, "nan"]}
    assert read == plan


def test_equal_steps_take_one_line_and_end_at_their_share_of_the_run(file: Path) -> None:
    document = json.loads(file.read_text())
    assert [run["until"] for run in document["table"]] == [0.2, 0.6, 0.8, 1.0]
    assert document["actions"][3] == {
        "method": "band",
        "options": {"share": 0.1, "tile": 16},
        "residual": True,
        "share": False,
        "reuse": False,
    }
    assert sum('"until"' in line for line in file.read_text().splitlines()) == 4


@pytest.mark.parametrize("change", ["scheduler", "keep", "max_age", "table"])
def test_plans_that_differ_are_not_equal(change: str) -> None:
    changes: dict[str, Any] = {"scheduler": {"scheduler": "Other"}, "keep": {"keep": "cpu"}, "max_age": {"max_age": 8}}
    other = a_plan(**changes[change]) if change in changes else a_plan(TABLE.flip(0))
    assert other != a_plan()
    assert other.digest != a_plan().digest
    assert other.processor().options() != a_plan().processor().options()


def test_another_number_of_steps_takes_the_rows_at_the_same_shares(file: Path) -> None:
    assignment = TunedPlan.load(file).assignment
    assert torch.equal(assignment.rows(10), TABLE.long().repeat_interleave(2, 0))
    assert torch.equal(assignment.rows(3), TABLE.long()[[0, 2, 4]])


def test_the_processor_follows_the_plan_and_takes_options(file: Path) -> None:
    plan = TunedPlan.load(file)
    method = plan.processor("plan.json")
    assert (method.name, method.keep, method.max_age) == ("plan", "8bit", 7)
    assert method.options() == {"keep": "8bit", "max_age": 7, "plan": plan.digest}
    json.dumps(method.options())
    assert make_method(method, keep="cpu").plan == plan  # type: ignore[attr-defined]
    copied = copy.deepcopy(method)
    assert copied.plan == plan
    assert torch.equal(copied.assignment.table, plan.assignment.table)


def edited(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Sets, or removes for ..., what lies at a path of keys."""

    def edit(document: Any) -> None:
        *outer, last = [int(key) if key.isdigit() else key for key in path.split(".")]
        for key in outer:
            document = document[key]
        if value is ...:
            del document[last]
        else:
            document[last] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edited("schema", 2), "schema must be 1, got 2"),
        (edited("schema", ...), "schema must be 1, got None"),
        (edited("colour", 1), "the plan has the unknown key 'colour'"),
        (edited("metric", ...), "the plan lacks the key 'metric'"),
        (edited("metric.budget", "low"), "budget of metric must be int | float, got 'low'"),
        (edited("metric.budget", True), "budget of metric must be int | float, got True"),
        (edited("model.weights", 1), "model has the unknown key 'weights'"),
        (edited("steps", "5"), "steps of the plan must be int, got '5'"),
        (edited("guidance.mode", "both"), "guidance must be one of batched, separate, none, got 'both'"),
        (edited("grids.largest", [1, 16, 64]), "no larger than the largest on any axis"),
        (edited("grids.largest", [64, 64]), "the largest grid must be three integers"),
        (edited("keep", "disk"), "keep must be one of device, cpu, 8bit, got 'disk'"),
        (edited("max_age", 0), "max_age must be at least 1 step or None, got 0"),
        (edited("actions", []), "the first action must be full attention"),
        (edited("actions.3", "band"), "action 3 must be an object, got 'band'"),
        (edited("actions.3.method", "bnd"), "there is no method 'bnd'; did you mean 'band'"),
        (edited("actions.3.options.tyle", 1), "band has no option 'tyle'; did you mean 'tile'"),
        (edited("actions.3.options.share", 2), r"share must be in \(0, 1\], got 2"),
        (edited("actions.0.options.share", 2), "action 0 has options but no method"),
        (edited("actions.1.share", True), "an action that reuses computes nothing"),
        (edited("table.1.blocks.0.0", 6), "the table must name 6 actions from 0 on, got 0 to 6"),
        (edited("table.1.blocks.0.0", -1), "the table must name 6 actions from 0 on, got -1 to 5"),
        (edited("table.1.blocks.0.0", 1.5), "the table must be integers"),
        (edited("table.1.blocks.0", [1, 2]), "blocks must be as many lists of as many indices"),
        (edited("table.1.blocks", []), "blocks must be as many lists of as many indices"),
        (edited("table.1.blocks.0.0", None), "blocks must be as many lists of as many indices"),
        (edited("table.1.until", 0.55), "row 1 of the table must end at a later one of 5 steps, got 0.55"),
        (edited("table.1.until", 0.2), "row 1 of the table must end at a later one of 5 steps, got 0.2"),
        (edited("table.3.until", 1.2), "row 3 of the table must end at a later one of 5 steps, got 1.2"),
        (edited("table.3", ...), "the table must end with the run, got 4 of 5 steps"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_wrong_file_is_refused_in_one_sentence(file: Path, edit: Callable[[Any], None], message: str) -> None:
    document = json.loads(file.read_text())
    edit(document)
    file.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message.replace("|", r"\|")) as refusal:
        TunedPlan.load(file)
    sentence = str(refusal.value)
    assert sentence.startswith(f"{file} is no plan that can be used (")
    assert sentence.endswith("); write it with dit-accel tune.")
    assert sentence.count(". ") == 0


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1, 2]", b"null", b'{"schema": 1}'], ids=repr)
def test_a_file_that_is_anything_else_is_refused(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{file} is no plan that can be used "):
        TunedPlan.load(file)


def test_a_method_without_a_name_to_find_it_by_is_not_written(tiny: ModuleType, tmp_path: Path) -> None:
    plan = a_plan(assignment=Assignment((FULL, Action(tiny.Tiles())), TABLE.clamp(max=1)))
    with pytest.raises(ValueError, match="a plan's methods are found by name, and tiles is none of"):
        plan.save(tmp_path / "plan.json")


def test_a_folder_holds_a_plan(tmp_path: Path) -> None:
    a_plan().save_pretrained(tmp_path / "pipeline")
    assert (tmp_path / "pipeline" / "dit_accel_plan.json").is_file()
    assert TunedPlan.from_pretrained(tmp_path / "pipeline") == a_plan()
    assert TunedPlan.from_pretrained(str(tmp_path / "pipeline" / "dit_accel_plan.json")) == a_plan()
    with pytest.raises(ValueError, match=f"the folder {tmp_path} holds no dit_accel_plan.json"):
        TunedPlan.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("owner/name", ("owner/name", "dit_accel_plan.json")),
        ("owner/name-1.5/fast.json", ("owner/name-1.5", "fast.json")),
        ("owner/name/plans/fast.json", ("owner/name", "plans/fast.json")),
    ],
)
def test_a_plan_on_the_hub_is_downloaded(
    file: Path, monkeypatch: pytest.MonkeyPatch, source: str, asked: tuple[str, str]
) -> None:
    calls: list[tuple[str, str]] = []

    def download(repository: str, name: str) -> str:
        calls.append((repository, name))
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert TunedPlan.from_pretrained(source) == a_plan()
    assert calls == [asked]


@pytest.mark.parametrize("error", [OSError("no network\nlong"), EntryNotFoundError("404."), ValueError("bad id")])
def test_a_plan_that_the_hub_does_not_give_is_refused(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def download(repository: str, name: str) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(ValueError, match=r"nor could .* from the hub \((no network|404|bad id)\); check"):
        TunedPlan.from_pretrained("owner/name")


@pytest.mark.parametrize(
    "source", ["plan.json", "results/plan.json", "./owner/name", "/no/such/plan.json", "../a.json"]
)
def test_a_path_that_leads_nowhere_is_not_looked_up_on_the_hub(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    with pytest.raises(ValueError, match=f"there is no plan {source}; give a file"):
        TunedPlan.from_pretrained(source)


# What follows runs a tiny pipeline: two blocks, batched guidance, eight by ten tokens.
RUN = Assignment((FULL, REUSE, Action(BandAttnProcessor())), torch.tensor([[[0], [0]], [[2], [1]]] * 2))


@pytest.fixture
def tuned(tiny: ModuleType, tmp_path: Path) -> tuple[Any, TunedPlan, str]:
    """A pipeline, a plan that fits it, and its file."""
    pipe = tiny.pipeline("pixel_dit")
    plan = TunedPlan.for_pipeline(
        pipe, RUN, grids=[(1, 8, 12), (1, 10, 10)], metric=Metric("mse", 0.1), guidance_scale=2.0
    )
    plan.save(tmp_path / "plan.json")
    return pipe, plan, str(tmp_path / "plan.json")


def test_a_plan_knows_what_it_was_tuned_for(tuned: tuple[Any, TunedPlan, str]) -> None:
    pipe, plan, _ = tuned
    assert plan.model == TunedModel("PixelDiT", config_hash([pipe.transformer]))
    assert (plan.scheduler, plan.guidance) == ("FlowMatchEulerDiscreteScheduler", Guidance("batched", 2.0))
    assert (plan.steps, plan.grids) == (4, ((1, 8, 10), (1, 10, 12)))
    assert set(plan.versions) == {"python", "torch", "diffusers", "dit-accel"}
    plan.check(pipe)


def test_every_form_of_a_plan_is_applied(tuned: tuple[Any, TunedPlan, str], tiny: ModuleType, tmp_path: Path) -> None:
    pipe, plan, file = tuned
    dense = tiny.run(pipe, height=8, width=10)
    plan.save_pretrained(tmp_path / "folder")
    outputs = []
    for form in (plan, plan.processor(), file, Path(file), str(tmp_path / "folder")):
        pipe.set_attn_processor(form)
        outputs.append(tiny.run(pipe, height=8, width=10))
        with dit_accel.apply(pipe, form) as handle:
            assert handle.method.name == "plan"
            outputs.append(tiny.run(pipe, height=8, width=10))
    assert not torch.equal(outputs[0], dense)
    assert all(torch.equal(outputs[0], other) for other in outputs)
    assert torch.equal(tiny.run(pipe, height=8, width=10), dense)


def test_a_plan_is_explained(tuned: tuple[Any, TunedPlan, str], monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, plan, file = tuned
    monkeypatch.setattr(explanation, "rates", lambda *arguments: Rates(1.0, 1.0, 1.0, tokens=1, density=1.0))
    size = {"height": 8, "width": 10, "steps": 4}
    told = dit_accel.explain(pipe, file, **size)
    assert (told.method, told.options) == ("plan", {"plan": plan.digest})
    assert told.run_density == pytest.approx((2 + 2 + 2 * 1.0) / 8)  # its band touches the only tile
    with pytest.raises(ValueError, match="tuned for latent grids from 1x8x10 to 1x10x12, this run has 1x8x14"):
        dit_accel.explain(pipe, file, **size | {"width": 14})


def test_another_size_is_refused_before_the_first_step(tuned: tuple[Any, TunedPlan, str], tiny: ModuleType) -> None:
    pipe, plan, _ = tuned
    steps: list[Any] = []
    pipe.transformer.register_forward_hook(lambda *_: steps.append(1))
    with dit_accel.apply(pipe, plan):
        tiny.run(pipe, height=10, width=12, steps=7)
        assert len(steps) == 7
        with pytest.raises(
            ValueError, match="tuned for latent grids from 1x8x10 to 1x10x12, this run has 1x8x14; choose a size"
        ):
            tiny.run(pipe, height=8, width=14)
    assert len(steps) == 7


def test_another_pipeline_is_refused(tuned: tuple[Any, TunedPlan, str], tiny: ModuleType) -> None:
    pipe, plan, file = tuned
    with pytest.raises(ValueError, match="with the denoiser PixelDiT, this pipeline has WanTransformer3DModel; tune"):
        tiny.pipeline("wan").set_attn_processor(file)
    with pytest.raises(ValueError, match="which a PixelDiT by itself does not know; apply it to the pipeline"):
        dit_accel.apply(pipe.transformer, plan)
    other = tiny.PixelDiTPipeline(tiny.pixel_dit_model(layers=3), pipe.scheduler)
    with pytest.raises(ValueError, match=r"tuned with the configuration \w{12}, this pipeline has \w{12}; tune"):
        dit_accel.apply(other, plan)
    pipe.scheduler = tiny.UniPCMultistepScheduler()
    with pytest.raises(ValueError, match="with the scheduler FlowMatchEuler.*, this pipeline has UniPCMultistep"):
        dit_accel.apply(pipe, plan)


def test_another_guidance_is_refused(tuned: tuple[Any, TunedPlan, str]) -> None:
    pipe, plan, _ = tuned
    separate = TunedPlan(plan.assignment, plan.model, plan.scheduler, Guidance("separate"), plan.grids, plan.metric)
    with pytest.raises(ValueError, match="with the guidance separate, this pipeline has batched; tune"):
        dit_accel.apply(pipe, separate)


def test_the_hash_is_of_public_configuration_however_it_came(tiny: ModuleType, tmp_path: Path) -> None:
    model = tiny.wan_model()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert config_hash([loaded]) == config_hash([model])
    assert config_hash([model, model]) != config_hash([model]) != config_hash([tiny.wan_model(layers=1)])


def test_the_command_line_takes_a_plan_where_it_takes_a_method(tuned: tuple[Any, TunedPlan, str]) -> None:
    _, plan, file = tuned
    method = parse_method(file, "shapes")
    assert isinstance(method, PlanAttnProcessor) and method.plan == plan
    assert method_call(method) == file
    assert apply_call(method) == repr(file)
    with pytest.raises(ValueError, match="density is of the fixed schedule's window, got 0.3"):
        parse_method(file, "shapes", 0.3)
    with pytest.raises(ValueError, match="there is no plan plan.json"):
        parse_method("plan.json", "shapes")
    with pytest.raises(ValueError, match="a method is written as a name"):
        parse_method("", "shapes")
