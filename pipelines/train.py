"""Prepare and train: raw data in, the folder of a finished run out.

    python -m pipelines.train --source movielens-1m --from ml-1m --data data/movielens_1m \
        --job pipelines/movielens_1m.toml

Each step is left out where its result is there, and an unfinished run is gone on with.
"""

from recsys_compress.runtime import configure

configure()  # before torch is imported

from pipelines import steps  # noqa: E402


def main() -> int:
    """Runs the steps; returns the exit status."""
    options = steps.parser(__doc__ or "").parse_args()
    steps.prepared(options)
    print(steps.trained(steps.load(options)))
    return 0


if __name__ == "__main__":
    steps.run(main)
