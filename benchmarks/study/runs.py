"""The runs of the study, each in a process of its own, and the result files that they leave."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.study.cells import MOVIELENS, Cell, by_name
from benchmarks.study.records import Record
from recsys_compress.files import to_json, write_text

ROOT = Path(__file__).parents[2]
SOURCES = {"movielens_1m": ("movielens-1m", "movielens-1m"), "frappe": ("frappe", "frappe")}
LIBRARIES = ("recsys-compress", "torch", "torchrec", "fbgemm-gpu-cpu")


class OutOfReachError(Exception):
    """The method cannot take the budget."""


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Runs cells and keeps what they print.

    Attributes:
        data: folder of the raw data sets.
        work: folder of prepared data sets, run folders and results.
    """

    data: Path
    work: Path

    def prepare(self, name: str, seed: int) -> None:
        """Prepares a data set unless it is there."""
        out = self._dataset(name, seed)
        if not out.exists():
            source, folder = SOURCES[name]
            path = str(self.data / folder)
            _run("prepare", source, "--from", path, "--out", str(out), "--seed", str(seed))

    def measure(self, cell: Cell, seed: int, *, again: bool = False) -> Record:
        """Returns the record of a cell's run, which is run unless its result is kept here.

        Args:
            cell: what to run.
            seed: of the split and the training.
            again: whether it is run anew in any case.
        """
        try:
            result = self._result(cell, seed, again=again)
        except OutOfReachError as error:
            return Record(run=cell.run, seed=seed, error=str(error), versions=_versions())
        return Record.of(cell, seed, result, _versions())

    def folder(self, cell: Cell, seed: int) -> Path:
        """Returns the run folder of a cell, which is run unless it is kept."""
        return Path(self._result(cell, seed)["folder"])

    def store(self, cell: Cell, record: Record, storage: Sequence[str]) -> Record:
        """Returns the record with the figures in storage types, as far as the run is still here."""
        kept = self._kept(cell, record.seed)
        if kept is not None:
            for kind in storage:
                if f"{kind}.auc" not in record.figures:
                    record = record.stored(kind, _store(Path(kept["folder"]), kind))
        return record

    def _result(self, cell: Cell, seed: int, *, again: bool = False) -> dict[str, Any]:
        kept = None if again else self._kept(cell, seed)
        if kept is not None:
            return kept
        if cell.of is None:
            result = self._train(cell, seed)
        else:
            trained = self._result(by_name(cell.of), seed)
            result = _compress(Path(trained["folder"]), cell)
            result["inference"] = _inference(Path(result["folder"]), Path(trained["folder"]))
        write_text(self._path(cell, seed), to_json({"run": cell.run, "result": result}))
        return result

    def _kept(self, cell: Cell, seed: int) -> dict[str, Any] | None:
        """Returns the result of an earlier run whose folder is still there."""
        path = self._path(cell, seed)
        kept: dict[str, Any] = (
            json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"run": None}
        )
        if kept["run"] != cell.run or not Path(kept["result"]["folder"]).exists():
            return None
        result: dict[str, Any] = kept["result"]
        return result

    def _path(self, cell: Cell, seed: int) -> Path:
        return self.work / "results" / f"{cell.name}-s{seed}.json"

    def _dataset(self, name: str, seed: int) -> Path:
        # Frappe comes with its splits; MovieLens is split at random by the seed.
        return self.work / f"{name}-s{seed if name == MOVIELENS else 0}"

    def _train(self, cell: Cell, seed: int) -> dict[str, Any]:
        settings = {
            "data.path": self._dataset(cell.data, seed),
            "embedding.method": cell.method,
            "train.seed": seed,
            "train.threads": 1,
            "train.output": self.work / "runs",
            "tracking.uri": f"sqlite:///{self.work / 'mlflow.db'}",
        } | dict(cell.settings)
        if cell.budget:
            settings["embedding.budget"] = cell.budget
        return _run("train", str(ROOT / "pipelines" / f"{cell.data}.toml"), *_sets(settings))


def _compress(folder: Path, cell: Cell) -> dict[str, Any]:
    """Compresses a trained model after training; the result is like that of a training."""
    budget = ["--budget", cell.budget] if cell.budget else []
    sets = _sets(dict(cell.settings))
    return _run("compress", str(folder), "--method", cell.method, *budget, *sets)


def _inference(folder: Path, before: Path) -> dict[str, Any]:
    """Times a model and the one that it comes from, in one process."""
    command = [sys.executable, "-m", "benchmarks.inference", str(folder), str(before)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _store(folder: Path, storage: str) -> dict[str, Any]:
    """Evaluates a trained model with its tables in a storage type."""
    return _run("compress", str(folder), "--storage", storage)


def _sets(settings: Mapping[str, Any]) -> list[str]:
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


def _run(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "recsys_compress", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 2 and "out of reach" in done.stderr:
        raise OutOfReachError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _versions() -> str:
    found = [f"{name} {metadata.version(name)}" for name in LIBRARIES]
    git = ["git", "rev-parse", "--short", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True, cwd=ROOT, check=False)
    commit = [f"commit {head.stdout.strip()}"] if head.returncode == 0 else []
    return ", ".join([*found, *commit])
