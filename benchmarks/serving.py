"""Look-ups in tables as they are served: `python -m benchmarks.serving [--repeats N]`.

For each storage type the kernels there are, and our collection around the one it uses. Kernels give
(B, K x D) in fp32 from one table of all rows; the collection does too, from a `KeyedJaggedTensor`.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from torch import Tensor
from torch.nn.functional import embedding_bag

from benchmarks.case import Case, Figures, Shape, run
from benchmarks.clock import Stages
from benchmarks.tables import OPTIONS, Batches, configs
from recsys_compress.compress import CompressedEmbeddingBagCollection, Policy, Rule
from recsys_compress.compress.kernels import look_up_fbgemm, pack
from recsys_compress.compress.methods.full import Full
from recsys_compress.compress.size import DATA_TYPE_BITS, ROW_SCALE_BYTES
from recsys_compress.compress.storage import StoragePlan, quantize

WIDTHS = (4, 8, 16, 32, 64)
ROWS = 1_000_000
REPEATS = 3

Kernel = Callable[[Tensor, Tensor], Tensor]  # (K x B,) rows, (K x B + 1,) offsets


@torch.no_grad()
def measure(case: Case) -> Figures:
    """Returns CPU milliseconds of a look-up on one thread, by "TYPE/KERNEL" at the case's width.

    "TYPE/collection" is the quantized collection; "trained/collection" the one it was made from.
    """
    shape = case.shape
    torch.set_num_threads(1)
    torch.manual_seed(0)
    batches = Batches(shape, zipf=0.0)
    offsets = torch.arange(shape.features * shape.batch + 1)
    firsts = (torch.arange(shape.features) * shape.rows_per_table).repeat_interleave(shape.batch)
    rows = [batches.flat(number) + firsts for number in range(shape.warmup + shape.steps)]
    policy = Policy(default=Rule(method=Full(), options=OPTIONS), min_rows=0)
    collection = CompressedEmbeddingBagCollection(tables=configs(shape), policy=policy)
    collections = {"trained": collection} | {
        data_type: quantize(collection, StoragePlan(types=data_type))
        for data_type in DATA_TYPE_BITS
    }
    kernels = _kernels(torch.rand(shape.rows_per_table * shape.features, shape.dim) * 2 - 1, shape)
    stages = Stages()
    # In turn, so that a neighbour's load falls on all, and none finds its table in the cache.
    for number in range(shape.warmup + shape.steps):
        for name, kernel in kernels.items():
            with stages.stage(name):
                kernel(rows[number], offsets)
        for name, module in collections.items():
            with stages.stage(f"{name}/collection"):
                module(batches.keyed(number)).values()
    return stages.medians(shape.warmup)


def _kernels(values: Tensor, shape: Shape) -> dict[str, Kernel]:
    """Returns the candidates over tables of (N, D) values, by "TYPE/KERNEL"."""

    def fbgemm(table: Tensor, kind: SparseType) -> Kernel:
        width, count = shape.dim, shape.features
        return lambda ids, offsets: look_up_fbgemm(table, width, kind, count, ids, offsets, None)

    def from_torch(table: Tensor, bits: str) -> Kernel:
        kernel = getattr(torch.ops.quantized, f"embedding_bag_{bits}_rowwise_offsets")
        return _beside(lambda i, o: kernel(table, i, o, include_last_offset=True), shape)

    def plain(table: Tensor, weights: Tensor | None = None) -> Kernel:
        def look_up(ids: Tensor, offsets: Tensor) -> Tensor:
            rows = table
            if weights is not None:
                rows, ids = table.index_select(0, ids).float(), torch.arange(len(ids))
            return embedding_bag(
                ids,
                rows,
                offsets,
                mode="sum",
                per_sample_weights=weights,
                include_last_offset=True,
            ).float()

        return _beside(look_up, shape)

    def gathered(table: Tensor) -> Kernel:
        def look_up(ids: Tensor, _: Tensor) -> Tensor:
            rows = table.index_select(0, ids)
            affine = rows[:, :ROW_SCALE_BYTES].contiguous().view(torch.float16).float()
            return torch.addcmul(affine[:, 1:], rows[:, ROW_SCALE_BYTES:].float(), affine[:, :1])

        return _beside(look_up, shape)

    packed = {data_type: pack(values, data_type) for data_type in DATA_TYPE_BITS}
    # FBGEMM wants scales and biases first.
    turned = {t: packed[t].roll(ROW_SCALE_BYTES, dims=1) for t in ("int4", "int2")}
    with_fp32_scales = torch.ops.quantized.embedding_bag_byte_prepack(values)
    return {
        "fp32/fbgemm": fbgemm(packed["fp32"], SparseType.FP32),
        "fp32/embedding_bag": plain(packed["fp32"]),
        "fp16/fbgemm": fbgemm(packed["fp16"], SparseType.FP16),
        "fp16/embedding_bag": plain(packed["fp16"]),
        "bf16/embedding_bag": plain(packed["bf16"]),
        "bf16/weighted": plain(packed["bf16"], torch.ones(shape.features * shape.batch)),
        "int8/fbgemm": fbgemm(packed["int8"], SparseType.INT8),
        "int8/torch": from_torch(with_fp32_scales, "byte"),
        "int8/gathered": gathered(packed["int8"]),
        "int4/fbgemm": fbgemm(turned["int4"], SparseType.INT4),
        "int4/torch": from_torch(packed["int4"], "4bit"),
        "int2/fbgemm": fbgemm(turned["int2"], SparseType.INT2),
        "int2/torch": from_torch(packed["int2"], "2bit"),
    }


def _beside(kernel: Kernel, shape: Shape) -> Kernel:
    """Turns (K x B, D) into (B, K x D)."""

    def look_up(ids: Tensor, offsets: Tensor) -> Tensor:
        vectors = kernel(ids, offsets).view(shape.features, shape.batch, shape.dim)
        return vectors.transpose(0, 1).reshape(shape.batch, shape.features * shape.dim)

    return look_up


def main() -> None:
    """Prints a Markdown table of medians over processes, of which each measures one width."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--repeats", type=int, default=REPEATS, help="processes per width")
    repeats = parser.parse_args().repeats
    runs: dict[int, list[Figures]] = {width: [] for width in WIDTHS}
    for width in list(WIDTHS) * repeats:
        shape = Shape(rows=ROWS, dim=width)
        case = Case(group="serving", name="kernels", tuned=True, shape=shape)
        runs[width].append(run(case))
    print(f"| ms at width | {' | '.join(map(str, WIDTHS))} |")
    print(f"|---|{'--:|' * len(WIDTHS)}")
    for name in runs[WIDTHS[0]][0]:
        medians = [statistics.median(figures[name] for figures in runs[w]) for w in WIDTHS]
        print(f"| {name} | {' | '.join(f'{median:.1f}' for median in medians)} |")


if __name__ == "__main__":
    main()
