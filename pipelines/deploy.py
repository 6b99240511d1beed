"""Prepare, plan, train, register, gate, promote, score: one pass from raw data to scores.

    python -m pipelines.deploy --source movielens-1m --from ml-1m --data data/movielens_1m \
        --job pipelines/movielens_1m.toml --budget 0.1x --policy pipelines/gate.toml \
        --rows rows.parquet --scores scores.parquet

Without --budget the job is trained as it is. Every step is left out where its result is there, so
that cron may run it again after anything: an unfinished run is resumed, a registered one is not
registered twice, a champion stays one. It exits with 3 where the gate refuses; the champion before
is then scored with and goes on being served.
"""

import json
from pathlib import Path

from recsys_compress.runtime import configure

configure()  # before torch is imported

from pipelines import steps  # noqa: E402
from recsys_compress.compress.storage import StoragePlan  # noqa: E402
from recsys_compress.serve.gate import load_policy  # noqa: E402
from recsys_compress.serve.score import score  # noqa: E402
from recsys_compress.track.promotion import promote  # noqa: E402
from recsys_compress.track.registry import located, register  # noqa: E402
from recsys_compress.track.uri import tracking_uri  # noqa: E402


def main() -> int:
    """Runs the steps; returns the exit status."""
    parser = steps.parser(__doc__ or "")
    parser.add_argument("--budget", help="bytes at serving that tables are planned for")
    parser.add_argument("--storage", help="storage type of the tables; by default as planned")
    parser.add_argument("--policy", type=Path, help="TOML file with the gate's limits")
    parser.add_argument("--held-out", type=Path, help="raw rows with the label, for the gate")
    parser.add_argument("--rows", help="Parquet rows to score")
    parser.add_argument("--scores", type=Path, default=Path("scores.parquet"), help="their scores")
    options = parser.parse_args()
    steps.prepared(options)
    plan, reference, settings = None, None, []
    if options.budget:
        plan, reference = steps.planned(options, options.budget)
        settings = ["embedding.method=full", f"embedding.plan={json.dumps(str(plan))}"]
    job = steps.load(options, *settings)
    job = steps.without_budget(job) if options.budget else job  # a plan says it all
    run = steps.trained(job, reference)
    uri = tracking_uri(job)
    version = register(run, StoragePlan(types=options.storage) if options.storage else None)
    decision = promote(version.name, uri, load_policy(options.policy), options.held_out)
    print(f"{decision.name}: {decision.reason}")
    if options.rows and (decision.passed or decision.champion):
        with located(f"models:/{version.name}@champion", uri) as folder:
            print(score(folder, options.rows, options.scores).to_json())
    return 0 if decision.passed else 3


if __name__ == "__main__":
    steps.run(main)
