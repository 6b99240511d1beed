import dataclasses

import pytest
import torch

from recsys_compress.compress import CompressedEmbeddingBagCollection, TableOptions
from recsys_compress.compress.methods.mixed_dim import MixedDim
from recsys_compress.errors import UserError
from tests.compress.tables import make_batch, make_policy, make_tables


def test_widths_follow_the_popularity_rule() -> None:
    tables = make_tables(dim=64)
    exact = {"user": 64 * (40 / 5000) ** 0.4, "item": 64 * (40 / 3000) ** 0.4, "genre": 64}
    for rounding, expected in (
        ("none", {name: round(width) for name, width in exact.items()}),
        ("power_of_two", {"user": 8, "item": 16, "genre": 64}),
        ("multiple_of_4", {"user": 8, "item": 12, "genre": 64}),
    ):
        assert MixedDim(alpha=0.4, rounding=rounding).dims(tables) == expected


def test_alpha_zero_gives_one_width() -> None:
    tables = make_tables(dim=16)[:2]
    assert MixedDim(alpha=0.0, base_dim=4).dims(tables) == {"user": 4, "item": 4}
    assert MixedDim(alpha=0.0).dims(tables) == {"user": 16, "item": 16}
    assert MixedDim(alpha=0.0).lower(tables).combine is None


def test_tables_that_a_projection_would_not_shrink_keep_their_width() -> None:
    tables = make_tables(dim=16)
    tables[1] = dataclasses.replace(tables[1], num_embeddings=5)  # 4 * (5 + 16) > 5 * 16
    assert MixedDim(alpha=0.0, base_dim=4).dims(tables) == {"user": 4, "item": 16, "genre": 4}


def test_vectors_are_projected_rows() -> None:
    tables = make_tables(dim=16)
    collection = CompressedEmbeddingBagCollection(
        tables=tables, policy=make_policy(MixedDim(alpha=1.0, base_dim=8), "adam", min_rows=0)
    )
    state = collection.state_dict()
    narrow = state["dense.adam_d4.embedding_bags.adam_d4.weight"]
    wide = state["dense.adam_d8.embedding_bags.adam_d8.weight"]
    user, item = state["output.combines.0.projections.4x16"]
    (genre,) = state["output.combines.0.projections.8x16"]
    batch = make_batch(32)
    output = collection(batch)
    assert output.keys() == ["user", "item", "genre"]
    assert torch.allclose(output["user"], narrow[batch["user"].values()] @ user, atol=1e-6)
    assert torch.allclose(output["item"], narrow[5000 + batch["item"].values()] @ item, atol=1e-6)
    bags = batch["genre"].lengths().tolist()
    sums = [ids.sum(0) for ids in wide[batch["genre"].values()].split(bags)]
    assert torch.allclose(output["genre"], torch.stack(sums) @ genre, atol=1e-6)


def test_projections_are_part_of_the_budget() -> None:
    tables = make_tables(dim=64)
    fitted = MixedDim().fit(tables, 195_000, TableOptions())
    collection = CompressedEmbeddingBagCollection(
        tables=tables, policy=make_policy(fitted, min_rows=0)
    )
    report = collection.size_report()
    dims = fitted.dims(tables)
    rows = {t.name: t.num_embeddings for t in tables}
    projections = sum(d * 64 * 4 for d in dims.values() if d < 64)
    assert sum(p.parameter_bytes for p in report.combine) == projections > 0
    assert report.table_bytes == sum(4 * dims[n] * rows[n] for n in rows) + projections
    assert 0.95 * 195_000 <= report.table_bytes <= 195_000


def test_a_gap_between_sizes_names_both_ends() -> None:
    tables = make_tables()[:2]
    message = r"no size within 5 % below; the nearest are 224,192 and 304,384 bytes"
    with pytest.raises(UserError, match=message):
        MixedDim().fit(tables, 300_000, TableOptions())
    assert MixedDim().fit(tables, 224_192, TableOptions()).dims(tables)["user"] == 4
    assert MixedDim().fit(tables, 304_384, TableOptions()).dims(tables)["user"] == 8


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (MixedDim(), "needs embedding.budget or embedding.methods.mixed_dim.alpha"),
        (MixedDim(alpha=-1.0), r"alpha = -1.0: must lie in \[0, 4.0\]"),
        (MixedDim(alpha=1.0, base_dim=13), r"base_dim = 13: must lie in \[1, 12\]"),
    ],
)
def test_wrong_knobs_are_one_clear_error(method: MixedDim, message: str) -> None:
    with pytest.raises(UserError, match=message):
        method.lower(make_tables())


def test_an_unknown_rounding_is_one_clear_error() -> None:
    with pytest.raises(UserError, match="rounding = 'power_of_2': did you mean 'power_of_two'"):
        MixedDim(rounding="power_of_2")  # type: ignore[arg-type]
