"""Where a run is recorded: MLflow, plots, the terminal."""

import os

# MLflow reads these when it is imported: no usage reports to its makers, no log lines about its
# database tables.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
