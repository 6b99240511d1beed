"""Prepare, train, register, gate, promote, score: one pass from raw data to scores.

    python pipelines/deploy.py --source movielens-1m --from ml-1m --data data/movielens_1m \
        --job pipelines/movielens_1m.toml --policy pipelines/gate.toml \
        --rows rows.parquet --scores scores.parquet

Every step is skipped where its result is there, so that cron may run it again after anything: an
unfinished run is resumed, a registered one is not registered twice, a champion stays one. It exits
with 3 where the gate refuses; the champion before is then scored with and goes on being served.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from recsys_compress.runtime import configure

configure()  # before torch is imported

from recsys_compress.compress.storage import StoragePlan  # noqa: E402
from recsys_compress.config import Job, dump_job, load_job  # noqa: E402
from recsys_compress.data.dataset import MANIFEST, PreparedDataset  # noqa: E402
from recsys_compress.data.prepare import prepare  # noqa: E402
from recsys_compress.data.sources import make_source  # noqa: E402
from recsys_compress.errors import UserError  # noqa: E402
from recsys_compress.serve.gate import load_policy  # noqa: E402
from recsys_compress.serve.score import score  # noqa: E402
from recsys_compress.track.promotion import promote  # noqa: E402
from recsys_compress.track.registry import located, register  # noqa: E402
from recsys_compress.track.run import tracked_train  # noqa: E402
from recsys_compress.track.uri import tracking_uri  # noqa: E402
from recsys_compress.train.folder import JOB, read_result  # noqa: E402


def main() -> int:
    """Runs the steps; returns the exit status."""
    options = _options()
    dataset = prepared(options.source, options.path, options.data)
    job = load_job(options.job, [f"data.path={json.dumps(str(options.data))}", *options.set])
    # A plan of methods and budgets by table (`plan`) takes the job here and returns another.
    run = trained(job, dataset)
    uri = tracking_uri(job)
    version = register(run, StoragePlan(types=options.storage))
    decision = promote(version.name, uri, load_policy(options.policy), options.held_out)
    print(f"{decision.name}: {decision.reason}")
    if options.rows and (decision.passed or decision.champion):
        with located(f"models:/{version.name}@champion", uri) as folder:
            print(score(folder, options.rows, options.scores).to_json())
    return 0 if decision.passed else 3


def prepared(source: str, path: str | None, out: Path) -> PreparedDataset:
    """Returns the prepared dataset in `out`, made if it is not there."""
    if (out / MANIFEST).is_file():
        return PreparedDataset.open(out)
    return prepare(make_source(source, {"path": path} if path else {}), out)


def trained(job: Job, dataset: PreparedDataset) -> Path:
    """Returns the folder of the finished run of a job on this data: an old one, or a new one."""
    own = Path(job.train.output) / f"data-{dataset.checksum[:12]}"
    job = dataclasses.replace(job, train=dataclasses.replace(job.train, output=str(own)))
    for folder in sorted(own.glob("*/")):
        if (folder / JOB).is_file() and (folder / JOB).read_text() == dump_job(job):
            if read_result(folder).get("test"):
                return folder
            if any((folder / "checkpoints").glob("step-*")):
                return tracked_train(job, resume=folder).folder
    return tracked_train(job).folder


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--source", required=True, help="movielens-1m, frappe, criteo, synthetic")
    parser.add_argument("--from", dest="path", help="raw data")
    parser.add_argument("--data", required=True, type=Path, help="folder of the prepared dataset")
    parser.add_argument("--job", required=True, type=Path, help="job file")
    parser.add_argument("--set", action="append", default=[], help="change a key of the job")
    parser.add_argument("--storage", default="fp32", help="storage type of the tables")
    parser.add_argument("--policy", type=Path, help="TOML file with the gate's limits")
    parser.add_argument("--held-out", type=Path, help="raw rows with the label, for the gate")
    parser.add_argument("--rows", help="Parquet rows to score")
    parser.add_argument("--scores", type=Path, default=Path("scores.parquet"), help="their scores")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
