"""How rows are packed and looked up in each storage type, on CPU; figures in docs/storage.md.

There are three kernels, since none does all types:

* fp32, fp16, int8: FBGEMM's for inference. It sums in fp32, and its int8 rows have a scale and bias
  in fp16; those of torch's kernel have them in fp32, which is 4 bytes more.
* int4, int2: torch's, of FBGEMM's bytes and speed. It keeps scale and bias at the end of a row;
  FBGEMM keeps them at the start, and reads up to 3 bytes past the last row of the table.
* bf16: `embedding_bag`, since FBGEMM's does not know the type.
"""

import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.tbe.config.embedding_config import EmbeddingLocation, PoolingMode
from torch import Tensor
from torch.nn import functional
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys_compress.compress.size import DATA_TYPE_BITS, DataType, is_integer, row_bytes

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_FBGEMM_TYPES = {"fp32": SparseType.FP32, "fp16": SparseType.FP16, "int8": SparseType.INT8}
# Widths by type, at which only the kernel for GPUs looks.
_WIDEST = dict.fromkeys([f"max_{t}_D" for t in ("int2", "int4", "int8", "float16", "float32")], 0)


def empty_table(rows: int, dim: int, data_type: DataType) -> Tensor:
    """Returns (rows, D) zeros, or (rows, bytes) for integers, in a storage type."""
    columns = row_bytes(data_type, dim) if is_integer(data_type) else dim
    return torch.zeros(rows, columns, dtype=_DTYPES.get(data_type, torch.uint8))


def pack(values: Tensor, data_type: DataType) -> Tensor:
    """Returns (N, D) fp32 values in a storage type, as rows of `empty_table`.

    Integers are affine in each row, as in FBGEMM: value = scale * integer + bias, where bias is the
    row's least value. (N, bytes): D integers, the first in the lowest bits of a byte, after (int8)
    or before (int4, int2) the scale and the bias in fp16.
    """
    if not is_integer(data_type):
        return values.to(_DTYPES[data_type])
    bits = DATA_TYPE_BITS[data_type]
    levels, per_byte = 2**bits - 1, 8 // bits
    bias = values.amin(dim=1, keepdim=True).half()
    scale = ((values.amax(dim=1, keepdim=True) - bias.float()) / levels).half()
    scale[scale == 0] = 1  # all values are the bias
    integers = ((values - bias.float()) / scale.float()).round_().clamp_(0, levels).to(torch.uint8)
    integers = functional.pad(integers, (0, -values.shape[1] % per_byte))
    packed = integers[:, ::per_byte].clone()
    for place in range(1, per_byte):
        packed |= integers[:, place::per_byte] << (bits * place)
    affine = torch.cat([scale, bias], dim=1).view(torch.uint8)
    return torch.cat([affine, packed] if data_type == "int8" else [packed, affine], dim=1)


def given_width(dim: int, data_type: DataType) -> int:
    """Returns the width W of what is looked up in rows of D values: all of their last byte."""
    per_byte = max(1, 8 // DATA_TYPE_BITS[data_type])
    return -(-dim // per_byte) * per_byte


def look_up(table: Tensor, dim: int, data_type: DataType, lookups: KeyedJaggedTensor) -> Tensor:
    """Returns (B, K x W) in fp32, the sums over the bags of K look-ups.

    Args:
        table: all rows, packed.
        dim: their width D.
        data_type: their type.
        lookups: K keys of B bags, all into this table.
    """
    ids, offsets, weights = lookups.values(), lookups.offsets(), lookups.weights_or_none()
    count, batch, width = len(lookups.keys()), lookups.stride(), given_width(dim, data_type)
    if data_type in _FBGEMM_TYPES:
        return look_up_fbgemm(table, width, _FBGEMM_TYPES[data_type], count, ids, offsets, weights)
    if data_type == "bf16":
        vectors = _bf16(table, ids, offsets, weights)
    else:
        kernels = torch.ops.quantized
        kernel = (
            kernels.embedding_bag_4bit_rowwise_offsets
            if data_type == "int4"
            else kernels.embedding_bag_2bit_rowwise_offsets
        )
        vectors = kernel(table, ids, offsets, per_sample_weights=weights, include_last_offset=True)
    return vectors.view(count, batch, width).transpose(0, 1).reshape(batch, count * width)


def look_up_fbgemm(
    table: Tensor,
    width: int,
    kind: SparseType,
    count: int,
    ids: Tensor,
    offsets: Tensor,
    weights: Tensor | None,
) -> Tensor:
    """Returns (B, K x W) from rows of FBGEMM's form.

    To its kernel each look-up has a table of its own, all of them at the same place.
    """
    data = table.view(torch.uint8).view(-1)
    location = EmbeddingLocation.HOST.value
    vectors: Tensor = torch.ops.fbgemm.int_nbit_split_embedding_codegen_lookup_function(
        dev_weights=data,
        uvm_weights=data,
        weights_placements=torch.full((count,), location, dtype=torch.int32),
        weights_offsets=torch.zeros(count, dtype=torch.int64),
        weights_tys=torch.full((count,), kind.as_int(), dtype=torch.uint8),
        D_offsets=torch.arange(0, (count + 1) * width, width, dtype=torch.int32),
        total_D=count * width,
        **_WIDEST,
        indices=ids,
        offsets=offsets,
        pooling_mode=PoolingMode.SUM.value,
        indice_weights=weights,
        output_dtype=SparseType.FP32.as_int(),
        row_alignment=1,
    )
    return vectors


def _bf16(table: Tensor, ids: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
    """Returns (K x B, D)."""
    if weights is not None:  # The kernel would want them in bf16 too.
        table, ids = table.index_select(0, ids).float(), torch.arange(len(ids))
    return functional.embedding_bag(
        ids, table, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    ).float()
