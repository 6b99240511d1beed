"""Tensors that say they are on another device, for machines without one.

They are on the CPU in truth, and refuse what tensors on an accelerator refuse: to be mixed with
those of the CPU, and to be seen by NumPy.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("lazy", 0)  # a kind that every torch knows, without a library
_MAY_MIX = ("aten::copy_", "aten::index", "aten::index_put_", "aten::_index_put_impl_")


class _Elsewhere(Tensor):
    """Wraps a tensor of the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "_Elsewhere":
        found = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        found.inner = inner
        return found

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        return _run(func, args, kwargs or {})


class Elsewhere(TorchDispatchMode):
    """Within it the device exists."""

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        return _run(func, args, kwargs or {})

    def __enter__(self) -> "Elsewhere":
        torch._C._set_only_lift_cpu_tensors(True)  # so `torch.tensor` makes its copy in sight
        return super().__enter__()

    def __exit__(self, *given: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(False)
        super().__exit__(*given)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> object:
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    here = [t for t in given if not isinstance(t, _Elsewhere)]
    name = func._schema.name
    elsewhere = isinstance(given[0], _Elsewhere) if given else False
    strangers = name not in _MAY_MIX and any(t.ndim for t in here)
    if len(here) < len(given) and (strangers or not elsewhere) and name != "aten::copy_":
        raise RuntimeError(f"{name}: tensors on two devices")
    if kwargs.get("device") is not None:
        elsewhere = kwargs["device"].type == DEVICE.type
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map(
        lambda leaf: leaf.inner if isinstance(leaf, _Elsewhere) else leaf, (args, kwargs)
    )
    result = func(*args, **kwargs)
    if func._schema.is_mutable:  # in place, or else into `out`, which comes last
        return given[-1 if "out" in kwargs else 0]
    wrap = elsewhere and name != "aten::_local_scalar_dense"
    return tree_map(
        lambda leaf: _Elsewhere(leaf) if wrap and isinstance(leaf, Tensor) else leaf, result
    )
