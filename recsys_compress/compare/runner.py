"""The runs of a study, each in a process of its own, and what they leave."""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from recsys_compress.compare.cells import Run, digest
from recsys_compress.compare.records import Record, words
from recsys_compress.compare.spec import Study
from recsys_compress.config import load_job
from recsys_compress.data.dataset import MANIFEST, PreparedDataset
from recsys_compress.data.prepare import prepare
from recsys_compress.data.sources import make_source
from recsys_compress.errors import UserError
from recsys_compress.train.dryrun import dry_run
from recsys_compress.train.folder import MODEL, SIZE, read_result

LIBRARIES = ("recsys-compress", "torch", "torchrec", "fbgemm-gpu-cpu")
# What a training process takes besides its model: libraries, and rows that are read ahead.
BASE_BYTES = 1_000_000_000
_OUT_OF_REACH = "out of reach"


class StoppedError(Exception):
    """The study was asked to stop."""


@dataclass(frozen=True, kw_only=True)
class Runner:
    """Runs what a study asks for.

    Attributes:
        study: the study.
        work: folder of prepared data, run folders and logs; what it holds is not run again.
        data: folder of raw data, where the study prepares its own.
        memory: bytes that all processes may take together.
        threads: of each training.
        parent: MLflow run in which the runs are nested; None for none.
    """

    study: Study
    work: Path
    data: Path | None
    memory: "Memory"
    threads: int
    parent: str | None = None
    _children: "set[subprocess.Popen[str]]" = field(default_factory=set)
    _stopped: threading.Event = field(default_factory=threading.Event)

    def prepare(self, seed: int) -> None:
        """Prepares a seed's data unless it is there.

        Raises:
            UserError: it cannot be prepared.
        """
        made, out = self.study.prepare, self._dataset(seed)
        if made is None or out is None or (out / MANIFEST).exists():
            return
        options = dict(made.options)
        if made.folder is not None:
            if self.data is None:
                raise UserError("compare: the study prepares raw data; name its folder by --data")
            options["path"] = str(self.data / made.folder)
        prepare(make_source(made.source, options), out, seed=seed, progress=True)

    def checksum(self, seed: int) -> str:
        """Returns that of a seed's data.

        Raises:
            UserError: it is not prepared.
        """
        path = self._dataset(seed) or Path(load_job(Path(self.study.job)).data.path)
        return PreparedDataset.open(path).checksum

    def remove(self, key: str, seed: int) -> None:
        """Removes what there is of a run."""
        shutil.rmtree(self._place(key, seed), ignore_errors=True)

    def measure(self, run: Run, seed: int) -> Record:
        """Returns the record of a run; a finished one is not run again, a started one goes on.

        A budget that the method cannot take is a record with that as its error.

        Raises:
            UserError: it fails, or needs more memory than there is.
            StoppedError: the study is to stop.
        """
        try:
            folder = self.trained(run, seed)
        except UserError as error:
            if _OUT_OF_REACH not in str(error):
                raise
            return Record(
                key=run.key, seed=seed, run=words(run), error=str(error), versions=versions()
            )
        return record_of(run, seed, folder)

    def trained(self, run: Run, seed: int) -> Path:
        """Returns the folder of a run, which is run, or gone on with, unless it has ended.

        Raises:
            UserError: it fails, or needs more memory than there is.
            StoppedError: the study is to stop.
        """
        return self.folder(run, seed) or self._run(run, seed)

    def folder(self, run: Run, seed: int) -> Path | None:
        """Returns the folder of a run that has ended, if it is here."""
        for folder in self._started(run, seed):
            if (folder / MODEL).exists() and not read_result(folder).get("interrupted", True):
                return folder
        return None

    def served(
        self, run: Run, seed: int, kinds: Sequence[str], base: Run | None
    ) -> dict[str, dict[str, float]]:
        """Returns what a run's model is like as it is served.

        Args:
            run: that has ended.
            seed: of it.
            kinds: storage types, by which AUC and bytes are returned.
            base: a run against whose inference its own is timed; None for none.

        Raises:
            UserError: it fails, or needs more memory than there is.
            StoppedError: the study is to stop.
        """
        folder = self.trained(run, seed)
        arguments = ["-m", "recsys_compress.compare.served", str(folder), "--storage", *kinds]
        arguments += [] if base is None else ["--against", str(self.trained(base, seed))]
        sizes = [self._estimate(r, seed, "parameters") for r in (run, base) if r is not None]
        # Both models, and of one what is stored of it.
        with self.memory.taken(BASE_BYTES + sum(sizes) + max(sizes)):
            return self._call(arguments, f"{folder.name}-served")

    def stop(self) -> None:
        """Asks all processes to leave a checkpoint and end, and waits for them."""
        self._stopped.set()
        self.memory.give_up()
        for child in list(self._children):
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(signal.SIGINT)
        for child in list(self._children):
            child.wait()

    def _run(self, run: Run, seed: int) -> Path:
        place = self._place(run.key, seed)
        resumed = [folder for folder in self._started(run, seed) if _has_checkpoint(folder)]
        if resumed:
            calls = [["train", "--resume", str(resumed[0])]]
        else:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            own = [f"train.output={place}", f"train.threads={self.threads}"]
            own += [f"tracking.parent={self.parent}"] if self.parent else []
            dataset = self._dataset(seed)
            own += [f"data.path={dataset}"] if dataset is not None and run.after is None else []
            trained = None if run.after is None else self.folder(run.after, seed)
            if run.after is not None and trained is None:
                raise UserError("the training of the model that it begins with has failed")
            plan = str(place / "plan.toml")
            calls = run.arguments(seed, *own, folder=str(trained), plan=plan)
        with self.memory.taken(BASE_BYTES + self._estimate(run, seed, "total")):
            for call in calls:
                found = self._call(["-m", "recsys_compress", *call, "--json"], place.name)
        return Path(found["folder"])

    def _call(self, arguments: list[str], name: str) -> dict[str, Any]:
        """Runs Python in a process of its own; returns the JSON object that it prints last."""
        if self._stopped.is_set():
            raise StoppedError
        log = self.work / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        # In a session of its own: Ctrl-C reaches it through `stop` alone, and once.
        with log.open("w", encoding="utf-8") as errors:
            child = subprocess.Popen(
                [sys.executable, *arguments],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        self._children.add(child)
        try:
            printed, _ = child.communicate()
        finally:
            self._children.discard(child)
        if self._stopped.is_set():
            raise StoppedError
        if child.returncode < 0:
            number = signal.Signals(-child.returncode).name
            raise UserError(f"was ended by {number}, as where memory is short (see {log})")
        if child.returncode:
            said = log.read_text(encoding="utf-8").strip().splitlines() or [f"see {log}"]
            error = said[-1].removeprefix("error: ")
            raise UserError(error if child.returncode == 2 else f"{error} (see {log})")
        found: dict[str, Any] = json.loads(printed.splitlines()[-1])
        return found

    def _estimate(self, run: Run, seed: int, part: Literal["parameters", "total"]) -> int:
        """Returns bytes that a run takes, as far as a dry run tells: of its largest phase."""
        if run.after is not None:
            return self._estimate(run.after, seed, part)  # the first does not train meanwhile
        dataset = self._dataset(seed)
        place = [] if dataset is None else [f"data.path={dataset}"]
        try:
            found = dry_run(load_job(Path(run.job), [*run.settings, *place]), 1).fullest
        except UserError as error:
            if _OUT_OF_REACH not in str(error):
                raise
            return 0  # whether it is, the training says, and at once
        return found.total if part == "total" else found.parameters

    def _started(self, run: Run, seed: int) -> list[Path]:
        place = self._place(run.key, seed)
        return sorted(path.parent for path in place.glob("*/job.toml"))

    def _place(self, key: str, seed: int) -> Path:
        return self.work / "runs" / f"{key}-s{seed}"

    def _dataset(self, seed: int) -> Path | None:
        made = self.study.prepare
        if made is None:
            return None
        return self.work / "data" / f"{digest(made.identity)}-s{seed if made.each_seed else 0}"


class Memory:
    """Lets runs begin as far as they fit together.

    Args:
        total: bytes.
    """

    def __init__(self, total: int) -> None:
        self._total = self._free = total
        self._changed = threading.Condition()
        self._given_up = False

    @contextlib.contextmanager
    def taken(self, size: int) -> Iterator[None]:
        """Waits for so many bytes, and holds them.

        Raises:
            UserError: there are not so many in all.
            StoppedError: the study is to stop.
        """
        if size > self._total:
            raise UserError(
                f"needs about {size:,} bytes, all runs together may take {self._total:,}; "
                "give more by --memory"
            )
        with self._changed:
            self._changed.wait_for(lambda: self._given_up or self._free >= size)
            if self._given_up:
                raise StoppedError
            self._free -= size
        try:
            yield
        finally:
            with self._changed:
                self._free += size
                self._changed.notify_all()

    def give_up(self) -> None:
        """Lets no run begin any more."""
        with self._changed:
            self._given_up = True
            self._changed.notify_all()


def record_of(run: Run, seed: int, folder: Path) -> Record:
    """Returns the record of a run that has ended."""
    size = json.loads((folder / SIZE).read_text(encoding="utf-8"))
    return Record.of(run, seed, read_result(folder), _tables(size), versions())


def versions() -> str:
    """Returns the versions that figures hang on."""
    return ", ".join(f"{name} {metadata.version(name)}" for name in LIBRARIES)


def _tables(size: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Returns what is stored, and its bytes, from a run's size report."""
    found = [
        (
            f"{', '.join(t['members'])}: {t['num_embeddings']:,} x {t['used_dim']}",
            t["parameter_bytes"],
        )
        for t in size["physical"]
    ]
    rest = {
        "projections": sum(part["parameter_bytes"] for part in size["combine"]),
        "index": sum(part["bytes"] for part in size["auxiliary"]),
    }
    return [*found, *((name, taken) for name, taken in rest.items() if taken)]


def _has_checkpoint(folder: Path) -> bool:
    return read_result(folder).get("interrupted", True) and any(folder.glob("checkpoints/*"))
