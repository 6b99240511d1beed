"""Constant memory: `python -m benchmarks.scale [--quick]`.

A billion ids a field are trained, and 100 million rows read; resident memory is looked at as they
go by. Each part runs in a process of its own. Figures go to a Markdown page and to a plot.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.case import ROOT, Case, Figures, Shape, run
from benchmarks.report import machine, markdown
from recsys_compress import runtime
from recsys_compress.files import atomic_file, write_text

PARTS = {
    "train": "training, unified, 1,000,000,000 ids a field in {rows:,} shared rows",
    "read": "reading a prepared dataset, shuffled",
}
IDS = 1_000_000_000
SAMPLES = 50
WARMUP = 0.1  # share of a part in which memory may grow
MOST = 1.1  # times the most of the warm-up that memory may reach after it
SHAPE = Shape(rows=1_000_000, batch=2048, steps=400, examples=100_000_000)
QUICK = Shape(features=4, rows=1000, dim=8, batch=64, dense=2, warmup=0, steps=20, examples=100_000)
_SHARES = (0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
_SHARD = 1 / 100  # of the rows that are read, generated and linked again and again


def measure(case: Case) -> Figures:
    """Returns resident bytes by examples, "all/EXAMPLES" and "own/EXAMPLES", and "seconds", "cpu".

    Own memory leaves out what files are mapped to, which the kernel takes back as it likes.
    """
    part = {"train": _train, "read": _read}[case.name]
    return _watched(part(case), case.shape.examples if case.name == "read" else None, case.shape)


def _train(case: Case) -> Iterator[int]:
    """Trains DCN-V2 on ids that are new in every batch; yields the examples of each step."""
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    from benchmarks.tables import CPU, OPTIONS, configs, names, quiet_process_group
    from recsys_compress.compress import CompressedEmbeddingBagCollection, Policy, Rule
    from recsys_compress.compress.methods.unified import Unified
    from recsys_compress.config import ModelConfig, TrainConfig
    from recsys_compress.models import build_model
    from recsys_compress.train.optim import Optimizers
    from recsys_compress.train.shard import shard

    shape = case.shape
    torch.manual_seed(0)
    with quiet_process_group():
        embeddings = CompressedEmbeddingBagCollection(
            tables=configs(dataclasses.replace(shape, rows=IDS * shape.features)),
            policy=Policy(default=Rule(method=Unified(num_embeddings=shape.rows), options=OPTIONS)),
            fused_device=torch.device("meta"),
        )
        model = shard(build_model(ModelConfig(), embeddings, shape.dense), embeddings, CPU)
        optimizers = Optimizers(model, embeddings, TrainConfig())
        count = shape.features * shape.batch
        for _ in range(shape.steps):
            features = KeyedJaggedTensor(
                keys=names(shape),
                values=torch.randint(IDS, (count,)),
                lengths=torch.ones(count, dtype=torch.int64),
                stride=shape.batch,
                length_per_key=[shape.batch] * shape.features,
            )
            optimizers.zero_grad()
            logits = model(torch.randn(shape.batch, shape.dense), features)
            labels = (torch.rand(shape.batch) < 0.3).float()
            binary_cross_entropy_with_logits(logits, labels).backward()
            optimizers.step()
            yield shape.batch


def _read(case: Case) -> Iterator[int]:
    """Reads an epoch; yields the examples of each batch."""
    from recsys_compress.data.dataset import PreparedDataset
    from recsys_compress.data.reader import Reader

    dataset = PreparedDataset.open(case.data)
    reader = Reader(dataset, "train", batch_size=case.shape.batch, shuffle=True)
    yield from map(len, reader.epoch(0))


def _watched(steps: Iterator[int], total: int | None, shape: Shape) -> Figures:
    every = max(1, (total or shape.batch * shape.steps) // SAMPLES)
    found: Figures = {}
    started, cpu, examples, due = time.perf_counter(), time.process_time(), 0, every
    for count in steps:
        examples += count
        if examples >= due:
            due += every
            lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
            status = dict(line.split(":", 1) for line in lines)
            for key, field in (("all", "VmRSS"), ("own", "RssAnon")):
                found[f"{key}/{examples}"] = int(status[field].split()[0]) * 1024
    found["seconds"] = time.perf_counter() - started
    found["cpu"] = time.process_time() - cpu
    found["examples"] = examples
    return found


@dataclass(frozen=True)
class Course:
    """Memory over the course of a part.

    Attributes:
        examples: at which it was looked at.
        memory: resident bytes, all or the process's own.
    """

    examples: list[int]
    memory: list[float]

    @classmethod
    def of(cls, figures: Figures, key: str) -> "Course":
        """Returns that of "all" memory or of the process's "own"."""
        found = {
            int(name.partition("/")[2]): value
            for name, value in figures.items()
            if name.startswith(f"{key}/")
        }
        return cls(list(found), list(found.values()))

    @property
    def first(self) -> float:
        """The most of the warm-up."""
        return max(self.memory[: self._warm])

    @property
    def last(self) -> float:
        """The most after it."""
        return max(self.memory[self._warm :])

    @property
    def _warm(self) -> int:
        return max(1, round(WARMUP * len(self.memory)))


def write(found: dict[str, Figures], shape: Shape, out: Path) -> str:
    """Writes figures, page and plot to the folder `out`; returns the page."""
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "scale.json", json.dumps({"machine": machine(), "parts": found}) + "\n")
    with atomic_file(out / "scale.png") as path:
        _draw(found, path)
    rows = []
    for name, figures in found.items():
        course = Course.of(figures, "own")
        rows.append(
            [
                name,
                f"{figures['examples']:,.0f}",
                f"{figures['examples'] / figures['cpu']:,.0f}",
                f"{figures['examples'] / figures['seconds']:,.0f}",
                f"{course.first / 1e6:,.0f}",
                f"{course.last / 1e6:,.0f}",
                f"{max(Course.of(figures, 'all').memory) / 1e6:,.0f}",
                "holds" if course.last <= MOST * course.first else "DOES NOT HOLD",
            ]
        )
    titles = [
        "",
        "examples",
        "a second of CPU time",
        "a second, wall",
        "own memory at most, first tenth, MB",
        "own memory at most, after it, MB",
        "with mapped files, MB",
        f"at most {MOST:g}x",
    ]
    descriptions = [f"* {k}: {text.format(rows=shape.rows)}." for k, text in PARTS.items()]
    page = [
        "# Constant memory",
        "",
        "`make bench-scale` measures what this page shows. Memory is what is resident, looked at"
        f" {SAMPLES} times; libraries are part of it.",
        "",
        *descriptions,
        "",
        f"Shape: {shape.features} fields of one id, width {shape.dim}, {shape.dense} dense"
        f" features, batch {shape.batch:,}; {machine()}. Ids to train on are drawn anew for every"
        " batch. What is read is one generated shard, hard-linked many times over: its pages are"
        " in the kernel's cache, so the speed of a disk is not in the figures.",
        "",
        *markdown(titles, rows),
        "",
        "Own memory in MB by the share of the examples that have gone by:",
        "",
        *markdown(
            ["", *(f"{share:.0%}" for share in _SHARES)],
            [[name, *_at_shares(Course.of(found[name], "own"))] for name in found],
        ),
        "",
        "![memory over examples](scale.png)",
    ]
    text = "\n".join(page) + "\n"
    write_text(out / "scale.md", text)
    return text


def _at_shares(course: Course) -> list[str]:
    last = len(course.memory) - 1
    return [f"{course.memory[round(share * last)] / 1e6:,.0f}" for share in _SHARES]


def _draw(found: dict[str, Figures], path: Path) -> None:
    from matplotlib.figure import Figure

    from recsys_compress.track.plots import COLOURS, GREY

    figure = Figure(figsize=(10, 3.5), dpi=120, layout="constrained")
    for axes, (name, figures) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
        for key, colour in (("all", GREY), ("own", COLOURS[0])):
            course = Course.of(figures, key)
            memory = [value / 1e6 for value in course.memory]
            label = "with mapped files" if key == "all" else "own"
            axes.plot([n / 1e6 for n in course.examples], memory, color=colour, label=label)
        axes.set(title=name, xlabel="million examples", ylabel="resident MB", ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path, format="png")


def main(arguments: list[str] | None = None) -> int:
    """Runs both parts; returns 1 if memory grows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rows, to try it out")
    parser.add_argument("--out", type=Path, help="folder of the page and the plot")
    options = parser.parse_args(arguments)
    out = options.out or ROOT / ("build/benchmarks" if options.quick else "docs/benchmarks")
    shape = QUICK if options.quick else SHAPE
    runtime.configure()
    from benchmarks import data

    execute: Callable[[Case], Figures] = measure if options.quick else run
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        few = dataclasses.replace(shape, examples=round(shape.examples * _SHARD))
        for name in PARTS:
            path = data.click_log(few, Path(folder)) if name == "read" else Path()
            if name == "read":
                data.repeated(data.PreparedDataset.open(path), shape.examples)
            found[name] = execute(
                Case(group="scale", name=name, tuned=True, shape=shape, data=str(path))
            )
            print(f"{name}: {found[name]['seconds']:,.0f} s", flush=True)
    print(write(found, shape, out))
    print(f"written to {out}")
    courses = [Course.of(figures, "own") for figures in found.values()]
    return 0 if options.quick or all(c.last <= MOST * c.first for c in courses) else 1


if __name__ == "__main__":
    sys.exit(main())
