"""Where the time of a step goes, and what is left to gain: `python -m benchmarks.profile`.

Each case runs in processes of its own, in turn with the others. With `--against FOLDER`, a checkout
of another state of this repository that has `benchmarks/hot_path.py` too, each also runs there.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.case import ROOT, Case, Figures, Shape, run
from benchmarks.report import machine, markdown
from benchmarks.run import QUICK, prepared
from recsys_compress import runtime
from recsys_compress.files import atomic_file, write_text
from recsys_compress.track.plots import COLOURS, GREY

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CASES = {
    "train full": "training, full",
    "train unified": "training, unified, 2 probes, at 1/10",
    "train dynamic_sparse": "training, dynamic_sparse at 1/10",
    "train dnis search": "training, dnis while it searches",
    "serve full fp32": "scoring, full, fp32",
    "serve full int8": "scoring, full, int8",
    "serve unified int8": "scoring, unified at 1/10, int8",
    "serve dynamic_sparse int8": "scoring, dynamic_sparse at 1/10, int8",
    "serve dnis int8": "scoring, dnis at 1/10, int8",
}
READING = "reading"
REPEATS = 2
# Of a parameter, its gradient and Adam's moments are read, all but the gradient written.
_ADAM_BYTES = 7 * 4
_HEADER = """# Profile of the hot path

`make bench-profile` measures what this page shows. CPU milliseconds of one thread for a batch of
{batch:,}: {features} features of one id each, {rows:,} rows in all, width {dim}, {dense} dense
features, DCN-V2 with three full-rank cross layers beside a deep part of 256 and 128. Training is
the trainer's own step; scoring begins with raw rows (an Arrow table), whose {features} vocabularies
hold all ids. Uniform ids, which is the worst case for caches. Medians over steps, of a method's
hook the mean.

The limit of a stage is what plain operations reach in the same process: copying (of the bytes that
a stage must read and write at least), reading random rows (of a table of the case's size and
width; an update reads and writes each row, and its optimizer state), and multiplying matrices.
It is no bound for a stage whose rows partly come twice, or lie in the cache.

Machine: {machine}.
"""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """All figures.

    Attributes:
        shape: the workload.
        machine: what it ran on.
        runs: figures of each repeat, by case; "before CASE" is that of the other state.
    """

    shape: Shape
    machine: str
    runs: dict[str, list[Figures]] = field(default_factory=dict)

    def median(self, name: str, figure: str) -> float:
        """Returns the median of a figure over the repeats; 0 where a case has none."""
        return statistics.median(figures.get(figure, 0.0) for figures in self.runs[name])

    def stages(self, name: str) -> dict[str, float]:
        """Returns milliseconds by stage, of those that take any."""
        from benchmarks.hot_path import OTHER, SERVING, TRAINING

        stages = (*(TRAINING if "train" in name else SERVING), OTHER)
        spent = {stage: self.median(name, stage) for stage in stages}
        if "train" in name:
            spent = {READING: self._reading()} | spent
        return {stage: value for stage, value in spent.items() if value >= 0.05}

    def total(self, name: str) -> float:
        """Returns the milliseconds of a batch."""
        return sum(self.stages(name).values())

    def limits(self, name: str) -> dict[str, tuple[float, float]]:
        """Returns by stage the least megabytes that it moves and milliseconds that it takes."""
        from benchmarks.hot_path import (
            BACKWARD,
            COMBINE,
            COMBINE_BACK,
            FORWARD,
            IDS,
            LOOK_UP,
            SEARCH,
            TABLES,
            UPDATE,
        )

        shape = self.shape
        get = {key: self.median(name, key) for key in self.runs[name][0]}
        rows, given = get["rows read"], 4 * get["values looked up"]
        row_ms, byte_ms, flop_ms = (1 / get[f"{w} per ms"] for w in ("rows", "bytes", "flops"))
        wanted = 4.0 * shape.batch * shape.features * shape.dim
        read = shape.batch * shape.features * 8
        example = shape.batch * (8 * shape.features + 4 * (shape.dense + 1))
        product = get["flops"] * flop_ms

        def streamed(size: float) -> tuple[float, float]:
            return size, size * byte_ms

        # Reading random rows includes writing them side by side.
        looked_up = (rows * get["row bytes"] + given, rows * row_ms)
        combined = streamed(given + wanted)
        if 5 * get[COMBINE] < combined[1]:  # nothing to combine: vectors are handed on uncopied
            combined = (0.0, 0.0)
        state = rows * (2 * get["row bytes"] + 8) + given
        found = {
            READING: streamed(2 * example),
            IDS: streamed(read + get["bytes of ids"]),
            LOOK_UP: looked_up,
            COMBINE: combined,
            FORWARD: (0.0, product),
            BACKWARD: (0.0, product * (1 if SEARCH in get else 2)),
            COMBINE_BACK: combined,
            TABLES: (state, 3 * rows * row_ms + given * byte_ms),
            UPDATE: streamed(get.get("dense parameters", 0.0) * _ADAM_BYTES),
            SEARCH: (
                looked_up[0] + 2 * combined[0] + read + get["bytes of ids"],
                looked_up[1] + 2 * combined[1] + 2 * product,
            ),
        }
        return {stage: (size / 1e6, spent) for stage, (size, spent) in found.items()}

    def _reading(self) -> float:
        return self.shape.batch / self.median(READING, "cpu") * 1e3


def measure(shape: Shape, repeats: int, against: Path | None) -> Profile:
    """Runs all cases in turn."""
    found = Profile(shape=shape, machine=machine())

    def take(name: str, case: Case, root: Path = ROOT) -> None:
        figures = run(case, root=root)
        found.runs.setdefault(name, []).append(figures)
        shown = "  ".join(f"{key} {value:,.4g}" for key, value in figures.items())
        print(f"{name}  {shown}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        data = prepared(READING, shape, Path(folder))
        for _ in range(repeats):
            take(READING, Case(group=READING, name="reader", tuned=True, shape=shape, data=data))
            for name in CASES:
                case = Case(group="hot_path", name=name, tuned=True, shape=shape)
                if against is not None:
                    take(f"before {name}", case, against)
                take(name, case)
    return found


def write(found: Profile, out: Path) -> str:
    """Writes figures, page and plot to the folder `out`; returns the page."""
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "profile.json", json.dumps(dataclasses.asdict(found), indent=1) + "\n")
    with atomic_file(out / "profile.png") as path:
        _draw(found, path)
    page = render(found)
    write_text(out / "profile.md", page)
    return page


def render(found: Profile) -> str:
    """Returns the Markdown page."""
    lines = [
        *_HEADER.format(**dataclasses.asdict(found.shape), machine=found.machine).splitlines(),
        "",
        "![stages](profile.png)",
        "",
    ]
    names = [name for name in CASES if name in found.runs]
    if any(f"before {name}" in found.runs for name in names):
        lines += ["## Before and after", "", *_before(found, names), ""]
    for name in names:
        lines += [f"## {CASES[name][0].upper()}{CASES[name][1:]}", "", *_case(found, name), ""]
    return "\n".join(lines).rstrip() + "\n"


def _before(found: Profile, names: list[str]) -> list[str]:
    """Returns the lines of all totals, and of the stages that changed most."""
    rows = []
    for name in names:
        old, new = found.stages(f"before {name}"), found.stages(name)
        gain = {stage: old.get(stage, 0.0) - new.get(stage, 0.0) for stage in old | new}
        most = max(gain, key=lambda stage: abs(gain[stage]))
        totals = sum(old.values()), sum(new.values())
        rows.append(
            [
                CASES[name],
                *(f"{total:.1f}" for total in totals),
                f"{totals[0] / totals[1]:.2f}x",
                f"{most}: {old.get(most, 0.0):.1f} to {new.get(most, 0.0):.1f}",
            ]
        )
    return markdown(["", "before", "now", "faster", "stage that changed most"], rows)


def _case(found: Profile, name: str) -> list[str]:
    limits, total = found.limits(name), found.total(name)
    rows = []
    for stage, spent in found.stages(name).items():
        size, least = limits.get(stage, (0.0, 0.0))
        rows.append(
            [
                stage,
                f"{spent:.1f}",
                f"{spent / total:.0%}",
                f"{size:,.0f}" if size else "",
                f"{least:.1f}" if least else "",
                f"{spent / least:.1f}x" if least else "",
            ]
        )
    rows.append(["**all**", f"**{total:.1f}**", "", "", "", ""])
    figures = {key: found.median(name, f"{key} per ms") for key in ("bytes", "rows", "flops")}
    return [
        f"{found.shape.batch / total:,.0f} thousand samples/s. Limits: copying"
        f" {figures['bytes'] / 1e6:.1f} GB/s, random rows of"
        f" {found.median(name, 'row bytes'):.0f} bytes {1e6 / figures['rows']:.0f} ns each,"
        f" products {figures['flops'] / 1e6:.0f} GFLOP/s.",
        "",
        *markdown(["stage", "ms", "share", "MB moved", "limit, ms", "time / limit"], rows),
    ]


def _draw(found: Profile, path: Path) -> None:
    from matplotlib.figure import Figure

    names = [name for name in CASES if name in found.runs]
    figure = Figure(figsize=(12, 6), dpi=110, layout="constrained")
    axes: Axes = figure.subplots()
    stages = list(dict.fromkeys(stage for name in names for stage in found.stages(name)))
    left = [0.0] * len(names)
    for number, stage in enumerate(stages):
        spent = [found.stages(name).get(stage, 0.0) for name in names]
        colour = (*COLOURS, GREY)[number % (len(COLOURS) + 1)]
        hatch = "//" if number > len(COLOURS) else ""
        axes.barh(
            [CASES[name] for name in names],
            spent,
            left=left,
            label=stage,
            color=colour,
            hatch=hatch,
            edgecolor="white",
        )
        left = [before + own for before, own in zip(left, spent, strict=True)]
    least = [
        sum(found.limits(name).get(stage, (0.0, 0.0))[1] for stage in found.stages(name))
        for name in names
    ]
    axes.plot(least, range(len(names)), "k|", ms=22, mew=2, label="sum of the limits")
    axes.invert_yaxis()
    axes.set_xlabel("CPU milliseconds of one thread for a batch")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, format="png")


def main(arguments: list[str] | None = None) -> int:
    """Measures, and writes the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__)
    parser.add_argument("--repeats", type=int, default=REPEATS, help="processes per case")
    parser.add_argument("--quick", action="store_true", help="tiny tables, to try it out")
    parser.add_argument("--against", type=Path, help="another state's checkout, measured in turn")
    parser.add_argument("--out", type=Path, help="folder of the page and the plot")
    options = parser.parse_args(arguments)
    out = options.out or ROOT / ("build/benchmarks" if options.quick else "docs/benchmarks")
    runtime.configure()
    found = measure(QUICK if options.quick else Shape(), options.repeats, options.against)
    print(write(found, out))
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
