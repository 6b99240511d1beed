"""Every fault in raw data is one line that names file, column and value; nothing is written."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_tables import TOML, columns, tabular, write

from recsys_compress.data.prepare import prepare
from recsys_compress.data.sources import make_source
from recsys_compress.data.sources.source import Source
from recsys_compress.data.sources.synthetic import Synthetic
from recsys_compress.errors import UserError


def refused(source: Source, folder: Path, message: str) -> None:
    out = folder / "prepared"
    with pytest.raises(UserError, match=message) as raised:
        prepare(source, out)
    assert "\n" not in str(raised.value)
    assert not out.exists()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("click", 2, r"raw\.parquet: label 'click' is 2 in row 41; it must be 0 or 1"),
        ("click", None, r"raw\.parquet: label 'click' is None in row 41"),
        ("price", float("nan"), r"raw\.parquet: column 'price' is nan in row 41; it must be a fin"),
        ("price", float("inf"), r"raw\.parquet: column 'price' is inf in row 41"),
        ("price", 1e300, r"raw\.parquet: column 'price' is 1e\+300 in row 41"),
    ],
)
def test_bad_values(tmp_path: Path, column: str, value: object, message: str) -> None:
    raw = columns()
    raw[column][40] = value
    refused(tabular(tmp_path, write(tmp_path, raw)), tmp_path, message)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("click", ["yes"] * 100, "label 'click' is string; it must hold 0 and 1"),
        ("price", ["cheap"] * 100, "column 'price' is string; it must hold numbers"),
        ("user", [0.5] * 100, "column 'user' is double; ids must be integers or strings"),
        ("user", np.full(100, 2**64 - 1, dtype=np.uint64), "column 'user' does not fit 64 bits"),
        ("user", [[1]] * 100, "column 'user' holds lists; name it under multi_valued"),
    ],
)
def test_wrong_types(tmp_path: Path, column: str, values: list[object], message: str) -> None:
    source = tabular(tmp_path, write(tmp_path, columns() | {column: values}))
    refused(source, tmp_path, message)


def test_missing_column_names_the_nearest(tmp_path: Path) -> None:
    raw = columns()
    raw["prices"] = raw.pop("price")
    message = r"raw\.parquet: column 'price' is missing; did you mean 'prices'\?"
    refused(tabular(tmp_path, write(tmp_path, raw)), tmp_path, message)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".arrow"])
def test_empty_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"raw{suffix}"
    path.touch()
    refused(tabular(tmp_path, path), tmp_path, rf"raw\{suffix}: cannot be read: ")


def test_no_rows(tmp_path: Path) -> None:
    (tmp_path / "raw.csv").write_text("click,user,price\n")
    source = tabular(tmp_path, tmp_path / "raw.csv")
    refused(source, tmp_path, "split 'train' has no rows")


def test_truncated_parquet(tmp_path: Path) -> None:
    path = write(tmp_path, columns())
    path.write_bytes(path.read_bytes()[:-20])
    refused(tabular(tmp_path, path), tmp_path, r"raw\.parquet: cannot be read: ")


def test_damaged_parquet_page(tmp_path: Path) -> None:
    path = write(tmp_path, columns())
    data = bytearray(path.read_bytes())
    data[4:120] = bytes(116)
    path.write_bytes(data)
    refused(tabular(tmp_path, path), tmp_path, r"raw\.parquet: cannot be read: ")


def test_ids_of_mixed_types_in_one_csv(tmp_path: Path) -> None:
    """Types are guessed from the first 8 MiB; a string far below does not fit them."""
    path = tmp_path / "raw.csv"
    with open(path, "w") as file:
        file.write("click,user,price\n")
        file.writelines(f"{row % 2},{row},0.000000000000000000000001\n" for row in range(300_000))
        file.write("1,someone,0.5\n")
    message = r"raw\.csv: column 'user' is of mixed types: .*'someone'.*as text"
    refused(tabular(tmp_path, path), tmp_path, message)


def test_a_stray_word_among_the_integers_of_a_short_csv(tmp_path: Path) -> None:
    path = tmp_path / "raw.csv"
    rows = [f"{row % 2},{'someone' if row == 41 else row},0.5\n" for row in range(100)]
    path.write_text("".join(["click,user,price\n", *rows]))
    message = r"'user' is of mixed types: 'someone' in row 42 among integers; .*under text"
    refused(tabular(tmp_path, path), tmp_path, message)


def test_lists_have_no_text(tmp_path: Path) -> None:
    raw = columns() | {"user": [[row] for row in range(100)]}
    source = tabular(tmp_path, write(tmp_path, raw), f'text = ["user"]\n{TOML}')
    refused(source, tmp_path, r"column 'user' is list<.*>, which has no text")


def test_a_column_that_is_there_twice(tmp_path: Path) -> None:
    table = pa.table(columns())
    twice = table.append_column("user", table["user"])
    pq.write_table(twice, tmp_path / "raw.parquet")
    message = r"raw\.parquet: column 'user' is there 2 times"
    refused(tabular(tmp_path, tmp_path / "raw.parquet"), tmp_path, message)


def test_ids_of_mixed_types_in_two_files(tmp_path: Path) -> None:
    write(tmp_path / "raw", columns(), "a.parquet")
    write(tmp_path / "raw", columns() | {"user": ["x"] * 100}, "b.parquet")
    message = r"b\.parquet: column 'user' holds strings, but integers in .*a\.parquet"
    refused(tabular(tmp_path, tmp_path / "raw"), tmp_path, message)


@pytest.mark.parametrize("name", ["a.b", "a/b", "a#b", ""])
def test_names_that_cannot_be_features(tmp_path: Path, name: str) -> None:
    raw = columns()
    raw[name] = raw.pop("user")
    source = tabular(tmp_path, write(tmp_path, raw), TOML.replace("user", name))
    refused(source, tmp_path, f"column {re.escape(repr(name))} cannot name a feature")


def test_a_split_value_that_no_split_names(tmp_path: Path) -> None:
    toml = f'{TOML}[split]\ncolumn = "user"\ntrain = [0, 1, 2]\nvalid = [3]\ntest = [4, 5]\n'
    message = r"raw\.parquet: column 'user' is 6 in row 7, which no split names"
    refused(tabular(tmp_path, write(tmp_path, columns()), toml), tmp_path, message)


def test_a_split_without_rows(tmp_path: Path) -> None:
    toml = f'{TOML}[split]\ncolumn = "click"\ntrain = [0, 1]\nvalid = [7]\ntest = [8]\n'
    message = r"split 'valid' has no rows \(of 100\)"
    refused(tabular(tmp_path, write(tmp_path, columns()), toml), tmp_path, message)


def test_weights_that_do_not_fit_their_ids(tmp_path: Path) -> None:
    raw = columns() | {"tags": [[1, 2]] * 100, "w": [[0.5, 0.5]] * 60 + [[0.5]] * 40}
    toml = f'{TOML}[[multi_valued]]\ncolumn = "tags"\nweights = "w"\n'
    message = r"raw\.parquet: column 'w' has not one weight per id in row 61"
    refused(tabular(tmp_path, write(tmp_path, raw), toml), tmp_path, message)


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    raw = columns() | {"tags": [[1, 2]] * 100, "w": [[0.5, 0.5]] * 60 + [[0.5, None]] * 40}
    toml = f'{TOML}[[multi_valued]]\ncolumn = "tags"\nweights = "w"\n'
    message = r"raw\.parquet: column 'w' holds None in row 61; it must hold finite numbers"
    refused(tabular(tmp_path, write(tmp_path, raw), toml), tmp_path, message)


def test_negative_example_weight(tmp_path: Path) -> None:
    raw = columns() | {"w": [1.0] * 99 + [-0.5]}
    source = tabular(tmp_path, write(tmp_path, raw), f'weight = "w"\n{TOML}')
    refused(source, tmp_path, r"raw\.parquet: weight 'w' is -0\.5 in row 100; weights must not be")


def test_text_that_is_no_time(tmp_path: Path) -> None:
    raw = columns() | {"at": ["yesterday"] * 100}
    toml = f'{TOML}[[time]]\ncolumn = "at"\nparts = ["hour"]\n'
    refused(tabular(tmp_path, write(tmp_path, raw), toml), tmp_path, "column 'at' holds no times")


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("x", r"schema\.toml: is not valid TOML"),
        ("", r"schema\.toml: key 'label' is missing"),
        (TOML.replace("dense", "dence"), r"unknown key 'dence'; did you mean 'dense'"),
        (TOML.replace('"user"', "5"), r"schema\.toml: categorical\.0 = 5"),
        (TOML.replace("[label]", "[label]\nconstant = 1"), "give either column or constant"),
        (f'{TOML}positive = "about 4"', r'write it like ">=4"'),
        (f'{TOML}positive = ">=many"', r"cannot be compared with 'many'"),
        (f"{TOML}[split]\nfractions = [0.5, 0.5, 0.5]", "must be three positive numbers"),
        (f"{TOML}[split]\ntrain = [1]", "column, train, valid and test go together"),
        (
            f'{TOML}[[time]]\ncolumn = "at"\nparts = ["hour"]\nzone = "Mars"\n',
            r"schema\.toml: .*zone 'Mars' is not known; name one like Europe/Berlin",
        ),
        (f'{TOML}[[multi_valued]]\ncolumn = "x"\nseparator = ""\n', r"multi_valued\.0\.separator"),
        (f'text = ["price"]\n{TOML}', "'price' is not one of the categorical"),
        (TOML.replace('"user"', '"user", "price"'), "column 'price' is used twice"),
        (TOML.replace('"user"', ""), "no categorical column"),
    ],
)
def test_bad_schema_files(tmp_path: Path, toml: str, message: str) -> None:
    source = tabular(tmp_path, write(tmp_path, columns()), toml)
    refused(source, tmp_path, message)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("movielens", {}, "source 'movielens' is unknown; did you mean 'movielens-1m'"),
        ("synthetic", {"row": 5}, "unknown key 'row'; did you mean 'rows'"),
        ("synthetic", {"rows": "many"}, "source synthetic: rows = 'many'"),
        ("frappe", {}, "key 'path' is missing"),
    ],
)
def test_bad_options(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_source(name, options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("movielens-1m", "has neither ratings.parquet nor ratings.dat"),
        ("frappe", "has neither train.parquet nor train.csv"),
        ("criteo", "no data file there"),
    ],
)
def test_folders_that_hold_something_else(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "raw").mkdir()
    refused(make_source(name, {"path": str(tmp_path / "raw")}), tmp_path, message)


def test_criteo_lines_of_too_few_columns(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("1\t2\t3\n")
    source = make_source("criteo", {"path": str(tmp_path / "train.txt")})
    refused(source, tmp_path, r"train\.txt: cannot be read: .*Expected 40 columns, got 3")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"min_count": 0}, "min_count 0: must be at least 1"),
        ({"encoding": "hsh"}, "encoding 'hsh' is unknown; did you mean 'hash'"),
        ({"encoding": "hash", "min_count": 2}, "min_count 2: hash encoding keeps every value"),
    ],
)
def test_bad_settings(tmp_path: Path, setting: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare(Synthetic(rows=10), tmp_path / "out", **setting)  # type: ignore[arg-type]


def test_an_output_folder_in_use(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        prepare(Synthetic(rows=100), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
