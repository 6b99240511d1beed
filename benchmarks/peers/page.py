"""Figures beside the peers to claims and a Markdown page."""

import dataclasses
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.peers.contestant import CROSS_LAYERS, HIDDEN
from benchmarks.peers.inference import REQUEST_ROWS
from benchmarks.peers.plot import draw
from benchmarks.peers.records import GROWING, MB, Record, Records
from benchmarks.peers.until import SHARES
from benchmarks.report import Claim, markdown
from recsys_compress.files import atomic_file, write_text

SHOWN = ("torch", "fuxictr", "deepctr-torch", "numpy")
# Test AUC on the leaderboard of BARS.
PUBLISHED = {"DCN-V2": 0.9845, "DNN": 0.9833}
_PIN = re.compile(r"^([a-z0-9-]+)==(\S+)", re.MULTILINE)


def versions(lock: Path) -> dict[str, str]:
    """Returns the versions that a lock names."""
    return dict(_PIN.findall(lock.read_text(encoding="utf-8")))


def claims(records: Records) -> list[Claim]:
    """Returns the claims for which there are figures."""
    found: list[Claim] = []

    def ratio(
        text: str, least: float, above: Record | None, below: Record | None, key: str
    ) -> None:
        if above is not None and below is not None:
            value = above.median(key) / below.median(key)
            found.append(Claim(text=text, least=least, found=value))

    full = records.find("training", "full", tuned=True)
    small = records.find("training", "unified", tuned=True)
    for tuned in (False, True):
        peer = records.find("training", "fuxictr", tuned=tuned)
        ratio(_speed_claim(tuned), 5.0, full, peer, "cpu")
        text = f"training at 1/10: peak memory of FuxiCTR {_HOW[tuned]} against it"
        ratio(text, 4.0, peer, small, "rss")
    base = records.find("inference", "full fp32", tuned=True)
    for name in ("full int8", "unified int8", "full int8 layers", "unified int8 layers"):
        served = records.find("inference", name, tuned=True)
        ratio(f"inference, {name}: samples/s against full fp32", 1.3, served, base, "cpu")
    return found


_HOW = {False: "as it is", True: "in our process settings too"}


def _speed_claim(tuned: bool) -> str:
    return f"training, full tables: samples/s against FuxiCTR {_HOW[tuned]}"


def write(records: Records, out: Path) -> str:
    """Writes figures, page and plot to the folder `out`; returns the page."""
    records.write(out)
    with atomic_file(out / "peers.png") as path:
        draw(records, path)
    text = render(records)
    write_text(out / "peers.md", text)
    return text


def render(records: Records) -> str:
    """Returns the Markdown page."""
    sections = [
        *_head(records),
        *_training(records),
        *_inference(records),
        *_until(records),
        *_quality(records),
        *_growth(records),
    ]
    return "\n".join(sections) + "\n"


def _head(records: Records) -> list[str]:
    stated = ", ".join(f"{n} {records.versions[n]}" for n in SHOWN if n in records.versions)
    hidden = " and ".join(map(str, HIDDEN))
    lines = [
        "# Beside other libraries",
        "",
        "`make bench-peers` measures what this page shows; `python -m benchmarks.peers.run --help`"
        " for parts of it. FuxiCTR and DeepCTR-Torch run in an environment of their own"
        " (`benchmarks/peers/requirements.lock`) with the same torch as ours. Every case runs in a"
        " process of its own, in turn with the others; figures are medians over them, with least"
        " and greatest. CPU time is of one thread, and the figure to compare on a machine that does"
        " other work too; all have one thread.",
        "",
        f"All train DCN-V2: {CROSS_LAYERS} full-rank cross layers beside a deep part of {hidden},"
        " on the same ids, dense features and labels, which are in memory already. All but the"
        " tables is trained by Adam at 1e-3. What users of each library get:",
        "",
        "* **ours** and **TorchRec**: row-wise Adagrad inside the backward pass. Ours starts with"
        " the settings of `recsys_compress/runtime.py`, as its command line does; the others start"
        " as they are, and FuxiCTR also in our settings (tuned).",
        "* **layers trained in bf16**: `train.precision`, which is `torch.autocast` around the"
        " layers; the values that are kept, the tables and the loss are fp32 still.",
        "* **torch**: the same model; `nn.EmbeddingBag(sparse=True)` with Adagrad, or"
        " `nn.Embedding` with Adam over all rows.",
        "* **FuxiCTR**: its embeddings, cross and deep layers, base model and training step, with"
        " Adam over all rows and its clipping of gradients. Its package holds no ready DCN-V2 for"
        " plain features, so the model is put together of its layers. Dense features are taken as"
        " they are; by default it would give each a vector, which makes the model half as wide"
        " again.",
        "* **DeepCTR-Torch**: its `DCN` with matrices, and its `fit`, a batch at a time, with"
        " its own loader, which handles rows one by one. Its L2 terms, which by default sum over"
        " all rows in every step, and its linear part are off.",
        "",
        f"Versions: {stated}." if stated else "",
        f"Machine: {records.machine}." if records.machine else "",
        "",
        "| claim | at least | found | |",
        "|---|---:|---:|---|",
    ]
    for claim in claims(records):
        verdict = "holds" if claim.holds else "DOES NOT HOLD"
        lines.append(f"| {claim.text} | {claim.least:g}x | {claim.found:.2f}x | {verdict} |")
    return [*lines, "", *_reasons(records), "![beside other libraries](peers.png)", ""]


def _reasons(records: Records) -> Iterator[str]:
    """Yields what a profile says of claims that do not hold."""
    missed = [claim.text for claim in claims(records) if not claim.holds]
    full = records.find("training", "full", tuned=True)
    for tuned in (False, True):
        peer = records.find("training", "fuxictr", tuned=tuned)
        if peer and full and _speed_claim(tuned) in missed:
            bf16 = records.find("training", "full bf16", tuned=True)
            rounded = (
                f" Trained in bf16, as a processor with instructions for it may, they leave a step"
                f" of {bf16.median('step'):,.0f} ms:"
                f" {bf16.median('cpu') / peer.median('cpu'):.2f} times FuxiCTR's samples/s."
                if bf16
                else ""
            )
            yield (
                f"Training: of the {peer.median('step'):,.0f} ms of a step of FuxiCTR"
                f" {_HOW[tuned]}, {peer.median('optimizer'):,.0f} are its optimizer's, which"
                f" touches every row. Ours takes {full.median('step'):,.0f} ms, nearly all of them"
                f" in the dense layers, which are the same for both and bound the ratio.{rounded}"
            )
            yield ""
    base = records.find("inference", "full fp32", tuned=True)
    if base and "look-up" in base and any(text.startswith("inference") for text in missed):
        look_up, batch = base.median("look-up"), base.median("batch")
        limit = batch / (batch - look_up)
        yield (
            f"Inference: of the {batch:,.0f} ms of a batch from the full fp32 artifact,"
            f" {look_up:,.1f} are look-ups ({look_up / batch:.0%}), and the rest is dense layers in"
            f" fp32, which no storage type of the tables changes; layers in int8 do. Look-ups that"
            f" took no time at all would give {limit:.2f}x.{_look_ups(records)}"
        )
        yield ""


def _look_ups(records: Records) -> str:
    """Returns what the look-ups of smaller artifacts take."""
    kinds = ("full int8", "unified fp32", "unified int8")
    found = [r for r in records.of("inference") if r.case.name in kinds and "look-up" in r]
    if not found:
        return ""
    taken = ", ".join(f"{r.case.name} {r.median('look-up'):,.1f} ms" for r in found)
    line = 4 * found[0].case.shape.dim <= 64
    misses = " A row in fp32 is one cache line, and no fewer in int8." if line else ""
    return (
        f" Those of the others take: {taken}.{misses} Unified reads two rows an id, and hashes it."
    )


def _table(
    records: list[Record], columns: Sequence[tuple[str, str, float, int]], base: str = ""
) -> list[str]:
    """Returns a row a record; columns are (title, figure, unit, digits).

    With a base, samples/s of CPU time against the record of that name is a column too.
    """
    found = [r for r in records if r.case.name == base and "cpu" in r]
    rows = []
    for record in records:
        cells = [record.cell(figure, unit, digits) for _, figure, unit, digits in columns]
        if base:
            value = found and "cpu" in record and record.median("cpu") / found[0].median("cpu")
            cells.insert(1, f"{value:.2f}x" if value else "-")
        label = f"{record.label}: {record.skipped}" if record.skipped else record.label
        rows.append([label, *cells])
    titles = [title for title, *_ in columns]
    if base:
        titles.insert(1, "against FuxiCTR")
    return markdown(["", *titles], rows)


def _workload(record: Record) -> str:
    shape = record.case.shape
    return (
        f"{shape.features} categorical features of one id each, {shape.rows:,} rows in all, width"
        f" {shape.dim}, {shape.dense} dense features, batch {shape.batch:,}, uniform ids."
    )


def _training(records: Records) -> list[str]:
    found = records.of("training")
    if not found:
        return []
    return [
        "## Training",
        "",
        _workload(found[0]),
        "A step is all of it: forward, backward, optimizers. Peak resident memory of the process"
        " is in MB (10^6 bytes), as is what the library keeps of the trained model: an fp32"
        " artifact for ours, without a vocabulary, as ids are given as they are; weights as a torch"
        " file for the others. `optimizer` is what a step spends outside the backward pass to"
        " change weights.",
        "",
        *_table(
            found,
            [
                ("samples/s of CPU time", "cpu", 1, 0),
                ("samples/s, wall", "wall", 1, 0),
                ("peak memory", "rss", MB, 0),
                ("of it libraries", "before", MB, 0),
                ("step, CPU ms", "step", 1, 0),
                ("optimizer, CPU ms", "optimizer", 1, 0),
                ("kept, MB", "artifact", MB, 1),
            ],
            base="fuxictr",
        ),
        "",
    ]


def _inference(records: Records) -> list[str]:
    found = records.of("inference")
    if not found:
        return []
    requests = [
        column
        for count in REQUEST_ROWS
        for column in (
            (f"request of {count}, p50 ms", f"p50/{count}", 1.0, 2),
            (f"request of {count}, p99 ms", f"p99/{count}", 1.0, 2),
            (f"request of {count}, CPU ms", f"cpu/{count}", 1.0, 2),
        )
    ]
    return [
        "## Inference",
        "",
        "The same workload. Ours is a `Predictor` that loaded the artifact, in the storage type"
        " named; rows are encoded already, for all. Others predict through what the library has"
        " for it. Latencies are wall time of single requests, and on a busy machine the greatest"
        " of them (p99) are mostly waiting for a core.",
        "",
        *_table(
            found,
            [
                ("samples/s of CPU time", "cpu", 1, 0),
                ("samples/s, wall", "wall", 1, 0),
                ("look-up, ms of a batch", "look-up", 1, 1),
                ("all, ms of a batch", "batch", 1, 1),
                *requests,
                ("artifact, MB", "artifact", MB, 1),
            ],
            base="fuxictr",
        ),
        "",
    ]


def _until(records: Records) -> list[str]:
    found = records.of("until")
    measured = [record for record in found if record.runs]
    if not measured:
        return []
    shape, best = measured[0].case.shape, measured[0].median("best")
    targets = [f"{measured[0].median(f'target {share}'):.4f}" for share in SHARES]
    columns = [
        (f"{title} to {target}", f"{figure} {share}", 1, digits)
        for share, target in zip(SHARES, targets, strict=True)
        for title, figure, digits in (("CPU s", "seconds", 1), ("steps", "steps", 0))
    ]
    return [
        "## Time to quality",
        "",
        f"CPU seconds of training until validation AUCs of {' and '.join(targets)}, on generated"
        f" data of {shape.examples:,} rows whose true odds are known: they have {best:.4f}. Fields"
        f" of 4 to 100,000 ids, batch {shape.batch:,}, at most three passes, evaluated eight times"
        " in each (evaluation is left out). Every library has its own initial values, another seed"
        " of them in each run, and the learning rates of above, tuned for none: this ranks no"
        " quality. A first target of 0.95 of the way from 0.5 to the best took our full tables more"
        " than three passes, and was lowered to 0.9 before the others were run. That is about what"
        " the first pass ends with: a run that misses it there has it late in the second, since"
        " AUC falls first, so that seeds differ by a pass. 0.85 is free of that."
        f" Runs of each: {len(measured[0].runs)}.",
        "",
        *_table(found, [*columns, ("best AUC until then", "auc", 1, 4)]),
        "",
        "A dash, or never: not reached.",
        "",
    ]


def _quality(records: Records) -> list[str]:
    if not records.quality:
        return []
    rows = []
    for name, runs in records.quality.items():
        auc, logloss = ([run[figure] for run in runs] for figure in ("AUC", "logloss"))
        each = ", ".join(f"{value:.4f}" for value in auc)
        rows.append([name, f"{PUBLISHED[name]:.4f}", each, f"{statistics.mean(logloss):.4f}"])
    return [
        "## FuxiCTR at its published quality",
        "",
        "That the peer is used as it should be: FuxiCTR on Frappe, in the split of BARS"
        " (Frappe_x1; in training rows the items of sampled negatives were drawn anew), with the"
        " settings of that benchmark's own logs, its loader, training loop, early stopping and"
        " evaluation; a run for each seed, the first of which is that of the logs:"
        " `make bench-fuxictr-quality DATA=FOLDER`.",
        "",
        *markdown(["model", "published test AUC", "test AUC here", "mean logloss here"], rows),
        "",
    ]


def _growth(records: Records) -> list[str]:
    lines = []
    for part, text in GROWING.items():
        found = records.of(part)
        if not found:
            continue
        values = list(dict.fromkeys(getattr(record.case.shape, part) for record in found))
        rows = []
        for name in dict.fromkeys(record.label for record in found):
            own = [record for record in found if record.label == name]
            rows.append([name, *(_speed_and_memory(record) for record in own)])
        shape = dataclasses.asdict(found[0].case.shape)
        others = ", ".join(f"{shape[key]:,} {GROWING[key]}" for key in GROWING if key != part)
        others = others.replace(f"{shape['batch']:,} batch", f"batch {shape['batch']:,}")
        lines += [f"### By {text}", "", f"With {others}.", ""]
        lines += [*markdown(["", *(f"{value:,}" for value in values)], rows), ""]
    if not lines:
        return []
    head = [
        "## Growth",
        "",
        "Thousand samples/s of CPU time in training / peak memory in MB; in each process, the"
        " median of three steps.",
        "",
    ]
    return head + lines


def _speed_and_memory(record: Record) -> str:
    if not record.runs:
        return record.skipped
    return f"{record.cell('cpu', 1e3, 2)} / {record.cell('rss', MB, 0)}"
