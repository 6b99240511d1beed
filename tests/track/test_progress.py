import dataclasses
import io

import pytest
from rich.console import Console

from recsys_compress.track.progress import ProgressListener
from recsys_compress.train.events import RunResult, RunStart


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_is_shown(terminal: bool, start: RunStart, result: RunResult) -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=120)
    listener = ProgressListener(console)
    listener.started(start)
    listener.metrics(20, {"train/loss": 0.55, "perf/samples_per_s": 5000.0})
    listener.metrics(20, {"eval/auc": 0.75})
    listener.finished(result)
    shown = text.getvalue()
    assert "dcnv2-full-1x-s0: embeddings 1 kB, full tables 4 kB" in shown
    assert "row_wise      1   1,000" in shown
    assert "loss 0.5500  valid AUC 0.7500  samples/s 5,000  peak memory" in shown
    assert "finished after 30 steps, 12 s" in shown
    assert ("step 20/30" in shown) is not terminal


def test_lines_do_not_flood_a_log(start: RunStart) -> None:
    text = io.StringIO()
    listener = ProgressListener(Console(file=text, width=120))
    listener.started(dataclasses.replace(start, shards=[]))
    for step in range(1000):
        listener.metrics(step, {"train/loss": 0.5})
    assert len(text.getvalue().splitlines()) <= 3
