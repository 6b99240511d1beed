"""The vectors of a field's ids: for retrieval, and how far they move from version to version."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from recsys_compress.compress.reads import all_vectors
from recsys_compress.data.encode import VocabularyEncoder
from recsys_compress.data.schema import NUM_RESERVED_IDS
from recsys_compress.errors import UserError, nearest
from recsys_compress.files import atomic_file
from recsys_compress.serve.predictor import Predictor

Floats = npt.NDArray[np.float32]

NEIGHBOURS = 10
_SAMPLED = 500  # ids whose neighbours are compared
_CANDIDATES = 20_000  # most frequent ids among which neighbours are looked for


@dataclass(frozen=True, kw_only=True)
class Movement:
    """How a field's vectors moved from one version to the next, as they are, not aligned.

    Attributes:
        ids: raw values that both versions know.
        cosine_distance: mean of 1 - cos between old and new vector; None where widths differ.
        neighbours_changed: mean share of an id's ten nearest neighbours (by cosine) that are
            others now.
    """

    ids: int
    cosine_distance: float | None
    neighbours_changed: float


def write_vectors(predictor: Predictor, field: str, path: Path) -> int:
    """Writes the vector of each known value of a field as Parquet: columns `id` and `vector`.

    Values come by falling frequency in training; missing and unknown values have no row.

    Args:
        predictor: the model.
        field: a categorical field with a vocabulary.
        path: the file to write.

    Returns:
        The number of rows.

    Raises:
        UserError: there is no such field, its values are hashed, or `path` cannot be written.
    """
    fields = {f.name for f in predictor.artifact.schema.categorical}
    if field not in fields:
        raise UserError(
            f"field {field!r}: the model has none of that name; {nearest(field, fields)}"
        )
    found = _vectors(predictor, field)
    if found is None:
        raise UserError(
            f"field {field!r}: is hashed, so its values are not known; prepare the data with "
            "--encoding vocabulary"
        )
    values, vectors = found
    rows = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    with atomic_file(path) as temporary:
        pq.write_table(pa.table({"id": values, "vector": rows}), temporary)
    return len(values)


def movement(before: Predictor, after: Predictor, field: str) -> Movement | None:
    """Returns how a field's vectors moved; None where its values are not known, or none is shared.

    Args:
        before: the older version.
        after: the newer one.
        field: a categorical field of `after`.
    """
    if field not in before.encoders:
        return None
    old, new = _vectors(before, field), _vectors(after, field)
    if old is None or new is None or old[0].type != new[0].type:
        return None
    place = before.encoders[field].encode(new[0]) - NUM_RESERVED_IDS
    known = np.flatnonzero(place >= 0)[:_CANDIDATES]
    if not len(known):
        return None
    first, second = _unit(old[1][place[known]]), _unit(new[1][known])
    same_width = first.shape[1] == second.shape[1]
    distance = float(np.mean(1 - np.sum(first * second, axis=1))) if same_width else None
    sample = np.unique(np.linspace(0, len(known) - 1, _SAMPLED).astype(np.int64))
    near = [_nearest(vectors, sample) for vectors in (first, second)]
    kept = [len(np.intersect1d(*pair)) for pair in zip(*near, strict=True)]
    changed = 1 - float(np.mean(kept)) / near[0].shape[1] if near[0].shape[1] else 0.0
    return Movement(ids=len(known), cosine_distance=distance, neighbours_changed=changed)


def _vectors(predictor: Predictor, field: str) -> tuple[pa.Array, Floats] | None:
    """Returns the values of a field and their (n, D) vectors; None where it is hashed."""
    encoder = predictor.encoders[field]
    if not isinstance(encoder, VocabularyEncoder):
        return None
    vectors = all_vectors(predictor.embeddings, field)
    return encoder.values, vectors[NUM_RESERVED_IDS:].numpy()


def _unit(vectors: Floats) -> Floats:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: Floats = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
    return unit


def _nearest(vectors: Floats, sample: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Returns (S, at most 10) the positions nearest to each of S sampled ones, itself left out."""
    likeness = vectors[sample] @ vectors.T
    likeness[np.arange(len(sample)), sample] = -np.inf
    count = min(NEIGHBOURS, len(vectors) - 1)
    order = np.argpartition(-likeness, max(count - 1, 0), axis=1)[:, :count]
    return order.astype(np.int64)
