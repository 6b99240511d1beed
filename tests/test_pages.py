"""Pages that are written from committed figures are those of the figures."""

import json
from pathlib import Path

from benchmarks.plan_page import write

BENCHMARKS = Path(__file__).parents[1] / "docs" / "benchmarks"


def test_the_page_of_plans_is_that_of_the_committed_figures(tmp_path: Path) -> None:
    figures = json.loads((BENCHMARKS / "plan.json").read_text(encoding="utf-8"))
    write(figures, tmp_path / "plan.md")
    committed = (BENCHMARKS / "plan.md").read_text(encoding="utf-8")
    again = "written anew by `python -m benchmarks.plan --render`"
    assert (tmp_path / "plan.md").read_text(encoding="utf-8") == committed, again
