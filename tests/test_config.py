from pathlib import Path

import pytest

from recsys_compress.config import Job, dump_job, load_job
from recsys_compress.errors import UserError

JOB = """
[data]
path = "data"
[embedding]
budget = "0.1x"
[embedding.methods.unified]
num_probes = 3
[[embedding.rules]]
table = "user_id"
method = "full"
[train]
learning_rate = 1
[variants.unified.embedding]
optimizer = "adam"
[variants.unified.train]
learning_rate = 0.5
seed = 3
[variants.hash.train]
seed = 4
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "job.toml"
    path.write_text(JOB)
    return path


def test_a_resolved_job_reads_back_the_same(path: Path, tmp_path: Path) -> None:
    job = load_job(path, ["embedding.method=unified", "train.epochs=2"])
    resolved = tmp_path / "resolved.toml"
    resolved.write_text(dump_job(job))
    assert load_job(resolved) == job
    assert isinstance(job, Job)


def test_variants_hold_for_their_method_and_overrides_win(path: Path) -> None:
    assert load_job(path).train.learning_rate == 1
    assert load_job(path).embedding.optimizer == "rowwise_adagrad"
    job = load_job(path, ["embedding.method=unified", "train.seed=9"])
    assert (job.embedding.optimizer, job.train.learning_rate, job.train.seed) == ("adam", 0.5, 9)
    assert load_job(path, ["embedding.method=hash"]).train.seed == 4


def test_overrides_are_toml_or_plain_text(path: Path) -> None:
    job = load_job(
        path,
        [
            "model.dcnv2.hidden=[8, 4]",
            "data.path=some/where",
            "embedding.budget=2MiB",
            "model.name='dlrm'",
        ],
    )
    assert job.model.dcnv2.hidden == (8, 4)
    assert job.data.path == "some/where"
    assert job.embedding.budget == "2MiB"
    assert load_job(path, ["embedding.budget=158000"]).embedding.budget == 158000
    assert job.model.name == "dlrm"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=3", "unknown key 'train.epoch'; did you mean 'epochs'"),
        ("trian.epochs=3", "unknown key 'trian'; did you mean 'train'"),
        ("train.epochs=-1", "train.epochs = -1: input should be greater than or equal to 0"),
        ("train.epochs=1.5", "train.epochs = 1.5: "),
        ("train.epochs=x", "train.epochs = 'x': input should be a valid integer"),
        ("train.learning_rate=nan", "train.learning_rate = nan: input should be a finite number"),
        ("embedding.budget=0.1", "embedding.budget = 0.1: write '0.1x' or '2MB', or a whole"),
        ("model.name=foo", "model.name = 'foo': input should be 'dcnv2', 'dlrm'"),
        ("model.dcnv2.hiden=[1]", "unknown key 'model.dcnv2.hiden'; did you mean 'hidden'"),
        ("embedding.rules=[{table='a', methd='b'}]", "embedding.rules.0.methd"),
        ("data=3", "data = 3: input should be an object"),
        ("train.epochs", "write it as key=value"),
        ("=3", "write it as key=value"),
    ],
)
def test_a_wrong_override_is_one_clear_error(path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")) as caught:
        load_job(path, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[data", "is not valid TOML"),
        ("", "key 'data' is missing; add it"),
        ("[data]", "key 'data.path' is missing; add it"),
        ("variants = 3\n[data]\npath='x'", "variants must be sections"),
        ("[data]\npath='x'\n[variants.hash.train]\nseeds=1", "variants.hash: unknown key"),
    ],
)
def test_a_wrong_file_is_one_clear_error(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "job.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_job(path)
    with pytest.raises(UserError, match="cannot be read"):
        load_job(tmp_path / "none.toml")
