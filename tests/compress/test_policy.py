import math

import pytest

from recsys_compress.compress import (
    CompressedEmbeddingBagCollection,
    Method,
    Policy,
    Rule,
    TableOptions,
)
from recsys_compress.compress.methods.full import Full
from recsys_compress.compress.methods.hash import Hash
from recsys_compress.compress.methods.low_rank import LowRank
from recsys_compress.compress.methods.unified import Unified
from recsys_compress.compress.policy import full_bytes, resolve
from recsys_compress.config import EmbeddingConfig, RuleConfig
from recsys_compress.errors import UserError
from tests.compress.tables import make_batch, make_policy, make_tables


def methods(policy: Policy) -> dict[str, str]:
    return {
        table.name: type(assignment.rule.method).__name__
        for assignment in policy.assign(make_tables())
        for table in assignment.tables
    }


def test_small_tables_are_left_alone() -> None:
    assert methods(make_policy(Hash(share=0.5))) == {
        "user": "Hash",
        "item": "Hash",
        "genre": "Full",
    }
    assert methods(make_policy(Hash(share=0.5), min_rows=0))["genre"] == "Hash"


def test_the_first_matching_rule_wins() -> None:
    policy = Policy(
        default=Rule(method=Full()),
        rules=(Rule(method=Hash(share=0.5), table="u.*"), Rule(method=Unified(), table=".*r")),
    )
    assert methods(policy) == {"user": "Hash", "item": "Full", "genre": "Full"}


def test_a_rule_without_a_table_is_an_error() -> None:
    policy = Policy(default=Rule(method=Full()), rules=(Rule(method=Full(), table="usr"),))
    with pytest.raises(UserError, match="no table matches 'usr'; tables: user, item, genre"):
        policy.assign(make_tables())


def test_a_budget_covers_full_tables_and_is_shared_by_the_rest() -> None:
    tables = make_tables()
    policy = Policy(
        default=Rule(method=Unified(num_probes=3)), rules=(Rule(method=Hash(), table="item"),)
    )
    budget = full_bytes(tables) // 4
    fitted = policy.fit(tables, budget)
    report = CompressedEmbeddingBagCollection(tables=tables, policy=fitted).size_report()
    assert 0.95 * budget <= report.table_bytes <= budget
    by_member = {members: t for t in report.physical for members in t.members}
    assert by_member["user"].parameter_bytes > by_member["item"].parameter_bytes / 2


def test_merged_tables_differ_in_width_or_training_only() -> None:
    policy = Policy(
        default=Rule(method=Unified(num_embeddings=64, num_probes=3)),
        rules=(Rule(method=Full(), table="item", options=TableOptions(optimizer="adam")),),
    )
    collection = CompressedEmbeddingBagCollection(tables=make_tables(), policy=policy)
    assert {t.name: (t.num_embeddings, t.members) for t in collection.size_report().physical} == {
        "fused.embedding_bags.rowwise_adagrad_d4.weight": (64, ("user",)),
        "fused.embedding_bags.rowwise_adagrad_d12.weight": (40, ("genre",)),
        "dense.adam_d12.embedding_bags.adam_d12.weight": (3000, ("item",)),
    }
    assert collection(make_batch(8)).keys() == ["user", "item", "genre"]


def test_padding_is_counted_for_fused_tables_only() -> None:
    tables = make_tables(dim=10)
    for optimizer, width in (("rowwise_adagrad", 12), ("adam", 10)):
        collection = CompressedEmbeddingBagCollection(
            tables=tables, policy=make_policy(Full(), optimizer)
        )
        (table,) = collection.size_report().physical
        assert (table.embedding_dim, table.used_dim) == (width, 10)
        assert collection(make_batch(8)).length_per_key() == [10] * 3


def test_serving_bytes_are_unpadded_and_count_scales() -> None:
    collection = CompressedEmbeddingBagCollection(
        tables=make_tables(dim=10), policy=make_policy(Full())
    )
    (table,) = collection.size_report().physical
    rows = table.num_embeddings
    assert [table.serving_bytes(t) for t in ("fp32", "fp16", "int8", "int4")] == [
        40 * rows,
        20 * rows,
        14 * rows,
        9 * rows,
    ]


def test_a_job_describes_a_policy() -> None:
    config = EmbeddingConfig(
        method="unified",
        dim=12,
        learning_rate=0.5,
        budget="0.1x",
        seed=7,
        rules=(RuleConfig(table="item", method="hash"),),
        methods={"unified": {"num_probes": 3}, "hash": {"share": 0.5}},
    )
    policy = resolve(config, make_tables())
    assert policy.default.options == policy.rules[0].options == TableOptions(learning_rate=0.5)
    assert isinstance(policy.default.method, Unified)
    assert policy.default.method.num_probes == 3
    assert policy.default.method.seed == 7
    assert policy.rules[0].table == "item"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "unifed"}, "did you mean 'unified'"),
        ({"methods": {"hash": {"shar": 0.1}}}, "unknown key 'shar'; did you mean 'share'"),
        ({"methods": {"hash": {"share": "x"}}}, r"embedding.methods.hash: share = 'x'"),
        ({"methods": {"full": {"optimizer": "adam"}}}, "unknown key 'optimizer'"),
        ({"optimizer": "rowise_adagrad"}, "did you mean 'rowwise_adagrad'"),
        ({"weight_decay": 0.1}, "has no weight decay on CPU"),
        ({"optimizer": "adam", "dense_rows": 10}, "no fused Adam on CPU"),
        ({"budget": "0x"}, "not positive"),
        ({"budget": "12 apples"}, "is not understood"),
        ({"method": "full", "budget": "0.5x"}, "out of reach"),
        (
            {"rules": (RuleConfig(table="*r", method="full"),)},
            r"rules: table = '\*r' is no regular",
        ),
        ({"rules": (RuleConfig(table="u[", method="full"),)}, r"or 'u\\\\\[' for that name"),
        (
            {"method": "unified", "budget": "0.1x", "methods": {"unified": {"num_tables": 0}}},
            r"^embedding\.methods\.unified\.num_tables = 0: must be 1 or more$",
        ),
        (
            {"method": "unified", "methods": {"unified": {"num_probes": {}}}},
            "unified.num_probes = {}: names no table",
        ),
        (
            {"method": "dnis", "methods": {"dnis": {"growth": math.nan}}},
            "dnis.growth = nan: must be 1.0 or more",
        ),
    ],
)
def test_wrong_settings_are_one_clear_error(settings: dict[str, object], message: str) -> None:
    def build() -> None:
        policy = resolve(EmbeddingConfig(**{"dim": 12, **settings}), make_tables())
        CompressedEmbeddingBagCollection(tables=make_tables(), policy=policy)

    with pytest.raises(UserError, match=message):
        build()


def test_methods_that_no_table_gets_add_no_stages() -> None:
    all_ = (RuleConfig(table=".*", method="hash"), RuleConfig(table="u.*", method="dnis"))
    methods = {"hash": {"share": 0.5}}
    config = EmbeddingConfig(method="dnis", dim=12, rules=all_, methods=methods)
    (phase,) = resolve(config, make_tables()).phases()
    assert not phase.search
    small = EmbeddingConfig(method="dnis", dim=12, min_rows=10_000)
    assert len(resolve(small, make_tables()).phases()) == 1
    some = EmbeddingConfig(method="dnis", dim=12, min_rows=0)
    assert len(resolve(some, make_tables()).phases()) == 3


@pytest.mark.parametrize(
    ("method", "other"),
    [(Unified(num_embeddings=64, num_probes=3), "user#0"), (LowRank(rank=2), "=user")],
)
def test_a_feature_called_what_a_lookup_is_is_refused(method: Method, other: str) -> None:
    tables = make_tables()
    tables[2].feature_names = [other]  # by its few rows left full
    with pytest.raises(UserError, match=rf"features 'user' and '{other}': a look-up of either"):
        CompressedEmbeddingBagCollection(tables=tables, policy=make_policy(method))


def test_names_given_twice_are_refused() -> None:
    tables = make_tables()
    tables[1].name = "user"
    with pytest.raises(UserError, match="table 'user' is given twice"):
        CompressedEmbeddingBagCollection(tables=tables, policy=make_policy(Full()))


def test_tables_too_large_for_the_kernel_are_refused() -> None:
    tables = make_tables()
    tables[0].num_embeddings = 2**62
    with pytest.raises(UserError, match="use a method that shares rows"):
        CompressedEmbeddingBagCollection(tables=tables, policy=make_policy(Full()))
