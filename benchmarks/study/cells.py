"""The rows of the study, as data."""

from dataclasses import dataclass

Settings = tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One row of the study.

    Attributes:
        data: "movielens_1m" or "frappe": the job in `pipelines` and the dataset.
        method: the embedding method.
        budget: bytes of all tables; None for the job's own.
        settings: keys of the job set otherwise, with their values.
        note: what is special about it.
        of: name of the cell whose trained model is compressed; None for a training.
        line: the line in the plot that it is a point of; None for the method's.
        paper: test AUC that the Unified Embedding paper prints for this row.
        floor: mean test AUC to reach.
        most_lost: mean test AUC that may be lost against full tables.
    """

    data: str
    method: str
    budget: str | None = None
    settings: Settings = ()
    note: str | None = None
    of: str | None = None
    line: str | None = None
    paper: float | None = None
    floor: float | None = None
    most_lost: float | None = None

    @property
    def name(self) -> str:
        """A name for files, claims and the command line."""
        note = (self.note or "").replace(",", "").replace(" ", "-")
        return "-".join(part for part in (self.data, self.method, self.budget, note) if part)

    @property
    def label(self) -> str:
        """What it is called in tables."""
        return f"{self.method}, {self.note}" if self.note else self.method

    @property
    def run(self) -> str:
        """All that its figures hang on besides the job file and the seed."""
        keys = {"method": self.method, "budget": self.budget} | dict(sorted(self.settings))
        own = " ".join(f"{key}={value}" for key, value in keys.items() if value is not None)
        return f"{by_name(self.of).run} | compress {own}" if self.of else f"{self.data} {own}"


# The two settings that every method is tried with on Frappe; validation at seed 0 picks.
HELD_BACK: Settings = (
    ("embedding.learning_rate", "2e-3"),
    ("embedding.weight_decay", "1e-2"),
)
FREE: Settings = (("embedding.learning_rate", "1e-2"), ("embedding.weight_decay", "1e-3"))
# Unified Embedding as in the paper: no id has rows of its own, and vectors are as wide as did best.
PLAIN: Settings = (
    ("embedding.min_rows", "20"),
    ("embedding.methods.unified.head_share", "0.0"),
    ("embedding.methods.unified.num_probes", "{user=8, item=8, city=2, country=2}"),
)
# More rows than dense Adam takes unasked.
MANY_ROWS: Settings = (("embedding.dense_rows", "200000"),)
# Small tables must shrink too, or half of the bytes is out of reach.
ALL_TABLES: Settings = (("embedding.min_rows", "0"),)


def _dim(width: int) -> Settings:
    return (("embedding.dim", str(width)),)


def _knob(method: str, name: str, value: str) -> Settings:
    return ((f"embedding.methods.{method}.{name}", value),)


# Validation at seed 0 picked among 100, 30, 20 and 10 steps from one update to the next.
_OFTEN: Settings = (
    *_knob("dynamic_sparse", "update_steps", "10"),
    *_knob("dynamic_sparse", "window", "10"),
)
# MovieLens has width 30: a block has to divide it.
_PAIRS = _knob("dynamic_sparse", "block", "2")
# What magnitude pruning leaves stays where it is.
_STAY = _knob("dynamic_sparse", "growth", "static")


def _sparse(data: str, budget: str, growth: str, settings: Settings = ()) -> Cell:
    other = growth != "gradient"
    return Cell(
        data=data,
        method="dynamic_sparse",
        budget=budget,
        settings=(*settings, *_OFTEN, *_knob("dynamic_sparse", "growth", growth)),
        note=f"{growth} growth" if other else None,
        line=f"dynamic_sparse, {growth}" if other else None,
    )


def _after(
    data: str, method: str, budget: str, note: str, settings: Settings = (), *, epochs: int = 1
) -> Cell:
    return Cell(
        data=data,
        method=method,
        budget=budget,
        settings=(("train.epochs", str(epochs)), *settings),
        note=note,
        of=f"{data}-full",
        line=f"{method}, {note}",
    )


MOVIELENS = "movielens_1m"
_QR = _knob("quotient_remainder", "operation", "mult")
_DOUBLE = _knob("double_hash", "operation", "concat")
_MOVIELENS = (
    Cell(data=MOVIELENS, method="full", paper=0.8872, floor=0.895),
    Cell(data=MOVIELENS, method="full", settings=_dim(15), note="width 15"),
    Cell(data=MOVIELENS, method="full", settings=_dim(3), note="width 3"),
    Cell(data=MOVIELENS, method="full", settings=_dim(1), note="width 1"),
    Cell(data=MOVIELENS, method="mixed_dim", budget="0.5x", settings=ALL_TABLES),
    Cell(data=MOVIELENS, method="unified", budget="1x", paper=0.8774, floor=0.894),
    Cell(data=MOVIELENS, method="unified", budget="0.5x", paper=0.8693, floor=0.893),
    Cell(data=MOVIELENS, method="unified", budget="0.1x", paper=0.8200, floor=0.886),
    Cell(data=MOVIELENS, method="unified", budget="0.0333x"),
    # At 1x it keeps every row, and so is `full`; the paper's figure there is 0.8537.
    Cell(data=MOVIELENS, method="hash", budget="0.5x", paper=0.8300),
    Cell(data=MOVIELENS, method="hash", budget="0.1x", paper=0.7707),
    Cell(data=MOVIELENS, method="hash", budget="0.0333x"),
    *(
        Cell(data=MOVIELENS, method=method, budget=budget, settings=settings)
        for method, settings in (("quotient_remainder", _QR), ("double_hash", _DOUBLE))
        for budget in ("1x", "0.5x", "0.1x", "0.0333x")
    ),
    Cell(data=MOVIELENS, method="dnis", budget="0.5x"),
    _after(MOVIELENS, "low_rank", "0.25x", "after training", epochs=5),
    # What a second training alone brings: methods that begin with a trained model had one too.
    _after(MOVIELENS, "full", "1x", "trained again", epochs=5),
    *(_sparse(MOVIELENS, budget, "gradient", _PAIRS) for budget in ("0.5x", "0.1x")),
    *(_sparse(MOVIELENS, "0.1x", growth, _PAIRS) for growth in ("static", "random")),
    _after(MOVIELENS, "dynamic_sparse", "0.1x", "pruned after training", (*_PAIRS, *_STAY)),
    _after(
        MOVIELENS,
        "dynamic_sparse",
        "0.1x",
        "pruned and trained again",
        (*_PAIRS, *_STAY),
        epochs=5,
    ),
)

FRAPPE = "frappe"
# The width that does as well as any at a tenth of the bytes and below.
_NARROW = _dim(8)
_FINE = _knob("dnis", "dim_multiple", "1")
_MIXED = (*ALL_TABLES, *_knob("mixed_dim", "rounding", "none"))
# What validation picked at seed 0; `TRIALS` are what it picked from. By method and, for the methods
# that are also run narrow, its width.
_TUNED: dict[str, Settings] = {
    "full 40": (*_dim(40), *HELD_BACK),
    "full 8": (*_NARROW, *FREE),
    "full 4": (*_dim(4), *FREE),
    "mixed_dim": (*_MIXED, *_dim(24), *FREE),
    "hash": HELD_BACK,
    "hash 8": (*_NARROW, *FREE),
    "quotient_remainder": HELD_BACK,
    "quotient_remainder 8": (*_NARROW, *FREE),
    "double_hash": HELD_BACK,
    "double_hash 8": (*_NARROW, *FREE),
    "dnis": (*_dim(24), *FREE, *_FINE, *_knob("dnis", "least_dims", "3")),
    "dynamic_sparse": (*_dim(24), *FREE),
}
_HASHES = ("hash", "quotient_remainder", "double_hash")
_FRAPPE = (
    Cell(data=FRAPPE, method="full", floor=0.983),
    # What the hashing trick comes down to at these bytes where width is free as well.
    *(
        Cell(data=FRAPPE, method="full", settings=_TUNED[f"full {dim}"], note=f"width {dim}")
        for dim in (40, 8, 4)
    ),
    Cell(data=FRAPPE, method="mixed_dim", budget="0.05x"),
    Cell(data=FRAPPE, method="mixed_dim", budget="86384", settings=_TUNED["mixed_dim"]),
    Cell(data=FRAPPE, method="unified", budget="1x", settings=MANY_ROWS),
    Cell(data=FRAPPE, method="unified", budget="0.5x"),
    Cell(data=FRAPPE, method="unified", budget="0.1x", most_lost=0.002),
    Cell(data=FRAPPE, method="unified", budget="0.0333x"),
    Cell(
        data=FRAPPE,
        method="unified",
        budget="0.1x",
        settings=PLAIN,
        note="as in the paper",
        line="unified, as in the paper",
    ),
    *(
        Cell(data=FRAPPE, method=method, budget=budget, settings=_TUNED[method])
        for method in _HASHES
        for budget in ("1x", "0.5x", "0.1x", "0.0333x")
        if (method, budget) != ("hash", "1x")
    ),
    *(
        Cell(
            data=FRAPPE,
            method=method,
            budget="57531",
            settings=_TUNED[f"{method} 8"],
            note="width 8",
            line=f"{method}, width 8",
        )
        for method in _HASHES
    ),
    # Budgets in bytes are shares of the full tables of width 80 here too: 1/20 and 1/10.
    Cell(data=FRAPPE, method="dnis", budget="86384", settings=_TUNED["dnis"]),
    _after(FRAPPE, "low_rank", "0.25x", "after training", epochs=5),
    _sparse(FRAPPE, "0.5x", "gradient", HELD_BACK),
    *(
        _sparse(FRAPPE, "172768", growth, _TUNED["dynamic_sparse"])
        for growth in ("gradient", "static", "random")
    ),
    _after(FRAPPE, "dynamic_sparse", "0.1x", "pruned after training", _STAY),
)
CELLS = (*_MOVIELENS, *_FRAPPE)


def _trials(
    data: str, method: str, budget: str | None, base: Settings, tried: dict[str, Settings]
) -> list[Cell]:
    return [
        Cell(
            data=data,
            method=method,
            budget=budget,
            settings=(*base, *settings),
            note=f"tried {note}",
        )
        for note, settings in tried.items()
    ]


def _operations(method: str, *operations: str) -> dict[str, Settings]:
    return {name: _knob(method, "operation", name) for name in operations}


_BOTH = {"held back": HELD_BACK, "free": FREE}
_QR_ALL = _operations("quotient_remainder", "mult", "add", "concat")
_DOUBLE_ALL = _operations("double_hash", "concat", "add")
# Run at seed 0 only, for their validation AUC.
TRIALS = (
    *_trials(MOVIELENS, "quotient_remainder", "0.1x", (), _QR_ALL),
    *_trials(MOVIELENS, "double_hash", "0.1x", (), _DOUBLE_ALL),
    *_trials(FRAPPE, "full", None, _dim(40), {f"width 40, {k}": v for k, v in _BOTH.items()}),
    *_trials(FRAPPE, "full", None, _NARROW, {f"width 8, {k}": v for k, v in _BOTH.items()}),
    *_trials(FRAPPE, "mixed_dim", "86384", (*_MIXED, *_dim(24)), _BOTH),
    *_trials(FRAPPE, "mixed_dim", "86384", (*_MIXED, *_dim(32)), {"width 32": HELD_BACK}),
    *_trials(FRAPPE, "hash", "0.1x", (), _BOTH),
    *_trials(FRAPPE, "quotient_remainder", "0.1x", (), _BOTH),
    *_trials(FRAPPE, "double_hash", "0.1x", (), _BOTH),
    *_trials(FRAPPE, "hash", "57531", _NARROW, _BOTH),
    *_trials(FRAPPE, "quotient_remainder", "57531", _NARROW, _BOTH),
    *_trials(FRAPPE, "double_hash", "57531", _NARROW, _BOTH),
    *_trials(FRAPPE, "dnis", "0.05x", (), {"width 80, held back": HELD_BACK}),
    *_trials(
        FRAPPE,
        "dnis",
        "86384",
        (*_dim(24), *FREE),
        {
            "width 24, free": (),
            "width 24, free, single dims": _FINE,
            "width 24, free, 3 dims or more": (*_FINE, *_knob("dnis", "least_dims", "3")),
        },
    ),
)
_NAMED = {cell.name: cell for cell in (*CELLS, *TRIALS)}


def by_name(name: str) -> Cell:
    """Returns the cell of that name."""
    return _NAMED[name]
