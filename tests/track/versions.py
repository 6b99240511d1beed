"""What the tests of the registry share."""

from mlflow import MlflowClient

from recsys_compress.compress.storage import StoragePlan
from recsys_compress.serve.gate import GatePolicy

ANY = GatePolicy(
    min_auc_difference=-1, max_logloss_increase=9, max_drift=99, min_calibration=0,
    max_calibration=99, min_rows=1,
)  # fmt: skip
PLAN = StoragePlan(types="fp32")


def aliases(client: MlflowClient, name: str) -> dict[str, str]:
    """The aliases of a registered model and their versions."""
    found = client.get_registered_model(name).aliases
    return {which: str(version) for which, version in found.items()}
