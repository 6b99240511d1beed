"""Where a run is recorded: MLflow, plots, the terminal."""

import os

# MLflow reads these: no usage reports to its makers, no log lines about its database tables, no
# links to its pages on standard output, where results belong, no bars for a dozen small files.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
