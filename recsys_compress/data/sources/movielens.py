"""MovieLens-1M (Harper and Konstan, TiiS 2015): who liked which film.

Ratings of 3 stars are dropped and 4 or 5 are the positive label, as in the papers of DCN-V2 and
Unified Embedding.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from recsys_compress.data.columns import id_lists, ids
from recsys_compress.data.inputs import IdInput, Inputs
from recsys_compress.data.sources.files import unreadable
from recsys_compress.data.sources.source import Chunk, RawField, RawSchema, Source
from recsys_compress.data.split import DEFAULT_FRACTIONS, Fractions
from recsys_compress.errors import UserError

_FIELDS = ("user_id", "movie_id", "gender", "age", "occupation", "zip")
_USER_FIELDS = ("gender", "age", "occupation", "zip")
_DAT_COLUMNS = {
    "ratings": ("user_id", "movie_id", "rating", "timestamp"),
    "users": ("user_id", "gender", "age", "occupation", "zip"),
    "movies": ("movie_id", "title", "genres"),
}
_STRINGS = ("gender", "zip", "title", "genres")


@dataclass(frozen=True, kw_only=True)
class MovieLens1M(Source):
    """MovieLens-1M.

    Attributes:
        path: folder with ratings, users and movies as `.parquet` or GroupLens's own `.dat`.
        genres: whether the film's genres are a multi-valued field.
        fractions: shares of the random split into train, valid and test.
    """

    name: ClassVar[str] = "movielens-1m"

    path: str
    genres: bool = False
    fractions: Fractions = DEFAULT_FRACTIONS

    def schema(self) -> RawSchema:
        """Returns the columns."""
        fields = [RawField(name=name) for name in _FIELDS]
        if self.genres:
            fields.append(RawField(name="genres", multi_valued=True, pooling="mean"))
        return RawSchema(label="label", categorical=tuple(fields))

    def inputs(self) -> Inputs:
        """Returns what a model needs of raw rows: ratings beside their users and films."""
        fields = [IdInput(name=name, column=name) for name in _FIELDS]
        if self.genres:
            genres = IdInput(name="genres", column="genres", multi_valued=True, separator="|")
            fields.append(genres)
        return Inputs(ids=tuple(fields))

    def random_fractions(self) -> Fractions:
        """Returns the shares of the random split, if it is one."""
        return self.fractions

    def chunks(self, rows: int) -> Iterator[Chunk]:
        """Yields all rows, at most `rows` at a time."""
        ratings = self._table("ratings", ["user_id", "movie_id", "rating"])
        users = self._table("users", ["user_id", *_USER_FIELDS])
        movies = self._table("movies", ["movie_id", "genres"]) if self.genres else None
        ratings = ratings.filter(pc.not_equal(ratings["rating"], 3))
        for first in range(0, ratings.num_rows, rows):
            yield Chunk(table=_join(ratings.slice(first, rows), users, movies), where=self.path)

    def _table(self, name: str, columns: list[str]) -> pa.Table:
        """Returns one of the three tables, ids as int64 or large_string."""
        folder = Path(self.path)
        path = folder / f"{name}.parquet"
        if not path.is_file() and not path.with_suffix(".dat").is_file():
            raise UserError(
                f"{folder}: has neither {name}.parquet nor {name}.dat; name a MovieLens-1M folder"
            )
        try:
            table = (
                pq.read_table(path, columns=columns)
                if path.is_file()
                else _read_dat(path.with_suffix(".dat"), _DAT_COLUMNS[name]).select(columns)
            )
        except (OSError, KeyError, pa.ArrowException) as error:
            raise unreadable(path if path.is_file() else path.with_suffix(".dat"), error) from error
        if table.num_columns < len(columns):
            missing = next(column for column in columns if column not in table.column_names)
            raise UserError(f"{path}: column {missing!r} is missing; name a MovieLens-1M folder")
        return pa.table({column: ids(table[column], column, str(path)) for column in columns})


def _join(ratings: pa.Table, users: pa.Table, movies: pa.Table | None) -> pa.Table:
    """Returns ratings beside what is known of their users and films, in the ratings' order."""
    columns = {
        "label": pc.cast(pc.greater_equal(ratings["rating"], 4), pa.int8()),
        "user_id": ratings["user_id"],
        "movie_id": ratings["movie_id"],
    }
    user = pc.index_in(ratings["user_id"], value_set=users["user_id"])
    columns |= {name: users[name].take(user) for name in _USER_FIELDS}
    if movies is not None:
        film = pc.index_in(ratings["movie_id"], value_set=movies["movie_id"])
        genres = pc.split_pattern(movies["genres"].take(film), "|")
        columns["genres"] = id_lists(genres, "genres", "movies")
    return pa.table(columns)


def _read_dat(path: Path, columns: tuple[str, ...]) -> pa.Table:
    """Reads GroupLens's format: Latin-1 lines of values between double colons."""
    lines = pa.csv.read_csv(
        path,
        read_options=pa.csv.ReadOptions(column_names=["line"], encoding="latin1"),
        parse_options=pa.csv.ParseOptions(delimiter="\x01", quote_char=False),
        convert_options=pa.csv.ConvertOptions(column_types={"line": pa.large_string()}),
    )["line"]
    parts = pc.split_pattern(lines, "::")
    values = {name: pc.list_element(parts, index) for index, name in enumerate(columns)}
    return pa.table(
        {
            name: column if name in _STRINGS else pc.cast(column, pa.int64())
            for name, column in values.items()
        }
    )
