"""Suite files: they come back as written, and whatever is wrong with one is said with its place and a remedy."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from dit_accel.eval.quality import METRICS
from dit_accel.eval.suite.schema import Setting, Suite, dump_suite, load_suite, shipped_suites
from dit_accel.methods import make_method, parse_method_call

LEAST: dict[str, Any] = {"name": "try", "models": ["shapes"], "methods": ["draft"], "prompts": ["a cat", "a dog"]}
SMALL: dict[str, Any] = {"name": "small", "height": 96, "steps": 8, "guidance": 4, "options": {"tile": [1, 8, 8]}}


def write(folder: Path, text: str) -> Path:
    path = folder / "suite.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, **changes: Any) -> Suite:
    content = {name: value for name, value in (LEAST | changes).items() if value is not ...}
    return load_suite(write(folder, yaml.safe_dump(content)))


def refusal(folder: Path, text: str) -> str:
    """What a file of this text is refused with, without the file's path."""
    path = write(folder, text)
    with pytest.raises(ValueError, match=r"\A[^\n]+[.?]\Z") as caught:
        load_suite(path)
    message = str(caught.value)
    assert message.startswith(str(path)), message
    return message.removeprefix(str(path))


def test_defaults(tmp_path: Path) -> None:
    assert load(tmp_path) == Suite(
        name="try",
        models=("shapes",),
        methods=("draft",),
        settings=(Setting(name="default"),),
        prompts=("a cat", "a dog"),
        prompt_list="inline",
        seeds=(0,),
        metrics={name: {} for name in METRICS},
        floors=("backend",),
        runs=1,
        batch=1,
        attention=0,
        trajectory=False,
        show=4,
    )


CHANGES: dict[str, dict[str, Any]] = {
    "models": {"models": ["shapes", "shapes-image", "/some where/model"]},
    "methods": {"methods": ["radial(density=0.35, start_percent=0.25)", "draft@folder", "grat(group=(2, 8, 8))"]},
    "settings": {"settings": [SMALL, {"name": "large", "width": 256, "num_frames": 25, "guidance": 0.5}]},
    "options": {"settings": [{"name": "a", "options": {"delta": None, "sink": True, "pattern": "B", "decay": 1e-3}}]},
    "texts": {"prompts": ["a: b", "# c", "on", "12", "“ü” \u2028 x", "two\nlines", "- d", "'", "x" * 300]},
    "list": {"prompts": {"file": "shapes", "first": 3}},
    "seeds": {"seeds": [3, 0, 4294967295]},
    "metrics": {"metrics": ["ssim", {"seam": {"tile": [2, 8, 8]}}, {"psnr": {}}]},
    "floors": {"floors": ["step", "backend"]},
    "no floors": {"floors": []},
    "untimed": {"runs": 0, "batch": 24},
    "rest": {"runs": 5, "attention": 2, "trajectory": True, "show": 0},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=list(CHANGES))
def test_a_dumped_suite_is_read_back_equal_elsewhere(tmp_path: Path, changes: dict[str, Any]) -> None:
    suite = load(tmp_path, **changes)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert load_suite(write(elsewhere, dump_suite(suite))) == suite
    assert {name for name in changes if getattr(suite, name) == getattr(load(tmp_path), name)} == set()


def test_values_are_read_as_they_are_used(tmp_path: Path) -> None:
    suite = load(tmp_path, settings=[SMALL], metrics=["psnr", {"seam": {"tile": [2, 8, 8]}}])
    assert suite.settings == (Setting(name="small", height=96, steps=8, guidance=4.0, options={"tile": (1, 8, 8)}),)
    assert isinstance(suite.settings[0].guidance, float)
    assert suite.metrics == {"psnr": {}, "seam": {"tile": (2, 8, 8)}}


def test_the_prompt_hash_is_of_the_texts_in_order(tmp_path: Path) -> None:
    suite = load(tmp_path)
    assert suite.prompt_hash == "f658c42ad55fc07e"
    assert dataclasses.replace(suite, prompts=suite.prompts[::-1]).prompt_hash != suite.prompt_hash
    assert dataclasses.replace(suite, name="other", prompt_list="other").prompt_hash == suite.prompt_hash


def setting(**entries: Any) -> dict[str, Any]:
    return {"settings": [{"name": "a"} | entries]}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    # keys
    "unknown key": ({"model": ["shapes"]}, "model is not known; did you mean models?"),
    "no near key": ({"zzz": 1}, "zzz is not known; use name, models,"),
    "unknown in setting": (
        {"settings": [{"name": "a"}, {"name": "b", "hieght": 4}]},
        "settings[1].hieght is not known; did you mean height?",
    ),
    "unknown in prompts": (
        {"prompts": {"file": "shapes", "frist": 4}},
        "prompts.frist is not known; did you mean first?",
    ),
    "key is no text": ({True: 1}, "True is no key, which must be text, got true; YAML reads on, off"),
    "no name": ({"name": ...}, "name is missing; add it."),
    "no models": ({"models": ...}, "models is missing"),
    "no methods": ({"methods": ...}, "methods is missing"),
    "no prompts": ({"prompts": ...}, "prompts is missing"),
    "setting without name": ({"settings": [{"height": 4}]}, "settings[0].name is missing"),
    "prompts without file": ({"prompts": {"first": 4}}, "prompts.file is missing"),
    # types
    "name is a number": ({"name": 3}, "name must be text, got 3; write a text, in quotes"),
    "name with a slash": ({"name": "a/b"}, "name must be letters, digits, '.', '_' and '-', got 'a/b'"),
    "models is text": ({"models": "shapes"}, "models must be a list, got 'shapes'; begin each element with a dash"),
    "settings is a mapping": ({"settings": {"name": "a"}}, "settings must be a list, got {'name': 'a'}"),
    "setting is text": ({"settings": ["a"]}, "settings[0] must be keys with values, got 'a'"),
    "prompts is a number": ({"prompts": 4}, "prompts must be {file: LIST, first: NUMBER} or a list of texts, got 4"),
    "prompt is a number": ({"prompts": ["a", 4]}, "prompts[1] must be text, got 4"),
    "prompt is blank": ({"prompts": ["a", " "]}, "prompts[1] is blank"),
    "seed is true": ({"seeds": [True]}, "seeds[0] must be a whole number, got true"),
    "seed is a fraction": ({"seeds": [1.0]}, "seeds[0] must be a whole number, got 1.0"),
    "runs is true": ({"runs": True}, "runs must be a whole number, got true"),
    "height is text": (setting(height="96"), "settings[0].height must be a whole number, got '96'"),
    "guidance is true": (setting(guidance=True), "settings[0].guidance must be a number, got true"),
    "trajectory is 1": ({"trajectory": 1}, "trajectory must be true or false, got 1"),
    "nested option": (
        setting(options={"x": [[1]]}),
        "settings[0].options.x must be text, a number, true, false or a list of these, got [1]",
    ),
    "nothing": ({"seeds": None}, "seeds must be a list, got nothing"),
    "metric without name": ({"metrics": [{"psnr": {}, "ssim": {}}]}, "metrics[0] must be one metric, got 2 keys"),
    "metric options": ({"metrics": [{"seam": 3}]}, "metrics[0].seam must be keys with values, got 3"),
    # empty lists
    "empty models": ({"models": []}, "models is an empty list"),
    "empty methods": ({"methods": []}, "methods is an empty list"),
    "empty settings": ({"settings": []}, "settings is an empty list"),
    "empty prompts": ({"prompts": []}, "prompts is an empty list"),
    "empty seeds": ({"seeds": []}, "seeds is an empty list"),
    "empty metrics": ({"metrics": []}, "metrics is an empty list"),
    # twice
    "model twice": ({"models": ["a", "a"]}, "models[1] repeats models[0], 'a'; remove one of them."),
    "method twice": ({"methods": ["draft", "radial", " draft "]}, "methods[2] repeats methods[0], 'draft'"),
    "setting twice": (
        {"settings": [{"name": "a"}, {"name": "a", "steps": 2}]},
        "settings[1].name repeats settings[0].name",
    ),
    "prompt twice": (
        {"prompts": ["a cat", "a dog", " a cat"]},
        "prompts has 'a cat' 2 times; keep one of them, and add seeds for more samples of it.",
    ),
    "prompt of a dump twice": ({"prompts": {"list": "x", "texts": ["a"] * 3}}, "prompts has 'a' 3 times;"),
    "seed twice": ({"seeds": [1, 0, 1]}, "seeds[2] repeats seeds[0], 1"),
    "metric twice": ({"metrics": ["psnr", {"psnr": {}}]}, "metrics[1] repeats metrics[0], 'psnr'"),
    "floor twice": ({"floors": ["step", "step"]}, "floors[1] repeats floors[0]"),
    # ranges and words
    "dense": ({"methods": ["draft", "dense"]}, "methods[1] is dense, which is always run by itself; remove it."),
    "unknown metric": ({"metrics": ["pnsr"]}, "got 'pnsr'; did you mean psnr?"),
    "no word": ({"floors": [[1]]}, "floors[0] must be one of backend, step, got [1]"),
    "unknown floor": (
        {"floors": ["backends"]},
        "floors[0] must be one of backend, step, got 'backends'; did you mean backend?",
    ),
    "no near floor": ({"floors": ["zzz"]}, "floors[0] must be one of backend, step, got 'zzz'; take one of these."),
    "negative seed": ({"seeds": [-1]}, "seeds[0] must be between 0 and 4294967295, got -1"),
    "negative runs": ({"runs": -1}, "runs must be at least 0, got -1"),
    "no batch": ({"batch": 0, "runs": 0}, "batch must be at least 1, got 0"),
    "no steps": (setting(steps=0), "settings[0].steps must be at least 1, got 0"),
    "infinite guidance": (
        setting(guidance=float("inf")),
        "settings[0].guidance must be a finite number of at least 0, got inf",
    ),
    "first of nothing": ({"prompts": {"file": "shapes", "first": 0}}, "prompts.first must be at least 1, got 0"),
    "timed batch": ({"batch": 8}, "batch must be 1 where clips are timed, got 8; set runs: 0."),
    "too many prompts": (
        {"prompts": [str(i) + "x" for i in range(10_001)]},
        "prompts has 10001 texts, more than 10000",
    ),
}


@pytest.mark.parametrize(("changes", "expected"), REFUSED.values(), ids=list(REFUSED))
def test_what_is_wrong_is_one_sentence_with_its_place(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    content = {name: value for name, value in (LEAST | changes).items() if value is not ...}
    assert expected in refusal(tmp_path, yaml.safe_dump(content, sort_keys=False))


BROKEN: dict[str, tuple[str, str]] = {
    "syntax": ("name: a\nmodels: [shapes\nmethods: [draft]\n", ", line 3: this is no YAML ("),
    "indentation": ("name: a\n models: [shapes]\n", ", line 2: this is no YAML ("),
    "tab": ("name: a\n\tmodels: [shapes]\n", ", line 2: this is no YAML ("),
    "key twice": ("name: a\nseeds: [0]\nseeds: [1]\n", ", line 3: this is no YAML (the key seeds is there twice)"),
    "inner key twice": (
        "name: a\nsettings:\n- {name: a, steps: 1,\n   steps: 2}\n",
        ", line 4: this is no YAML (the key steps",
    ),
    "two documents": ("name: a\n---\nname: b\n", ", line 2: this is no YAML ("),
    "python object": ("name: !!python/object:os.system x\n", ", line 1: this is no YAML ("),
    "control character": ("name: a\x07\n", ": this is no YAML in UTF-8 ("),
    "impossible date": ("name: 2024-13-45\n", ": this is no YAML in UTF-8 ("),
    "empty": ("", ": must be keys with values, got nothing"),
    "a list": ("- name: a\n", ": must be keys with values, got [{'name': 'a'}]"),
}


@pytest.mark.parametrize(("text", "expected"), BROKEN.values(), ids=list(BROKEN))
def test_broken_yaml_is_one_sentence_with_its_line(tmp_path: Path, text: str, expected: str) -> None:
    assert refusal(tmp_path, text).startswith(expected)


@pytest.mark.parametrize("word", ["off", "on", "yes", "No", "true"])
def test_words_that_yaml_reads_as_truth_values_are_no_methods(tmp_path: Path, word: str) -> None:
    text = f"name: a\nmodels: [shapes]\nprompts: [a]\nmethods: [{word}]\n"
    assert refusal(tmp_path, text).startswith(": methods[0] must be text, got ")
    assert load_suite(write(tmp_path, text.replace(word, f'"{word}"'))).methods == (word,)


def test_another_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_bytes("name: Größe\n".encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: this is no YAML in UTF-8 \(.*\); correct it\."):
        load_suite(path)


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    assert load_suite(write(tmp_path, "\ufeff" + yaml.safe_dump(LEAST))) == load(tmp_path)


@pytest.mark.parametrize("name", shipped_suites())
def test_shipped_suites_are_found_by_name_and_their_methods_exist(name: str) -> None:
    suite = load_suite(name)
    assert suite.name == name
    for setting in suite.settings:
        for method, options in map(parse_method_call, suite.methods):
            make_method(method, **(dict(setting.options) | options))


def test_the_example_of_the_documentation_is_a_suite(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```yaml\n(name: .*?)```", page, re.DOTALL)
    assert [setting.name for setting in load_suite(write(tmp_path, example)).settings] == ["small", "large"]


def test_a_file_goes_before_a_shipped_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smoke").write_text(yaml.safe_dump(LEAST))
    assert load_suite("smoke").name == "try"


def test_a_name_that_is_no_suite_gets_a_near_one() -> None:
    with pytest.raises(ValueError, match=r"no suite 'smoek', neither a file nor a shipped one; did you mean smoke\?"):
        load_suite("smoek")
