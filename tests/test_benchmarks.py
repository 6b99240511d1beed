"""A tiny run of every benchmark: the figures mean nothing, but all of it must work."""

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import report, run
from benchmarks.case import Case, Shape
from benchmarks.report import Results


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
        for case in run.cases(group, run.QUICK, data):
            figures = importlib.import_module(f"benchmarks.{group}").measure(case)
            assert figures
            assert all(value >= 0 for value in figures.values()), figures
            found.add(case, figures)
    page = report.write(found, tmp_path)
    for key in found.runs:
        assert f"| {report.label(key)} |" in page
    assert (tmp_path / "benchmarks.png").read_bytes().startswith(b"\x89PNG")


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
