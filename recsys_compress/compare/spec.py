"""The study file: which methods are compared at which budgets, and what they are to show.

title = "MovieLens-1M"
job = "../pipelines/movielens_1m.toml"
seeds = [0, 1, 2]
budgets = ["0.5x", "0.1x"]
storage = ["int8", "int4"]

[[methods]]
name = "full"
budgets = []                       # its own size

[[methods]]
name = "double_hash"
set = { embedding.min_rows = 0 }
try = [                            # validation picks, at the first seed and `try_budget`
    { embedding.methods.double_hash.operation = "add" },
    { embedding.methods.double_hash.operation = "concat" },
]

[[methods]]
name = "low_rank, after training"
method = "low_rank"
after = "full"                     # compresses that model instead of training one

[[methods]]
name = "planned"
method = "plan"                    # the planner chooses a method for each table
after = "full"

[[claims]]
text = "double hashing at a tenth is as good as full tables"
left = "double_hash 0.1x"
right = "full"
least = -0.001
"""

from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from recsys_compress.config import ModelName
from recsys_compress.settings import STRICT

PLAN = "plan"
Settings = dict[str, Any]  # a part of a job, as TOML has it
Served = Annotated[str, Field(pattern="^(fp16|bf16|int8|int4|int2)$")]
AUC = "test.auc"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """How the data is prepared, where the job's own is not to be taken.

    Attributes:
        source: as for `recsys-compress prepare`.
        folder: folder of the raw data within that which `compare --data` names.
        each_seed: whether each seed splits anew; False for data that comes with its splits.
        options: of the source.
    """

    __pydantic_config__ = STRICT

    source: str
    folder: str | None = None
    each_seed: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> dict[str, Any]:
        """What makes other data; the raw data's place does not."""
        return {"source": self.source, "options": self.options, "each_seed": self.each_seed}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A method with its settings: a line in the plots.

    Attributes:
        name: what it is called; unique in the study.
        method: the embedding method; by default the name. `PLAN` stands for the best plan of the
            budget, which a trained model is the evidence for and hands its tables to.
        budgets: of its own; None for the study's, empty for one run at the size that it has.
        set: keys of the job that are other for it.
        tries: settings of which validation picks one; None for the study's, empty for none.
        try_budget: at which it picks; None for the first of the budgets.
        after: name of the entry whose trained model it begins with; None for a training.
        line: name of the line in the plots that its cells are points of; None for its own.
        published: test AUC that a paper prints, by budget ("" for none).
        models: those of the study's that it is run with; None for all.
    """

    __pydantic_config__ = STRICT

    name: str
    method: str | None = None
    budgets: tuple[str, ...] | None = None
    set: Settings = field(default_factory=dict)
    tries: tuple[Settings, ...] | None = None
    try_budget: str | None = None
    after: str | None = None
    line: str | None = None
    published: dict[str, float] = field(default_factory=dict)
    models: tuple[ModelName, ...] | None = None

    @property
    def stored_by(self) -> str:
        """The method's name."""
        return self.method or self.name

    @property
    def drawn_as(self) -> str:
        """Name of the line in charts."""
        return self.line or self.name


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One cell against another, seed by seed, or against a bound.

    AUCs are compared by their difference, other figures by their ratio.

    Attributes:
        text: what is claimed.
        left: name of the cell that the claim is about.
        right: name of the cell that it is held against; None for none.
        figure: the figure compared.
        least: least mean that lets the claim hold; None for no such bound.
        most: likewise, the greatest.
    """

    __pydantic_config__ = STRICT

    text: str
    left: str
    right: str | None = None
    figure: str = AUC
    least: float | None = None
    most: float | None = None


@dataclass(frozen=True, kw_only=True)
class StorageClaim:
    """A storage type costs every cell less than `most` test AUC."""

    __pydantic_config__ = STRICT

    storage: Served
    most: float


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study file; see the module's text.

    Attributes:
        title: heading of the report.
        job: job file, relative to the study file.
        about: a sentence or two for the report.
        seeds: of training, and of the split where the data has none.
        budgets: of the embedding tables, for entries that have none of their own.
        models: what each cell is trained with; none for the job's own model.
        storage: types in which trained tables are stored and evaluated besides.
        tries: settings of which validation picks one for each entry that has none of its own.
        prepare: how the data is made; None for the job's own.
        methods: the entries; the first is what others are measured against.
        claims: what is to be shown.
        storage_claims: likewise, for storage types.
    """

    __pydantic_config__ = STRICT

    title: str
    job: str
    methods: tuple[Entry, ...]
    about: str = ""
    seeds: tuple[int, ...] = (0, 1, 2)
    budgets: tuple[str, ...] = ()
    models: tuple[ModelName, ...] = ()
    storage: tuple[Served, ...] = ()
    tries: tuple[Settings, ...] = ()
    prepare: Prepared | None = None
    claims: tuple[Claim, ...] = ()
    storage_claims: tuple[StorageClaim, ...] = ()

    def entry(self, name: str) -> Entry:
        """Returns the entry of that name."""
        return next(entry for entry in self.methods if entry.name == name)
