"""A deployed model as MLflow serves it."""

import warnings
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from recsys_compress.errors import UserError
from recsys_compress.serve.predictor import Floats, Predictor
from recsys_compress.serve.rows import to_table

with warnings.catch_warnings():
    # MLflow says so of its own types, on import.
    warnings.filterwarnings("ignore", ".*Any type hint is inferred as AnyType", UserWarning)
    from mlflow.pyfunc.model import PythonModel, PythonModelContext

CODE = Path(__file__).with_name("pyfunc_code.py")
ARTIFACT = "artifact"  # name of our folder among the model's artifacts

MAX_ROWS = 10_000  # of one request; larger jobs are for `recsys-compress score`
MAX_BYTES = 8 << 20  # of one request's columns


class ServedModel(PythonModel):
    """Scores the rows of a request; what is wrong with them is the client's error (400)."""

    def load_context(self, context: PythonModelContext) -> None:
        """Loads the artifact, whose files are compared with their checksums."""
        self._predictor = Predictor.load(context.artifacts[ARTIFACT])

    def predict(
        self,
        context: PythonModelContext,  # noqa: ARG002  (MLflow asks for this very name)
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,  # noqa: ARG002
    ) -> Floats:
        """Returns (N,) float32 probabilities.

        Raises:
            MlflowException: the rows are none, too many, or not what the model reads.
        """
        try:
            if not len(model_input):
                raise UserError("rows: there are none; give at least one")
            if len(model_input) > MAX_ROWS:
                raise UserError(
                    f"rows: {len(model_input):,} are more than {MAX_ROWS:,} for one request; send "
                    "them in parts, or use recsys-compress score"
                )
            table = to_table(model_input, self._predictor.artifact.inputs, "rows")
            if table.nbytes > MAX_BYTES:
                raise UserError(
                    f"rows: {table.nbytes:,} bytes are more than {MAX_BYTES:,} for one request; "
                    "send them in parts"
                )
            return self._predictor.predict(table)
        except UserError as error:
            raise MlflowException(str(error), error_code=INVALID_PARAMETER_VALUE) from error
