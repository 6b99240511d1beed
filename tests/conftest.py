"""Fixtures that several test modules share."""

from pathlib import Path

import hypothesis
import pytest
import torch

from recsys_compress.data.dataset import PreparedDataset
from recsys_compress.data.prepare import prepare
from recsys_compress.data.sources.synthetic import Synthetic

# Busy machines miss deadlines; and every run tries the same examples, so none fails by chance.
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True)
hypothesis.settings.load_profile("steady")


@pytest.fixture(autouse=True)
def tiny_numbers() -> None:
    """Undoes what an earlier training has set for the process; hypothesis wants all numbers."""
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data, which is not part of the repository."""
    path = Path(__file__).parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no real data at {path}")
    return path


@pytest.fixture(scope="session")
def synthetic_dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    """20,000 generated rows: 4 categorical fields of 5 to 2,000 ids, 2 dense features."""
    source = Synthetic(rows=20_000, cardinalities=(5, 50, 300, 2000), dense=2)
    out = tmp_path_factory.mktemp("synthetic") / "dataset"
    return prepare(source, out, row_group_rows=1000, rows_per_file=6000)
