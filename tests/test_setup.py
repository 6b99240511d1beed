"""The installed environment is the one the lock pins, and our metadata pulls no CUDA build."""

import importlib.metadata
import re
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

REQUIREMENTS = Path(__file__).parents[1] / "requirements"
DEVICES = ("cpu", "cuda")
PIN = re.compile(r"([a-z0-9][a-z0-9-]*)==([\w.]+(?:\+\w+)?)")
HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}")
# What may differ between devices: the builds of torch and FBGEMM, and CUDA's own packages.
OF_ONE_DEVICE = re.compile(r"torch|triton|fbgemm-gpu(-cpu)?|(cuda|nvidia)-.+")


def read_pins(device: str) -> dict[str, str]:
    """Versions by name; fails on an entry that is anything but a pinned, hashed requirement."""
    entries = (REQUIREMENTS / f"{device}.lock").read_text().replace("\\\n", " ").splitlines()
    pins: dict[str, str] = {}
    for entry in entries:
        requirement, *hashes = entry.split()
        pin = PIN.fullmatch(requirement)
        assert pin, f"not a plain pin: {entry!r}"
        assert hashes, f"no hash: {entry!r}"
        assert all(HASH.fullmatch(part) for part in hashes), f"not only sha256 hashes: {entry!r}"
        name, version = pin.groups()
        assert name not in pins, f"pinned twice: {entry!r}"
        pins[name] = version
    return pins


def pulled_by(extra: str) -> dict[str, Requirement]:
    """What installing recsys-compress[extra] asks for, by name."""
    requirements = map(Requirement, importlib.metadata.requires("recsys-compress") or [])
    return {
        canonicalize_name(r.name): r
        for r in requirements
        if r.marker is None or r.marker.evaluate({"extra": extra})
    }


@pytest.mark.parametrize("device", DEVICES)
def test_lock_holds_only_pinned_hashed_requirements(device: str) -> None:
    assert {"torch", "torchrec", "mlflow", "pyarrow", "flit-core", "pytest"} <= set(
        read_pins(device)
    )


def test_each_lock_holds_the_builds_of_its_device() -> None:
    cpu, cuda = map(read_pins, DEVICES)
    assert cpu["torch"] == f"{cuda['torch']}+cpu"
    assert cpu["fbgemm-gpu-cpu"] == cuda["fbgemm-gpu"]
    assert "fbgemm-gpu" not in cpu
    assert "fbgemm-gpu-cpu" not in cuda
    assert not [name for name in cpu if name.startswith(("cuda-", "nvidia-"))]


def test_locks_agree_on_all_else() -> None:
    cpu, cuda = (
        {name: pin for name, pin in read_pins(device).items() if not OF_ONE_DEVICE.fullmatch(name)}
        for device in DEVICES
    )
    assert cpu == cuda


def test_every_pinned_version_is_installed() -> None:
    installed = {
        canonicalize_name(found.name): found.version for found in importlib.metadata.distributions()
    }
    pins = read_pins("cpu" if "fbgemm-gpu-cpu" in installed else "cuda")
    assert {name: installed.get(name) for name in pins} == pins


def test_metadata_pulls_fbgemm_and_torchrec_only_by_extra() -> None:
    always, cpu, cuda = (pulled_by(extra).keys() for extra in ("", *DEVICES))
    cuda_only = {"fbgemm-gpu", "torchrec"}
    assert "torch" in always
    assert not always & {*cuda_only, "fbgemm-gpu-cpu"}
    assert "fbgemm-gpu-cpu" in cpu
    assert not cpu & cuda_only
    assert cuda_only <= cuda


@pytest.mark.parametrize("device", DEVICES)
def test_lock_meets_the_metadata(device: str) -> None:
    pins = read_pins(device)
    for name, requirement in pulled_by(device).items():
        assert name in pins, f"{name} is in pyproject.toml only: run make lock"
        assert pins[name] in requirement.specifier


def test_torch_torchrec_and_fbgemm_work_together() -> None:
    table = EmbeddingBagConfig(name="t", embedding_dim=4, num_embeddings=3, feature_names=["f"])
    ids = KeyedJaggedTensor(keys=["f"], values=torch.tensor([0, 2]), lengths=torch.tensor([2, 0]))
    collection = EmbeddingBagCollection(tables=[table])
    rows = collection.embedding_bags["t"].weight
    torch.testing.assert_close(
        collection(ids)["f"], torch.stack([rows[0] + rows[2], torch.zeros(4)])
    )
