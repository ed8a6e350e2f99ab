"""What every piece of a run's page needs to know of a study: its numbers, names, colours and anchors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from dit_accel.eval.aggregate import MethodSummary, StudySummary, summarise_study
from dit_accel.eval.report.run import Run
from dit_accel.eval.statistics import Sample
from dit_accel.eval.studies import Study, studies
from dit_accel.eval.summary import title


@dataclass(frozen=True)
class Part:
    """One study on the page.

    Args:
        run: it is of.
        summary: its numbers.
        anchor: id of its section.
        numbers: of the colours and shapes, by method; a method looks the same in all studies.
        names: short labels, by method.
        title: heading; the run is left out where there is only one.
    """

    run: Run
    summary: StudySummary
    anchor: str
    numbers: Mapping[str, int]
    names: Mapping[str, str]
    title: str

    @property
    def study(self) -> Study:
        return self.summary.study

    @property
    def judged(self) -> list[MethodSummary]:
        """The methods that have a PSNR."""
        return [method for method in self.summary.of("method") if "psnr" in method.metrics]

    def row_anchor(self, label: str) -> str:
        return f"{self.anchor}-row-{[row.label for row in self.study.rows].index(label)}"

    def sample_anchor(self, sample: Sample) -> str:
        return f"{self.anchor}-sample-{self.study.prompts.index(sample[0])}-{sample[1]}"


def parts_of(runs: Sequence[Run]) -> list[Part]:
    """All studies of the runs, in their order."""
    names = [run.name for run in runs]
    found = [
        (run, summarise_study(study))
        for run in runs
        for study in studies(run.records, run.name if names.count(run.name) == 1 else str(run.path))
    ]
    labels = sorted({method.label for _, summary in found for method in summary.of("method")})
    numbers = {label: place for place, label in enumerate(labels)}
    single = len({summary.study.run for _, summary in found}) == 1
    return [
        Part(
            run=run,
            summary=summary,
            anchor=f"study-{place}",
            numbers=numbers,
            names=short_names([method.label for method in summary.methods]),
            title=title(summary.study, with_run=not single),
        )
        for place, (run, summary) in enumerate(found)
    ]


def short_names(labels: Sequence[str]) -> dict[str, str]:
    """Each label without the options that all others of its method have too: the method alone where it is alone.

    Of a folder behind "@" its last part is left, and nothing where all methods but dense ran in the same one.
    """
    calls = {label: _call(label) for label in labels}
    shared = {folder for method, folder, _ in calls.values() if not method.startswith("dense")}
    names = {}
    for label, (method, folder, options) in calls.items():
        rivals = [theirs for other, (*own, theirs) in calls.items() if own == [method, folder] and other != label]
        differing = [option for option in options if any(option not in theirs for theirs in rivals)]
        inner = f"({', '.join(differing)})" * bool(differing)
        common = shared == {folder} and not method.startswith("dense")
        at = "" if common or not folder else f"@{PurePath(folder).name}"
        names[label] = f"{method}{inner}{at}"
    return names if len(set(names.values())) == len(names) else {label: label for label in labels}


def _call(label: str) -> tuple[str, str, list[str]]:
    """Method, folder and options of a label; a comma within brackets parts nothing."""
    call, _, folder = label.partition("@")
    method, _, inner = call.partition("(")
    return method, folder, list(_split(inner.removesuffix(")")))


def _split(inner: str) -> Iterator[str]:
    depth, start = 0, 0
    for place, letter in enumerate(f"{inner},"):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            if inner[start:place]:
                yield inner[start:place].strip()
            start = place + 1
