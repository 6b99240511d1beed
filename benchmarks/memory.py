"""Peak resident memory of the trainer by budget."""

import tempfile
from typing import Any

from benchmarks.case import Case, Figures
from recsys_compress.config import DataConfig, EmbeddingConfig, Job, ModelConfig, TrainConfig
from recsys_compress.train.memory import peak_rss_bytes
from recsys_compress.train.trainer import train

# Cases without a budget; rows of 4 values are the narrowest that the fused kernel has.
WHOLE: dict[str, dict[str, Any]] = {
    "full": {},
    "mixed_dim": {"alpha": 0.0, "base_dim": 4},
    "low_rank": {"rank": 4},
}
# `dnis` trains full tables and searches them before it drops dims; without, it drops them evenly.
UNSEARCHED = {"dnis": {"search_epochs": 0}}


def measure(case: Case) -> Figures:
    """Returns bytes: "rss" at its peak, "before" (libraries alone), "tables" and "optimizer".

    The case's name is a method and its budget, like "unified 0.1x". Of a method that searches this
    is what it trains after the search; "dnis 0.1x with search" is all of it.
    """
    before = peak_rss_bytes()
    with tempfile.TemporaryDirectory() as output:
        job = Job(
            data=DataConfig(path=case.data, buffer_rows=8 * case.shape.batch),
            model=ModelConfig(name="deepfm"),  # the one with the least time of its own
            embedding=_embedding(case),
            train=TrainConfig(epochs=1, batch_size=case.shape.batch, output=output),
        )
        result = train(job)
    return {
        "rss": result.peak_rss_bytes,
        "before": before,
        "tables": result.bytes["tables"],
        "optimizer": result.bytes["optimizer"],
    }


def _embedding(case: Case) -> EmbeddingConfig:
    dim = case.shape.dim
    if case.name in WHOLE:
        return EmbeddingConfig(method=case.name, dim=dim, methods={case.name: WHOLE[case.name]})
    method, budget, *search = case.name.split()
    knobs = {} if search else UNSEARCHED.get(method, {})
    return EmbeddingConfig(method=method, dim=dim, budget=budget, methods={method: knobs})
