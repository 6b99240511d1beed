"""Prepare, train a reference, plan: raw data and a byte budget in, a plan file out.

    python -m pipelines.plan --source movielens-1m --from ml-1m --data data/movielens_1m \
        --job pipelines/movielens_1m.toml --budget 0.1x

Each step is left out where its result is there.
"""

from recsys_compress.runtime import configure

configure()  # before torch is imported

from pipelines import steps  # noqa: E402


def main() -> int:
    """Runs the steps; returns the exit status."""
    parser = steps.parser(__doc__ or "")
    parser.add_argument("--budget", required=True, help="bytes at serving, like 400kB or 0.1x")
    options = parser.parse_args()
    steps.prepared(options)
    path, _ = steps.planned(options, options.budget)
    print(path)
    return 0


if __name__ == "__main__":
    steps.run(main)
