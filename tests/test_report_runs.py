"""The report of runs: every number worked out again by brute force, a page that is whole, and what it refuses."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dit_accel.cli import main
from dit_accel.commands.report import heads_of
from dit_accel.eval.aggregate import StudySummary, summarise_study
from dit_accel.eval.quality import Score
from dit_accel.eval.records import Item, Job, Record, Timings, make_record, to_json
from dit_accel.eval.report.part import short_names
from dit_accel.eval.report.run import Run, load_run
from dit_accel.eval.report.run_page import write_run_report
from dit_accel.eval.sets import SetRecord
from dit_accel.eval.statistics import signed_rank_p
from dit_accel.eval.studies import prompt_hash, studies
from dit_accel.eval.suite.schema import Suite, dump_suite
from dit_accel.eval.summary import write_summary
from dit_accel.methods import METHODS
from dit_accel.tuned_plan import PlanAttnProcessor

PROMPTS = ['a <script>alert("1")</script> & a ring', "a red circle", "a blue star, growing", "two | squares", "a cross"]
SIZES = {"small": (5, 32, 48), "large": (9, 64, 96)}
SEEDS, STEPS, BLOCKS, HEADS = (0, 1), 4, 3, 4
KERNEL, FEWER, RADIAL, DRAFT, PLAN = (
    "dense(kernel='_native_math')",
    "dense, one step less",
    "radial(density=0.3, start_percent=0.25)",
    "draft(density=0.3)",
    "draft(density=0.3, region=(1, 8, 8))",
)
SPEED = {"dense": 1.0, KERNEL: 1.1, FEWER: 1.3, RADIAL: 1.5, DRAFT: 1.3, PLAN: 0.9}
CLOSE = {KERNEL: 48.0, FEWER: 33.0, RADIAL: 25.0, DRAFT: 30.0, PLAN: 36.0}
VOID = {"meta", "img", "input"}


def quality_of(label: str, prompt: int, seed: int, draw: np.random.Generator) -> dict[str, Score]:
    """Scores of one sample: some infinite, some skipped, attention probed for one seed."""
    shown = Score(None, skipped="no verifier") if prompt == 3 else Score(float(draw.integers(0, 3)) / 2)
    if label == "dense":
        return {"prompt_accuracy": shown, "psnr": Score(None, skipped="psnr needs a reference clip.")}
    psnr = CLOSE[label] + float(draw.normal(0, 2)) - 2 * prompt
    errors = tuple(float(step * draw.uniform(0.5, 1) / 20) for step in range(STEPS))
    quality = {
        "prompt_accuracy": shown,
        "psnr": Score(math.inf if label == KERNEL and prompt == 1 else psnr),
        "ssim": Score(1 - float(draw.uniform(0, 0.2))),
        "trajectory": Score(errors[-1], errors),
    }
    if label in (RADIAL, DRAFT) and seed == 0 and prompt < 2:
        for name, base in (("discarded_mass", 0.2), ("attention_error", 0.1), ("attention_cosine", 0.98)):
            values = base + draw.uniform(0, 0.02, (BLOCKS, HEADS))
            values[0] = math.nan
            steps = (math.nan, *draw.uniform(0, 0.5, STEPS - 1).tolist())
            quality[name] = Score(float(np.nanmean(values)), tuple(values.ravel().tolist()))
            quality[f"{name}_by_step"] = Score(float(np.nanmean(steps)), steps)
    return quality


def make_records(sizes: dict[str, tuple[int, int, int]] = SIZES, prompts: Sequence[str] = PROMPTS) -> list[Record]:
    """All samples of all methods; the first draft lost those of one seed."""
    draw, found = np.random.default_rng(7), []
    template = make_record(
        Job(method="dense", model="shapes", prompt="", seed=0, size=(1, 8, 8), steps=STEPS, guidance=4.0),
        timings={},
        quality={},
        densities={},
    )
    for setting, size in sizes.items():
        for number, prompt in enumerate(prompts):
            for seed in SEEDS:
                identity = f"{setting}-{number}-{seed}"
                for label, speed in SPEED.items():
                    if label == DRAFT and seed == 1:
                        continue
                    is_dense = label.startswith("dense")
                    role: Any = "reference" if label == "dense" else "floor" if is_dense else "method"
                    denoise = math.prod(size) / 1e4 / speed * float(draw.uniform(0.95, 1.05))
                    timings: Timings = {"denoise": denoise, "attention": 0.6 * denoise}
                    scores = quality_of(label, number, seed, draw)
                    found.append(
                        template
                        | Record(
                            id=f"{identity}-{list(SPEED).index(label)}",
                            method=label.partition("(")[0].partition(",")[0],
                            prompt=prompt,
                            seed=10_000 * seed + number,
                            size=list(size),
                            steps=STEPS - (label == FEWER),
                            timings=timings,
                            quality={name: vars(score) for name, score in scores.items()},
                            densities={"executed": 1.0 if is_dense else 0.3, "run": 1.0 if is_dense else 0.5},
                            baseline=None if label == "dense" else f"{identity}-0",
                            item=Item(
                                suite="synthetic",
                                setting=setting,
                                label=label,
                                role=role,
                                prompt_list="mine",
                                prompt_hash=prompt_hash(prompts),
                                number=number,
                                seed=seed,
                            ),
                        )
                    )
    return found


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return make_records()


@pytest.fixture(scope="module")
def summaries(records: list[Record]) -> dict[str, StudySummary]:
    return {study.setting: summarise_study(study) for study in studies(records)}


class Page(HTMLParser):
    """Tags and text of a page; tags must nest."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open_tags: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open_tags == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open_tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str, name: str) -> list[str]:
        return [attributes[name] or "" for found, attributes in self.tags if found == tag and name in attributes]


def heads(model: str) -> int:
    assert model == "shapes"
    return HEADS


def keep_clips(folder: Path, records: Sequence[Record], frames: int | None = None) -> None:
    """Random clips of the first prompt and seed at the small size, in the run folder."""
    draw = np.random.default_rng(0)
    for record in records:
        item = record["item"]
        if item["setting"] == "small" and item["number"] == 0 and item["seed"] == 0:
            length, height, width = record["size"]
            clip = draw.integers(0, 256, (frames or length, height, width, 3), dtype=np.uint8)
            path = folder / ("references" if item["role"] == "reference" else "clips") / f"{record['id']}.npz"
            path.parent.mkdir(exist_ok=True)
            np.savez_compressed(path, frames=clip)


@pytest.fixture(scope="module")
def page(records: list[Record], tmp_path_factory: pytest.TempPathFactory) -> Page:
    folder = tmp_path_factory.mktemp("run")
    keep_clips(folder, records)
    failed = {"model": "shapes", "setting": "small", "method": DRAFT, "error": "RuntimeError: <no> memory"}
    score = {"value": 12.34, "samples": 5, "skipped": None}
    judged = SetRecord(model="shapes", setting="small", label=RADIAL, metric="fid", clips=["a"], score=score)
    run = Run("synthetic", folder, records, [failed], [judged], "name: synthetic\n")
    return Page(write_run_report(folder, [run], heads))


def samples(records: Sequence[Record], setting: str, label: str, metric: str) -> dict[tuple[str, int], float]:
    """Scores that were not skipped, read straight from the records."""
    found = {}
    for record in records:
        item, score = record["item"], record["quality"].get(metric, {})
        if (item["setting"], item["label"]) == (setting, label) and score.get("value") is not None:
            found[record["prompt"], item["seed"]] = score["value"]
    return found


def by_prompt(scores: dict[tuple[str, int], float]) -> dict[str, float]:
    prompts = {prompt for prompt, _ in scores}
    return {
        prompt: float(np.mean([score for (text, _), score in scores.items() if text == prompt])) for prompt in prompts
    }


@pytest.mark.parametrize("setting", SIZES)
@pytest.mark.parametrize("label", [RADIAL, DRAFT, PLAN])
@pytest.mark.parametrize("metric", ["psnr", "ssim", "prompt_accuracy", "trajectory"])
def test_means_and_worst_prompts_are_those_of_brute_force(
    records: list[Record], summaries: dict[str, StudySummary], setting: str, label: str, metric: str
) -> None:
    means = by_prompt(samples(records, setting, label, metric))
    found = summaries[setting][label].metrics[metric]
    assert found.by_prompt == pytest.approx(means)
    assert found.summary.count == len(means) == (4 if metric == "prompt_accuracy" else 5)
    assert found.summary.mean == pytest.approx(np.mean(list(means.values())))
    worst = max if metric == "trajectory" else min
    assert found.worst_prompt in means
    assert found.summary.worst == pytest.approx(worst(means.values())) == means[found.worst_prompt]


def test_differences_are_paired_by_sample_and_tested_by_prompt(
    records: list[Record], summaries: dict[str, StudySummary]
) -> None:
    for label in (RADIAL, DRAFT):
        ours, theirs = (samples(records, "large", name, "prompt_accuracy") for name in (label, "dense"))
        both = ours.keys() & theirs.keys()
        gaps = by_prompt({sample: ours[sample] - theirs[sample] for sample in both})
        found = summaries["large"][label].metrics["prompt_accuracy"]
        assert found.compared_with == "dense"
        assert found.difference is not None
        assert found.difference.count == len(gaps) == 4
        assert found.difference.difference == pytest.approx(np.mean(list(gaps.values())))
        assert found.difference.p_value == pytest.approx(signed_rank_p(list(gaps.values())))
    psnr = summaries["large"][DRAFT].metrics["psnr"]
    assert psnr.compared_with == PLAN, "dense has no PSNR, and this is the best of the others"
    assert psnr.difference is not None
    assert psnr.difference.count == 5


def test_a_second_seed_of_the_same_prompts_adds_no_evidence() -> None:
    """Ten equal pairs from five prompts are five: p is 2 / 2**5, not 2 / 2**10."""
    once = [record for record in make_records({"small": SIZES["small"]}) if record["item"]["seed"] == 0]
    better = {record["prompt"]: 1.0 for record in once}
    for record in once:
        ahead = record["item"]["label"] == RADIAL
        record["quality"] = {"prompt_accuracy": {"value": better[record["prompt"]] if ahead else 0.5}}
    again = [record | Record(id=f"{record['id']}-again", item=record["item"] | Item(seed=5)) for record in once]
    (study,) = studies([*once, *again])
    found = summarise_study(study)[RADIAL].metrics["prompt_accuracy"]
    assert (len(found.by_sample), found.summary.count) == (10, 5)
    assert found.difference is not None
    assert found.difference.p_value == 2 / 2**5


def test_speed_ups_are_medians_of_ratios_of_the_same_sample(
    records: list[Record], summaries: dict[str, StudySummary]
) -> None:
    time = {
        (record["item"]["label"], record["prompt"], record["item"]["seed"]): record["timings"]["denoise"]
        for record in records
        if record["item"]["setting"] == "small"
    }
    summary = summaries["small"]
    assert summary.fastest == KERNEL, "one step less is no exact baseline"
    for base, name in (("dense", "speed_up"), (KERNEL, "speed_up_fastest")):
        ratios = [time[base, prompt, seed] / own for (label, prompt, seed), own in time.items() if label == RADIAL]
        spread = getattr(summary[RADIAL], name)
        assert (spread.low, spread.median, spread.high) == pytest.approx(np.quantile(ratios, (0.25, 0.5, 0.75)))
    assert summary.attention_share == pytest.approx(0.6)
    assert summary[RADIAL].bound == pytest.approx(1 / (1 - 0.6 + 0.6 * 0.5))


def test_whole_module_methods_have_no_bound_from_pairs() -> None:
    """They are those that answer calls of whole modules: of the methods by name, and plans."""
    answered = {name for name, method in METHODS.items() if method.whole_modules} | {PlanAttnProcessor.name}
    found = make_records({"small": SIZES["small"]})
    for name in METHODS.keys() | {PlanAttnProcessor.name}:
        renamed = [record | Record(method=name) if record["item"]["label"] == PLAN else record for record in found]
        (study,) = studies(renamed)
        assert (summarise_study(study)[PLAN].bound is None) == (name in answered)


def test_dense_kernels_are_compared_on_the_samples_that_all_have() -> None:
    """A kernel that finished the easiest prompt alone is neither the fastest nor the floor for that."""
    found, other = [], "dense(kernel='_native_flash')"
    for record in make_records({"small": SIZES["small"]}):
        item, number = record["item"], record["item"]["number"]
        if item["label"] in ("dense", KERNEL):
            found.append(record | Record(timings={"denoise": 10.0**number * (1.0 if item["label"] == KERNEL else 1.5)}))
        if item["label"] == KERNEL:
            found[-1]["quality"] = {"psnr": {"value": 40.0 if number == 0 else 60.0}}
            if number == 0:
                own = record | Record(
                    id=f"{record['id']}-other", timings={"denoise": 1.2}, item=item | Item(label=other)
                )
                found.append(own | Record(quality={"psnr": {"value": 45.0}}))
    (study,) = studies(found)
    summary = summarise_study(study)
    assert {method.label for method in summary.of("floor")} == {KERNEL, other}
    assert (summary.fastest, summary.floor) == (KERNEL, KERNEL)


def test_floor_is_of_the_kernel_and_distances_to_it_are_medians(
    records: list[Record], summaries: dict[str, StudySummary]
) -> None:
    summary = summaries["small"]
    assert summary.floor == KERNEL
    ours, floor = (by_prompt(samples(records, "small", label, "psnr")) for label in (RADIAL, KERNEL))
    assert summary[RADIAL].to_floor == pytest.approx(sorted(ours[prompt] - floor[prompt] for prompt in ours)[2])
    psnr = summary[KERNEL].metrics["psnr"]
    assert (psnr.identical, psnr.summary.mean) == (1, math.inf)
    assert psnr.finite is not None
    assert psnr.finite.mean == pytest.approx(np.mean([value for value in floor.values() if math.isfinite(value)]))


def test_files_do_not_depend_on_the_order_of_the_records(records: list[Record], tmp_path: Path) -> None:
    shuffled = [records[place] for place in np.random.default_rng(3).permutation(len(records))]
    texts = [write_summary(tmp_path / name, found) for name, found in (("a", records), ("b", shuffled))]
    assert texts[0] == texts[1]
    for name in ("summary.md", "summary.csv", "summary.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    pages = [
        write_run_report(tmp_path / name, [Run("synthetic", tmp_path, found)], heads).read_text()
        for name, found in (("a", records), ("b", shuffled))
    ]
    assert pages[0] == pages[1]


def test_files_hold_the_numbers_with_count_and_hash(
    summaries: dict[str, StudySummary], records: list[Record], tmp_path: Path
) -> None:
    text = write_summary(tmp_path, records)
    assert text == (tmp_path / "summary.md").read_text()
    assert text.count(f"5 prompts of mine (hash {prompt_hash(PROMPTS)}) × 2 seeds") == 2
    assert "draft(density=0.3) finished 5 of 10 samples" in text
    with (tmp_path / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        metric = summaries[row["setting"]][row["method"]].metrics[row["metric"]]
        assert (int(row["samples"]), int(row["prompts"])) == (len(metric.by_sample), metric.summary.count)
        assert (float(row["mean"]), float(row["worst"])) == (metric.summary.mean, metric.summary.worst)
        assert row["worst_prompt"] == metric.worst_prompt
        assert row["prompt_hash"] == prompt_hash([prompt for prompt in PROMPTS if prompt in metric.by_prompt])
        if metric.difference:
            assert float(row["p"]) == metric.difference.p_value
    assert len(rows) == sum(len(method.metrics) for summary in summaries.values() for method in summary.methods)
    found = json.loads((tmp_path / "summary.json").read_text())
    small = next(study for study in found if study["setting"] == "small")
    radial = next(method for method in small["methods"] if method["label"] == RADIAL)
    means = summaries["small"][RADIAL].metrics["psnr"].by_prompt
    assert radial["metrics"]["psnr"]["by_prompt"] == [means[prompt] for prompt in PROMPTS]


def test_page_loads_nothing_and_holds_no_prompt_as_markup(page: Page) -> None:
    assert "http://" not in page.source
    assert "https://" not in page.source
    assert "url(" not in page.source
    assert "@import" not in page.source
    assert all(source.startswith("data:") for tag in ("img", "video") for source in page.all(tag, "src"))
    assert all(link.startswith("#") for link in page.all("a", "href"))
    assert page.source.count("<script>") == 1
    assert PROMPTS[0] in page.text
    assert "RuntimeError: <no> memory" in page.text


def test_page_links_lead_somewhere_and_everything_has_a_name(page: Page) -> None:
    names = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(names)) == len(names)
    links = {link.removeprefix("#") for link in page.all("a", "href")}
    assert links
    assert links <= set(names)
    assert all(page.all("img", "alt"))
    assert all(page.all("video", "aria-label"))
    assert len(page.all("a", "aria-label")) == 2 * 3, "a point for each method and setting, reached by keyboard"


def test_page_shows_clips_maps_and_figures_of_every_method(page: Page, summaries: dict[str, StudySummary]) -> None:
    rows = len(SPEED)
    assert len(page.all("video", "src")) == rows + rows - 1, "a clip each, an error map each except dense"
    assert "frame 1 / 5" in page.text
    assert {"min": "1", "max": "5", "value": "1"}.items() <= dict(
        next(had for tag, had in page.tags if tag == "input")
    ).items()
    assert len(page.all("img", "src")) == 2 * 3 * 2 * 2, "settings, measures, methods, by head and by step"
    for summary in summaries.values():
        for label in (RADIAL, PLAN):
            psnr, speed = summary[label].metrics["psnr"].summary, summary[label].speed_up
            assert speed is not None
            assert f"{psnr.mean:.1f} dB" in page.text
            assert f"{speed.median:.2f}×" in page.text
    for words in ("Noise floors", "Error over steps", "Softmax mass left out", prompt_hash(PROMPTS), "torch", "12.34"):
        assert words in page.text


def test_images_are_shown_as_stills_without_a_player(records: list[Record], tmp_path: Path) -> None:
    keep_clips(tmp_path, records, frames=1)
    page = Page(write_run_report(tmp_path, [Run("synthetic", tmp_path, records)], lambda model: None))
    assert page.all("video", "src") == []
    assert len(page.all("img", "src")) == 2 * len(SPEED) - 1
    assert 'class="player"' not in page.source


def test_samples_beyond_the_budget_are_left_out_and_counted(records: list[Record], tmp_path: Path) -> None:
    keep_clips(tmp_path, records, frames=1)
    page = Page(write_run_report(tmp_path, [Run("synthetic", tmp_path, records)], lambda model: None, budget=100))
    assert page.all("img", "src") == []
    assert "1 more would make the page too large" in page.text


def test_one_sample_without_times_or_floors_makes_a_page(tmp_path: Path) -> None:
    found = [record for record in make_records() if record["id"].startswith("small-0-0")]
    plain = [record | Record(timings={}) for record in found if record["item"]["role"] != "floor"]
    page = Page(write_run_report(tmp_path, [Run("one", tmp_path, plain)], heads))
    assert "1 prompt of mine" not in page.text
    assert "1 of mine's prompts (hash" in page.text
    assert "Nothing was timed" in page.text
    assert "Noise floors:" not in page.text


def test_one_prompt_has_neither_interval_nor_test_nor_worst_prompt(tmp_path: Path) -> None:
    found = [record for record in make_records({"small": SIZES["small"]}) if record["item"]["number"] == 0]
    page = Page(write_run_report(tmp_path, [Run("one", tmp_path, found)], heads))
    text = (tmp_path / "summary.md").read_text()
    heading, *rows = [line for line in text.splitlines() if line.startswith("| ")]
    table = "".join(rows)
    assert "worst" not in heading
    assert table.count("[") == 2 * (len(SPEED) - 1), "quartiles of both speed-ups, over two samples of all but draft"
    assert "p =" not in table
    assert "worst prompt of" not in text
    assert "one prompt: no interval, no test and no worst prompt" in text
    for words in ("1 prompts", "Worst prompt", "Prompt by prompt", "95 % across", "p = 1"):
        assert words not in page.text
    with (tmp_path / "summary.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            assert row["mean"]
            assert not any(row[name] for name in ("low", "high", "difference_low", "difference_high", "p"))
    for method in json.loads((tmp_path / "summary.json").read_text())[0]["methods"]:
        for metric in method["metrics"].values():
            assert metric["summary"]["interval"] is None
            assert metric["difference"] is None or metric["difference"]["p_value"] is None


@pytest.mark.parametrize("prompts", [9, 10])
def test_intervals_of_fewer_than_ten_prompts_come_with_a_word(tmp_path: Path, prompts: int) -> None:
    found = make_records({"small": SIZES["small"]}, [f"prompt {number}" for number in range(prompts)])
    words = f"{prompts} prompts: bootstrap intervals of fewer than 10 are too narrow"
    page = Page(write_run_report(tmp_path, [Run("few", tmp_path, found)], heads))
    assert (words in page.text) == (words in (tmp_path / "summary.md").read_text()) == (prompts < 10)


def test_methods_whose_dense_run_is_missing_were_timed_all_the_same(records: list[Record], tmp_path: Path) -> None:
    found = [record for record in records if record["item"]["role"] == "method"]
    page = Page(write_run_report(tmp_path, [Run("synthetic", tmp_path, found)], heads))
    assert "Nothing was timed" not in page.text
    assert "No dense run was timed on the same samples: up is fewer" in page.text


@pytest.mark.parametrize("floors", [(), (KERNEL,), (FEWER,), (KERNEL, FEWER)], ids=["none", "kernel", "step", "both"])
def test_plot_explains_the_bands_that_it_has(records: list[Record], tmp_path: Path, floors: tuple[str, ...]) -> None:
    found = [record for record in records if record["item"]["role"] != "floor" or record["item"]["label"] in floors]
    page = Page(write_run_report(tmp_path, [Run("synthetic", tmp_path, found)], heads))
    assert ("to its right a difference means nothing" in page.text) == (KERNEL in floors)
    assert ("a change and no noise" in page.text) == (FEWER in floors)


def test_a_kernel_floor_beyond_the_plot_is_named_with_its_mean_and_not_called_shaded(tmp_path: Path) -> None:
    found = make_records({"small": SIZES["small"]})
    for record in found:
        if record["item"]["label"] == KERNEL:
            record["quality"]["psnr"] = {"value": 88.0 + record["item"]["number"], "values": []}
    page = Page(write_run_report(tmp_path, [Run("far", tmp_path, found)], heads))
    assert "kernel floor: 90.0 →" in page.text
    assert "90.0 dB" in page.text, "the same figure above the table"
    assert "means nothing" not in page.text


def test_dots_say_how_many_clips_they_are_of(records: list[Record], tmp_path: Path) -> None:
    whole = [record for record in records if record["item"]["label"] != DRAFT]
    once = [record for record in whole if record["item"]["seed"] == record["item"]["number"] % 2]
    for found, words in ((whole, "the mean over its 2 seeds."), (records, "the mean over its seeds."), (once, "")):
        page = Page(write_run_report(tmp_path, [Run("synthetic", tmp_path, found)], heads))
        assert f"each of the 5 prompts{', ' * bool(words)}{words or '.'}" in page.text


def test_files_of_records_without_a_suite_are_read(tmp_path: Path, records: list[Record]) -> None:
    small = [record for record in records if record["item"]["setting"] == "small" and record["item"]["seed"] == 0]
    lines = []
    for record in small:
        if record["item"]["label"] in ("dense", RADIAL):
            plain = {name: value for name, value in record.items() if name != "item"}
            lines.append(json.dumps(to_json(plain | {"options": {"density": 0.3, "tile": [1, 8], "dtype": "x"}})))
    path = tmp_path / "compare.jsonl"
    path.write_text("\n".join([*lines, ""]))
    run = load_run(path)
    assert (run.name, len(run.records), run.suite) == ("compare", 10, "")
    (study,) = studies(run.records, run.name)
    assert study.setting == study.size_words == "48×32, 5 frames, 4 steps, guidance 4"
    assert study.prompts == tuple(PROMPTS)
    dense, radial = study.rows
    assert (dense.role, radial.role, radial.label) == ("reference", "method", "radial(density=0.3, tile=(1, 8))")
    found = summarise_study(study)[radial.label].metrics["psnr"].by_prompt
    assert found == by_prompt(samples(small, "small", RADIAL, "psnr"))


def test_the_command_reads_a_run_folder(
    records: list[Record], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = Suite(name="synthetic", models=("shapes",), methods=(RADIAL, DRAFT, PLAN), prompts=tuple(PROMPTS))
    (tmp_path / "suite.yaml").write_text(dump_suite(suite))
    for rank in range(2):
        lines = [json.dumps(to_json(record)) for record in records[rank::2]]
        (tmp_path / f"records-{rank}-of-2.jsonl").write_text("\n".join([*lines, ""]))
    failure = {"model": "shapes", "setting": "small", "method": DRAFT, "error": "RuntimeError: odd", "created": "now"}
    (tmp_path / "failures-1-of-2.jsonl").write_text(json.dumps(failure) + "\n")
    assert main(["report", str(tmp_path)]) == 0
    assert f"page: {tmp_path / 'index.html'}" in capsys.readouterr().out
    page = Page(tmp_path / "index.html")
    for words in ("RuntimeError: odd", "dit-accel eval suite.yaml", "growing", "Softmax mass left out"):
        assert words in page.text
    assert (tmp_path / "summary.md").read_text() == write_summary(tmp_path / "again", records)


def test_runs_of_one_suite_are_kept_apart(records: list[Record], tmp_path: Path) -> None:
    runs = [Run("synthetic", tmp_path / name, records) for name in ("a", "b")]
    page = Page(write_run_report(tmp_path / "page", runs, lambda model: None))
    for run in runs:
        assert f"{run.path}: shapes, small" in page.text


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["radial(density=0.3, tile=64)", "grat"], ["radial", "grat"]),
        (
            ["radial(density=0.3, tile=64)", "radial(density=0.2, tile=64)"],
            ["radial(density=0.3)", "radial(density=0.2)"],
        ),
        (["draft(a=(1, 2))", "draft(a=(1, 2), b=3)"], ["draft", "draft(b=3)"]),
        (["draft(a=1)@x/y", "draft(a=1)"], ["draft@y", "draft"]),
        (["dense", "draft(a=1)@x/y", "radial@x/y", "dense@x/y"], ["dense", "draft", "radial", "dense@y"]),
        (["draft(a=1)@x/y", "draft(a=2)@x/y", "radial@z"], ["draft(a=1)@y", "draft(a=2)@y", "radial@z"]),
        (["draft@x/y", "draft@z/y"], ["draft@x/y", "draft@z/y"]),
        (["dense", "dense, one step less"], ["dense", "dense, one step less"]),
        (["a(x=1, y=1)", "a(x=1)", "a(y=1)"], ["a(x=1, y=1)", "a(x=1)", "a(y=1)"]),
    ],
)
def test_short_names_say_what_differs(labels: list[str], names: list[str]) -> None:
    assert list(short_names(labels).values()) == names


def test_heads_are_those_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text('{"num_attention_heads": 7}')
    assert [heads_of(model) for model in ("shapes", str(tmp_path), "nobody/nothing", "unknown")] == [4, 7, None, None]


def test_refusals(records: list[Record], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither a file of records nor a folder"):
        load_run(tmp_path / "nothing")
    with pytest.raises(ValueError, match="at least one run"):
        write_run_report(tmp_path, [], heads)
    with pytest.raises(ValueError, match="two records of the prompt"):
        studies([records[0], records[0] | Record(id="other")])
    with pytest.raises(ValueError, match="more than one size"):
        studies([records[0], records[1] | Record(size=[1, 2, 3])])
    assert main(["report"]) == main(["report", str(tmp_path), "--tables"]) == 2
