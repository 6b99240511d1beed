"""The model card: what a deployed model is, in Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from recsys_compress.data.inputs import DenseInput, IdInput
from recsys_compress.serve.artifact import Artifact

_FIGURES = ("auc", "logloss", "ne", "calibration", "ece")


def model_card(
    artifact: Artifact, result: Mapping[str, Any], policy: Sequence[Mapping[str, Any]]
) -> str:
    """Returns the card of an artifact whose own files are described but for the card.

    Args:
        artifact: what it holds.
        result: of the run.
        policy: how its tables are stored, as `Policy.describe` has it.
    """
    full, sizes = result["bytes"]["full"], artifact.bytes
    lines = [
        f"# Click-through model, tables stored by `{artifact.method}`",
        "",
        f"Run `{artifact.run}`, trained on data of checksum `{artifact.dataset[:16]}`.",
        "",
        "| bytes | |",
        "|---|--:|",
        f"| full tables, fp32 | {int(full):,} |",
        f"| tables as trained | {int(result['bytes']['tables']):,} |",
        f"| tables as served | {sizes['tables']:,} |",
        f"| all weights as served | {sizes['model']:,} |",
        f"| vocabularies | {_vocabulary_bytes(artifact):,} |",
        "",
        "| test split | " + " | ".join(_FIGURES) + " |",
        "|---|" + "--:|" * len(_FIGURES),
        _figures("as trained", artifact.trained),
        _figures("as served", artifact.test),
        "",
        "## Tables",
        "",
        "| tables | method |",
        "|---|---|",
        *(f"| {', '.join(part['tables'])} | `{part['method']}` |" for part in policy),
        "",
        "Storage: "
        + ", ".join(f"`{t}` in {kind}" for t, kind in artifact.storage.items())
        + f"; linear layers in {artifact.layers}.",
        "",
        "## What it reads",
        "",
        "| column | holds | missing |",
        "|---|---|---|",
        *(_dense(column) for column in artifact.inputs.dense),
        *(_ids(field) for field in artifact.inputs.ids),
        "",
        "Other columns are ignored. An id that was not seen in training counts as unknown"
        + (" (a hashed one has no such case)." if _is_hashed(artifact) else ".")
        + " A number must be finite.",
        "",
        "## How to load it",
        "",
        "```python",
        "from recsys_compress.serve.predictor import Predictor",
        "",
        "Predictor.load(FOLDER).predict(rows)  # DataFrame, Arrow table or Parquet path",
        "```",
        "",
    ]
    return "\n".join(lines)


def _vocabulary_bytes(artifact: Artifact) -> int:
    return sum(f.bytes for name, f in artifact.files.items() if name.startswith("vocabulary/"))


def _figures(name: str, figures: Mapping[str, float | None]) -> str:
    values = [figures.get(figure) for figure in _FIGURES]
    shown = ["" if value is None else f"{value:.6f}" for value in values]
    return f"| {name} | {' | '.join(shown)} |"


def _dense(column: DenseInput) -> str:
    missing = "refused" if column.missing is None else f"counts as {column.missing:g}"
    return f"| `{column.name}` | numbers | {missing} |"


def _ids(field: IdInput) -> str:
    holds = f"{field.kind or 'integer or string'}s"
    if field.part:
        holds = f"times, told in {field.zone or 'UTC'} where they name a zone"
    if field.multi_valued:
        holds = f"lists of {holds}"
        holds += f", or text cut at `{field.separator}`" if field.separator else ""
    weighted = f", weights in `{field.weights}`" if field.weights else ""
    missing = "no ids" if field.multi_valued else "an id of its own"
    return f"| `{field.column}` | {holds}{weighted} | {missing} |"


def _is_hashed(artifact: Artifact) -> bool:
    return any(field.encoding == "hash" for field in artifact.schema.categorical)
