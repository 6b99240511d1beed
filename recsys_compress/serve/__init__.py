"""A finished run as one folder that scores raw rows; nothing here imports MLflow."""

# What `Predictor` imports, with what these packages themselves need.
PACKAGES = (
    "fbgemm-gpu-cpu",
    "numpy",
    "pyarrow",
    "pydantic",
    "safetensors",
    "tomli-w",
    "torch",
    "torchrec",
)
