"""MLflow's scoring server over HTTP: the figures of training, and requests of every bad kind."""

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import recsys_compress
from recsys_compress.compress.storage import StoragePlan
from recsys_compress.serve.gate import GatePolicy
from recsys_compress.track.promotion import promote
from recsys_compress.track.registry import register
from recsys_compress.train.events import RunResult
from tests.serve.clicks import auc, held_out
from tests.track.conftest import free_port, wait_for

pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning"),
    pytest.mark.timeout(400),  # three processes start one another, each with torch
]

COLUMNS = ["user", "item", "price", "tags", "tag_weights", "at"]


@pytest.fixture(scope="module")
def scoring(
    server_uri: str, tracked_runs: list[RunResult], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """`recsys-compress serve` of the champion, as a process of its own."""
    register(tracked_runs[1].folder, StoragePlan(types="fp32"), name="served")
    limits = GatePolicy(min_calibration=None, max_calibration=None)
    assert promote("served", server_uri, limits).passed
    port, log = free_port(), tmp_path_factory.mktemp("serve") / "log"
    command = [sys.executable, "-m", "recsys_compress", "serve", "served", "--port", str(port)]
    environment = os.environ | {
        "PYTHONPATH": str(Path(recsys_compress.__file__).parents[1]),
        "MLFLOW_TRACKING_URI": server_uri,
    }
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command, env=environment, stdout=file, stderr=file, start_new_session=True
        )
    try:
        wait_for(f"http://127.0.0.1:{port}", process, log, seconds=300)
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)


def ask(url: str, body: bytes, content: str = "application/json") -> tuple[int, Any]:
    request = urllib.request.Request(url, body, {"Content-Type": content})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def split(rows: list[list[Any]], columns: list[str] = COLUMNS) -> bytes:
    return json.dumps({"dataframe_split": {"columns": columns, "data": rows}}).encode()


def some(count: int) -> list[list[Any]]:
    return [list(row.values()) for row in held_out().select(COLUMNS).slice(0, count).to_pylist()]


def test_the_server_reaches_the_auc_of_training(
    scoring: str, tracked_runs: list[RunResult]
) -> None:
    rows = held_out()
    status, answer = ask(scoring, split(some(rows.num_rows)))
    assert status == 200, answer
    expected = tracked_runs[1].test["auc"]
    assert auc(answer["predictions"], rows) == pytest.approx(expected, abs=1e-6)


def test_other_forms_of_a_request(scoring: str, tmp_path: Path) -> None:
    rows = held_out().slice(0, 20)
    _, answer = ask(scoring, split(some(20)))
    records = [dict(zip(COLUMNS, row, strict=True)) for row in some(20)]
    bodies = {"dataframe_records": records, "inputs": records}
    for form, body in bodies.items():
        status, other = ask(scoring, json.dumps({form: body}).encode())
        assert status == 200, other
        np.testing.assert_allclose(other["predictions"], answer["predictions"], atol=1e-6)
    pq.write_table(rows, tmp_path / "rows.parquet")
    parquet = (tmp_path / "rows.parquet").read_bytes()
    status, other = ask(scoring, parquet, "application/vnd.apache.parquet")
    assert status == 200, other
    np.testing.assert_allclose(other["predictions"], answer["predictions"], atol=1e-6)


def test_missing_and_unknown_values_are_scored(scoring: str) -> None:
    row = some(1)[0]
    rows = [[None, *row[1:]], [10**12, *row[1:]], [row[0], None, *row[2:]]]
    status, answer = ask(scoring, split([*rows, [row[0], row[1], None, *row[3:]]]))
    assert status == 200, answer
    assert len(set(answer["predictions"])) > 1


def replaced(column: str, value: Any) -> bytes:
    rows = some(3)
    rows[1][COLUMNS.index(column)] = value
    return split(rows)


BAD = {
    "malformed JSON": (b"{", "JSON"),
    "no JSON at all": (b"\xff\xfe", "JSON"),
    "a list": (b"[1, 2]", "Received a list"),
    "an empty object": (b"{}", "dataframe_split"),
    "no rows": (split([]), "there are none"),
    "an empty list": (json.dumps({"instances": []}).encode(), ""),
    "empty records": (json.dumps({"dataframe_records": []}).encode(), ""),
    "a column too few": (split([row[1:] for row in some(2)], COLUMNS[1:]), "user"),
    "unequal rows": (split([some(1)[0], some(1)[0][1:]]), ""),
    "text for an integer": (replaced("user", "x"), "user"),
    "an integer for text": (split([[r[0], 5, *r[2:]] for r in some(3)]), "item"),
    "a half id": (replaced("user", 1.5), "ids must be integers or strings"),
    "text for a number": (replaced("price", "x"), "price"),
    "an infinite number": (replaced("price", float("inf")), "must be a finite number"),
    "a list for an id": (replaced("user", [1, 2]), "user"),
    "an object for an id": (replaced("user", {"a": 1}), "user"),
    "no time": (replaced("at", "noon"), "holds no times"),
    "10 MB of rows": (split(some(100) * 1200), "more than 10,000"),
    "10 MB in one value": (replaced("tags", "t" * 10_000_000), "in parts"),
    "10 MB of nothing": (b" " * 10_000_000, "JSON"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_request_is_the_clients_error_and_the_server_lives_on(
    scoring: str, what: str
) -> None:
    body, message = BAD[what]
    status, answer = ask(scoring, body)
    assert 400 <= status < 500, answer
    assert message in answer
    assert "Traceback" not in answer
    status, answer = ask(scoring, split(some(1)))
    assert status == 200, answer


def test_a_content_type_that_is_not_known(scoring: str) -> None:
    assert ask(scoring, b"x", "text/html")[0] == 415
