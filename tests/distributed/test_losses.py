"""Sharded training is unsharded training: the same losses, for every method and model."""

from typing import Any

import pytest

from recsys_compress.data.dataset import PreparedDataset
from tests.distributed.processes import run
from tests.train.jobs import EMBEDDINGS

pytestmark = pytest.mark.timeout(600)  # several processes on a busy machine

STEPS = 50
SMALL = {"batch_size": 200}
FUSED = [name for name in EMBEDDINGS if "adam" not in name]
CASES: list[tuple[str, str, dict[str, Any]]] = [
    *((name, kind, SMALL) for name in FUSED for kind in ("row_wise", "table_wise")),
    # Tables trained by dense Adam are replicated, whatever the kind.
    *((name, "row_wise", SMALL) for name in EMBEDDINGS if name not in FUSED),
    *((name, "column_wise", SMALL) for name in ("adagrad", "sgd")),
    ("full", "auto", SMALL),
    *(("full", "row_wise", {**SMALL, "model": model}) for model in ("dlrm", "deepfm", "autoint")),
]


def label(case: tuple[str, str, dict[str, Any]]) -> str:
    name, kind, settings = case
    return " ".join([name, kind, settings.get("model", "")]).strip()


@pytest.fixture(scope="module")
def found(
    synthetic_dataset: PreparedDataset, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """Figures of one process, and those of each of two."""
    arguments = {
        "dataset": str(synthetic_dataset.path),
        "folder": str(tmp_path_factory.mktemp("losses")),
        "cases": [(label(case), *case) for case in CASES],
        "steps": STEPS,
    }
    module = "tests.distributed.losses"
    return [*run(module, 1, **arguments), *run(module, 2, **arguments)]


@pytest.mark.parametrize("case", CASES, ids=label)
def test_losses_are_those_of_one_process(
    case: tuple[str, str, dict[str, Any]], found: list[dict[str, Any]]
) -> None:
    one, first, second = (figures[label(case)] for figures in found)
    assert len(one["losses"]) == STEPS
    assert first == second
    assert first["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert first["auc"] == pytest.approx(one["auc"], abs=1e-5)
    assert first["norm"] == pytest.approx(one["norm"], rel=1e-5)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_fused_tables_are_sharded_as_asked(
    case: tuple[str, str, dict[str, Any]], found: list[dict[str, Any]]
) -> None:
    name, kind, _ = case
    figures = found[1][label(case)]
    if name not in FUSED:
        assert (figures["sharded"], figures["kinds"]) == (0, [])
        return
    assert figures["sharded"] == 1
    if kind == "auto":
        assert set(figures["kinds"]) <= {"row_wise", "table_wise"}
    else:
        assert figures["kinds"] == [kind]
