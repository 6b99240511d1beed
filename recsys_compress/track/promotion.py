"""Which version is served: aliases that move only through a gate, one decision at a time.

MLflow's aliases know no compare-and-set: the last to write wins. What it does guarantee is that of
two processes that make a registered model of one name only one succeeds. So a decision holds such a
model, `NAME.promotion`, as a lock while it moves aliases, and looks at the champion again once it
has the lock. A lock is taken over from a process of this machine that is gone, and from any other
after ten minutes.
"""

import contextlib
import os
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from recsys_compress.errors import UserError
from recsys_compress.files import to_json
from recsys_compress.serve.gate import GatePolicy, Report, judge
from recsys_compress.track.client import connected
from recsys_compress.track.registry import CHALLENGER, CHAMPION, PREVIOUS, alias, load

LOCK_SECONDS = 600.0
_OWNER = "owner"
_ROLLBACK = "rollback"


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What became of a promotion or a rollback.

    Attributes:
        name: of the registered model.
        version: the version that was judged, or went back to.
        champion: the champion before; None if there was none.
        passed: whether `version` is the champion now.
        report: of the comparison; None where none was needed.
        reason: what happened, in words.
    """

    name: str
    version: str
    champion: str | None
    passed: bool
    report: Report | None
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Returns it as plain data."""
        found = {key: value for key, value in self.__dict__.items() if key != "report"}
        if self.report is not None:
            failed = [check.figure for check in self.report.failed]
            checks = [asdict(c) | {"passed": c.passed} for c in self.report.checks]
            found |= {"figures": self.report.figures, "checks": checks, "failed": failed}
        return found


def promote(name: str, uri: str, policy: GatePolicy, data: Path | None = None) -> Decision:
    """Makes the challenger the champion if it keeps all limits on the same held-out rows.

    The figures and the decision become tags of the challenger; the old champion is `previous`.
    Running it again, after a crash or a success, ends in the same state.

    Args:
        name: of the registered model.
        uri: of MLflow.
        policy: the limits.
        data: prepared dataset or Parquet rows with the label; by default the challenger's dataset.

    Raises:
        UserError: there is no challenger, MLflow cannot be reached, an artifact has been changed,
            the rows cannot be read, or another decision was made at the same time.
    """
    with connected(uri) as client:
        challenger, champion = alias(client, name, CHALLENGER), alias(client, name, CHAMPION)
        if challenger is None:
            raise UserError(f"model {name!r}: has no challenger; register one first")
        before = None if champion is None else str(champion.version)
        version = str(challenger.version)
        if before == version:
            reason = f"version {version} is the champion already"
            return _decision(name, version, before, None, reason, passed=True)
        rolled_back = f"version {version} was rolled back; register another"
        if _ROLLBACK in challenger.tags:
            return _decision(name, version, before, None, rolled_back, passed=False)
        report = judge(
            load(client, challenger),
            None if champion is None else load(client, champion),
            data or Path(challenger.tags["dataset.path"]),
            policy,
        )
        _tag_all(client, challenger, _verdict(report, policy, before))
        if report.failed:
            reason = "; ".join(map(str, report.failed))
            return _decision(name, version, before, report, reason, passed=False)
        with _locked(client, name) as holds:
            now = _still(client, name, CHALLENGER, version)
            if now is not None and _ROLLBACK in now.tags:  # while this one was judged
                return _decision(name, version, before, report, rolled_back, passed=False)
            _still(client, name, CHAMPION, before)
            if before is not None:
                client.set_registered_model_alias(name, PREVIOUS, before)
            holds()
            client.set_registered_model_alias(name, CHAMPION, version)
        client.set_model_version_tag(name, version, "promoted", _now())
        _still(client, name, CHAMPION, version)
        reason = f"version {version} is the champion now"
        return _decision(name, version, before, report, reason, passed=True)


def rollback(name: str, uri: str) -> Decision:
    """Makes the previous champion the champion again; the one that goes cannot come back.

    Raises:
        UserError: there is no previous champion, or another decision is under way.
    """
    with connected(uri) as client, _locked(client, name) as holds:
        champion, previous = alias(client, name, CHAMPION), alias(client, name, PREVIOUS)
        if champion is None or previous is None:
            raise UserError(f"model {name!r}: has no previous champion to go back to")
        before, version = str(champion.version), str(previous.version)
        if before == version:
            reason = f"version {version} is the champion already; there is none before it"
            return _decision(name, version, before, None, reason, passed=True)
        # First the tag: what is killed in between is finished by running it again.
        client.set_model_version_tag(name, before, _ROLLBACK, f"to version {version}, {_now()}")
        holds()
        client.set_registered_model_alias(name, CHAMPION, version)
        reason = f"version {version} is the champion again"
        return _decision(name, version, before, None, reason, passed=True)


def _decision(
    name: str, version: str, champion: str | None, report: Report | None, reason: str, *,
    passed: bool,
) -> Decision:  # fmt: skip
    return Decision(
        name=name,
        version=version,
        champion=champion,
        passed=passed,
        report=report,
        reason=reason,
    )


def _verdict(report: Report, policy: GatePolicy, before: str | None) -> dict[str, str]:
    failed = ", ".join(check.figure for check in report.failed)
    return {
        **{f"gate.{name}": f"{value:.8g}" for name, value in report.figures.items()},
        "gate.policy": to_json(asdict(policy)),
        "gate.against": before or "none",
        "gate.time": _now(),
        "gate.decision": f"failed: {failed}" if failed else "passed",
    }


def _tag_all(client: MlflowClient, version: ModelVersion, tags: dict[str, str]) -> None:
    for key, value in tags.items():
        client.set_model_version_tag(version.name, version.version, key, value)


def _still(client: MlflowClient, name: str, which: str, version: str | None) -> ModelVersion | None:
    """Checks that an alias is where it was; returns the version as it is now.

    Raises:
        UserError: someone has moved it.
    """
    found = alias(client, name, which)
    now = None if found is None else str(found.version)
    if now != version:
        raise UserError(
            f"model {name!r}: {which} went from version {version} to {now} in the meantime; run "
            "the command again"
        )
    return found


@contextlib.contextmanager
def _locked(client: MlflowClient, name: str) -> Iterator["_Holds"]:
    """Holds the one lock of a registered model; yields what checks that it is still held."""
    lock, owner = f"{name}.promotion", f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex}"
    for attempt in range(2):
        try:
            client.create_registered_model(
                lock, tags={_OWNER: owner}, description="A promotion or rollback is under way."
            )
            break
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            if attempt or not _take_over(client, lock):
                raise UserError(
                    f"model {name!r}: another promotion or rollback is under way; run the command "
                    f"again when it is over (at most {LOCK_SECONDS:.0f} s if it has crashed)"
                ) from error
    try:
        yield _Holds(client, lock, owner)
    finally:
        if _owner(client, lock) == owner:
            client.delete_registered_model(lock)


@dataclass(frozen=True)
class _Holds:
    """Checks, when called, that a lock is still one's own."""

    client: MlflowClient
    lock: str
    owner: str

    def __call__(self) -> None:
        if _owner(self.client, self.lock) != self.owner:
            raise UserError(
                f"{self.lock}: was taken over by another process; run the command again"
            )


def _take_over(client: MlflowClient, lock: str) -> bool:
    """Removes a lock whose holder is gone; returns whether it did."""
    try:
        found = client.get_registered_model(lock)
    except MlflowException:
        return True  # it has just been released
    owner = str(found.tags.get(_OWNER, ""))
    host, _, process = owner.partition(":")
    age = time.time() - found.creation_timestamp / 1000
    gone = host == socket.gethostname() and not _is_alive(int(process.partition(":")[0]))
    if not (gone or age > LOCK_SECONDS) or _owner(client, lock) != owner:
        return False
    client.delete_registered_model(lock)
    return True


def _owner(client: MlflowClient, lock: str) -> str | None:
    try:
        return str(client.get_registered_model(lock).tags.get(_OWNER))
    except MlflowException:
        return None


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
