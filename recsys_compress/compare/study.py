"""Reading of study files."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from recsys_compress.byte_sizes import budget_bytes
from recsys_compress.compare.cells import (
    all_trials,
    budgets_of,
    cells,
    overrides,
    settings_tried,
)
from recsys_compress.compare.records import KEPT
from recsys_compress.compare.spec import PLAN, Entry, Study
from recsys_compress.compress.method import method_class
from recsys_compress.config import load_job
from recsys_compress.errors import UserError, nearest
from recsys_compress.files import read_toml
from recsys_compress.settings import parse


def load_study(path: Path) -> Study:
    """Reads a study file.

    Raises:
        UserError: it or its job cannot be read, or something in it is not valid.
    """
    study = parse(Study, read_toml(path, "name a study file"), where=str(path))
    study = dataclasses.replace(study, job=os.path.normpath(path.parent / study.job))
    names = [entry.name for entry in study.methods]
    if not names or not study.seeds:
        raise UserError(f"{path}: needs at least one of [[methods]], and a seed")
    for entry in study.methods:
        _check_entry(study, entry, names, f"{path}: methods: {entry.name!r}")
    first = study.methods[0]
    if first.after is not None or first.models is not None or len(budgets_of(study, first)) > 1:
        raise UserError(
            f"{path}: methods: {first.name!r}: the first is what others are held against; give it "
            "one budget, or budgets = [] for its own size, and neither `after` nor `models`"
        )
    whole = cells(study)
    called = [cell.name for cell in [*all_trials(study, whole), *whole]]
    for name in called:
        if called.count(name) > 1:
            raise UserError(f"{path}: methods: two cells are {name!r}; give their entries others")
    _check_claims(study, path)
    return study


def _check_entry(study: Study, entry: Entry, names: Sequence[str], where: str) -> None:
    if names.count(entry.name) > 1:
        raise UserError(f"{where} is there twice; give each a name of its own")
    for model in entry.models or ():
        if model not in study.models:
            raise UserError(f"{where}: models: {model!r}; {nearest(model, study.models)}")
    if entry.after is not None:
        if entry.after not in names:
            raise UserError(f"{where}: after = {entry.after!r}; {nearest(entry.after, names)}")
        before = study.entry(entry.after)
        if before.after is not None:
            raise UserError(f"{where}: after = {entry.after!r}, which is no training; name one")
        if not set(entry.models or study.models) <= set(before.models or study.models):
            raise UserError(f"{where}: after = {entry.after!r}, which has not all of its models")
    if entry.stored_by == PLAN and (entry.after is None or None in budgets_of(study, entry)):
        raise UserError(
            f"{where}: needs budgets, and `after`, the trained model that is planned on"
        )
    for budget in (*budgets_of(study, entry), entry.try_budget):
        if budget is not None:
            _check_budget(budget, where)
    try:
        if entry.stored_by != PLAN:
            method_class(entry.stored_by)
        for tried in settings_tried(study, entry) or ({},):
            _check_settings(study, (*overrides(entry.set), *overrides(tried)))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _check_budget(budget: str, where: str) -> None:
    try:
        budget_bytes(budget, 10**12)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _check_settings(study: Study, settings: Sequence[str]) -> None:
    for setting in settings:
        if setting.partition("=")[0] in ("embedding.method", "embedding.budget"):
            raise UserError("name `method` and `budgets` beside `set` and `tries`, not in them")
    load_job(Path(study.job), settings)


def _check_claims(study: Study, path: Path) -> None:
    names = [cell.name for cell in cells(study)]
    served = [f"{kind}.{part}" for kind in study.storage for part in ("auc", "bytes")]
    known = [*KEPT, *served, "inference.rows_per_s", "inference.ratio"]
    for claim in study.claims:
        for name in (claim.left, claim.right):
            if name is not None and name not in names:
                raise UserError(f"{path}: claims: {name!r} is no cell; {nearest(name, names)}")
        if claim.figure not in known:
            mend = nearest(claim.figure, known)
            raise UserError(f"{path}: claims: figure = {claim.figure!r} is none; {mend}")
        if claim.least is None and claim.most is None:
            raise UserError(f"{path}: claims: {claim.text!r} has no bound; give least or most")
