"""Prompt lists: the shipped ones do not rot, files of every format give the same texts, doubtful ones are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dit_accel.eval.suite.prompts import LISTS, read_prompts, shipped_lists
from dit_accel.eval.suite.schema import load_suite
from dit_accel.pipelines.embedded import EMBEDDED
from dit_accel.pipelines.shapes.scenes import captions, held_out_scenes, parse_caption

TEXTS = ("a cat, a dog", 'the "ü" sign', "one\ttab", "no\u2028line end")
FILES = {
    "lines.txt": 'a cat, a dog\n\n  the "ü" sign \r\none\ttab\nno\u2028line end\n',
    "table.csv": 'id,Prompt\n1,"a cat, a dog"\n2,"the ""ü"" sign"\n\n3,one\ttab\n4,no\u2028line end\n',
    "table.tsv": 'Prompts\tCategory\na cat, a dog\tx\n"the ""ü"" sign"\tx\n"one\ttab"\tx\nno\u2028line end\t\n',
    "texts.json": json.dumps(TEXTS),
    "objects.json": json.dumps([{"prompt_en": text, "dimension": ["colour"]} for text in TEXTS]),
    "mixed.json": json.dumps([TEXTS[0], {"caption": TEXTS[1]}, {"prompt": TEXTS[2]}, TEXTS[3]]),
    "lines.jsonl": "\n".join(json.dumps({"prompt": text, "seed": 0}) for text in TEXTS) + "\n\n",
}


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("model", EMBEDDED)
def test_the_list_of_an_embedded_model_is_its_held_out_captions_each_once(model: str) -> None:
    scenes = [held_out_scenes(480, objects, language=EMBEDDED[model].language) for objects in (1, 2)]
    one, two = (dict.fromkeys(captions(found)) for found in scenes)
    in_turn = [text for pair in zip(one, two, strict=False) for text in pair]
    assert (LISTS / f"{model}.txt").read_text(encoding="utf-8").splitlines() == in_turn
    assert len(set(in_turn)) == len(in_turn)


@pytest.mark.parametrize("model", EMBEDDED)
def test_the_first_prompts_have_one_object_and_two_in_turn(model: str) -> None:
    texts, name = read_prompts(model, Path("/nowhere"), first=9)
    assert name == model
    assert [len(parse_caption(text, EMBEDDED[model].language)) for text in texts] == [1, 2, 1, 2, 1, 2, 1, 2, 1]
    assert read_prompts(model, Path(), first=4)[0] == texts[:4]


def test_every_shipped_list_is_that_of_an_embedded_model() -> None:
    assert shipped_lists().keys() == EMBEDDED.keys()


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_texts(tmp_path: Path, name: str, mark: str) -> None:
    write(tmp_path, name, mark + FILES[name])
    assert read_prompts(name, tmp_path) == (TEXTS, name)
    assert read_prompts(str(tmp_path / name), Path("/nowhere"), first=2) == (TEXTS[:2], name)


def test_a_list_lies_beside_its_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lists").mkdir()
    write(tmp_path / "lists", "own.txt", "a\nb\n")
    suite = "name: try\nmodels: [m]\nmethods: [draft]\nprompts: {file: lists/own.txt, first: 1}\n"
    path = write(tmp_path, "suite.yaml", suite)
    monkeypatch.chdir("/")
    loaded = load_suite(path)
    assert (loaded.prompts, loaded.prompt_list) == (("a",), "own.txt")


def test_a_suite_takes_each_prompt_of_a_list_once(tmp_path: Path) -> None:
    write(tmp_path, "own.txt", "a cat\na dog\n\na cat \n")
    suite = "name: try\nmodels: [m]\nmethods: [draft]\nprompts: {file: own.txt}\n"
    with pytest.raises(ValueError, match=r"suite\.yaml: prompts has 'a cat' 2 times; keep one of them"):
        load_suite(write(tmp_path, "suite.yaml", suite))
    first = write(tmp_path, "suite.yaml", suite.replace("own.txt", "own.txt, first: 2"))
    assert load_suite(first).prompts == ("a cat", "a dog")


REFUSED: dict[str, tuple[str, str | bytes, str]] = {
    "no column": (
        "a.csv",
        "text,id\nx,1\n",
        "{path} must have exactly one of the columns prompt, Prompt, Prompts, caption, prompt_en, got text, id; ",
    ),
    "two columns": (
        "a.tsv",
        "prompt\tcaption\nx\ty\n",
        "got prompt, caption; rename the one with the prompts to prompt.",
    ),
    "column twice": ("a.csv", "prompt,prompt\nx,y\n", "got prompt, prompt; rename"),
    "no header": ("a.csv", "", "got none; rename"),
    "comma without quotes": (
        "a.csv",
        "id,prompt\n1,a cat\n2,a cat, a dog\n",
        "line 3 of {path} must have 2 cells as the header has, got 3; put texts with commas in quotes.",
    ),
    "cell missing": ("a.csv", "id,prompt\n1\n", "line 2 of {path} must have 2 cells as the header has, got 1"),
    "cell blank": ("a.csv", "id,prompt\n1, \n", "line 2 of {path} must have a text for its prompt, got ' '"),
    "quote open": (
        "a.tsv",
        'prompt\n"a cat\na dog\n',
        "of {path} is no row (unexpected end of data); correct its quotes.",
    ),
    "header alone": ("a.csv", "prompt\n", "{path} has no prompts; write at least one."),
    "blank lines": ("a.txt", "\n  \n", "{path} has no prompts; write at least one."),
    "empty list": ("a.json", "[]", "{path} has no prompts"),
    "no list": ("a.json", '{"prompt": "x"}', "{path} must be a list of texts or objects, got dict; wrap it in []."),
    "no text": ("a.json", '["x", 3]', "entry 1 of {path} must have a text for its prompt, got 3"),
    "no such key": ("a.json", '["x", {"text": "y"}]', "entry 1 of {path} must have exactly one of the columns"),
    "both languages": (
        "a.jsonl",
        '{"prompt": "x", "prompt_en": "y"}',
        "line 1 of {path} must have exactly one of the columns",
    ),
    "broken json": ("a.json", '["x",\n', "{path} is no JSON (Expecting value, line 2); correct it."),
    "broken line": ("a.jsonl", '"x"\n{', "line 2 of {path} is no JSON ("),
    "another ending": ("a.md", "x", "{path} must end in .txt, .csv, .tsv, .json, .jsonl, got '.md'"),
    "latin-1": ("a.txt", "Größe".encode("latin-1"), "{path} is not UTF-8 ("),
    "utf-16": ("a.csv", "prompt\nx\n".encode("utf-16"), "{path} is not UTF-8 ("),
}


@pytest.mark.parametrize(("name", "content", "expected"), REFUSED.values(), ids=list(REFUSED))
def test_a_doubtful_file_is_refused_in_one_sentence(
    tmp_path: Path, name: str, content: str | bytes, expected: str
) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(ValueError, match=r"\A[^\n]+[.?]\Z") as caught:
        read_prompts(name, tmp_path)
    assert expected.format(path=path) in str(caught.value)


def test_more_prompts_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shapes\.txt has 842 prompts, got first: 843; ask for at most 842\."):
        read_prompts("shapes", Path(), first=843)


def test_a_missing_list_gets_a_near_name(tmp_path: Path) -> None:
    path = re.escape(str(tmp_path / "shape"))
    with pytest.raises(ValueError, match=rf"no prompt list {path}, and none of that name is shipped; did you mean"):
        read_prompts("shape", tmp_path)
