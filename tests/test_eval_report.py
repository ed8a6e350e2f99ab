"""The page, its tables and its tile pictures."""

from __future__ import annotations

import base64
import dataclasses
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from dit_accel.eval.quality import measure
from dit_accel.eval.records import Job, Record, Timings, make_record
from dit_accel.eval.report import MethodResult, ReportData, format_table, summary, tile_picture, write_report
from dit_accel.eval.report.embed import ENCODINGS, embed

PROMPT = 'a <b>red</b> & "blue" circle $5'
VOID = {"meta", "img", "input", "br", "link"}


class Page(HTMLParser):
    """Collects tags, attributes and text, and requires that tags nest."""

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
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open_tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def record(method: str, denoise: float, frames: np.ndarray, reference: np.ndarray | None) -> Record:
    job = Job(method=method, model="shapes", prompt=PROMPT, seed=7, size=frames.shape[:3], steps=4, guidance=3.0)
    timings: Timings = {"denoise": denoise, "runs": 3, "warmup_runs": 1}
    quality = measure(frames, reference, ["psnr", "ssim"])
    density = 0.25 if reference is not None else 1.0
    return make_record(job, timings=timings, quality=quality, densities={"executed": density})


def report(frames: int, methods: int = 3) -> ReportData:
    """Random clips, dense first, with a tile picture each except dense."""
    generator = np.random.default_rng(0)
    clips = generator.random((methods, frames, 34, 50, 3), dtype=np.float32)
    names = ["dense", "radial", "draft <fast>"][:methods]
    return ReportData(
        [
            MethodResult(
                record(name, 4.0 / (number + 1), clip, clips[0] if number else None),
                clip,
                name,
                script=f'pipe.set_attn_processor("{name}")',
                command=f"dit-accel compare --methods {name}",
                tile_picture=tile_picture(np.ones((2, 3, 4)), (0, 0, 0)) if number else None,
            )
            for number, (name, clip) in enumerate(zip(names, clips, strict=True))
        ],
        tokens=1234,
        notes=["Weights are random."],
    )


@pytest.fixture(scope="module")
def video_page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(write_report(tmp_path_factory.mktemp("page"), report(frames=5)))


def test_page_loads_nothing_from_outside(video_page: Page) -> None:
    links = [
        attributes[name] or "" for _, attributes in video_page.tags for name in ("src", "href") if name in attributes
    ]
    assert links
    assert all(link.startswith("data:") for link in links)
    assert "http://" not in video_page.source
    assert "https://" not in video_page.source
    assert "url(" not in video_page.source
    assert "@import" not in video_page.source
    assert len(video_page.source.encode()) < 15e6


def test_page_shows_every_method_with_clip_error_map_tiles_and_code(video_page: Page) -> None:
    videos = [video["src"] or "" for video in video_page.all("video")]
    assert len(videos) == 3 + 2
    assert all(b"ftyp" in base64.b64decode(video.partition(",")[2])[:16] for video in videos)
    assert len([1 for figure in video_page.all("figure") if figure["class"] == "tiles"]) == 2
    for text in ("radial", "draft <fast>", 'pipe.set_attn_processor("radial")', "dit-accel compare --methods radial"):
        assert text in video_page.text


def test_page_states_the_facts(video_page: Page) -> None:
    for text in (PROMPT, "50 × 34, 5 frames", "1,234", "median of 3 timed runs", "Weights are random.", "torch"):
        assert text in video_page.text
    assert "<b>red</b>" not in video_page.source, "values are escaped"


def test_page_puts_dense_first_with_the_others_relative_to_it(video_page: Page) -> None:
    table = video_page.source.partition("<tbody>")[2].partition("</tbody>")[0]
    rows = [row for row in table.split("<tr>") if row.strip()]
    assert [row.partition('scope="row">')[2].partition("<")[0] for row in rows] == [
        "dense",
        "radial",
        "draft &lt;fast&gt;",
    ]
    for row, ratio in zip(rows, ("1.00×", "2.00×", "3.00×"), strict=True):
        assert ratio in row


def test_everything_that_moves_or_is_seen_has_a_label(video_page: Page) -> None:
    assert all(video["aria-label"] for video in video_page.all("video"))
    assert all(image["alt"] for image in video_page.all("img"))
    assert all(control["aria-label"] for control in video_page.all("input"))


def test_page_of_images_has_no_player(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path, report(frames=1)))
    assert page.all("video") == []
    assert 'class="player"' not in page.source
    assert "50 × 34" in page.text


def test_page_of_dense_alone_has_nothing_to_compare(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path, report(frames=1, methods=1)))
    assert 'class="stage"' not in page.source


def test_a_tight_budget_compresses_and_the_page_says_so(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path, report(frames=5), budget=1))
    assert str(ENCODINGS[-1]) in page.text


def test_media_use_the_best_encoding_that_fits() -> None:
    clips = list(np.random.default_rng(0).integers(0, 256, (2, 4, 48, 64, 3), dtype=np.uint8))
    media, encoding = embed(clips, 16, budget=10**9)
    assert encoding == ENCODINGS[0]
    best = sum(item.size for item in media)
    media, encoding = embed(clips, 16, budget=best - 1)
    assert encoding != ENCODINGS[0]
    assert sum(item.size for item in media) < best


def test_clips_that_do_not_match_are_refused(tmp_path: Path) -> None:
    data = report(frames=2)
    odd = dataclasses.replace(data.results[1], frames=np.zeros((3, 34, 50, 3), np.uint8))
    with pytest.raises(ValueError, match="same frame count, got 3 and 2"):
        write_report(tmp_path, dataclasses.replace(data, results=[data.results[0], odd]))
    with pytest.raises(ValueError, match="at least one result"):
        write_report(tmp_path, dataclasses.replace(data, results=[]))


def test_summary_says_identical_and_leaves_out_what_was_not_measured() -> None:
    frames = np.full((2, 16, 16, 3), 9, np.uint8)
    dense, same = record("dense", 3.0, frames, None), record("radial", 2.0, frames, frames)
    assert summary(same, dense, "radial 0.3") == {
        "method": "radial 0.3",
        "denoise": "2.00 s",
        "attention": "–",
        "speed-up": "1.50×",
        "density": "25.0%",
        "PSNR": "identical",
        "SSIM": "1.000",
        "prompt accuracy": "–",
    }


def test_table_is_aligned_markdown() -> None:
    table = format_table([{"method": "dense", "speed-up": "1.00×"}, {"method": "a|b", "speed-up": "12.50×"}])
    assert table.splitlines() == [
        "| method | speed-up |",
        "| ------ | -------: |",
        "| dense  |    1.00× |",
        "| a\\|b   |   12.50× |",
    ]
    assert format_table([]) == ""
    with pytest.raises(ValueError, match="row 1 must have the columns"):
        format_table([{"a": "1"}, {"b": "1"}])


@pytest.mark.parametrize(
    ("grid", "columns", "size"),
    [
        ((1, 30, 40), 3, (12 + 400 + 12, 12 + 24 + 300 + 12)),
        ((7, 30, 40), 3, (12 + 3 * 172, 12 + 3 * (24 + 120 + 12))),
        ((2, 7, 5), 3, (12 + 2 * (140 + 12), 12 + 24 + 196 + 12)),
    ],
    ids=["one frame", "rows wrap", "odd sizes"],
)
def test_tile_picture_has_a_panel_per_frame(grid: tuple[int, int, int], columns: int, size: tuple[int, int]) -> None:
    assert tile_picture(np.zeros(grid), (0, 1, 1), columns).size == size


def test_tile_picture_is_bright_where_seen_and_marks_the_query() -> None:
    seen = np.zeros((2, 12, 12), np.uint8)
    seen[0, 6:] = 1
    picture = np.asarray(tile_picture(seen, (1, 3, 3)).convert("L")).astype(int)
    scale, top, left, step = 17, 36, 12, 216
    assert picture[top + 9 * scale, left + 60] > picture[top + 3 * scale, left + 60] + 100
    unmarked = np.asarray(tile_picture(seen, (1, 9, 9)).convert("L")).astype(int)
    changed = np.argwhere(picture != unmarked)
    assert changed[:, 1].min() >= left + step, "the first frame has no mark"
    assert picture[top + 3 * scale - 2, left + step + 3 * scale] > 150


@pytest.mark.parametrize(
    ("seen", "query", "sentence"),
    [
        (np.zeros((4, 4)), (0, 0, 0), r"\[frames, rows, columns\], got \[4, 4\]"),
        (np.full((1, 4, 4), 2.0), (0, 0, 0), r"in \[0, 1\], got values from 2 to 2"),
        (np.full((1, 4, 4), np.nan), (0, 0, 0), r"in \[0, 1\]"),
        (np.zeros((1, 4, 4)), (0, 4, 0), "query must lie in the grid"),
        (np.zeros((1, 4, 4)), (0, -1, 0), "query must lie in the grid"),
    ],
    ids=["two axes", "above range", "NaN", "outside", "negative"],
)
def test_tile_picture_refuses(seen: np.ndarray, query: tuple[int, int, int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        tile_picture(seen, query)
