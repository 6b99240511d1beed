"""Compression methods as lowerings of logical embedding tables onto physical ones."""

from recsys_compress.compress.collection import CompressedEmbeddingBagCollection
from recsys_compress.compress.lowering import Lookup, Lowering, PhysicalTable, TableOptions
from recsys_compress.compress.method import Method, method_class, method_classes
from recsys_compress.compress.policy import Policy, Rule
from recsys_compress.compress.size import SizeReport
from recsys_compress.compress.storage import (
    QuantizedEmbeddingBagCollection,
    StoragePlan,
    quantize,
)

__all__ = [
    "CompressedEmbeddingBagCollection",
    "Lookup",
    "Lowering",
    "Method",
    "PhysicalTable",
    "Policy",
    "QuantizedEmbeddingBagCollection",
    "Rule",
    "SizeReport",
    "StoragePlan",
    "TableOptions",
    "method_class",
    "method_classes",
    "quantize",
]
