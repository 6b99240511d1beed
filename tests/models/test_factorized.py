"""Factorized layers: their place in a model, from scratch and in the place of trained ones."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from recsys_compress.compress.moments import Moments
from recsys_compress.compress.spectrum import Spectrum
from recsys_compress.config import (
    AutoIntConfig,
    DCNv2Config,
    DeepFMConfig,
    DLRMConfig,
    Job,
    ModelConfig,
    dump_job,
    load_job,
)
from recsys_compress.errors import UserError
from recsys_compress.models import build_model
from recsys_compress.models.factorized import FactorizedLinear, candidates, factorize, factors
from tests.models.test_models import BATCH, bags, collection

LAYERS = {
    "dcnv2": ["cross.0", "cross.1", "cross.2", "deep.0", "deep.2"],
    "dlrm": ["bottom.0", "bottom.2", "top.0", "top.2"],
    "deepfm": ["deep.0", "deep.2"],
    "autoint": [
        *(
            f"attention.{i}.{part}"
            for i in (0, 1)
            for part in ("query", "key", "value", "residual")
        ),
        "deep.0",
    ],
}
CONFIGS = {
    "dcnv2": ModelConfig(name="dcnv2", dcnv2=DCNv2Config(hidden=(8, 6))),
    "dlrm": ModelConfig(name="dlrm", dlrm=DLRMConfig(bottom=(8,), top=(8, 4))),
    "deepfm": ModelConfig(name="deepfm", deepfm=DeepFMConfig(hidden=(8, 4))),
    "autoint": ModelConfig(
        name="autoint", autoint=AutoIntConfig(attention_layers=2, attention_dim=8, hidden=(8,))
    ),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def correlated(rows: int, dim: int) -> torch.Tensor:
    """Returns inputs of which a few directions hold most of the variance, and a mean."""
    scales = 2.0 ** -torch.arange(dim)
    return (torch.randn(rows, dim) * scales) @ torch.randn(dim, dim) + torch.randn(dim)


def spectrum_of(vectors: torch.Tensor) -> Spectrum:
    moments = Moments.zeros(vectors.shape[-1])
    moments.add(vectors.flatten(0, -2))
    return Spectrum.of(moments)


def mimic(layer: nn.Linear, outputs: torch.Tensor, rank: int) -> FactorizedLinear:
    spectrum = spectrum_of(outputs)
    product = FactorizedLinear(layer.in_features, layer.out_features, rank)
    product.load_state_dict(factors(layer, spectrum.mean, spectrum.basis(rank)))
    return product


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_mimics_the_outputs_as_the_formula_says(bias: bool, rank: int) -> None:
    layer = nn.Linear(9, 7, bias=bias)
    x = correlated(400, 9)
    y = layer(x).detach()
    spectrum = spectrum_of(y)
    mean, basis = spectrum.mean.float(), spectrum.basis(rank).float()
    expected = (y - mean) @ basis @ basis.t() + mean
    torch.testing.assert_close(mimic(layer, y, rank)(x), expected, atol=1e-5, rtol=1e-5)
    if rank == 7:
        torch.testing.assert_close(expected, y, atol=1e-5, rtol=1e-5)


def test_full_rank_is_reached_at_the_smaller_width() -> None:
    layer = nn.Linear(5, 12)
    x = correlated(400, 5)
    torch.testing.assert_close(mimic(layer, layer(x), 5)(x), layer(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_beats_the_svd_of_the_weights_where_inputs_are_correlated(rank: int) -> None:
    layer = nn.Linear(16, 16)
    x, other = correlated(2000, 16).split(1000)
    left, singular, right = torch.linalg.svd(layer.weight.detach())
    weight = (left[:, :rank] * singular[:rank]) @ right[:rank]
    svd = (functional.linear(other, weight, layer.bias) - layer(other)).square().mean()
    ours = (mimic(layer, layer(x), rank)(other) - layer(other)).square().mean()
    assert ours < 0.5 * svd


def test_an_activation_stands_between_the_projected_output_and_its_basis() -> None:
    layer = nn.Linear(9, 7)
    x = correlated(400, 9)
    y = layer(x).detach()
    spectrum = spectrum_of(y)
    mean, basis = spectrum.mean.float(), spectrum.basis(3).float()
    product = FactorizedLinear(9, 7, 3, nn.ReLU())
    state = factors(layer, spectrum.mean, spectrum.basis(3), activation=True)
    product.load_state_dict(state)
    expected = functional.relu(y @ basis) @ basis.t() + mean - mean @ basis @ basis.t()
    torch.testing.assert_close(product(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_candidates_are_the_layers_outside_of_the_embeddings(name: str) -> None:
    model = build_model(CONFIGS[name], collection(), 2)
    model.embeddings.decoder = nn.Linear(3, 3)
    assert list(candidates(model)) == LAYERS[name]
    factorize(model, {LAYERS[name][0]: 1})
    assert list(candidates(model)) == LAYERS[name][1:]


@pytest.mark.parametrize("name", LAYERS)
def test_a_model_of_full_rank_layers_is_the_trained_model(name: str) -> None:
    full = build_model(CONFIGS[name], collection(), 2).eval()
    dense, sparse = torch.randn(BATCH, 2), bags()
    outputs: dict[str, torch.Tensor] = {}
    layers = candidates(full)
    for key, layer in layers.items():
        layer.register_forward_hook(lambda _m, _x, y, key=key: outputs.update({key: y.detach()}))
    expected = full(dense, sparse)
    state = full.state_dict()
    for key, layer in layers.items():
        # The components of any data serve at full rank; few rows leave directions without variance.
        spectrum = spectrum_of(torch.randn(100, layer.out_features) + outputs[key].mean())
        basis = spectrum.basis(layer.out_features)
        for part, value in factors(layer, spectrum.mean, basis).items():
            state[f"{key}.{part}"] = value
        for part in ("weight", "bias"):
            state.pop(f"{key}.{part}", None)
    product = build_model(CONFIGS[name], collection(), 2).eval()
    for key, layer in layers.items():
        width = layer.out_features
        product.set_submodule(key, FactorizedLinear(layer.in_features, width, width))
    product.load_state_dict(state)
    torch.testing.assert_close(product(dense, sparse), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("between", ["linear", "activation"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_job_says_it_all(name, between, tmp_path) -> None:
    config = dataclasses.replace(
        CONFIGS[name], ranks=dict.fromkeys(LAYERS[name], 2), between=between
    )
    path = tmp_path / "job.toml"
    path.write_text(dump_job(Job(data={"path": "x"}, model=config)))
    config = load_job(path).model
    assert config.ranks == dict.fromkeys(LAYERS[name], 2)
    model = build_model(config, collection(), 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    dense, sparse, labels = torch.randn(BATCH, 2), bags(), torch.rand(BATCH)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = functional.binary_cross_entropy_with_logits(model(dense, sparse), labels)
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = build_model(config, collection(), 2)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(other(dense, sparse), model(dense, sparse))


def test_the_activation_between_is_the_one_that_follows() -> None:
    settings = DCNv2Config(hidden=(8, 6), batch_norm=True, dropout=0.5)
    ranks = {"cross.0": 2, "deep.0": 2, "deep.4": 2}
    config = ModelConfig(dcnv2=settings, ranks=ranks, between="activation")
    model = build_model(config, collection(), 0)
    between = {name: model.get_submodule(name).activation for name in ranks}
    assert between["cross.0"] is None
    assert isinstance(between["deep.0"], nn.ReLU)
    assert isinstance(between["deep.4"], nn.ReLU)
    assert model.get_submodule("cross.0").first.bias is None
    assert model.get_submodule("deep.0").first.bias is not None


@pytest.mark.parametrize("rank", [2, 16, 60])
def test_products_start_with_the_variance_of_xaviers_weights(rank: int) -> None:
    layer = FactorizedLinear(60, 100, rank)
    deviation = (layer.second.weight @ layer.first.weight).std().item()
    assert deviation == pytest.approx((2 / 160) ** 0.5, rel=0.25)
    assert not layer.second.bias.any()


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"deep.1": 2}, "model.ranks: no layer 'deep.1' to factorize; did you mean 'deep.2'"),
        ({"cross_output": 1}, "model.ranks: no layer 'cross_output' to factorize"),
        ({"deep.0": 9}, r"model.ranks: 9 for 'deep.0' must lie in \[1, 8\]"),
    ],
)
def test_wrong_names_and_ranks_are_one_clear_error(ranks, message: str) -> None:
    config = dataclasses.replace(CONFIGS["dcnv2"], ranks=ranks)
    with pytest.raises(UserError, match=message):
        build_model(config, collection(), 0)
