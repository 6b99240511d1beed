"""What the documentation shows has to work: Python is run, jobs and studies are read."""

import re
import tomllib
from pathlib import Path

import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys_compress.compare.spec import Study
from recsys_compress.config import Job
from recsys_compress.settings import parse

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def test_the_readmes_python_makes_a_model_within_its_budget() -> None:
    tables = [
        EmbeddingBagConfig(name=name, feature_names=[name], num_embeddings=rows, embedding_dim=16)
        for name, rows in (("user", 200_000), ("item", 50_000))
    ]
    names: dict[str, object] = {"tables": tables}
    (code,) = blocks(ROOT / "README.md", "python")
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102
    embeddings = names["embeddings"]
    assert embeddings.size_report().table_bytes <= 2_000_000  # type: ignore[attr-defined]
    ids = KeyedJaggedTensor.from_lengths_sync(
        keys=["user", "item"], values=torch.arange(6), lengths=torch.ones(6, dtype=torch.int32)
    )
    model = names["model"]
    assert model(torch.zeros(3, 13), ids).shape == (3, 1)  # type: ignore[operator]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_settings_that_are_shown_are_valid(page: Path) -> None:
    for text in blocks(page, "toml"):
        raw = tomllib.loads(text)
        if raw.keys() & {"embedding", "model", "train"}:
            parse(Job, {"data": {"path": "x"}, **raw}, where=page.name)
        if "methods" in raw:
            parse(Study, raw, where=page.name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
