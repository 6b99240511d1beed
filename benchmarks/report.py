"""Figures to tables, claims, a Markdown page and a plot."""

import itertools
import json
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path

from benchmarks.case import Case, Figures, Shape
from recsys_compress.files import atomic_file, write_text

GROUPS = ("embedding", "step", "reading", "ranks", "memory")
LIBRARIES = ("torch", "torchrec", "fbgemm-gpu-cpu", "numpy", "pyarrow")
LABELS = {
    "stock": "TorchRec, 26 tables",
    "torch": "nn.EmbeddingBag(sparse), Adagrad",
    "full": "ours, full",
    "hash": "ours, hash at 1/10 of the bytes",
    "double_hash": "ours, double_hash at 1/10",
    "quotient_remainder": "ours, quotient_remainder at 1/10",
    "unified": "ours, unified, 2 probes, at 1/10",
    "mixed_dim": "ours, mixed_dim at 1/4",
    "low_rank": "ours, low_rank at 1/4",
    "group_reduce": "ours, group_reduce at 1/10",
    "dynamic_sparse": "ours, dynamic_sparse at 1/10",
    "dnis": "ours, dnis at 1/10, after the search",
    "dnis search": "ours, dnis while it searches",
    "reader": "reading alone",
    "train": "training DCN-V2",
}


@dataclass(frozen=True, kw_only=True)
class Results:
    """All figures so far.

    Attributes:
        shape: the workload.
        machine: what it ran on, by group.
        runs: figures of each repeat, by "group/name/tuned".
    """

    shape: Shape
    machine: dict[str, str] = field(default_factory=dict)
    runs: dict[str, list[Figures]] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path, shape: Shape) -> "Results":
        """Returns what `write` left in `folder`, or nothing where the workload was another."""
        try:
            raw = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return cls(shape=shape)
        found = cls(**{**raw, "shape": Shape(**raw["shape"])})
        return found if found.shape == shape else cls(shape=shape)

    def without(self, groups: Sequence[str]) -> "Results":
        """Returns the results of other groups."""
        machine = {group: text for group, text in self.machine.items() if group not in groups}
        runs = {key: runs for key, runs in self.runs.items() if key.split("/")[0] not in groups}
        return replace(self, machine=machine, runs=runs)

    def add(self, case: Case, figures: Figures) -> None:
        """Adds one repeat of a case."""
        self.machine[case.group] = machine()
        key = f"{case.group}/{case.name}/{'tuned' if case.tuned else 'as is'}"
        self.runs.setdefault(key, []).append(figures)

    def keys(self, group: str) -> list[str]:
        """Returns the keys of a group's cases."""
        return [key for key in self.runs if key.startswith(f"{group}/")]

    def median(self, key: str, figure: str) -> float:
        """Returns the median of a figure over the repeats."""
        return statistics.median(run[figure] for run in self.runs[key])

    def range(self, key: str, figure: str) -> tuple[float, float]:
        """Returns the least and the greatest of a figure over the repeats."""
        values = [run[figure] for run in self.runs[key]]
        return min(values), max(values)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Something that a figure must show."""

    text: str
    least: float
    found: float

    @property
    def holds(self) -> bool:
        """Whether it does."""
        return self.found >= self.least


def machine() -> str:
    """Returns processor, memory and system in a line."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        pass
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()}"


def claims(results: Results) -> list[Claim]:
    """Returns the claims for which there are figures."""
    found: list[Claim] = []

    def speed(text: str, least: float, key: str, base: str, figure: str) -> None:
        if key in results.runs and base in results.runs:
            ratio = results.median(key, figure) / results.median(base, figure)
            found.append(Claim(text=text, least=least, found=ratio))

    ours, uniform = "embedding/full/tuned", "uniform/cpu"
    speed("full tables against stock TorchRec", 3.5, ours, "embedding/stock/as is", uniform)
    speed("full tables against nn.EmbeddingBag", 3.0, ours, "embedding/torch/as is", uniform)
    speed("reading against training", 10.0, "reading/reader/tuned", "reading/train/tuned", "cpu")
    for key in results.keys("embedding"):
        name = key.split("/")[1]
        if name not in ("stock", "torch", "full"):
            least = 0.33 if name.endswith("search") else 0.5
            speed(f"{name} against full tables", least, key, ours, uniform)
    by_budget = [key for key in results.keys("memory") if key.split("/")[1].startswith(_SHRINKING)]
    steps = list(itertools.pairwise(by_budget))
    if steps:
        saved = min(
            (results.median(more, "rss") - results.median(less, "rss"))
            / (_table_bytes(results, more) - _table_bytes(results, less))
            for more, less in steps
        )
        text = "resident memory saved by a smaller budget, per byte of tables"
        found.append(Claim(text=text, least=0.8, found=saved))
    for key in results.keys("memory"):
        name = key.split("/")[1]
        if name.endswith(" 0.1x"):
            whole, part = (results.median(k, "rss") - _base(results) for k in (_FULL, key))
            text = f"{name}: resident memory that is the tables', full against it"
            found.append(Claim(text=text, least=4.0, found=whole / part))
    return found


_FULL = "memory/full/tuned"
_SHRINKING = ("full", "unified")


def _base(results: Results) -> float:
    """Returns the peak resident memory that the trainer has whatever its tables take."""
    return results.median(_FULL, "rss") - _table_bytes(results, _FULL)


def _table_bytes(results: Results, key: str) -> float:
    """Returns the bytes of a memory case's tables and their optimizer state."""
    return results.median(key, "tables") + results.median(key, "optimizer")


def write(results: Results, out: Path) -> str:
    """Writes figures, page and plot to the folder `out`; returns the page."""
    from benchmarks.plot import draw

    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "figures.json", json.dumps(asdict(results), indent=1) + "\n")
    with atomic_file(out / "benchmarks.png") as path:
        draw(results, path)
    page = render(results)
    write_text(out / "README.md", page)
    return page


def render(results: Results) -> str:
    """Returns the Markdown page."""
    sections: dict[str, Callable[[Results], list[str]]] = {
        "embedding": _embedding,
        "step": _step,
        "reading": _reading,
        "ranks": _ranks,
        "memory": _memory,
    }
    shape = results.shape
    lines = [
        "# Benchmarks",
        "",
        "`make bench` measures what this page shows (`python -m benchmarks.run --help` for parts of"
        " it). Every case runs in processes of its own, in turn with the others; figures are"
        " medians over them, with least and greatest.",
        "",
        f"Workload: {shape.features} categorical features of one id each, {shape.rows:,} rows in"
        f" all, width {shape.dim}, {shape.dense} dense features, batch {shape.batch:,}, fp32,"
        " row-wise Adagrad inside the backward pass.",
        "Versions: " + ", ".join(f"{name} {_version(name)}" for name in LIBRARIES) + ".",
        *(f"Machine: {text}." for text in dict.fromkeys(results.machine.values())),
        "",
        "| claim | at least | found | |",
        "|---|---:|---:|---|",
    ]
    for claim in claims(results):
        mark = "holds" if claim.holds else "DOES NOT HOLD"
        lines.append(f"| {claim.text} | {claim.least:g}x | {claim.found:.2f}x | {mark} |")
    lines += ["", "![all groups](benchmarks.png)", ""]
    for group, section in sections.items():
        if results.keys(group):
            lines += [*section(results), ""]
    return "\n".join(lines).rstrip() + "\n"


def label(key: str) -> str:
    """Returns how a case is called in tables."""
    group, name, tuned = key.split("/")
    plain = LABELS.get(name, name)
    if group == "ranks":
        processes, _, rows = name.split()
        plain = f"{processes} process{'es' if processes != '1' else ''}, {int(rows):,} rows"
    return f"{plain} ({tuned})" if name in ("stock", "torch") or tuned != "tuned" else plain


def _embedding(results: Results) -> list[str]:
    columns = ("uniform/cpu", "uniform/wall", "uniform/wall_all", "zipf/cpu", "zipf/wall_all")
    titles = [
        "uniform ids, CPU time",
        "wall, 1 thread",
        "wall, all threads",
        "Zipf ids, CPU time",
        "wall, all threads",
    ]
    return [
        "## Embedding look-up, backward and update",
        "",
        "Thousand samples per second. CPU time is of one thread and the figure to compare on a"
        " machine that does other work too; x is against stock TorchRec as it is. Ours includes"
        " the id transform and its check of every id. TorchRec runs under"
        " `DistributedModelParallel`, a table for each feature, table-wise. Tuned: the process"
        " starts with the settings of `recsys_compress/runtime.py` (huge pages for tensors, freed"
        " memory kept), which the command line always has. Zipf exponent 1.1.",
        "",
        *_table(results, "embedding", columns, titles, base="embedding/stock/as is"),
    ]


def _step(results: Results) -> list[str]:
    from benchmarks.step import STAGES

    keys = results.keys("step")
    rows = []
    for stage in STAGES:
        spent = [results.median(key, stage) for key in keys]
        rows.append([stage, *(f"{value:.1f}" for value in spent)])
    totals = [sum(results.median(key, stage) for stage in STAGES) for key in keys]
    tables = [
        sum(results.median(key, s) for s in ("ids", "look-up", "tables backward")) for key in keys
    ]
    shares = zip(tables, totals, strict=True)
    rows += [
        ["**all**", *(f"**{total:.1f}**" for total in totals)],
        ["tables' share", *(f"{part / total:.0%}" for part, total in shares)],
        ["samples/s, CPU", *(f"{results.median(key, 'cpu'):,.0f}" for key in keys)],
        ["samples/s, wall, all threads", *(f"{results.median(k, 'wall_all'):,.0f}" for k in keys)],
    ]
    return [
        "## The training step of DCN-V2",
        "",
        "CPU milliseconds of one thread by stage: three full-rank cross layers beside a deep part"
        " of 256 and 128, Adam for all but the tables.",
        "",
        *markdown(["stage", *(label(key) for key in keys)], rows),
    ]


def _reading(results: Results) -> list[str]:
    return [
        "## Reading",
        "",
        f"Thousand rows per second of a prepared dataset of {results.shape.examples:,} rows,"
        " shuffled; training on batches that are in memory already.",
        "",
        *_table(
            results,
            "reading",
            ("cpu", "wall"),
            ("CPU time", "wall, all threads"),
            base="reading/train/tuned",
        ),
    ]


def _ranks(results: Results) -> list[str]:
    from benchmarks.ranks import STAGES

    keys = results.keys("ranks")
    busy = results.median(keys[0], "cpu") / results.median(keys[0], "wall")
    rows = []
    for stage in STAGES:
        figures = ((results.median(k, stage), results.median(k, f"{stage}/wall")) for k in keys)
        rows.append([stage, *(f"{cpu:.1f} / {wall:.1f}" for cpu, wall in figures)])
    for text, figure in (("samples/s of CPU time", "cpu"), ("samples/s, wall", "wall")):
        rates = [results.median(key, figure) for key in keys]
        rows.append([text, *(f"{rate:,.0f}" for rate in rates)])
        # Cases come in pairs, that of one process first.
        ratios = [rate / rates[i - i % 2] for i, rate in enumerate(rates)]
        rows.append(["against one process", *(f"{ratio:.2f}x" for ratio in ratios)])
    return [
        "## Two processes on this machine",
        "",
        "One step of DCN-V2 on the same global batch, full tables. Milliseconds of CPU time of all"
        " processes together / of wall time in each; one process has all cores as threads, each of"
        " two has half of them. Gloo moves the vectors through the loopback device. Two processes"
        " share the cores that one has alone, so they bring no computing power, only more work:"
        " CPU time is what shows it. Wall time also has the waiting for each other, and on a busy"
        " machine favours two processes, which get a greater share of its cores than one."
        f" Here a step of one process took {busy:.1f} times its CPU time (one thread on an idle"
        " machine: 1.0, two threads: less), so that wall figures "
        + ("are of a busy machine and no measure of speed." if busy > 1 else "can be compared."),
        "",
        *markdown(["stage", *(label(key) for key in keys)], rows),
    ]


def _memory(results: Results) -> list[str]:
    rows = [
        [key.split("/")[1], *(f"{results.median(key, name) / 1e6:,.0f}" for name in _MEMORY)]
        for key in results.keys("memory")
    ]
    return [
        "## Memory",
        "",
        f"Peak resident memory of the trainer, MB (10^6 bytes), for logical tables of about"
        f" {2 * results.shape.rows:,} ids at width {results.shape.dim}, all of which occur in the"
        " data, by method and budget. Rows of 4 values are the narrowest that the fused kernel"
        " has, so `mixed_dim` and `low_rank` cannot do with less than a quarter, which they have"
        " here. `dnis` drops dims of full tables that it has searched: what it trains then is"
        " small, the search is not.",
        "",
        *markdown(["tables", *_MEMORY.values()], rows),
    ]


_MEMORY = {
    "rss": "peak resident",
    "before": "of it libraries alone",
    "tables": "tables",
    "optimizer": "optimizer state",
}


def _table(
    results: Results, group: str, columns: Sequence[str], titles: Sequence[str], *, base: str
) -> list[str]:
    """Returns rates by case, in thousands, with range and ratio to the case `base`."""
    rows = []
    for key in results.keys(group):
        cells = []
        for column in columns:
            middle = results.median(key, column)
            low, high = results.range(key, column)
            ratio = (
                f", {middle / results.median(base, column):.2f}x" if base in results.runs else ""
            )
            cells.append(f"{middle / 1e3:,.1f} ({low / 1e3:,.1f}-{high / 1e3:,.1f}){ratio}")
        rows.append([label(key), *cells])
    return markdown(["", *titles], rows)


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a table, its first column to the left, all others to the right."""
    align = ["---", *("---:" for _ in titles[1:])]
    return [f"| {' | '.join(cells)} |" for cells in (titles, align, *rows)]


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "-"
