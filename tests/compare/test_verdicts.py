"""Verdicts, winners and advice from figures that are made up."""

from dataclasses import replace
from pathlib import Path

import pytest

from recsys_compress.compare.cells import Cell, cells, run_of
from recsys_compress.compare.records import Record, Records
from recsys_compress.compare.spec import Claim, Entry, StorageClaim, Study
from recsys_compress.compare.summary import margin, plain, summarize
from recsys_compress.compare.verdicts import judge, judge_storage

JOB = str(Path(__file__).parents[2] / "pipelines" / "frappe.toml")
STUDY = Study(
    title="made up",
    job=JOB,
    budgets=("0.5x", "0.1x"),
    storage=("int8",),
    methods=(
        Entry(name="full", budgets=()),
        Entry(name="hash"),
        Entry(name="unified"),
        Entry(name="low_rank, after", method="low_rank", after="full", budgets=("0.5x",)),
    ),
)
NAMED = {cell.name: cell for cell in cells(STUDY)}
FULL, UNIFIED = NAMED["full"], NAMED["unified 0.5x"]


def records(**aucs: tuple[float, ...]) -> Records:
    """Records of cells by name, with `_` for blanks, one for each AUC; bytes are the budget's."""
    found = Records(STUDY)
    for name, values in aucs.items():
        add(
            found,
            NAMED[name.replace("_", " ").replace("05x", "0.5x").replace("01x", "0.1x")],
            *values,
        )
    return found


def add(found: Records, cell: Cell, *aucs: float, **figures: float) -> None:
    run = run_of(STUDY, cell, {})
    assert run is not None
    share = float((cell.budget or "1x").rstrip("x"))
    for seed, auc in enumerate(aucs):
        own = {"test.auc": auc, "valid.auc": auc, "bytes.tables": 1000 * share, **figures}
        found.add(Record(key=run.key, seed=seed, figures=own))


def claim(**bounds: float) -> Claim:
    return Claim(text="", left="unified 0.5x", right="full", **bounds)


@pytest.mark.parametrize(("least", "holds"), [(-0.02, True), (0.0, False)])
def test_claims_compare_seed_by_seed(least: float, holds: bool) -> None:
    made = records(unified_05x=(0.8, 0.9, 0.7), full=(0.81, 0.91, 0.71))
    verdict = judge(claim(least=least), made)
    assert (verdict.found, verdict.seeds) == ("-0.0100 ± 0.0000", 3)
    assert verdict.holds is holds
    assert verdict.sizes == (500, 1000)
    # A seed without a counterpart does not count, nor one that the study does not have.
    made = records(unified_05x=(0.8, 0.9, 0.1), full=(0.81, 0.91))
    verdict = judge(claim(least=least), made)
    assert (verdict.found, verdict.seeds, verdict.holds) == ("-0.0100 ± 0.0000", 2, None)
    made.study = replace(STUDY, seeds=(0, 1))
    assert judge(claim(least=least), made).holds is holds


def test_one_cell_is_held_against_a_bound() -> None:
    alone = Claim(text="", left="full", least=0.9)
    verdict = judge(alone, records(full=(0.91, 0.92, 0.93)))
    assert (verdict.asked, verdict.found, verdict.holds) == ("≥ 0.9", "0.9200 ± 0.0100", True)


def test_other_figures_are_compared_by_ratio() -> None:
    found = Records(STUDY)
    add(found, UNIFIED, *[0.8] * 3, seconds=30.0)
    add(found, FULL, *[0.8] * 3, seconds=20.0)
    timed = Claim(text="", left="unified 0.5x", right="full", figure="seconds", most=3.0)
    verdict = judge(timed, found)
    assert (verdict.asked, verdict.found, verdict.holds) == ("≤ 3", "1.50 ± 0.00", True)
    add(found, FULL, *[0.8] * 3, seconds=0.0)
    assert judge(timed, found).holds is None


def test_what_was_not_run_or_cannot_be_is_not_judged() -> None:
    found = records(unified_05x=(0.8,))
    verdict = judge(claim(least=0.0), found)
    assert (verdict.found, verdict.holds, verdict.sizes) == (None, None, ())
    run = run_of(STUDY, FULL, {})
    assert run is not None
    found.add(Record(key=run.key, seed=0, error="budget of 1 byte is out of reach"))
    assert judge(claim(least=0.0), found).found == "out of reach"
    assert summarize(found).beyond == ((FULL, "budget of 1 byte is out of reach"),)


def test_a_storage_type_is_judged_where_it_costs_most() -> None:
    found = Records(STUDY)
    add(found, FULL, 0.9, **{"int8.auc": 0.8999})
    add(found, UNIFIED, 0.9, **{"int8.auc": 0.899})
    verdict = judge_storage(StorageClaim(storage="int8", most=0.0003), found)
    assert verdict.left == "unified 0.5x"
    assert verdict.found == "+0.0010 at most, 2 of 2 rows measured"
    assert verdict.holds is False


def test_a_storage_claim_holds_only_where_every_row_has_been_stored() -> None:
    found = Records(STUDY)
    fine, broken = (StorageClaim(storage="int8", most=most) for most in (0.01, 0.0003))
    assert (judge_storage(fine, found).holds, judge_storage(fine, found).left) == (None, "")
    add(found, FULL, 0.9, 0.9)
    assert judge_storage(fine, found).found == "0 of 1 rows measured"
    add(found, FULL, 0.9, **{"int8.auc": 0.899})  # of seed 0 alone
    assert judge_storage(fine, found).found == "0 of 1 rows measured"
    add(found, FULL, 0.9, 0.9, **{"int8.auc": 0.899})
    assert judge_storage(fine, found).holds is True
    add(found, UNIFIED, 0.9)
    verdict = judge_storage(fine, found)
    assert verdict.found == "+0.0010 at most, 1 of 2 rows measured"
    assert verdict.holds is None
    assert judge_storage(broken, found).holds is False


def test_the_best_within_each_budget_wins_and_ties_are_named() -> None:
    found = summarize(
        records(
            full=(0.900, 0.910, 0.905),
            unified_05x=(0.898, 0.909, 0.905),  # as good as hash, as far as three seeds can tell
            hash_05x=(0.899, 0.908, 0.906),
            unified_01x=(0.89, 0.89, 0.89),
            hash_01x=(0.99,),  # of one seed, which may be a lucky one
        )
    )
    won = {winner.budget: winner for winner in found.winners}
    assert [won[b].row.cell.name for b in ("1x", "0.5x", "0.1x")] == [
        "full",
        "hash 0.5x",
        "unified 0.1x",
    ]
    assert [row.cell.name for row in won["0.5x"].ties] == ["unified 0.5x"]
    assert won["0.1x"].ties == ()
    assert won["0.5x"].lost == pytest.approx(0.905 - 0.9043, abs=1e-4)
    assert found.missing == 2 + 3
    front = {row.cell.name for row in found.rows if row.on_front}
    # Rows of fewer seeds are not on the front, and push none off it.
    assert front == {"full", "hash 0.5x", "unified 0.1x"}


def test_advice_is_by_use() -> None:
    found = records(full=(0.9, 0.9, 0.9), hash_05x=(0.89, 0.89, 0.89))
    add(found, NAMED["low_rank, after 0.5x"], 0.902, 0.902, 0.902)
    told = dict(summarize(found).advice)
    assert told["As small as can be without a loss"][0].startswith("low_rank, after 0.5x (500 B, +")
    (held,) = told["The budget must hold while training too"]
    assert held == "At 1x, 0.5x: hash 0.5x (500 B, -0.0100 AUC)."
    (begun,) = told["There is a trained model to start from"]
    assert begun == "At 1x, 0.5x: low_rank, after 0.5x (500 B, +0.0020 AUC)."


def test_the_time_of_a_row_has_that_of_the_model_that_it_begins_with() -> None:
    found = Records(STUDY)
    for name, seconds in (("full", 100.0), ("low_rank, after 0.5x", 20.0), ("hash 0.5x", 110.0)):
        add(found, NAMED[name], 0.9, 0.9, 0.9, cpu_seconds=seconds)
    assert dict(summarize(found).advice)["Training time counts"][0].startswith("hash 0.5x: 1.10 of")
    add(found, NAMED["hash 0.5x"], 0.9, 0.9, 0.9, cpu_seconds=130.0)
    (told,) = dict(summarize(found).advice)["Training time counts"]
    assert told.startswith("low_rank, after 0.5x: 1.20 of")


def test_a_study_without_figures_has_nothing_to_say() -> None:
    found = summarize(Records(STUDY))
    assert (found.rows, found.winners, found.advice) == ((), (), ())
    assert found.missing == 3 * 6
    assert plain(found)["rows"] == []


def test_the_interval_is_students() -> None:
    assert margin([0.5]) == 0.0
    assert margin([1.0, 2.0, 3.0]) == pytest.approx(4.303 / 3**0.5, rel=1e-3)
