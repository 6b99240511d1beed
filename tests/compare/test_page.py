"""The report: what it shows, that nothing in it is taken for markup, and that it is readable."""

import html
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from recsys_compress.compare import tables
from recsys_compress.compare.cells import Cell, cells
from recsys_compress.compare.charts import charts
from recsys_compress.compare.page import render, write_report
from recsys_compress.compare.records import Record, Records
from recsys_compress.compare.summary import Summary, summarize
from recsys_compress.track.plots import as_svg, write_png
from tests.browser import browser, check_readable
from tests.compare.made_up import ODD, ONE_SEED, STUDY, TWO_MODELS, record, records

VOID = {"meta"}


@pytest.fixture(scope="module")
def summary() -> Summary:
    return summarize(records(STUDY))


@pytest.fixture(scope="module")
def report(summary: Summary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reports") / "report"
    write_report(summary, folder)
    return folder


@pytest.fixture(scope="module")
def page(report: Path) -> str:
    return (report / "report.html").read_text(encoding="utf-8")


class Checked(HTMLParser):
    """Asserts that elements are closed in turn, and keeps ids and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open += [] if tag in VOID else [tag]
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_has_all_that_was_found(page: str, summary: Summary) -> None:
    shown = Checked(page)
    assert len(shown.ids) == len(set(shown.ids))
    for row in summary.rows:
        assert row.cell.name in shown.text
        assert "\n".join(row.commands) in shown.text
        assert f"{row.auc:.4f}" in shown.text
    told = [said for title, sentences in summary.advice for said in (title, *sentences)]
    told += [claim.text for claim in STUDY.claims]
    told += ["DOES NOT HOLD", "budget of 9 bytes is out of reach; name more"]
    told += ["learning_rate = 0.01", "torch 2", "0.8100", STUDY.about]
    assert [said for said in told if said not in shown.text] == []
    assert page.count("<svg") == 2 * 6


def test_names_are_text_whatever_is_in_them(page: str, report: Path) -> None:
    assert "<b>" not in page
    assert "<i>" not in page
    assert f"<h1>{html.escape(STUDY.title)}</h1>" in page
    markdown = (report / "report.md").read_text(encoding="utf-8")
    assert "<b>" not in markdown
    # No bar in a name ends its cell.
    table = [line for line in markdown[markdown.index("## All rows") :].splitlines() if line]
    lines = [line.replace("\\|", "") for line in table if line.startswith("| ")]
    rows = lines[: 2 + 6]
    assert ODD[:7] in "".join(rows)
    assert {row.count("|") for row in rows} == {rows[0].count("|")}


def test_a_page_needs_nothing_else(page: str) -> None:
    assert re.findall(r"\bsrc=|<link|@import|url\((?!#)", page) == []
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', page))


def test_markdown_has_the_pictures_beside_it(report: Path) -> None:
    markdown = (report / "report.md").read_text(encoding="utf-8")
    pictures = re.findall(r"\]\((\S+\.png)\)", markdown)
    assert len(pictures) == 6
    assert all((report / name).stat().st_size > 5000 for name in pictures)
    for heading in ("What to take", "Best by budget", "Claims", "All rows", "Out of reach"):
        assert f"## {heading}\n" in markdown


def test_the_same_figures_give_the_same_report(
    page: str, report: Path, summary: Summary, tmp_path: Path
) -> None:
    again = summarize(records(STUDY))
    assert render(again, ()) == render(summary, ())
    for chart in charts(again)[:2]:
        for narrow in (False, True):
            assert as_svg(chart.draw, chart.name, narrow=narrow).removeprefix("<svg ") in page
        write_png(chart.draw, tmp_path / "again.png")
        assert (tmp_path / "again.png").read_bytes() == (report / f"{chart.name}.png").read_bytes()


def test_a_study_without_figures_says_so(tmp_path: Path) -> None:
    write_report(summarize(Records(TWO_MODELS)), tmp_path)
    shown = Checked((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert "42 runs have no figures yet" in shown
    assert "42 runs have no figures yet" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "All rows" not in shown
    assert not list(tmp_path.glob("*.png"))


def test_what_has_not_been_run_or_measured_yet_is_counted() -> None:
    def some(cell: Cell, key: str, seed: int) -> Record:
        whole = record(cell, key, seed)
        lost = ("int8.auc",) if (cell.entry.name, seed) == ("full", 0) else ()
        lost += ("inference.ratio",) if cell.name == "hash 0.1x" else ()
        kept = {name: value for name, value in whole.figures.items() if name not in lost}
        return replace(whole, figures=kept)

    summary = summarize(records(STUDY, some))
    assert tables.missing(summary) == (
        "4 runs have not all figures of storage types and inference yet."
    )
    assert tables.missing(summarize(records(replace(STUDY, storage=()), some))) == ""
    assert tables.missing(summarize(records(STUDY))) == ""


def test_a_report_may_have_rows_of_fewer_seeds_alone(tmp_path: Path) -> None:
    found = Records(STUDY)
    run = found.run(cells(STUDY)[0])
    assert run is not None
    found.add(record(cells(STUDY)[0], run.key, 0))
    write_report(summarize(found), tmp_path)
    assert "yes" not in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_one_seed_has_no_interval() -> None:
    summary = summarize(records(ONE_SEED))
    shown = Checked(render(summary, ())).text
    assert f"{summary.rows[0].auc:.4f}" in shown
    assert not re.search(r"± \d", shown)


def test_models_have_charts_of_their_own() -> None:
    summary = summarize(records(replace(TWO_MODELS, seeds=(0,))))
    titles = [chart.title for chart in charts(summary)]
    assert titles[:2] == ["Quality against bytes: dcnv2", "Quality against bytes: deepfm"]
    shown = Checked(render(summary, ())).text
    assert "deepfm: hash 0.5x" in shown


def test_a_report_is_readable_on_a_phone_and_a_desktop(report: Path, tmp_path: Path) -> None:
    with browser(tmp_path) as page:
        check_readable(page, report / "report.html", charts=6)
        assert page.run("document.querySelectorAll('[role=img][aria-label]').length") == 12
        # A press on a heading sorts: by number, the other way round, by name.
        press = """((title, column) => {
            const heads = [...document.querySelectorAll(".sortable th")];
            heads.find(head => head.textContent === title).firstChild.click();
            const rows = document.querySelectorAll(".sortable tbody tr");
            return [...rows].map(row => row.cells[column].textContent);
        })"""
        sizes = page.run(f"{press}('table bytes', 1)")
        assert sizes == ["100", "100", "500", "500", "500", "1,000"]
        assert page.run(f"{press}('table bytes', 1)") == sizes[::-1]
        names = page.run(f"{press}('row', 0)")
        assert names.index("full") < names.index("hash 0.1x") < names.index("hash 0.5x")
        assert page.errors == []
