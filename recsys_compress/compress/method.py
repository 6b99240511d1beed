"""The contract of a compression method, and the registry of methods."""

import abc
import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, TypeVar

from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recsys_compress.compress.curvature import Curvature
from recsys_compress.compress.lowering import Lowering, TableOptions
from recsys_compress.compress.moments import Moments
from recsys_compress.compress.spectrum import Item
from recsys_compress.errors import UserError, nearest
from recsys_compress.settings import STRICT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """A stage of training.

    Attributes:
        name: for people.
        method: what is lowered in this stage.
        epochs: most passes over the training split; None for the job's.
        rate: learning rates, as a share of the job's.
        freeze_model: whether training steps move the tables alone; batch norm keeps its statistics.
        search: whether each training step is followed by one of the hook's own, `Hook.search`.
    """

    name: str
    method: "Method"
    epochs: int | None = None
    rate: float = 1.0
    freeze_model: bool = False
    search: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained model's tables, as a method sees them that takes them over.

    Attributes:
        vectors: from a logical table's name to the (n, D) vectors of all its ids.
        moments: from a logical table's name to the moments of its vectors over the training split,
            each as often as it is looked up.
        layers: the model's layers that a method with `whole_model` may factorize.
        losses: from a logical table's name to (D + 1,) what is lost where its vectors are cut to
            their first 0, 1, ..., D principal components, in the unit of `layers`; None where it
            was not measured.
        weights: from a logical table's name to (n,) how often each id is looked up in training;
            None where it is not known.
        curvature: from a logical table's name to what changes of its vectors cost, which is
            measured for all tables when the first is asked for; None where it cannot be.
        widths: from a logical table's name to the width of its vectors; D where it is not there.
    """

    vectors: Callable[[str], Tensor]
    moments: Callable[[str], Moments]
    layers: tuple[Item, ...] = ()
    losses: Callable[[str], Tensor] | None = None
    weights: Callable[[str], Tensor] | None = None
    curvature: Callable[[str], Curvature] | None = None
    widths: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Values:
    """Values of a lowering's tensors.

    Attributes:
        tables: by physical table, (rows, D) without padding.
        combine: state dict of `Lowering.combine`, or a part of it.
        ids: state dict of `Lowering.ids`.
        layers: by layer of the model that is to be factorized, its rank.
    """

    tables: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    combine: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    ids: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    layers: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kept:
    """How much each part of each table keeps, for a heat map.

    Attributes:
        rows: by table, a figure for each of its parts.
        most: the greatest figure there can be.
        label: what the figures are, like "dims kept".
        columns: what the parts are, like "block, the most frequent ids first".
    """

    rows: dict[str, list[float]]
    most: float
    label: str
    columns: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(abc.ABC):
    """A way to store embedding tables in fewer bytes: a frozen dataclass of its knobs.

    A method is one file in `compress/methods`, registered by name. Its class docstring's first
    line describes it; its fields' metadata hold a "help" text each.

    Attributes:
        whole_model: whether `adopt` also factorizes layers of the model, so that its budget is for
            the tables and `Trained.layers` together.
        across_tables: whether it is made for rows that several tables share.
    """

    __pydantic_config__ = STRICT
    whole_model: ClassVar[bool] = False
    across_tables: ClassVar[bool] = False

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

    def phases(self) -> tuple[Phase, ...]:
        """Returns the stages in which the method trains; the last one's method is this one.

        From one stage to the next, the next one's method adopts the tables trained so far.
        """
        return (Phase(name="train", method=self),)

    def adopt(
        self,
        tables: Sequence[EmbeddingBagConfig],  # noqa: ARG002
        trained: Trained,  # noqa: ARG002
        budget_bytes: int | None,  # noqa: ARG002
        options: TableOptions,  # noqa: ARG002
    ) -> tuple["Method", Values]:
        """Returns this method fitted to trained tables, and the values its tables begin with.

        Args:
            tables: the logical tables.
            trained: their trained form.
            budget_bytes: as for `fit`; None where the method's own knobs say it all.
            options: as for `fit`.

        Raises:
            UserError: the budget is out of reach, or the method can only train from scratch.
        """
        raise UserError(
            f"method {method_name(self)!r} cannot take over trained tables; train it from scratch"
        )

    def in_one_stage(self, *, adopting: bool) -> "Method":  # noqa: ARG002
        """Returns the form that trains in one stage, for budget plans.

        Args:
            adopting: whether it begins with trained tables, or else from scratch.
        """
        return self

    def kept_parts(self, tables: Sequence[EmbeddingBagConfig]) -> Kept | None:  # noqa: ARG002
        """Returns what the method found worth keeping; None where it does not choose by part."""
        return None


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
