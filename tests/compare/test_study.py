"""Study files: what they say, what is refused, and which figures belong to which cell."""

import json
from pathlib import Path

import pytest

from recsys_compress.compare.cells import (
    all_trials,
    cells,
    commands,
    first_cell,
    run_of,
    trials,
)
from recsys_compress.compare.compare import forget, missing
from recsys_compress.compare.records import Record, Records
from recsys_compress.compare.spec import Study
from recsys_compress.compare.study import load_study
from recsys_compress.compare.summary import summarize
from recsys_compress.config import load_job
from recsys_compress.errors import UserError

ROOT = Path(__file__).parents[2]
JOB = """
[data]
path = "data"
[embedding]
dim = 8
[variants.unified.embedding]
learning_rate = 0.5
"""
STUDY = """
title = "small"
job = "job.toml"
seeds = [0, 1]
budgets = ["0.5x", "0.1x"]
tries = [{ embedding.learning_rate = 0.1 }, { embedding.learning_rate = 0.01 }]

[[methods]]
name = "full"
budgets = []
tries = []

[[methods]]
name = "hash"
try_budget = "0.1x"

[[methods]]
name = "unified"
tries = [{ embedding.methods.unified.num_probes = { user = 2 } }]

[[methods]]
name = "pruned"
method = "dynamic_sparse"
after = "full"
budgets = ["0.1x"]
set = { train.epochs = 1 }
"""


def written(folder: Path, text: str = STUDY) -> Path:
    (folder / "job.toml").write_text(JOB, encoding="utf-8")
    path = folder / "study.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return load_study(written(tmp_path))


def named(study: Study, name: str) -> list[str]:
    return [cell.name for cell in cells(study) if cell.entry.name == name]


def test_cells_are_methods_by_budgets(study: Study) -> None:
    assert named(study, "full") == ["full"]
    assert named(study, "hash") == ["hash 0.5x", "hash 0.1x"]
    assert cells(study)[-1].name == "pruned 0.1x"
    assert [t.name for t in trials(study, study.entry("hash"), None)] == [
        "hash 0.1x, try 1",
        "hash 0.1x, try 2",
    ]
    # One choice is none.
    assert trials(study, study.entry("unified"), None) == []


def test_an_entry_may_be_for_some_of_the_models(tmp_path: Path) -> None:
    text = STUDY.replace('title = "small"', 'title = "small"\nmodels = ["dcnv2", "deepfm"]')
    text = text.replace('name = "hash"', 'name = "hash"\nmodels = ["deepfm"]')
    study = load_study(written(tmp_path, text))
    assert named(study, "hash") == ["deepfm: hash 0.5x", "deepfm: hash 0.1x"]
    assert named(study, "full") == ["dcnv2: full", "deepfm: full"]
    with pytest.raises(UserError, match="after = 'hash', which has not all of its models"):
        load_study(written(tmp_path, text.replace('after = "full"', 'after = "hash"')))
    with pytest.raises(UserError, match="models: 'deepfm'; known: dlrm"):
        load_study(written(tmp_path, text.replace('"dcnv2", "deepfm"', '"dlrm"')))


def test_a_run_is_a_command_that_gives_its_job(study: Study) -> None:
    unified = next(cell for cell in cells(study) if cell.name == "unified 0.1x")
    run = run_of(study, unified, {})
    assert run is not None
    (arguments,) = run.arguments(3)
    assert arguments[:2] == ["train", study.job]
    job = load_job(Path(arguments[1]), arguments[3::2])
    assert (job.embedding.method, job.embedding.budget) == ("unified", "0.1x")
    assert job.embedding.methods["unified"]["num_probes"] == {"user": 2}
    assert (job.embedding.learning_rate, job.train.seed) == (0.5, 3)


def test_the_commands_of_a_cell_make_its_data_and_model_first() -> None:
    study = load_study(ROOT / "studies" / "movielens_1m.toml")
    pruned = next(c for c in cells(study) if c.name == "dcnv2: full, trained again 1x")
    run = run_of(study, pruned, {})
    assert run is not None
    made, trained, again = commands(study, run, 2)
    assert made == (
        "recsys-compress prepare movielens-1m --from movielens-1m --out data-s2 --seed 2"
    )
    assert trained.endswith("--set data.path=data-s2 --set train.seed=2")
    assert again == ("recsys-compress compress RUN --method full --budget 1x --set train.epochs=5")


def test_a_plan_is_made_of_the_trained_model_and_trained_on_from_it(tmp_path: Path) -> None:
    text = STUDY.replace('method = "dynamic_sparse"', 'method = "plan"')
    study = load_study(written(tmp_path, text))
    run = run_of(study, cells(study)[-1], {})
    assert run is not None
    *before, plan, train = commands(study, run, 1)
    assert before == commands(study, run.after, 1)  # type: ignore[arg-type]
    assert plan == (
        "recsys-compress plan RUN/job.toml --budget 0.1x --for parameters --reference RUN"
        " --out plan.toml --set train.epochs=1"
    )
    assert train == (
        "recsys-compress train RUN/job.toml --plan plan.toml --start RUN --set train.epochs=1"
    )


def test_what_hangs_on_trials_is_known_after_them(study: Study) -> None:
    records = Records(study)
    hashed = next(cell for cell in cells(study) if cell.name == "hash 0.1x")
    assert records.run(hashed) is None
    for trial, auc in zip(trials(study, study.entry("hash"), None), (0.7, 0.8), strict=True):
        run = records.run(trial)
        assert run is not None
        figures = {"valid.auc": auc, "test.auc": auc}
        records.add(Record(key=run.key, seed=0, run="", figures=figures))
    picked = records.run(hashed)
    assert picked is not None
    assert "embedding.learning_rate=0.01" in picked.settings
    # The trial at the first seed is the cell's own run.
    assert records.figures(hashed, "test.auc") == {0: 0.8}
    left = [f"{cell.name} {seed}" for cell, seed in missing(records, ["hash*"])]
    assert left == ["hash 0.5x 0", "hash 0.5x 1", "hash 0.1x 1"]


def test_trials_that_begin_with_a_picked_model_are_found_again(tmp_path: Path) -> None:
    tries = "tries = [{ train.epochs = 1 }, { train.epochs = 2 }]"
    changed = STUDY.replace("set = { train.epochs = 1 }", tries)
    study = load_study(written(tmp_path, changed.replace('after = "full"', 'after = "hash"')))
    records = Records(study)
    for entry, aucs in (("hash", (0.7, 0.8)), ("pruned", (0.75, 0.7))):
        for trial, auc in zip(trials(study, study.entry(entry), None), aucs, strict=True):
            run = records.run(trial)
            assert run is not None
            records.add(Record(key=run.key, seed=0, figures={"valid.auc": auc}))
    records.write(tmp_path / "results.json")
    for known in (records, Records.load(study, tmp_path / "results.json")):
        assert known.picks() == {("hash", None): 1, ("pruned", None): 0}
    # Another pick: what begins with that model has yet to be tried.
    first = records.run(trials(study, study.entry("hash"), None)[0])
    assert first is not None
    records.add(Record(key=first.key, seed=0, figures={"valid.auc": 0.9}))
    assert records.picks() == {("hash", None): 0}


def test_trials_come_first_and_compressions_last(study: Study) -> None:
    names = [cell.name for cell, _ in missing(Records(study))]
    assert names[:2] == ["hash 0.1x, try 1", "hash 0.1x, try 2"]
    assert names[-2:] == ["pruned 0.1x"] * 2
    assert len(names) == 2 + 2 + 4 + 4 + 2


def test_what_a_wanted_cell_begins_with_is_tried_before_it(tmp_path: Path) -> None:
    study = load_study(written(tmp_path, STUDY.replace('after = "full"', 'after = "hash"')))
    assert [cell.name for cell, _ in missing(Records(study), ["pruned*"])] == [
        "hash 0.1x, try 1",
        "hash 0.1x, try 2",
        "pruned 0.1x",
        "pruned 0.1x",
    ]


def test_validation_picks_at_the_seed_of_the_trials(tmp_path: Path) -> None:
    study = load_study(written(tmp_path, STUDY.replace("seeds = [0, 1]", "seeds = [1, 0]")))
    records = Records(study)
    for trial, auc in zip(trials(study, study.entry("hash"), None), (0.7, 0.8), strict=True):
        run = records.run(trial)
        assert run is not None
        figures = {"valid.auc": auc, "test.auc": auc, "bytes.tables": 1}
        records.add(Record(key=run.key, seed=1, figures=figures))
    assert records.picks() == {("hash", None): 1}
    records.add(Record(key=run.key, seed=0, figures={**figures, "valid.auc": 0.6}))
    assert records.picks() == {("hash", None): 1}
    assert [auc for _, auc, _ in summarize(records).tried] == [0.7, 0.8]


def test_cells_are_run_anew_where_their_names_match(study: Study) -> None:
    records = Records(study)
    for trial, auc in zip(trials(study, study.entry("hash"), None), (0.7, 0.8), strict=True):
        run = records.run(trial)
        assert run is not None
        records.add(Record(key=run.key, seed=0, figures={"valid.auc": auc}))

    def anew(*only: str) -> list[str]:
        left = Records(study, made)
        forget(left, only)
        return [f"{cell.name} {seed}" for cell, seed in missing(left, only)]

    made = [record for cell in cells(study) for record in records.all(cell)]
    made += [r for trial in trials(study, study.entry("hash"), None) if (r := records.trial(trial))]
    assert anew("hash 0.1x") == ["hash 0.1x, try 2 0", "hash 0.1x 0", "hash 0.1x 1"]
    assert anew("hash 0.1x*")[:2] == ["hash 0.1x, try 1 0", "hash 0.1x, try 2 0"]
    with pytest.raises(
        UserError, match=r"--only 'hsah 0\.1x': fits no cell; did you mean 'hash 0\.1x"
    ):
        missing(records, ["hsah 0.1x"])


def test_figures_hang_on_what_decides_them_alone(tmp_path: Path, study: Study) -> None:
    def key(text: str, job: str = JOB) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / "job.toml").write_text(job, encoding="utf-8")
        (folder / "study.toml").write_text(text, encoding="utf-8")
        other = load_study(folder / "study.toml")
        run = run_of(other, next(c for c in cells(other) if c.name == "pruned 0.1x"), {})
        assert run is not None
        return run.key

    own = key(STUDY)
    assert own == key(STUDY.replace('"pruned"', '"pruned"\nline = "x"'))
    assert own == key(STUDY, JOB.replace('"data"', '"elsewhere"') + '[tracking]\nuri = "x"\n')
    assert own != key(STUDY, JOB.replace("dim = 8", "dim = 16"))
    assert own != key(STUDY.replace("train.epochs = 1", "train.epochs = 2"))
    assert own != run_of(study, first_cell(study, "full", None), {})
    made = '[prepare]\nsource = "synthetic"\nfolder = "x"\noptions = { rows = 3000 }\n\n[[methods]]'
    before = STUDY.replace("[[methods]]", made, 1)
    assert own != key(before)
    assert key(before) == key(before.replace('folder = "x"', 'folder = "y"'))
    assert key(before) != key(before.replace("rows = 3000", "rows = 6000"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('job = "job.toml"', 'job = "none.toml"', "none.toml: cannot be read"),
        ("seeds = [0, 1]", "seed = [0]", "unknown key 'seed'; did you mean 'seeds'"),
        ('name = "hash"', 'name = "full"', "methods: 'full' is there twice"),
        ('name = "hash"', 'name = "hsah"', "'hsah'.*did you mean 'hash'"),
        ('after = "full"', 'after = "ful"', "after = 'ful'; did you mean 'full'"),
        ('name = "unified"', 'name = "unified"\nmethod = "plan"', "needs budgets, and `after`"),
        ("train.epochs = 1", "train.epoch = 1", "'pruned'.*unknown key 'train.epoch'"),
        ("train.epochs = 1", "embedding.budget = '1x'", "name `method` and `budgets` beside"),
        (
            "[[methods]]",
            '[[claims]]\ntext = "x"\nleft = "fall"\n[[methods]]',
            "did you mean 'full'",
        ),
        ("[[methods]]", '[[claims]]\ntext = "x"\nleft = "full"\n[[methods]]', "has no bound"),
        (
            "[[methods]]",
            '[[claims]]\ntext = "x"\nleft = "full"\nleast = 1\nfigure = "test.acu"\n[[methods]]',
            "figure = 'test.acu' is none; did you mean 'test.auc'",
        ),
        ('"0.5x"', '"0,5x"', "'hash'.*'0,5x' is not understood"),
        ('try_budget = "0.1x"', 'try_budget = "0.1y"', "'hash'.*'0.1y' is not understood"),
        ("budgets = []", 'budgets = ["1x", "0.5x"]', "'full'.*the first.*give it one budget"),
        ('name = "unified"', 'name = "hash 0.5x"\nmethod = "unified"\nbudgets = []', "two cells"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_study(written(tmp_path, STUDY.replace(old, new, 1)))


def test_records_are_kept_merged_and_replaced(tmp_path: Path, study: Study) -> None:
    full = first_cell(study, "full", None)
    run = run_of(study, full, {})
    assert run is not None
    path = tmp_path / "results.json"
    records = Records(
        study,
        [Record(key=run.key, seed=seed, figures={"test.auc": 0.9 - seed}) for seed in (0, 1)],
    )
    records.write(path)
    assert path.read_text(encoding="utf-8").count("\n") == 4
    again = Records.load(study, path)
    again.add(Record(key=run.key, seed=1, figures={"test.auc": 0.95}))
    assert again.figures(full, "test.auc") == {0: 0.9, 1: 0.95}
    assert Records.load(study, tmp_path / "absent.json").all(full) == []
    path.write_text("[{}]", encoding="utf-8")
    with pytest.raises(UserError, match=r"results\.json: cannot be read"):
        Records.load(study, path)


@pytest.mark.parametrize("name", ["movielens_1m", "frappe"])
def test_the_studies_of_the_project_are_valid_and_their_figures_their_own(name: str) -> None:
    study = load_study(ROOT / "studies" / f"{name}.toml")
    path = ROOT / "studies" / name / "results.json"
    records = Records.load(study, path)
    kept = {record["key"] for record in json.loads(path.read_text(encoding="utf-8"))}
    whole = cells(study)
    runs = [records.run(cell) for cell in [*all_trials(study, whole), *whole]]
    assert kept <= {run.key for run in runs if run is not None}
    for claim in study.claims:
        assert (claim.least is None) != (claim.most is None)
