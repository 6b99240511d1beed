"""The contract of a compression method, and the registry of methods."""

import abc
import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Sequence
from typing import TypeVar

from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recsys_compress.compress.lowering import Lowering, TableOptions
from recsys_compress.config import STRICT
from recsys_compress.errors import UserError, nearest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(abc.ABC):
    """A way to store embedding tables in fewer bytes: a frozen dataclass of its knobs.

    A method is one file in `compress/methods`, registered by name. Its class docstring's first
    line describes it; its fields' metadata hold a "help" text each.
    """

    __pydantic_config__ = STRICT

    @abc.abstractmethod
    def lower(self, tables: Sequence[EmbeddingBagConfig]) -> Lowering:
        """Returns the physical form of `tables`.

        Raises:
            UserError: a knob is missing or does not suit the tables.
        """

    @abc.abstractmethod
    def fit(
        self, tables: Sequence[EmbeddingBagConfig], budget_bytes: int, options: TableOptions
    ) -> "Method":
        """Returns this method with its knob set so that `tables` take at most `budget_bytes`.

        Args:
            tables: the logical tables.
            budget_bytes: bytes for their parameters and auxiliary tensors.
            options: how the tables are stored, which decides what a row costs.

        Raises:
            UserError: out of reach; the message says the least and the greatest bytes.
        """


M = TypeVar("M", bound=type[Method])
_METHODS: dict[str, type[Method]] = {}


def register(name: str) -> Callable[[M], M]:
    """Registers a method class under the name that jobs use."""

    def add(cls: M) -> M:
        _METHODS[name] = cls
        return cls

    return add


def method_classes() -> dict[str, type[Method]]:
    """Returns every method by name; a new file in `compress/methods` is found by itself."""
    from recsys_compress.compress import methods

    for module in pkgutil.iter_modules(methods.__path__):
        importlib.import_module(f"{methods.__name__}.{module.name}")
    return dict(sorted(_METHODS.items()))


def method_class(name: str) -> type[Method]:
    """Returns the method registered as `name`.

    Raises:
        UserError: there is none.
    """
    known = method_classes()
    if name not in known:
        raise UserError(f"embedding method {name!r} is unknown; {nearest(name, known)}")
    return known[name]


def method_name(method: Method) -> str:
    """Returns the name under which the method's class is registered."""
    return next(name for name, cls in method_classes().items() if cls is type(method))


def out_of_reach(name: str, budget_bytes: int, least: int, greatest: int) -> UserError:
    """Returns the error of a method that cannot take `budget_bytes`."""
    return UserError(
        f"budget of {budget_bytes:,} bytes is out of reach for {name!r}: it can take from "
        f"{least:,} to {greatest:,} bytes; choose a budget in between or another method"
    )
