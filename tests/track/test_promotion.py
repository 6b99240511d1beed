"""Promotions and rollbacks that are killed, or made at the same time, against a real server."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

import recsys_compress
from recsys_compress.errors import UserError
from recsys_compress.serve.gate import GatePolicy
from recsys_compress.track import promotion
from recsys_compress.track.promotion import promote, rollback
from recsys_compress.track.registry import register
from recsys_compress.train.events import RunResult
from tests.track.versions import ANY, PLAN, aliases

# SQLAlchemy says so of MLflow's own tables.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")


# Forks for each step a process that dies as it makes its n-th call of a method of the client.
# Nothing has been done here but imports, so that there is no thread that a fork would lose.
KILL = """
import os, sys
from pathlib import Path
import torch
from mlflow import MlflowClient
from recsys_compress.compress.storage import StoragePlan
from recsys_compress.settings import parse
from recsys_compress.serve.gate import GatePolicy
from recsys_compress.track.promotion import promote, rollback
from recsys_compress.track.registry import register
import json
uri, policy, *steps = map(json.loads, sys.argv[1:])
policy = parse(GatePolicy, policy, where="policy")
def die(method, call):
    real, left = getattr(MlflowClient, method), [call]
    def dies(*arguments, **more):
        left[0] -= 1
        if not left[0]:
            os._exit(9)
        return real(*arguments, **more)
    setattr(MlflowClient, method, dies)
def take(what, name, folder, method, call):
    die(method, call)
    if what == "register":
        register(Path(folder), StoragePlan(types="fp32"), name=name)
    elif what == "promote":
        promote(name, uri, policy)
    else:
        rollback(name, uri)
for step in steps:
    child = os.fork()
    if not child:
        try:
            take(*step)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9, step
"""

Step = tuple[str, str, str, str, int]


def kill(uri: str, *steps: Step) -> None:
    """Takes steps in processes that die: (what, model, run folder, method, which call of it)."""
    arguments = [json.dumps(part) for part in (uri, asdict(ANY), *steps)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILL, *arguments],
        env=os.environ | {"PYTHONPATH": str(Path(recsys_compress.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_killed_while_registering(
    server_uri: str, client: MlflowClient, runs: list[RunResult]
) -> None:
    methods = ("log_artifacts", "create_model_version", "set_registered_model_alias")
    folder = str(runs[0].folder)
    kill(server_uri, *(("register", f"killed-{m}", folder, m, 1) for m in methods))
    for method in methods:
        name = f"killed-{method}"
        assert aliases(client, name) == {}
        assert register(runs[0].folder, PLAN, name=name).version == "1"
        assert aliases(client, name) == {"challenger": "1"}
    assert promote(name, server_uri, ANY).passed


def test_killed_while_promoting_and_rolling_back(
    server_uri: str, client: MlflowClient, runs: list[RunResult]
) -> None:
    points = [
        ("set_model_version_tag", 3),
        ("create_registered_model", 1),
        ("set_registered_model_alias", 1),
        ("set_registered_model_alias", 2),
    ]
    name = "killed"
    register(runs[0].folder, PLAN, name=name)
    assert promote(name, server_uri, ANY).passed
    register(runs[1].folder, PLAN, name=name)
    # Each finds what the one before left behind, its lock too.
    kill(server_uri, *(("promote", name, "", *point) for point in points))
    assert aliases(client, name)["champion"] == "1"  # the one before is still served
    assert promote(name, server_uri, ANY).passed
    assert aliases(client, name) == {"challenger": "2", "champion": "2", "previous": "1"}
    kill(server_uri, ("rollback", name, "", "set_registered_model_alias", 1))
    assert aliases(client, name)["champion"] == "2"
    assert rollback(name, server_uri).version == "1"
    assert aliases(client, name)["champion"] == "1"
    with pytest.raises(MlflowException):
        client.get_registered_model(f"{name}.promotion")


def test_of_two_decisions_at_once_one_hears_of_it(
    server_uri: str, client: MlflowClient, runs: list[RunResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    for run in runs:
        register(run.folder, PLAN, name="race")
    other = GatePolicy(**{f: getattr(ANY, f) for f in ANY.__dataclass_fields__})

    def meanwhile(*arguments: object) -> object:
        """The other promotion runs while this one compares."""
        monkeypatch.undo()
        client.set_registered_model_alias("race", "challenger", "1")
        assert promote("race", server_uri, other).version == "1"
        return real(*arguments)  # type: ignore[arg-type]

    real = promotion.judge
    monkeypatch.setattr(promotion, "judge", meanwhile)
    with pytest.raises(UserError, match="went from version"):
        promote("race", server_uri, ANY)
    assert aliases(client, "race")["champion"] == "1"

    # Someone else holds the lock, and is alive.
    client.set_registered_model_alias("race", "challenger", "2")
    client.create_registered_model("race.promotion", tags={"owner": "elsewhere:1:x"})
    with pytest.raises(UserError, match="another promotion or rollback is under way"):
        promote("race", server_uri, ANY)
    monkeypatch.setattr(promotion, "LOCK_SECONDS", 0.0)  # and now has been gone for long
    assert promote("race", server_uri, ANY).passed


def test_what_is_rolled_back_while_it_is_judged_is_not_promoted(
    server_uri: str, client: MlflowClient, runs: list[RunResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    register(runs[0].folder, PLAN, name="back")
    promote("back", server_uri, ANY)
    register(runs[1].folder, PLAN, name="back")

    def meanwhile(*arguments: object) -> object:
        """Others promote it while this one compares, and go back."""
        monkeypatch.undo()
        assert promote("back", server_uri, ANY).version == "2"
        assert rollback("back", server_uri).version == "1"
        return real(*arguments)  # type: ignore[arg-type]

    real = promotion.judge
    monkeypatch.setattr(promotion, "judge", meanwhile)
    found = promote("back", server_uri, ANY)
    assert (found.passed, found.reason) == (False, "version 2 was rolled back; register another")
    assert aliases(client, "back")["champion"] == "1"
