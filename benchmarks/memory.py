"""Peak resident memory of the trainer by budget."""

import tempfile

from benchmarks.case import Case, Figures
from recsys_compress.config import DataConfig, EmbeddingConfig, Job, ModelConfig, TrainConfig
from recsys_compress.train.memory import peak_rss_bytes
from recsys_compress.train.trainer import train

FULL = "full"


def measure(case: Case) -> Figures:
    """Returns bytes: "rss" at its peak, "before" (libraries alone), "tables" and "optimizer".

    The case's name is the method and its budget, like "unified 0.1x", or "full".
    """
    before = peak_rss_bytes()
    embedding = EmbeddingConfig(dim=case.shape.dim)
    if case.name != FULL:
        method, budget = case.name.split()
        embedding = EmbeddingConfig(method=method, dim=case.shape.dim, budget=budget)
    with tempfile.TemporaryDirectory() as output:
        job = Job(
            data=DataConfig(path=case.data, buffer_rows=8 * case.shape.batch),
            model=ModelConfig(name="deepfm"),  # the one with the least time of its own
            embedding=embedding,
            train=TrainConfig(epochs=1, batch_size=case.shape.batch, output=output),
        )
        result = train(job)
    return {
        "rss": result.peak_rss_bytes,
        "before": before,
        "tables": result.bytes["tables"],
        "optimizer": result.bytes["optimizer"],
    }
