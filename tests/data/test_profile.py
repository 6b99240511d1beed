import json
from pathlib import Path

import numpy as np
import pytest
from raw_tables import tabular, write
from rich.console import Console

from recsys_compress.data.dataset import PreparedDataset
from recsys_compress.data.prepare import prepare
from recsys_compress.data.profile import profile, render, zipf_exponent
from recsys_compress.data.schema import Encoding
from recsys_compress.data.sources.synthetic import Synthetic
from recsys_compress.errors import UserError
from recsys_compress.track.tables import make_table, print_table

TOML = """
categorical = ["user"]
[label]
column = "click"
[[multi_valued]]
column = "tags"
[split]
column = "part"
train = [0]
valid = [1]
test = [2]
"""


@pytest.mark.parametrize("encoding", ["vocabulary", "hash"])
def test_figures_by_hand(tmp_path: Path, encoding: Encoding) -> None:
    """Ten rows of training: user 0 six times, users 1 and 2 once, two missing."""
    raw = {
        "part": [0] * 10 + [1, 1, 1, 2],
        "click": [0, 1] * 7,
        "user": [0] * 6 + [1, 2, None, None] + [0, 1, 3, 4],
        "tags": [[1, 2], []] * 5 + [[1], [], [9, 2], [1]],
    }
    source = tabular(tmp_path, write(tmp_path, raw), TOML)
    dataset = prepare(source, tmp_path / "out", encoding=encoding)
    user, tags = profile(dataset, dim=8).fields
    assert (user.ids, tags.ids) == (3, 2)
    assert user.top_1_percent == user.top_10_percent == pytest.approx(6 / 8)
    assert user.missing == pytest.approx(0.2)
    assert user.cold == pytest.approx(2 / 4)
    assert user.bytes == (3 + 2) * 8 * 4
    assert tags.missing == pytest.approx(0.5)
    assert tags.cold == pytest.approx(1 / 4)
    assert tags.ids_per_row == pytest.approx(1.0)


@pytest.mark.parametrize("exponent", [0.0, 0.8, 1.3])
def test_zipf_exponent_is_found_again(tmp_path: Path, exponent: float) -> None:
    source = Synthetic(rows=60_000, cardinalities=(100,), zipf=exponent, dense=0)
    dataset = prepare(source, tmp_path / "out")
    assert profile(dataset).fields[0].zipf == pytest.approx(exponent, abs=0.05)


def test_zipf_exponent_of_exact_counts() -> None:
    counts = np.round(1e9 * np.arange(1, 1001) ** -1.1).astype(np.int64)
    assert zipf_exponent(counts) == pytest.approx(1.1, abs=1e-4)
    assert zipf_exponent(np.array([5])) == 0.0


def test_prints_as_json_and_as_a_table(synthetic_dataset: PreparedDataset) -> None:
    result = profile(synthetic_dataset, dim=4)
    raw = json.loads(json.dumps(result.to_json()))
    assert raw["bytes"] == sum(f.num_embeddings for f in synthetic_dataset.schema.categorical) * 16
    console = Console(width=120)
    with console.capture() as capture:
        console.print(render(result))
    assert all(field["name"] in capture.get() for field in raw["fields"])


def test_names_are_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(make_table(["field"], [["price[usd]"]]))
    assert "price[usd]" in capsys.readouterr().out


def test_bad_dim(synthetic_dataset: PreparedDataset) -> None:
    with pytest.raises(UserError, match="dim 0: must be at least 1"):
        profile(synthetic_dataset, dim=0)
