"""Prepared datasets for the cases that read: generated, in a folder of the caller's."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from benchmarks.case import Shape
from recsys_compress.data.dataset import MANIFEST, PreparedDataset, checksum
from recsys_compress.data.prepare import prepare
from recsys_compress.data.sources.synthetic import Synthetic
from recsys_compress.files import write_text

_TRAIN = 0.9  # shares of the rows
_FRACTIONS = (_TRAIN, 0.05, 0.05)
_ENDLESS = 2**40  # values to draw from, so that no two rows share one


def click_log(shape: Shape, folder: Path) -> Path:
    """Returns a dataset like Criteo's: fields of 4 to 100,000 ids, dense features."""
    cardinalities = np.geomspace(4, 100_000, shape.features).astype(int)
    source = Synthetic(
        rows=shape.examples,
        cardinalities=tuple(cardinalities.tolist()),
        dense=shape.dense,
        fractions=_FRACTIONS,
    )
    return prepare(source, folder / "click_log").path


def many_ids(shape: Shape, folder: Path) -> Path:
    """Returns a dataset whose vocabularies together hold twice `shape.rows` ids.

    Nearly every value occurs once, so the number of rows follows from the number of ids.
    """
    rows = round(2 * shape.rows / shape.features / _TRAIN)
    source = Synthetic(
        rows=rows, cardinalities=(_ENDLESS,) * shape.features, zipf=0.0, fractions=_FRACTIONS
    )
    return prepare(source, folder / "many_ids").path


def repeated(dataset: PreparedDataset, rows: int) -> PreparedDataset:
    """Makes a dataset of at least so many training rows, in place: its shards again and again.

    They are hard links, which take no room; to a reader they are files like any others.
    """
    train = dataset.manifest.splits["train"]
    files = []
    for copy in range(-(-rows // train.rows)):
        for info in train.files:
            path = f"train/{copy:04}-{Path(info.path).name}"
            os.link(dataset.path / info.path, dataset.path / path)
            files.append(replace(info, path=path))
    longer = replace(train, files=tuple(files), rows=sum(info.rows for info in files))
    splits = {**dataset.manifest.splits, "train": longer}
    manifest = replace(dataset.manifest, splits=splits)
    manifest = replace(manifest, checksum=checksum(manifest))
    write_text(dataset.path / MANIFEST, json.dumps(asdict(manifest), default=str))
    return PreparedDataset.open(dataset.path)
