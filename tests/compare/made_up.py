"""Studies and figures that are made up, whole in every part that a report shows."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from recsys_compress.compare.cells import Cell, cells, seeds_of, trials
from recsys_compress.compare.records import Record, Records
from recsys_compress.compare.spec import Claim, Entry, StorageClaim, Study

JOB = str(Path(__file__).parents[2] / "pipelines" / "frappe.toml")
ODD = "unified <b>$x|y$</b> & co"  # a name that is no markup, no formula and no cell's end
STUDY = Study(
    title="Made <i>up</i>",
    about="All figures are made up & stand for nothing.",
    job=JOB,
    budgets=("0.5x", "0.1x"),
    storage=("int8",),
    methods=(
        Entry(name="full", budgets=(), published={"": 0.81}),
        Entry(
            name="hash",
            tries=({"embedding": {"learning_rate": 0.1}}, {"embedding": {"learning_rate": 0.01}}),
        ),
        Entry(name=ODD, method="unified", published={"0.5x": 0.8}),
        Entry(name="_low_rank", method="low_rank", after="full", budgets=("0.5x",)),
        Entry(name="out of reach", method="hash", budgets=("0.0001x",)),
    ),
    claims=(
        Claim(text="hash is as good", left="hash 0.5x", right="full", least=-0.1),
        Claim(text="hash is perfect", left="hash 0.1x", least=1.0),
    ),
    storage_claims=(StorageClaim(storage="int8", most=0.001),),
)
TWO_MODELS = replace(STUDY, models=("dcnv2", "deepfm"), claims=())
ONE_SEED = replace(STUDY, seeds=(7,))


def record(cell: Cell, key: str, seed: int) -> Record:
    """Figures that fall with the bytes and differ a little by seed."""
    if cell.entry.name == "out of reach":
        return Record(key=key, seed=seed, error="budget of 9 bytes is out of reach; name more")
    share = float((cell.budget or "1x").rstrip("x"))
    lost = 0.01 / share * (cell.entry.name == "hash") + 0.001 / share + 0.001 * seed
    figures = {
        "test.auc": 0.9 - lost,
        "valid.auc": 0.9 - lost / 2,
        "test.logloss": 0.3 + lost,
        "test.ne": 0.6 + lost,
        "test.calibration": 1.01,
        "test.ece": 0.004,
        "bytes.tables": 1000 * share,
        "bytes.optimizer": 2000 * share,
        "bytes.model": 1000 * share + 500,
        "int8.auc": 0.8999 - lost,
        "int8.bytes": 260 * share,
        "inference.ratio": 1.0,
        "peak_rss_bytes": 7e8,
        "cpu_seconds": 100.0 + seed,
    }
    return Record(
        key=key,
        seed=seed,
        run=cell.name,
        figures=figures,
        history=[[0.5, 0.4, 0.85], [1, 0.3 + lost, 0.9 - lost]],
        calibration=[[0.1, 0.12, 50], [0.8, 0.75, 50]],
        tables=[(f"user, {ODD}: 10 x 2", int(800 * share)), ("item: 5 x 2", int(200 * share))],
        versions="recsys-compress 0.1.0, torch 2",
    )


def records(study: Study, made: Callable[[Cell, str, int], Record] = record) -> Records:
    """Returns the figures of all of a study's cells and trials."""
    found = Records(study)
    entries = {(cell.entry.name, cell.model): cell.entry for cell in cells(study)}
    tried = [t for (_, model), entry in entries.items() for t in trials(study, entry, model)]
    for cell in [*tried, *cells(study)]:
        run = found.run(cell)
        assert run is not None
        for seed in seeds_of(study, cell):
            found.add(made(cell, run.key, seed))
    return found
