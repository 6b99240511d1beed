"""Load on the scoring server: `python -m benchmarks.load URL --rows rows.parquet [--seconds 60]`.

Clients ask for the scores of rows of a Parquet file, each as fast as it is answered, over
connections that stay open. Latencies are of whole requests; memory is that of the server's
processes, by their ids, as Linux counts it.
"""

import argparse
import http.client
import json
import statistics
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

CLIENTS = 4


def client(url: str, bodies: Sequence[bytes], end: float, found: list[tuple[float, int]]) -> None:
    """Asks until the end, and adds the seconds and status of each request."""
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.netloc, timeout=60)
    number = 0
    while time.monotonic() < end:
        before = time.perf_counter()
        body = bodies[number % len(bodies)]
        connection.request("POST", place.path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        found.append((time.perf_counter() - before, answer.status))
        number += 1


def resident_bytes(process: int) -> int:
    """Returns the resident bytes of a process and its children."""
    own, total = 0, 0
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            own = int(line.split()[1]) * 1024
    for task in Path(f"/proc/{process}/task").iterdir():
        for child in (task / "children").read_text().split():
            total += resident_bytes(int(child))
    return own + total


def main() -> None:
    """Puts the server under load and prints what was measured as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="like http://127.0.0.1:5001/invocations")
    parser.add_argument("--rows", required=True, help="Parquet file of raw rows")
    parser.add_argument("--process", type=int, help="id of the server's process, for its memory")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--batch", type=int, default=100, help="rows of a request")
    options = parser.parse_args()
    table = pq.read_table(options.rows).slice(0, 100 * options.batch)
    bodies = [
        json.dumps({"dataframe_split": _split(table.slice(first, options.batch))}).encode()
        for first in range(0, table.num_rows, options.batch)
    ]
    client(options.url, bodies, time.monotonic() + 5, [])  # warm-up
    found: list[list[tuple[float, int]]] = [[] for _ in range(options.clients)]
    end = time.monotonic() + options.seconds
    threads = [
        threading.Thread(target=client, args=(options.url, bodies, end, part)) for part in found
    ]
    memory = []
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if options.process:
            memory.append(resident_bytes(options.process) / 1e6)
        time.sleep(1)
    seconds = sorted(taken for part in found for taken, _ in part)
    cuts = statistics.quantiles(seconds, n=1000)
    print(
        json.dumps(
            {
                "requests": len(seconds),
                "errors": sum(status != 200 for part in found for _, status in part),
                "rows_per_s": round(len(seconds) * options.batch / options.seconds),
                "ms": {f"p{p}": round(cuts[int(p * 10) - 1] * 1e3, 1) for p in (50, 95, 99, 99.9)},
                "resident_mb": {
                    "first": round(memory[0]),
                    "last": round(memory[-1]),
                    "most": round(max(memory)),
                }
                if memory
                else {},
            }
        )
    )


def _split(table: pa.Table) -> dict[str, list[object]]:
    rows = [list(row.values()) for row in table.to_pylist()]
    return {"columns": table.column_names, "data": rows}


if __name__ == "__main__":
    main()
