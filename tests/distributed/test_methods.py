"""Methods that look at all tables at once find in several processes what they find in one."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from recsys_compress.config import dump_job
from recsys_compress.data.dataset import PreparedDataset
from tests.distributed.processes import run
from tests.train.jobs import make_job

pytestmark = pytest.mark.timeout(600)  # several processes on a busy machine

TASKS = "tests.distributed.tasks"
DNIS = [
    "embedding.method=dnis",
    "embedding.budget=0.5x",
    "embedding.methods.dnis={warmup_epochs=1, search_epochs=1, num_blocks=3}",
]
SEARCHES = {
    "first order": [*DNIS, "embedding.methods.dnis.inner_lr=0.0"],
    "second order": [*DNIS, "embedding.methods.dnis.inner_lr=0.05"],
    "by dense Adam": [*DNIS, "embedding.optimizer=adam", "embedding.learning_rate=0.01"],
}
TRAININGS = {
    "full": [],
    **SEARCHES,
    # One table, so that a process has none.
    "by whole tables": ["sharding.kind=table_wise"],
}
TAKERS = ("low_rank", "group_reduce")  # of a trained model
Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def found(
    synthetic_dataset: PreparedDataset, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Found, Found]:
    """Searches and compressions in one process, and in two that get the same rows."""
    folder = tmp_path_factory.mktemp("methods")
    job = make_job(synthetic_dataset, folder / "runs", "full", batch_size=1000)
    (folder / "job.toml").write_text(dump_job(job), encoding="utf-8")
    common = {"do": "train", "job": str(folder / "job.toml")}
    always = ["data.streams=2", "model.dcnv2.dropout=0.0"]
    tasks: list[dict[str, Any]] = [
        {**common, "settings": [*always, *settings]} for settings in TRAININGS.values()
    ]
    one = run(TASKS, 1, tasks=tasks)[0]
    taken = {"do": "compress", "run": one[0]["folder"], "settings": ["train.epochs=0"]}
    tasks += [{**taken, "method": method} for method in TAKERS]
    one += run(TASKS, 1, tasks=tasks[-len(TAKERS) :])[0]
    return one, run(TASKS, 2, tasks=tasks)[0]


@pytest.mark.parametrize("search", SEARCHES)
def test_a_search_finds_the_same(search: str, found: tuple[Found, Found]) -> None:
    one, two = (part[list(TRAININGS).index(search)] for part in found)
    assert two["kept"] == one["kept"]
    for before, after in zip(one["history"], two["history"], strict=True):
        # Retraining begins with fresh sums of squares, which makes the first steps of Adagrad
        # of one length, whatever the gradient: so rounding grows there.
        most = 1e-6 if before["phase"] < 2 else 1e-3
        assert after["logloss"] == pytest.approx(before["logloss"], abs=most)


def test_a_process_may_have_no_table(found: tuple[Found, Found]) -> None:
    one, two = (part[list(TRAININGS).index("by whole tables")] for part in found)
    assert two["test"] == pytest.approx(one["test"], abs=1e-5)


@pytest.mark.parametrize("method", TAKERS)
def test_what_is_measured_is_that_of_all_processes(method: str, found: tuple[Found, Found]) -> None:
    one, two = (part[len(TRAININGS) + TAKERS.index(method)] for part in found)
    assert two["ranks"] == one["ranks"]
    assert two["methods"] == one["methods"]
    assert two["test"] == pytest.approx(one["test"], abs=1e-5)
    first, second = (load_file(Path(part["folder"]) / "model.safetensors") for part in (one, two))
    assert {n: w.shape for n, w in first.items()} == {n: w.shape for n, w in second.items()}
