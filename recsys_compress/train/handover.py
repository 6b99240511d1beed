"""From one trained model to the next: another way to store its tables, the rest as it was."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recsys_compress.compress.curvature import Curvature
from recsys_compress.compress.method import Trained, Values
from recsys_compress.compress.moments import Moments
from recsys_compress.compress.policy import Policy
from recsys_compress.compress.spectrum import Item
from recsys_compress.compress.tensors import below
from recsys_compress.data.dataset import PreparedDataset
from recsys_compress.errors import UserError
from recsys_compress.ranks import Ranks
from recsys_compress.train.build import EMBEDDINGS, Built
from recsys_compress.train.curvature import measure
from recsys_compress.train.shard import write


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a model begins with.

    Attributes:
        policy: how its tables are stored.
        tables: their values, in the order of the policy's assignments.
        model: values of the other tensors, by their names in the model.
        layers: ranks of layers that are to be factorized.
        tags: where it comes from.
    """

    policy: Policy
    tables: Sequence[Values]
    model: Mapping[str, Tensor]
    layers: Mapping[str, int] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)

    @torch.no_grad()
    def write(self, built: Built) -> None:
        """Overwrites the weights of a model that was built for the same policy.

        Raises:
            UserError: its other weights are not those of the trained model.
        """
        state = built.state()
        model = {name: value for name, value in state.items() if not name.startswith(EMBEDDINGS)}
        self._check(model)
        write(model, self.model)
        tables = built.table_weights()
        built.embeddings.write(self.tables, tables)
        if Ranks.current().size > 1:  # else they were the live ones
            write(below(EMBEDDINGS, state), tables)

    def _check(self, model: Mapping[str, Tensor]) -> None:
        for name in sorted(model.keys() | self.model.keys()):
            mine, its = (
                tuple(found[name].shape) if name in found else "no" for found in (model, self.model)
            )
            if mine != its:
                raise UserError(
                    f"weights {name}: the trained model has {its} values and the job's {mine}; "
                    "leave the settings of [model] as they were, and have methods give vectors of "
                    "the trained width"
                )


def hand_over(
    built: Built,
    dataset: PreparedDataset,
    tables: Sequence[EmbeddingBagConfig],
    policy: Policy,
    layers: Sequence[Item] = (),
    losses: Mapping[str, Tensor] | None = None,
    curvature: Callable[[str], Curvature] | None = None,
) -> Start:
    """Returns what a model with tables under another policy begins with.

    Args:
        built: the trained model.
        dataset: what it was trained on.
        tables: the logical tables.
        policy: its methods adopt the trained tables.
        layers: that a method may factorize.
        losses: by table, as for `Trained.losses`.
        curvature: by table, where it is measured already.

    Raises:
        UserError: a method cannot take over what another has trained.
    """
    embeddings = built.embeddings
    built.model.eval()
    adopted, values = policy.adopt(
        tables,
        built.policy,
        embeddings.values(built.table_weights()),
        Trained(
            vectors=embeddings.vectors,
            moments=functools.cache(lambda name: table_moments(built, dataset, name)),
            layers=tuple(layers),
            losses=None if losses is None else losses.__getitem__,
            weights=lambda name: torch.tensor(dataset.frequencies(name)),
            widths={c.name: c.embedding_dim for c in embeddings.embedding_bag_configs()},
            curvature=curvature or curvatures(built, dataset),
        ),
    )
    return Start(
        policy=adopted,
        tables=values,
        model=built.dense_weights(),
        layers={name: rank for given in values for name, rank in given.layers.items()},
    )


def curvatures(built: Built, dataset: PreparedDataset) -> Callable[[str], Curvature]:
    """Returns the curvature by table, measured for all of them when the first is asked for."""
    measured = functools.cache(lambda: measure(built, dataset))
    return lambda name: measured()[name]


def table_moments(built: Built, dataset: PreparedDataset, table: str) -> Moments:
    """Returns the moments of a table's vectors over the training split.

    The preparation has counted how often each id is looked up there, so no second pass is needed.
    """
    vectors = built.embeddings.vectors(table)
    moments = Moments.zeros(vectors.shape[1])
    moments.add(vectors, torch.tensor(dataset.frequencies(table)))
    return moments


def check_ids(wanted: PreparedDataset, own: PreparedDataset, folder: Path) -> None:
    """Checks that a run's ids stand for the same values in another dataset.

    Args:
        wanted: the dataset whose tables are to take the run's vectors.
        own: what the run was trained on.
        folder: of the run, for messages.

    Raises:
        UserError: a vector would become that of another value.
    """
    if wanted.checksum == own.checksum:
        return
    coded = [part.name for part in wanted.schema.categorical if part.encoding == "vocabulary"]
    for name in coded:
        if not wanted.vocabulary(name).equals(own.vocabulary(name)):
            raise UserError(
                f"{folder}: the ids of field {name!r} stand for other values in its data than in "
                f"{wanted.path}; name the run's own data"
            )


def check_tables(
    tables: Sequence[EmbeddingBagConfig], others: Sequence[EmbeddingBagConfig], folder: Path
) -> None:
    """Refuses a run whose logical tables are not those of the job.

    Args:
        tables: of the job.
        others: of the run.
        folder: of the run, for messages.

    Raises:
        UserError: a table is missing on either side, or its rows or width differ.
    """
    found = {table.name: table for table in others}
    for table in tables:
        other = found.pop(table.name, None)
        if other is None:
            raise UserError(f"run {folder}: has no table {table.name!r}; name a run of this data")
        for key in ("num_embeddings", "embedding_dim"):
            mine, its = getattr(table, key), getattr(other, key)
            if mine != its:
                raise UserError(
                    f"run {folder}: table {table.name!r} has {key} = {its:,} there and {mine:,} in "
                    "the job; name a run of the same data and embedding.dim"
                )
    if found:
        raise UserError(
            f"run {folder}: has a table {min(found)!r} that the job's data has not; name a run of "
            "this data"
        )
