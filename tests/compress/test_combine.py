"""Several lowerings with and without a combine in one collection, and what it costs."""

import pytest
import torch
from torchrec.modules.embedding_configs import PoolingType

from recsys_compress.compress import (
    CompressedEmbeddingBagCollection,
    Method,
    Policy,
    Rule,
    TableOptions,
)
from recsys_compress.compress.bags import Bags
from recsys_compress.compress.combine import Pairwise
from recsys_compress.compress.methods.full import Full
from recsys_compress.compress.methods.low_rank import LowRank
from recsys_compress.compress.methods.quotient_remainder import QuotientRemainder
from recsys_compress.compress.policy import full_bytes
from tests.compress.tables import make_batch, make_policy, make_tables

MIXED: dict[str, tuple[Method, str]] = {
    "user": (LowRank(rank=3), "rowwise_adagrad"),
    "item": (QuotientRemainder(share=0.1), "adam"),
    "genre": (LowRank(rank=2), "sgd"),
}


def make_mixed(names: list[str]) -> CompressedEmbeddingBagCollection:
    rules = [
        Rule(method=method, options=TableOptions(optimizer=optimizer), table=name)
        for name, (method, optimizer) in MIXED.items()
        if name in names
    ]
    return CompressedEmbeddingBagCollection(
        tables=[t for t in make_tables(pooling=PoolingType.MEAN) if t.name in names],
        policy=Policy(default=Rule(method=Full()), rules=tuple(rules)),
    )


def test_lowerings_side_by_side_give_what_each_gives_alone() -> None:
    torch.manual_seed(0)
    together = make_mixed(list(MIXED))
    tables = {t.members: t.name for t in together.size_report().physical}
    batch = make_batch(64)
    output = together(batch)
    assert output.keys() == list(MIXED)
    for number, name in enumerate(MIXED):
        alone = make_mixed([name])
        state = together.state_dict()
        own = {t.name: state[tables[t.members]] for t in alone.size_report().physical}
        for parameter in (p.name for p in alone.size_report().combine):
            own[parameter] = state[parameter.replace("combines.0", f"combines.{number}")]
        alone.load_state_dict(own)
        assert torch.allclose(output[name], alone(batch)[name], atol=1e-7)


def test_without_a_combine_nothing_is_copied() -> None:
    collection = CompressedEmbeddingBagCollection(tables=make_tables(), policy=make_policy(Full()))
    seen = []
    collection.fused.register_forward_hook(lambda *call: seen.append(call[2].values()))
    assert collection(make_batch(8)).values().data_ptr() == seen[0].data_ptr()


def test_combining_parameters_are_reported_with_their_optimizers_state() -> None:
    collection = make_mixed(["user", "genre"])
    sizes = {p.name: p for p in collection.size_report("adam").combine}
    assert {name: p.parameter_bytes for name, p in sizes.items()} == {
        "output.combines.0.projections.3x12": 3 * 12 * 4,
        "output.combines.0.means.3x12": 12 * 4,
        "output.combines.1.projections.2x12": 2 * 12 * 4,
        "output.combines.1.means.2x12": 12 * 4,
    }
    kinds = {"adam": torch.optim.AdamW, "adagrad": torch.optim.Adagrad, "sgd": torch.optim.SGD}
    for name, kind in kinds.items():
        optimizer = kind(collection.output.parameters(), lr=0.1)
        collection(make_batch(8)).values().sum().backward()
        optimizer.step()
        state = [t for values in optimizer.state.values() for t in values.values() if t is not None]
        report = collection.size_report(name)
        assert sum(p.optimizer_bytes for p in report.combine) == sum(t.nbytes for t in state)


def test_serving_bytes_and_plain_data_count_what_combines() -> None:
    report = make_mixed(["user", "genre"]).size_report()
    plain = report.to_json()
    combine = sum(p["parameter_bytes"] for p in plain["combine"])
    assert combine == 7 * 12 * 4
    assert plain["total"]["serving"]["fp32"] == combine + 4 * (3 * 5000 + 2 * 40)
    assert report.table_bytes < full_bytes(make_tables())


@pytest.mark.parametrize("others", [0, 2])
def test_a_product_has_the_gradients_of_a_product(others: int) -> None:
    torch.manual_seed(0)
    vectors = torch.randn(5, 2 * 3 + others, dtype=torch.float64, requires_grad=True)
    tables = make_tables()
    bags = Bags(features=make_batch(5), names=[t.name for t in tables], is_weighted=False)
    combine = Pairwise(3, product=True)
    assert torch.equal(combine(vectors, bags)[:, :3], vectors[:, :3] * vectors[:, 3:6])
    assert torch.equal(combine(vectors, bags)[:, 3:], vectors[:, 6:])
    assert torch.autograd.gradcheck(lambda given: combine(given, bags), (vectors,))
