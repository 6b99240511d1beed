"""A tiny run of our own cases beside the peers, whose packages are not there in tests."""

import dataclasses
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.case import ROOT, Case, Shape
from benchmarks.peers import page, run, until
from benchmarks.peers.contestant import LABELS, PEERS, Rows, Sizes, open_contestant, random_batches
from benchmarks.peers.records import Record, Records
from recsys_compress.train.metrics import BinaryMetrics

TORCH = re.compile(r"^torch==.*\n(?:    --hash=.*\n?)+", re.MULTILINE)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_our_cases_run_and_peers_are_said_to_be_missing(tmp_path: Path) -> None:
    found = Records()
    absent = tmp_path / "python"
    data = str(run.generate(run.QUICK, tmp_path / "data"))
    for part in run.PARTS:
        for case in run.cases(part, quick=True):
            record = found.record(part, case)
            record.skipped = run.obstacle(case, absent)
            assert bool(record.skipped) == (case.name in PEERS)
            if not record.skipped:
                module = importlib.import_module(f"benchmarks.{case.group}")
                record.runs.append(module.measure(dataclasses.replace(case, data=data)))
    text = page.write(found, tmp_path)
    for part in ("training", "inference", "until"):
        for record in found.of(part):
            assert f"| {record.label}" in text
    assert "make bench-peers` builds it" in text
    assert "### By rows of all tables" in text
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")
    assert Records.load(tmp_path) == found
    (small,) = (r for r in found.of("inference") if r.case.name == "unified int8")
    (full,) = (r for r in found.of("inference") if r.case.name == "full fp32")
    assert small.median("artifact") < 0.3 * full.median("artifact")
    assert found.without(["until"]).of("until") == []


@pytest.mark.parametrize("name", [n for n in LABELS if " " not in n and n not in PEERS])
def test_contestants_learn_and_serve_what_they_learned(name: str, tmp_path: Path) -> None:
    shape = Shape(features=3, rows=600, dim=8, batch=64, dense=2)
    (rows,) = random_batches(shape, count=1)
    with open_contestant(name, Sizes.of(shape)) as own:
        before = torch.as_tensor(own.scores(rows))
        for _ in range(30):
            own.step(rows)
        after = torch.as_tensor(own.scores(rows))
        served = own.served(tmp_path / "model", "fp32")
        torch.testing.assert_close(torch.as_tensor(served(rows)), after, atol=1e-5, rtol=0)
    losses = [torch.nn.functional.binary_cross_entropy(s, rows.labels) for s in (before, after)]
    assert losses[1] < 0.8 * losses[0]


def test_auc_counts_ties_half() -> None:
    labels = torch.tensor([0.0, 1, 0, 1, 1, 0])
    rows = Rows(dense=torch.zeros(6, 0), ids=torch.zeros(0, 6, dtype=torch.int64), labels=labels)
    scores = torch.tensor([0.1, 0.9, 0.5, 0.5, 0.3, 0.3])
    metrics = BinaryMetrics()
    metrics.update(torch.logit(scores), labels)
    own = SimpleNamespace(scores=lambda _: scores)
    assert until.auc(own, rows) == pytest.approx(metrics.compute()["auc"])


def records(**rates: float) -> Records:
    found = Records()
    for name, rate in rates.items():
        case = Case(group="peers.training", name=name, tuned=name != "fuxictr", shape=run.SHAPE)
        figures = {"cpu": rate, "rss": 1e12 / rate, "step": 1.0, "optimizer": 0.5}
        found.all.append(Record(part="training", case=case, runs=[figures]))
    return found


@pytest.mark.parametrize(("rate", "holds"), [(500.0, [True, True]), (300.0, [False, False])])
def test_claims_beside_fuxictr(rate: float, holds: list[bool]) -> None:
    found = records(full=rate, unified=rate, fuxictr=100.0)
    assert [claim.holds for claim in page.claims(found)] == holds
    assert ("DOES NOT HOLD" in page.render(found)) is not all(holds)
    assert ("its optimizer's, which touches every row" in page.render(found)) is not all(holds)


def test_runs_that_do_not_reach_a_target_are_counted() -> None:
    case = Case(group="peers.until", name="full", tuned=True, shape=run.UNTIL)
    record = Record(part="until", case=case, runs=[{"seconds": 2.0}, {}, {"seconds": 1.0}])
    assert record.cell("seconds") == "2.0 (1.0-never)"
    assert record.cell("steps") == "-"


def test_what_does_not_fit_into_memory_is_left_out() -> None:
    huge = dataclasses.replace(run.SHAPE, rows=10**12)
    case = Case(group="peers.training", name="full", tuned=True, shape=huge)
    assert re.search(r"takes about [\d,]+ GB, and \d+ GB were free", run.obstacle(case, Path()))


def test_the_peers_lock_has_hashes_no_addresses_and_our_torch() -> None:
    text = run.LOCK.read_text(encoding="utf-8")
    entries = text.replace("\\\n", " ").splitlines()
    for entry in entries:
        assert re.fullmatch(r"[a-z0-9-]+==[\w.+]+ +(--hash=sha256:[0-9a-f]{64} *)+", entry)
    own = (ROOT / "requirements/cpu.lock").read_text(encoding="utf-8")
    (theirs,), (ours,) = TORCH.findall(text), TORCH.findall(own)
    assert theirs == ours
    assert {"fuxictr", "deepctr-torch"} <= page.versions(run.LOCK).keys()
