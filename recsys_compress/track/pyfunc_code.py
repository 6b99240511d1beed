"""The code of a registered model: MLflow runs this file to make it, and unpickles nothing."""

from mlflow.models import set_model

from recsys_compress.track.pyfunc import ServedModel

set_model(ServedModel())
