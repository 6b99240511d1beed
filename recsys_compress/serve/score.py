"""Parquet rows to a Parquet file of scores: in constant memory, resumable, whole or absent.

Parts of a fixed number of rows are written beside the output as they are done. A run that is killed
goes on behind the last whole part; at the end the parts become one file, and go.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from recsys_compress.data.progress import RowProgress
from recsys_compress.data.sources.files import column_names, find_files, unreadable
from recsys_compress.errors import UserError, nearest
from recsys_compress.files import FullDiskError, alone, atomic_file, sha256, write_text
from recsys_compress.serve.artifact import MANIFEST
from recsys_compress.serve.predictor import BATCH_ROWS, Predictor
from recsys_compress.serve.rows import check_columns, check_once

PART_ROWS = 1 << 18
SCORE = "score"
_STATE = "state.json"


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What was scored.

    Attributes:
        output: the file.
        rows: all of them.
        resumed_rows: rows that an earlier, interrupted run had done.
    """

    output: Path
    rows: int
    resumed_rows: int

    def to_json(self) -> dict[str, object]:
        """Returns it as plain data."""
        return {**dataclasses.asdict(self), "output": str(self.output)}


def score(
    model: Path,
    rows: str,
    output: Path,
    *,
    keep: Sequence[str] = (),
    part_rows: int = PART_ROWS,
    progress: bool = False,
) -> Scored:
    """Writes the score of each row, in the order of the rows, to column `score` of `output`.

    Args:
        model: folder of an artifact.
        rows: Parquet file, folder or glob.
        output: Parquet file to write.
        keep: columns of the rows to write beside the scores.
        part_rows: rows of a part, and of a row group of the output.
        progress: whether progress is shown on stderr.

    Raises:
        UserError: the model or the rows cannot be read, or the output cannot be written; what is
            done is kept for the next run.
    """
    _check_output(output, rows)
    predictor = Predictor.load(model)
    keep = list(dict.fromkeys(keep))
    files = _files(rows, predictor, keep)
    schema = _schema(files, keep)
    state = {
        "model": sha256(model / MANIFEST),
        "keep": keep,
        "part_rows": part_rows,
        "rows": [[str(f.absolute()), f.stat().st_size, f.stat().st_mtime_ns] for f in files],
    }
    total = sum(pq.read_metadata(f).num_rows for f in files)
    parts = output.with_name(f".{output.name}.parts")
    done = 0
    try:
        with alone(parts):
            resumed = done = _resume(parts, state, part_rows, total)
            with RowProgress("scoring", shown=progress, total=total) as bar:
                bar.advance(done)
                for table in _scored(predictor, files, schema, done, part_rows):
                    with atomic_file(_part(parts, done // part_rows)) as temporary:
                        pq.write_table(table, temporary)
                    done += table.num_rows
                    bar.advance(table.num_rows)
            _join(parts, -(-total // part_rows), schema, output)
            shutil.rmtree(parts)
    except (OSError, FullDiskError) as error:
        cause = error.__cause__ if isinstance(error, FullDiskError) else error
        reason = getattr(cause, "strerror", None) or " ".join(str(cause).split())
        raise UserError(
            f"{output}: cannot be written ({reason}); {done:,} of {total:,} rows are done: make "
            "room and run the same command again"
        ) from error
    return Scored(output=output, rows=total, resumed_rows=resumed)


def _check_output(output: Path, rows: str) -> None:
    """Checks that the scores are a file, and none of the rows, now or when they are there.

    Raises:
        UserError: they are not.
    """
    if output.is_dir():
        raise UserError(f"{output}: is a folder; name a Parquet file")
    place, resolved = Path(rows), output.resolve()
    if place.is_dir():
        among = resolved.is_relative_to(place.resolve())
    else:
        among = resolved == place.resolve() or resolved.match(
            str(place.parent.resolve() / place.name)
        )
    if among:
        raise UserError(f"{output}: is among the rows to score ({rows}); name a file elsewhere")


def _files(rows: str, predictor: Predictor, keep: Sequence[str]) -> list[Path]:
    """Returns the files, all of which have the columns wanted."""
    files = find_files(rows, (".parquet",))
    for path in files:
        names = column_names(path)
        check_columns(names, predictor.artifact.inputs, str(path))
        for name in keep:
            if name not in names:
                raise UserError(f"{path}: column {name!r} is missing; {nearest(name, names)}")
            check_once(names, name, str(path))
            if name == SCORE:
                raise UserError(f"{path}: column {SCORE!r} cannot be kept beside the scores")
    return files


def _schema(files: Sequence[Path], keep: Sequence[str]) -> pa.Schema:
    """Returns that of the output: a column kept has a type that holds what all files have."""
    found = pa.schema([])
    for path in files:
        columns = pq.read_schema(path)
        own = pa.schema([pa.field(name, columns.field(name).type) for name in keep])
        try:
            found = pa.unify_schemas([found, own], promote_options="permissive")
        except pa.ArrowException as error:
            raise UserError(
                f"{path}: a column to keep is of another type than in the files before: "
                f"{' '.join(str(error).split())}; cast it"
            ) from error
    return found.append(pa.field(SCORE, pa.float32()))


def _resume(parts: Path, state: dict[str, object], part_rows: int, total: int) -> int:
    """Returns how many rows are done by a run of the same model and rows; else begins anew."""
    path = parts / _STATE
    if path.is_file() and path.read_text(encoding="utf-8") == json.dumps(state):
        done = 0
        while done < total and _part(parts, done // part_rows).is_file():
            done = min(done + part_rows, total)
        return done
    for old in parts.iterdir():
        old.unlink()
    write_text(path, json.dumps(state))
    return 0


def _scored(
    predictor: Predictor, files: Sequence[Path], schema: pa.Schema, skip: int, part_rows: int
) -> Iterator[pa.Table]:
    """Yields the scores of all rows but the first ones, a part at a time."""
    keep = schema.names[:-1]
    pending: list[pa.Table] = []
    size = 0
    for path in files:
        for table, row in _rows(path, [*predictor.artifact.inputs.columns(), *keep], skip):
            for first in range(0, table.num_rows, BATCH_ROWS):
                some = table.slice(first, BATCH_ROWS)
                scores = predictor.predict_table(some, str(path), row + first)
                scored = some.select(keep).append_column(SCORE, pa.array(scores))
                pending.append(scored.cast(schema))
                size += some.num_rows
                while size >= part_rows:
                    whole = pa.concat_tables(pending)
                    yield whole.slice(0, part_rows).combine_chunks()
                    pending, size = [whole.slice(part_rows)], size - part_rows
        skip = max(0, skip - pq.read_metadata(path).num_rows)
    if size:
        yield pa.concat_tables(pending).combine_chunks()


def _rows(path: Path, columns: Sequence[str], skip: int) -> Iterator[tuple[pa.Table, int]]:
    """Yields some columns of a file behind its first rows, with the number of each first row."""
    names = list(dict.fromkeys(columns))
    row = 0
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
        groups = range(file.metadata.num_row_groups)
        sizes = [file.metadata.row_group(group).num_rows for group in groups]
        first = 0
        while first < len(sizes) and row + sizes[first] <= skip:
            row += sizes[first]
            first += 1
        try:
            for batch in file.iter_batches(
                BATCH_ROWS, list(groups[first:]), names, use_threads=False
            ):
                table = pa.Table.from_batches([batch]).select(names)
                past = min(max(skip - row, 0), table.num_rows)
                if past < table.num_rows:
                    yield table.slice(past), row + past + 1
                row += table.num_rows
        except (OSError, pa.ArrowException) as error:
            raise unreadable(path, error) from error


def _join(parts: Path, count: int, schema: pa.Schema, output: Path) -> None:
    """Makes one file of the parts, a row group each."""
    with atomic_file(output) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for number in range(count):
            table = pq.read_table(_part(parts, number))
            writer.write_table(table.cast(schema), row_group_size=table.num_rows)


def _part(parts: Path, number: int) -> Path:
    return parts / f"{number:06}.parquet"
