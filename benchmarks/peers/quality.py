"""Whether FuxiCTR reaches its published quality here: `python -m benchmarks.peers.quality DATA`.

DATA holds train, valid and test.parquet of Frappe in the split of the benchmark BARS (Frappe_x1).
Settings are those of the benchmark's own logs; data loader, training loop, early stopping and
evaluation are FuxiCTR's. It runs in the environment of the peers, and prints JSON.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks.peers.fuxi import LABEL, CrossModel, feature_map

EPOCHS = 100
BATCH = 4096
SEEDS = (2021, 2022, 2023)  # the logs' own, and two more
DIM = 10
SETTINGS: dict[str, dict[str, Any]] = {
    "DCN-V2": {"cross_layers": 4, "dropout": 0.4},
    "DNN": {"cross_layers": 0, "dropout": 0.2},
}


def train(name: str, data: Path, seed: int) -> dict[str, float]:
    """Returns AUC and logloss on the test rows, and the seconds that training took."""
    from fuxictr.pytorch.dataloaders import RankDataLoader
    from fuxictr.pytorch.torch_utils import seed_everything

    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        features = feature_map(encode(data, folder), [], DIM, folder)
        (folder / features.dataset_id).mkdir()
        seed_everything(seed)
        model = CrossModel(
            features,
            dim=DIM,
            hidden=(400, 400, 400),
            batch_norm=True,
            embedding_regularizer=0.05,
            early_stop_patience=2,
            model_root=text,
            model_id=name,
            **SETTINGS[name],
        )
        paths = {f"{s}_data": str(folder / f"{s}.npz") for s in ("train", "valid", "test")}
        sets = RankDataLoader(features, batch_size=BATCH, num_workers=1, **paths)
        started = time.perf_counter()
        model.fit(sets[0], epochs=EPOCHS, validation_data=sets[1])
        seconds = time.perf_counter() - started
        return {**model.evaluate(sets[2]), "seconds": seconds}


def encode(data: Path, folder: Path) -> dict[str, int]:
    """Writes the splits as FuxiCTR reads them; returns the size of each field's vocabulary.

    Values that the training rows lack have an id of their own, 0.
    """
    tables = {split: pq.read_table(data / f"{split}.parquet") for split in _SPLITS}
    fields = [name for name in tables["train"].column_names if name != LABEL]
    known = {name: np.unique(tables["train"][name].to_numpy()) for name in fields}
    for split, table in tables.items():
        columns = {LABEL: table[LABEL].to_numpy().astype(np.float64)}
        for name, values in known.items():
            raw = table[name].to_numpy()
            place = np.searchsorted(values, raw).clip(max=len(values) - 1)
            columns[name] = np.where(values[place] == raw, place + 1, 0).astype(np.float64)
        np.savez(folder / f"{split}.npz", **columns)
    return {name: len(values) + 1 for name, values in known.items()}


_SPLITS = ("train", "valid", "test")


def main() -> None:
    """Trains what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.quality", description=__doc__)
    parser.add_argument("data", type=Path, help="folder of the three Parquet files")
    parser.add_argument("--only", choices=list(SETTINGS), help="one model instead of all")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = [options.only] if options.only else list(SETTINGS)
    found = {n: [train(n, options.data, seed) for seed in options.seeds] for n in names}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
