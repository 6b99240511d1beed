"""Storage types: error, bytes, files and refusals, for fused and dense tables of many widths."""

import re
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys_compress.compress import (
    CompressedEmbeddingBagCollection,
    Method,
    Policy,
    Rule,
    TableOptions,
)
from recsys_compress.compress.kernels import pack
from recsys_compress.compress.methods.full import Full
from recsys_compress.compress.methods.low_rank import LowRank
from recsys_compress.compress.methods.mixed_dim import MixedDim
from recsys_compress.compress.size import DATA_TYPE_BITS, DataType, row_bytes, smallest_type
from recsys_compress.compress.storage import (
    QuantizedEmbeddingBagCollection,
    StoragePlan,
    quantize,
)
from recsys_compress.errors import UserError
from recsys_compress.train.shard import full_tensors, process_group, shard
from tests.compress.tables import ROWS, make_batch, make_policy, make_tables
from tests.compress.test_contract import METHODS

# Greatest error of a value in [-1, 1]: half a step, and the rounding of scale and bias to fp16.
ERROR = {"fp32": 1e-6, "fp16": 2**-12, "bf16": 2**-9, "int8": 0.0045, "int4": 0.068, "int2": 0.335}

every_type = pytest.mark.parametrize("data_type", DATA_TYPE_BITS)
every_table = pytest.mark.parametrize(
    ("optimizer", "dim"),
    [("rowwise_adagrad", dim) for dim in (4, 6, 8, 12, 16)] + [("adam", d) for d in (6, 15, 30)],
)
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def make(
    method: Method | None = None,
    optimizer: str = "rowwise_adagrad",
    dim: int = 12,
    *,
    is_weighted: bool = False,
    device: str | None = None,
) -> CompressedEmbeddingBagCollection:
    """Returns a collection, all of whose values are in [-1, 1] unless it is on a given device."""
    collection = CompressedEmbeddingBagCollection(
        tables=make_tables(dim=dim),
        policy=make_policy(method or Full(), optimizer),
        is_weighted=is_weighted,
        fused_device=None if device is None else torch.device(device),
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in collection.parameters():
            parameter.uniform_(-1, 1)
    return collection


def state_bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in module.state_dict().values())


@every_type
@every_table
@pytest.mark.parametrize("weighted", [False, True])
def test_errors_are_those_of_rounding(
    data_type: DataType, optimizer: str, dim: int, weighted: bool
) -> None:
    collection = make(optimizer=optimizer, dim=dim, is_weighted=weighted)
    batch = make_batch(500, weighted=weighted)
    expected, found = collection(batch), quantize(collection, StoragePlan(types=data_type))(batch)
    assert found.keys() == expected.keys()
    assert found.values().shape == expected.values().shape
    assert found.values().dtype == torch.float32
    errors = {key: (found[key] - expected[key]).abs().max().item() for key in ROWS}
    assert max(errors["user"], errors["item"]) <= ERROR[data_type]
    # Bags of up to three; bf16 rounds their sum, of up to 3, as well.
    assert errors["genre"] <= 3 * ERROR[data_type] + (2**-7 if data_type == "bf16" else 0)
    if DATA_TYPE_BITS[data_type] < 32:
        assert errors["user"] > 0


@every_type
@every_table
@pytest.mark.parametrize("weighted", [False, True])
def test_empty_bags_and_batches_give_zeros(
    data_type: DataType, optimizer: str, dim: int, weighted: bool
) -> None:
    collection = make(optimizer=optimizer, dim=dim, is_weighted=weighted)
    served = quantize(collection, StoragePlan(types=data_type))
    for batch in (5, 0):
        empty = KeyedJaggedTensor(
            keys=list(ROWS),
            values=torch.empty(0, dtype=torch.int64),
            weights=torch.empty(0) if weighted else None,
            lengths=torch.zeros(3 * batch, dtype=torch.int32),
            stride=batch,
        )
        output = served(empty).values()
        assert output.shape == (batch, 3 * dim)
        assert not output.any()


@every_type
def test_narrow_ids_and_other_keys_change_nothing(data_type: DataType) -> None:
    served, batch = quantize(make(dim=6), StoragePlan(types=data_type)), make_batch(64)
    other = KeyedJaggedTensor(
        keys=[*reversed(ROWS), "more"],
        values=torch.cat([*(batch[key].values() for key in reversed(ROWS)), torch.arange(64)]),
        lengths=torch.cat(
            [*(batch[key].lengths() for key in reversed(ROWS)), torch.ones(64, dtype=torch.int32)]
        ),
    )
    narrow = KeyedJaggedTensor(
        keys=other.keys(), values=other.values().int(), lengths=other.lengths()
    )
    for same in (other, narrow):
        assert torch.equal(served(same).values(), served(batch).values())


@every_type
@every_method
@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam"])
def test_a_file_has_the_bytes_reported_and_gives_the_same_outputs(
    data_type: DataType, method: Method, optimizer: str, tmp_path: Path
) -> None:
    plan, collection, batch = StoragePlan(types=data_type), make(method, optimizer), make_batch(64)
    served, report = quantize(collection, plan), collection.size_report()
    assert state_bytes(served) == report.serving_bytes(data_type)
    assert state_bytes(served) == report.to_json()["total"]["serving"][data_type]
    assert state_bytes(served) == plan.serving_bytes(collection)
    file = tmp_path / "served.safetensors"
    save_file(served.state_dict(), file)
    on_disk = file.read_bytes()
    assert len(on_disk) - 8 - int.from_bytes(on_disk[:8], "little") == state_bytes(served)
    loaded = QuantizedEmbeddingBagCollection(make(method, optimizer, device="meta"), plan)
    assert not torch.equal(loaded(batch).values(), served(batch).values())
    loaded.load_state_dict(load_file(file))
    assert torch.equal(loaded(batch).values(), served(batch).values())


def test_types_differ_by_table_and_configs_stay() -> None:
    collection = make(MixedDim(alpha=1.0, base_dim=8))
    widths = {t.name: t.used_dim for t in collection.merged_tables()}
    assert len(widths) > 1
    types = dict(zip(widths, ("int4", "bf16", "fp32", "fp16"), strict=False))
    assert StoragePlan(types=types).resolve(collection) == types
    served = quantize(collection, StoragePlan(types=types))
    stored = served.state_dict()
    for name, data_type in types.items():
        rows = stored[f"tables.{name}.weight"]
        assert rows[0].numel() * rows.element_size() == row_bytes(data_type, widths[name])
    assert state_bytes(served) == StoragePlan(types=types).serving_bytes(collection)
    assert served.embedding_bag_configs() == collection.embedding_bag_configs()
    assert not served.is_weighted()
    error = served(make_batch(100)).values() - collection(make_batch(100)).values()
    assert 0 < error.abs().max() < 1


@every_method
@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam"])
def test_a_sharded_collection_gives_what_a_plain_one_gives(method: Method, optimizer: str) -> None:
    plain, plan, batch = make(method, optimizer), StoragePlan(types="int4"), make_batch(64)
    expected = quantize(plain, plan)(batch).values()
    with process_group():
        collection = make(method, optimizer, device="meta")
        shard(nn.ModuleDict({"embeddings": collection}), collection, torch.device("cpu"))
        state = full_tensors(collection.state_dict())
        for name, value in plain.state_dict().items():
            state[name].copy_(value)
        assert torch.equal(quantize(collection, plan, state)(batch).values(), expected)
        if optimizer != "adam":
            with pytest.raises(ValueError, match="the collection is sharded; pass its whole"):
                quantize(collection, plan)


def test_training_on_leaves_what_is_served() -> None:
    collection, batch = make(LowRank(rank=5)), make_batch(64)
    served = quantize(collection, StoragePlan(types="fp32"))
    before = served(batch).values()
    with torch.no_grad():
        for parameter in collection.parameters():
            parameter.zero_()
    assert torch.equal(served(batch).values(), before)
    assert not any(p.requires_grad for p in served.parameters())


def test_buffers_of_id_transforms_are_served_as_they_are() -> None:
    collection = make()
    collection.ids.transforms[0].register_buffer("mask", torch.arange(7) << 60)
    served = quantize(collection, StoragePlan(types="int4"))
    assert torch.equal(served.state_dict()["ids.transforms.0.mask"], torch.arange(7) << 60)
    assert state_bytes(served) == collection.size_report().serving_bytes("int4")
    state = dict(collection.state_dict())
    state["ids.transforms.0.mask"] = torch.ones(7, dtype=torch.int64)
    again = quantize(collection, StoragePlan(types="int4"), state)
    assert again.state_dict()["ids.transforms.0.mask"].sum() == 7


def test_the_smallest_type_counts_scales() -> None:
    def types(width: int) -> list[str]:
        return [smallest_type(t, width) for t in DATA_TYPE_BITS]

    assert set(get_args(DataType)) == set(DATA_TYPE_BITS)
    assert types(1) == types(2) == ["fp32", "fp16", "bf16", "fp16", "fp16", "fp16"]
    assert types(3) == ["fp32", "fp16", "bf16", "fp16", "fp16", "int2"]
    assert types(4) == ["fp32", "fp16", "bf16", "fp16", "int4", "int2"]
    assert types(5) == types(64) == list(DATA_TYPE_BITS)


@pytest.mark.parametrize(
    ("types", "message"),
    [
        ("int3", "storage type 'int3': unknown; did you mean"),
        ({"rowwise_adagrad_d4": "int"}, "storage type 'int': unknown; did you mean"),
        ({}, "table 'rowwise_adagrad_d4' (of user, item, genre) has no type; give it one"),
        (
            {"rowwise_adagrad_d4": "fp16", "rowwise_adagrad_d8": "fp16"},
            "there is no table 'rowwise_adagrad_d8'; did you mean 'rowwise_adagrad_d4'?",
        ),
        (
            {"rowwise_adagrad_d4": "int8"},
            "int8 makes table 'rowwise_adagrad_d4' no smaller: a row of 4 takes 8 bytes with its "
            "scale and bias, and in fp16 8; use 'fp16'",
        ),
    ],
)
def test_plans_that_do_not_suit_are_refused(
    types: DataType | dict[str, DataType], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        quantize(make(dim=4), StoragePlan(types=types))


@pytest.mark.parametrize("value", [7e4, float("inf"), float("nan")])
def test_values_beyond_fp16_are_refused(value: float) -> None:
    collection = make()
    with torch.no_grad():
        collection.get_parameter("fused.embedding_bags.rowwise_adagrad_d12.weight")[3, 2] = value
    for data_type in ("fp16", "int8", "int2"):
        with pytest.raises(UserError, match="values beyond 65,504, or not finite"):
            quantize(collection, StoragePlan(types=data_type))
    quantize(collection, StoragePlan(types="bf16"))


def test_weights_of_another_collection_are_refused() -> None:
    collection, plan = make(LowRank(rank=5)), StoragePlan(types="int8")
    state = dict(collection.state_dict())
    lacking = {name: t for name, t in state.items() if name != list(state)[-1]}
    with pytest.raises(ValueError, match=r"weights lack 'output\.combines"):
        quantize(collection, plan, lacking)
    shorter = {name: t[:-1] if name.startswith("fused.") else t for name, t in state.items()}
    with pytest.raises(ValueError, match="pass the state dict of this collection"):
        quantize(collection, plan, shorter)


@pytest.mark.parametrize(("data_type", "bits"), [("int4", 4), ("int2", 2)])
def test_integers_are_packed_as_torch_packs_them(data_type: DataType, bits: int) -> None:
    values = torch.randn(300, 12, generator=torch.Generator().manual_seed(0))
    values[7] = 0.1  # a constant row
    reference = getattr(torch.ops.quantized, f"embedding_bag_{bits}bit_prepack")(values)
    assert torch.equal(pack(values, data_type), reference)


@every_type
def test_constant_rows_keep_their_value(data_type: DataType) -> None:
    values = torch.tensor([0.0, 0.1, -3.0, 1e-6, 1e-8])[:, None].expand(5, 6)
    collection = make(dim=6, optimizer="adam")
    name = "dense.adam_d6.embedding_bags.adam_d6.weight"
    with torch.no_grad():
        collection.get_parameter(name)[:5] = values
    served = quantize(collection, StoragePlan(types=data_type))
    ids, ones = torch.arange(5).repeat(3), torch.ones(15, dtype=torch.int32)
    batch = KeyedJaggedTensor(keys=list(ROWS), values=ids, lengths=ones, stride=5)
    assert torch.allclose(served(batch)["user"], values, rtol=2**-8, atol=1e-7)


def test_tables_of_other_types_are_stored_apart() -> None:
    def rule(table: str | None, storage: DataType) -> Rule:
        return Rule(method=Full(), options=TableOptions(storage=storage), table=table)

    policy = Policy(default=rule(None, "fp32"), rules=(rule("user", "int4"), rule("item", "int8")))
    collection = CompressedEmbeddingBagCollection(tables=make_tables(), policy=policy)
    plan = StoragePlan.planned(collection)
    types = {
        name: plan.types[table.name]
        for table in collection.merged_tables()
        for name in table.members
    }
    assert types == {"user": "int4", "item": "int8", "genre": "fp32"}
    served = quantize(collection, plan)
    assert sum(w.nbytes for w in served.state_dict().values()) == plan.serving_bytes(collection)
    narrow = CompressedEmbeddingBagCollection(tables=make_tables(dim=2), policy=policy)
    planned = StoragePlan.planned(narrow).resolve(narrow)
    assert set(planned.values()) == {"fp16", "fp32"}, "integers take no fewer bytes"
