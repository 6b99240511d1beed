"""Charts of figures that are made up: which there are, and what they show."""

from dataclasses import replace

import pytest
from matplotlib.figure import Figure

from recsys_compress.compare.cells import Cell
from recsys_compress.compare.charts import Chart, charts, chosen, styles
from recsys_compress.compare.records import Record
from recsys_compress.compare.spec import Entry, Study
from recsys_compress.compare.summary import Summary, summarize
from tests.compare.made_up import JOB, ODD, ONE_SEED, STUDY, record, records


@pytest.fixture(scope="module")
def summary() -> Summary:
    return summarize(records(STUDY))


@pytest.fixture(scope="module")
def drawn(summary: Summary) -> dict[str, Chart]:
    return {chart.name: chart for chart in charts(summary)}


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def points(figure: Figure, panel: int = 0) -> set[tuple[float, float]]:
    lines = figure.axes[panel].get_lines()
    return {
        (round(float(x), 6), round(float(y), 6)) for line in lines for x, y in line.get_xydata()
    }


def widths(figure: Figure, panel: int = 0) -> list[float]:
    return [round(bar.get_width(), 6) for bar in figure.axes[panel].patches]


def test_quality_has_every_row_and_what_papers_print(
    summary: Summary, drawn: dict[str, Chart]
) -> None:
    figure = drawn["quality"].draw(False)
    shown = points(figure)
    assert {(row.bytes, round(row.auc, 6)) for row in summary.rows} <= shown
    assert {(1000, 0.81), (500, 0.8)} <= shown
    names = ["Pareto front", "full", "hash", ODD, "_low_rank", "published (hollow)"]
    assert sorted(legend(figure)) == sorted(names)
    # What loses much has a panel of its own, and so does not flatten the rest.
    assert figure.axes[1].get_ylim()[0] == pytest.approx(summary.rows[0].auc - 0.02)
    assert "hash" not in drawn["quality"].label


def test_bands_are_the_intervals(summary: Summary, drawn: dict[str, Chart]) -> None:
    axes = drawn["quality"].draw(False).axes[0]
    row = next(row for row in summary.rows if row.cell.name == "hash 0.5x")
    corners = [
        tuple(corner) for band in axes.collections for corner in band.get_paths()[0].vertices
    ]
    assert row.margin > 0
    assert (row.bytes, pytest.approx(row.auc + row.margin)) in corners
    assert (row.bytes, pytest.approx(row.auc - row.margin)) in corners


def test_time_is_the_share_of_the_steps_done(drawn: dict[str, Chart]) -> None:
    shown = points(drawn["training"].draw(False))
    assert {(0.833333, 0.4), (1.666667, 0.301)} <= shown


def test_bars_are_as_long_as_the_bytes(drawn: dict[str, Chart]) -> None:
    memory = drawn["memory"].draw(True)
    assert set(widths(memory)) == {7e8}
    assert widths(memory, 1)[:2] == [1000, 2000]
    # Tables and layers: in fp32, and in int8.
    assert widths(drawn["serving"].draw(True))[:4] == [1000, 500, 260, 500]
    assert widths(drawn["tables"].draw(True))[:2] == [0.8, 0.2]
    key = drawn["tables"].key
    assert key is not None
    assert key.rows[0] == ["full", "1", f"user, {ODD}: 10 x 2", "800", "80.0%"]


def test_calibration_is_held_against_the_diagonal(drawn: dict[str, Chart]) -> None:
    figure = drawn["calibration"].draw(False)
    assert (0.1, 0.12) in points(figure)
    assert (0.1, 0.02) in points(figure, 1)
    assert legend(figure)[0] == "full (ratio 1.010, ECE 0.0040)"


def test_what_is_shown_closely_is_the_first_and_the_best(summary: Summary) -> None:
    names = [row.cell.name for row in chosen(summary)]
    assert names[0] == "full"
    assert len(names) == len(set(names)) <= 1 + 3


def test_what_was_not_measured_has_no_chart() -> None:
    def bare(cell: Cell, key: str, seed: int) -> Record:
        whole = record(cell, key, seed)
        kept = {n: v for n, v in whole.figures.items() if n in ("test.auc", "bytes.tables")}
        return Record(key=key, seed=seed, figures=kept, error=whole.error)

    study = replace(ONE_SEED, methods=(STUDY.methods[0], *STUDY.methods[2:]), claims=())
    found = charts(summarize(records(study, bare)))
    assert [chart.name for chart in found] == ["quality"]
    assert len(found[0].draw(True).axes) == 1  # no row loses much


def test_parts_that_were_not_measured_have_no_bar() -> None:
    def partly(cell: Cell, key: str, seed: int) -> Record:
        whole = record(cell, key, seed)
        gone = ("peak_rss_bytes", "int8.bytes", "test.ece")
        kept = {n: v for n, v in whole.figures.items() if n not in gone}
        return replace(whole, figures=kept)

    found = {chart.name: chart for chart in charts(summarize(records(ONE_SEED, partly)))}
    assert "full not measured" in found["memory"].label
    assert not found["memory"].draw(False).axes[0].patches
    assert "int8 not measured" in found["serving"].label
    assert legend(found["calibration"].draw(False))[0] == "full (ratio 1.010)"


def test_no_two_lines_look_alike() -> None:
    methods = tuple(
        Entry(name=f"{method} {line}", method=method)
        for method in map(str, range(13))
        for line in range(4)
    )
    looks = [
        (look["c"], look["marker"], look["ls"])
        for look in styles(Study(title="", job=JOB, methods=methods)).values()
    ]
    assert len(set(looks)) == len(looks) == 52
