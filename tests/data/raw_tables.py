"""Small raw data for the tests of this folder."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from recsys_compress.data.sources.tabular import Tabular

TOML = 'categorical = ["user"]\ndense = ["price"]\n[label]\ncolumn = "click"\n'


def columns(rows: int = 100) -> dict[str, list[object]]:
    """Raw columns that `TOML` describes."""
    return {
        "click": [row % 2 for row in range(rows)],
        "user": [row % 7 for row in range(rows)],
        "price": [row / 10 for row in range(rows)],
    }


def write(folder: Path, raw: dict[str, list[object]], name: str = "raw.parquet") -> Path:
    """Writes columns as Parquet."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(raw), folder / name)
    return folder / name


def tabular(folder: Path, path: Path, toml: str = TOML) -> Tabular:
    """A tabular source of `path`."""
    (folder / "schema.toml").write_text(toml)
    return Tabular(path=str(path), schema_file=str(folder / "schema.toml"))
