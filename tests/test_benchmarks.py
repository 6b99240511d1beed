"""A tiny run of every benchmark: the figures mean nothing, but all of it must work."""

import dataclasses
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import hot_path, method_curves, plan, profile, report, run, scale, takeover
from benchmarks.case import Case, Shape
from benchmarks.plan import MOVIELENS
from benchmarks.plan_page import spearman, write
from benchmarks.report import Results
from recsys_compress.data.dataset import PreparedDataset
from recsys_compress.train.trainer import train
from tests.train.jobs import make_job


def results(**rates: float) -> Results:
    found = Results(shape=Shape())
    for name, rate in rates.items():
        tuned = name not in ("stock", "torch")
        case = Case(group="embedding", name=name, tuned=tuned, shape=Shape())
        speeds = ("cpu", "wall", "wall_all")
        figures = {f"{ids}/{speed}": rate for ids in ("uniform", "zipf") for speed in speeds}
        found.add(case, figures)
    return found


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
def test_every_case_runs_and_is_on_the_page(tmp_path: Path) -> None:
    found = Results(shape=run.QUICK)
    for group in report.GROUPS:
        data = run.prepared(group, run.QUICK, tmp_path)
        # Several processes and their start are a test of their own.
        for case in (c for c in run.cases(group, run.QUICK, data) if not c.name.startswith("2 x")):
            figures = importlib.import_module(f"benchmarks.{group}").measure(case)
            assert figures
            assert all(value >= 0 for value in figures.values()), figures
            found.add(case, figures)
    page = report.write(found, tmp_path)
    for key in found.runs:
        assert f"| {report.label(key)} |" in page
    assert (tmp_path / "benchmarks.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("_threads")
def test_two_processes_share_a_batch(tmp_path: Path) -> None:
    data = run.prepared("ranks", run.QUICK, tmp_path)
    found = Results(shape=run.QUICK)
    for case in run.cases("ranks", run.QUICK, data)[:2]:
        found.add(case, importlib.import_module("benchmarks.ranks").measure(case))
    one, two = found.keys("ranks")
    assert found.median(one, "gradient average") < found.median(two, "gradient average")
    assert "| 2 processes, 4,000 rows |" in report.render(found)


@pytest.mark.usefixtures("_threads")
def test_memory_is_watched_over_generated_rows(tmp_path: Path) -> None:
    assert scale.main(["--quick", "--out", str(tmp_path)]) == 0
    parts = json.loads((tmp_path / "scale.json").read_text(encoding="utf-8"))["parts"]
    assert parts.keys() == scale.PARTS.keys()
    assert parts["read"]["examples"] >= scale.QUICK.examples
    for figures in parts.values():
        course = scale.Course.of(figures, "own")
        assert course.examples == sorted(course.examples)
        assert min(course.memory) > 1e7  # of a process that has torch in it
    assert "| train | 1,280 |" in (tmp_path / "scale.md").read_text(encoding="utf-8")
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")


def test_growth_after_the_warm_up_is_seen() -> None:
    figures = {f"own/{number}": 100.0 + 10 * (number > 15) for number in range(20)}
    course = scale.Course.of({**figures, "all/3": 1e9, "seconds": 1.0}, "own")
    assert (course.first, course.last) == (100.0, 110.0)


def test_cases_run_in_processes_of_their_own(tmp_path: Path) -> None:
    arguments = ["--quick", "--only", "reading", "--repeats", "1", "--out", str(tmp_path)]
    assert run.main(arguments) == 0
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert figures["runs"].keys() == {"reading/reader/tuned", "reading/train/tuned"}


def test_one_group_alone_keeps_the_others(tmp_path: Path) -> None:
    kept = Results(shape=run.QUICK)
    kept.add(
        Case(group="reading", name="reader", tuned=True, shape=run.QUICK), {"cpu": 1.0, "wall": 1.0}
    )
    report.write(kept, tmp_path)
    again = Results.load(tmp_path, run.QUICK)
    assert again.runs == kept.runs
    assert again.without(["reading"]).runs == {}
    assert Results.load(tmp_path, Shape()).runs == {}  # another workload: not to be mixed


def test_a_claim_that_does_not_hold_is_said() -> None:
    fast = report.claims(results(full=400.0, stock=100.0, torch=100.0))
    assert [claim.holds for claim in fast] == [True, True]
    slow = results(full=320.0, stock=100.0, torch=100.0)
    assert [claim.holds for claim in report.claims(slow)] == [False, True]
    assert "DOES NOT HOLD" in report.render(slow)


@pytest.mark.usefixtures("_threads")
def test_the_profile_shows_all_stages_and_their_limits(tmp_path: Path) -> None:
    found = profile.Profile(shape=run.QUICK, machine="")
    found.runs[profile.READING] = [{"cpu": 1e6}]
    wanted = {
        "train full": {hot_path.IDS, hot_path.FORWARD, hot_path.BACKWARD, hot_path.UPDATE},
        "train dnis search": {hot_path.COMBINE, hot_path.COMBINE_BACK, hot_path.SEARCH},
        "serve dnis int8": {hot_path.ENCODE, hot_path.IDS, hot_path.COMBINE, hot_path.FORWARD},
    }
    for name, stages in wanted.items():
        case = Case(group="hot_path", name=name, tuned=True, shape=run.QUICK)
        figures = hot_path.measure(case)
        assert all(figures[stage] > 0 for stage in stages), figures
        assert all(value >= 0 for value in figures.values()), figures
        found.runs[name] = [figures]
        found.runs[f"before {name}"] = [{k: 2 * v for k, v in figures.items()}]
        limits = found.limits(name)
        assert all(limits[stage][1] > 0 for stage in stages - {hot_path.ENCODE})
    page = profile.write(found, tmp_path)
    for name in wanted:
        before, now = found.total(f"before {name}"), found.total(name)
        assert f"| **all** | **{now:.1f}** |" in page
        assert f"| {before:.1f} | {now:.1f} | {before / now:.2f}x |" in page
    assert json.loads((tmp_path / "profile.json").read_text(encoding="utf-8"))["runs"] == found.runs
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("given", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}])
def test_settings_of_the_process_leave_those_of_the_user(given: dict[str, str]) -> None:
    code = (
        "import json, os, sys; from recsys_compress import runtime; runtime.configure();"
        "print(json.dumps([os.environ['OMP_WAIT_POLICY'], os.environ['THP_MEM_ALLOC_ENABLE'],"
        "'torch' in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=given, cwd=run.ROOT, capture_output=True, check=True
    )
    assert json.loads(done.stdout) == [given.get("OMP_WAIT_POLICY", "PASSIVE"), "1", False]


def test_the_study_of_plans_runs_on_any_model(
    synthetic_dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (plan, takeover):
        monkeypatch.setattr(module, "METHODS", ("full", "hash"))
        monkeypatch.setattr(module, "BUDGETS", {"1/4": "0.25x"})
    job = make_job(synthetic_dataset, tmp_path / "runs", "adagrad", epochs=1, threads=1)
    embedding = dataclasses.replace(job.embedding, optimizer="adam", learning_rate=0.01)
    folder = train(dataclasses.replace(job, embedding=embedding)).folder
    parts = {
        "points": plan.points(folder),
        "training": takeover.plans(folder, MOVIELENS, "training", 0),
        "serving": takeover.plans(folder, MOVIELENS, "serving", 0),
        "data": takeover.blind(folder, MOVIELENS, 0),
        "probes": plan.probed(folder, [], tmp_path / "new"),
    }
    found = [
        {"data": MOVIELENS, "what": what, "seed": 0, "rows": list(rows)}
        for what, rows in parts.items()
    ]
    measured = found[0]["rows"]
    assert {point["method"] for point in measured} == {"full", "hash"}
    assert spearman([p["predicted"] for p in measured], [p["measured"] for p in measured]) > 0.5
    (trained,) = found[1]["rows"]
    assert trained["rows"][0]["bytes"] <= trained["budget_bytes"]
    (probed,) = found[4]["rows"]
    assert probed["bytes"] <= trained["budget_bytes"]
    write(found, tmp_path / "plan.md")
    page = (tmp_path / "plan.md").read_text()
    assert "| 1/4 |" in page
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_rank_correlation_shares_ties() -> None:
    assert spearman([1, 2, 3], [10, 20, 40]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 2, 4], [1, 2, 3, 4]) == pytest.approx(0.9486833)


def test_every_methods_page_shows_its_curve(tmp_path: Path) -> None:
    method_curves.main(tmp_path)
    names = {path.stem for path in method_curves.PAGES.glob("*.md")}
    assert {path.stem for path in tmp_path.iterdir()} == names
    for name in names:
        assert f"]({name}.png)" in (method_curves.PAGES / f"{name}.md").read_text(encoding="utf-8")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
