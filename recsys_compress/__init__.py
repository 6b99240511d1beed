"""Embedding compression for click-through-rate (CTR) models on TorchRec."""

__version__ = "0.1.0"
