"""The rows of a study, and what has to be run for each."""

import hashlib
import json
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recsys_compress.compare.spec import PLAN, Entry, Settings, Study
from recsys_compress.config import raw_job
from recsys_compress.train.folder import JOB

PLANNED = ["--for", "parameters"]  # which budgets of studies are of
Picks = Mapping[tuple[str, str | None], int]  # number of the settings by entry and model


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A row of the study: an entry at a budget; or one of its trials.

    Attributes:
        entry: the entry.
        model: that is trained; None for the job's.
        budget: of its tables; None for the size that it has.
        tried: number of the settings that are tried; None for those that were picked.
    """

    entry: Entry
    model: str | None = None
    budget: str | None = None
    tried: int | None = None

    @property
    def name(self) -> str:
        """What claims and the command line call it."""
        return f"{self.model}: {self.label}" if self.model else self.label

    @property
    def label(self) -> str:
        """The name without the model."""
        budget = f" {self.budget}" if self.budget else ""
        tried = "" if self.tried is None else f", try {self.tried + 1}"
        return f"{self.entry.name}{budget}{tried}"


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is run for a cell, whatever the seed.

    Attributes:
        job: the job file.
        method: the embedding method, or `PLAN`.
        budget: of its tables.
        settings: keys of the job set otherwise, as `--set` takes them.
        key: the same for what gives the same figures, whatever file or cell it stands in.
        after: the run whose model it begins with; None for a training.
    """

    job: str
    method: str
    budget: str | None
    settings: tuple[str, ...]
    key: str
    after: "Run | None" = None

    def arguments(
        self, seed: int, *more: str, folder: str = "RUN", plan: str = "plan.toml"
    ) -> list[list[str]]:
        """Returns the arguments of the calls of `recsys-compress` that run it.

        Args:
            seed: of the training.
            more: further settings.
            folder: of the run whose model it begins with.
            plan: file for the plan, where one is made.
        """
        settings = [*self.settings, *more]
        budget = ["--budget", self.budget] if self.budget else []
        if self.after is None:
            calls = [["train", self.job]]
            settings.append(f"train.seed={seed}")
        elif self.method == PLAN:
            job = str(Path(folder) / JOB)
            calls = [
                ["plan", job, *budget, *PLANNED, "--reference", folder, "--out", plan],
                ["train", job, "--plan", plan, "--start", folder],
            ]
        else:
            calls = [["compress", folder, "--method", self.method, *budget]]
        given = [word for setting in settings for word in ("--set", setting)]
        return [[*call, *given] for call in calls]


def cells(study: Study) -> list[Cell]:
    """Returns the rows of a study, those that begin with another's model last."""
    found = [
        Cell(entry=entry, model=model, budget=budget)
        for model in study.models or (None,)
        for entry in study.methods
        if entry.models is None or model in entry.models
        for budget in budgets_of(study, entry)
    ]
    return sorted(found, key=lambda cell: cell.entry.after is not None)


def commands(study: Study, run: Run, seed: int) -> list[str]:
    """Returns the commands that run a run alone, one after the other: its data and model first."""
    made, data = study.prepare, f"data-s{seed}"
    words: list[list[str]] = []
    more = [f"data.path={data}"] if made is not None else []
    if made is not None and run.after is None:
        source = [] if made.folder is None else ["--from", made.folder]
        given = [part for key in overrides(made.options) for part in ("--option", key)]
        words.append(["prepare", made.source, *source, *given, "--out", data, "--seed", str(seed)])
    if run.after is not None:
        before = commands(study, run.after, seed)
        own = [shlex.join(["recsys-compress", *call]) for call in run.arguments(seed)]
        return [*before, *own]
    words += run.arguments(seed, *more)
    return [shlex.join(["recsys-compress", *own]) for own in words]


def first_cell(study: Study, name: str, model: str | None) -> Cell:
    """Returns an entry's cell at the first of its budgets: its model is what others begin with."""
    entry = study.entry(name)
    return Cell(entry=entry, model=model, budget=budgets_of(study, entry)[0])


def all_trials(study: Study, wanted: Sequence[Cell]) -> list[Cell]:
    """Returns the trials that some cells hang on."""
    entries = {(cell.entry.name, cell.model): cell.entry for cell in wanted}
    return [t for (_, model), entry in entries.items() for t in trials(study, entry, model)]


def trials(study: Study, entry: Entry, model: str | None) -> list[Cell]:
    """Returns what validation picks an entry's settings from; nothing where there is no choice."""
    tries = settings_tried(study, entry)
    budget = entry.try_budget or budgets_of(study, entry)[0]
    return [
        Cell(entry=entry, model=model, budget=budget, tried=number)
        for number in range(len(tries))
        if len(tries) > 1
    ]


def seeds_of(study: Study, cell: Cell) -> tuple[int, ...]:
    """Returns a cell's seeds; of a trial, the first."""
    return study.seeds if cell.tried is None else study.seeds[:1]


def settings_tried(study: Study, entry: Entry) -> tuple[Settings, ...]:
    """Returns the settings of which validation picks one for an entry."""
    if entry.tries is not None:
        return entry.tries
    return () if entry.after is not None else study.tries


def run_of(study: Study, cell: Cell, picks: Picks) -> Run | None:
    """Returns what a cell stands for; None where that hangs on trials without figures."""
    tries = settings_tried(study, cell.entry)
    settings = overrides(cell.entry.set)
    if tries:
        number = 0 if len(tries) == 1 else cell.tried
        if number is None:
            number = picks.get((cell.entry.name, cell.model))
        if number is None:
            return None
        settings = (*settings, *overrides(tries[number]))
    method = cell.entry.stored_by
    if cell.entry.after is not None:
        return _following(study, cell, picks, method, settings)
    settings = (f"embedding.method={method}", *settings)
    if cell.budget is not None:
        settings = (*settings, f"embedding.budget={cell.budget}")
    if cell.model is not None:
        settings = (f"model.name={cell.model}", *settings)
    return Run(
        job=study.job,
        method=method,
        budget=cell.budget,
        settings=settings,
        key=digest(_identity(study, raw_job(Path(study.job), settings))),
    )


def overrides(settings: Mapping[str, Any], prefix: str = "") -> tuple[str, ...]:
    """Returns a part of a job as `key=value` overrides."""
    found: list[str] = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found += overrides(value, f"{prefix}{key}.")
        else:
            found.append(f"{prefix}{key}={_toml(value)}")
    return tuple(found)


def _following(
    study: Study, cell: Cell, picks: Picks, method: str, settings: tuple[str, ...]
) -> Run | None:
    """Returns the run that begins with another entry's model."""
    trained = first_cell(study, cell.entry.after or "", cell.model)
    parent = run_of(study, trained, picks)
    if parent is None:
        return None
    own = {"method": method, "budget": cell.budget, "set": sorted(settings)}
    own |= {"plan": PLANNED} if method == PLAN else {}
    return Run(
        job=study.job,
        method=method,
        budget=cell.budget,
        settings=settings,
        after=parent,
        key=digest({"after": parent.key, **own}),
    )


def budgets_of(study: Study, entry: Entry) -> tuple[str | None, ...]:
    """Returns an entry's budgets; None for the size that it has."""
    return (study.budgets if entry.budgets is None else entry.budgets) or (None,)


def _toml(value: Any) -> str:
    """Returns a value as an override has it: a string plain where nothing else is meant by it."""
    if not isinstance(value, str):
        return json.dumps(value)
    try:
        tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        return value
    return json.dumps(value)


def _identity(study: Study, raw: dict[str, Any]) -> dict[str, Any]:
    """Returns a job without what its figures do not hang on, and without the seed."""
    left = {key: value for key, value in raw.items() if key != "tracking"}
    if study.prepare is not None:
        left["prepare"] = study.prepare.identity
    for section, keys in (("data", ("path",)), ("train", ("seed", "output", "threads"))):
        left[section] = {k: v for k, v in left.get(section, {}).items() if k not in keys}
    return left


def digest(value: Mapping[str, Any]) -> str:
    """Returns 16 hexadecimal digits that stand for plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
