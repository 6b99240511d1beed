"""Runs killed at random moments and resumed, over and over: `make soak`."""

import argparse
import itertools
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from recsys_compress.config import dump_job
from recsys_compress.data.prepare import prepare
from recsys_compress.data.sources.synthetic import Synthetic
from tests.distributed.processes import finish, start
from tests.train.jobs import make_job

_LOST = 60.0  # seconds after which all others must have said that one is gone


class Soak:
    """A run that is killed with SIGKILL again and again, and must end as one that never was.

    Args:
        job: file of the job; it is given a checkpoint at every step.
        folder: for the runs.
        size: processes of the run.
        seed: of the moments.
        background: whether checkpoints are written while training goes on.
    """

    def __init__(self, job: Path, folder: Path, *, size: int, seed: int, background: bool) -> None:
        self._background = background
        self._job = job
        self._folder = folder
        self._size = size
        self._random = random.Random(seed)  # noqa: S311

    def kill(self, times: int) -> int:
        """Kills so often; returns how often a checkpoint was being written at that moment.

        Raises:
            AssertionError: a survivor hung or said nothing, or the end is another one.
        """
        processes = self._begin("whole")
        begun = time.monotonic()
        self._check_end(processes)
        seconds = time.monotonic() - begun  # of training, which the moments are drawn from
        whole, kills, writing = self._run("whole"), 0, 0
        name = "killed-0"
        while kills < times:
            processes = self._begin(name)
            time.sleep(self._random.uniform(0, seconds / 2))
            if all(p.poll() is not None for p in processes):  # it has ended: begin anew
                self._check_end(processes)
                self._compare(self._run(name), whole)
                name = f"killed-{kills}"
                continue
            victims = self._random.choice([processes, [self._random.choice(processes)]])
            writing += any(self._run(name).glob("checkpoints/.step-*"))
            for victim in victims:
                victim.kill()
            kills += 1
            self._check_survivors(processes, victims)
            print(f"kill {kills}: {len(victims)} of {self._size} processes", file=sys.stderr)
        self._check_end(self._start(name))
        self._compare(self._run(name), whole)
        return writing

    def _check_survivors(
        self, processes: list["subprocess.Popen[str]"], victims: list["subprocess.Popen[str]"]
    ) -> None:
        for process, done in zip(processes, finish(processes, _LOST), strict=True):
            if process not in victims and done.status != 0:  # it may just have ended
                assert done.status == 2, f"status {done.status}: {done.err[-2000:]}"
                (line,) = [x for x in done.err.splitlines() if x.startswith("error: ")]
                assert "Traceback" not in done.err
                assert "--resume" in line or "process" in line

    def _start(self, name: str) -> list["subprocess.Popen[str]"]:
        """Starts a run, or goes on with it where it has begun."""
        command = ["-m", "recsys_compress", "train"]
        if self._checkpoints(name):
            return start([*command, "--resume", str(self._run(name))], self._size)
        settings = {
            "train.output": self._folder / name,
            "train.checkpoint_steps": 1,
            "train.background_checkpoints": str(self._background).lower(),
            "tracking.uri": f"sqlite:///{self._folder}/mlflow.db",
        }
        words = [word for k, v in settings.items() for word in ("--set", f"{k}={v}")]
        return start([*command, str(self._job), *words], self._size)

    def _begin(self, name: str) -> list["subprocess.Popen[str]"]:
        """Starts a run or goes on with it, and waits until it has written a checkpoint."""
        processes, known = self._start(name), self._checkpoints(name)
        while self._checkpoints(name) == known and any(p.poll() is None for p in processes):
            time.sleep(0.01)
        return processes

    def _check_end(self, processes: list["subprocess.Popen[str]"]) -> None:
        for done in finish(processes):
            assert done.status == 0, done.err[-2000:]

    def _run(self, name: str) -> Path:
        """Returns the folder of the run that has got farthest."""
        runs = sorted((self._folder / name).glob("dcnv2-*"), key=lambda path: path.stat().st_mtime)
        begun = [run for run in runs if any(run.glob("checkpoints/step-*"))]
        return (begun or runs or [self._folder / name])[-1]

    def _checkpoints(self, name: str) -> set[str]:
        return {path.name for path in self._run(name).glob("checkpoints/step-*")}

    def _compare(self, found: Path, whole: Path) -> None:
        """Checks that the weights are those of the whole run: to the bit in one process."""
        expected, actual = (load_file(run / "model.safetensors") for run in (whole, found))
        most = 0.0 if self._size == 1 else 1e-6
        for name, weight in expected.items():
            torch.testing.assert_close(actual[name], weight, rtol=0, atol=most)


def main() -> None:
    """Kills runs of one process and of two, of a method whose state is the most intricate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = Synthetic(rows=20_000, cardinalities=(5, 50, 300, 2000), dense=2)
        dataset = prepare(source, folder / "data", row_group_rows=1000)
        job = make_job(dataset, folder / "runs", "dynamic_sparse", batch_size=250, epochs=3)
        (folder / "job.toml").write_text(dump_job(job), encoding="utf-8")
        for size, background in itertools.product((1, 2), (False, True)):
            soak = Soak(
                folder / "job.toml",
                folder / f"{size}-{background}",
                size=size,
                seed=options.seed,
                background=background,
            )
            writing = soak.kill(options.kills)
            print(
                f"{size} process(es), checkpoints in the {'back' if background else 'fore'}ground: "
                f"{options.kills} kills, {writing} while a checkpoint was being written; the "
                "resumed run ends with the weights of an undisturbed one"
            )


if __name__ == "__main__":
    main()
