"""What cutting outputs costs: the estimate against the cost itself, for layers and tables."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys_compress.compress import CompressedEmbeddingBagCollection
from recsys_compress.compress.damage import Damage, measure
from recsys_compress.compress.method import Values
from recsys_compress.compress.methods.full import Full
from recsys_compress.compress.moments import Moments
from recsys_compress.compress.spectrum import Spectrum
from recsys_compress.config import AutoIntConfig, DCNv2Config, ModelConfig
from recsys_compress.models import build_model
from recsys_compress.models.factorized import candidates
from tests.compress.tables import make_policy

BATCH = 400
CONFIGS = {
    "dcnv2": ModelConfig(dcnv2=DCNv2Config(cross_layers=2, hidden=(8,))),
    "autoint": ModelConfig(name="autoint", autoint=AutoIntConfig(attention_layers=1)),
}


def make_model(
    name: str, optimizer: str, pooling: PoolingType
) -> tuple[nn.Module, CompressedEmbeddingBagCollection]:
    torch.manual_seed(0)
    tables = [
        EmbeddingBagConfig(
            name=key, feature_names=[key], num_embeddings=30, embedding_dim=8, pooling=kind
        )
        for key, kind in (("one", PoolingType.SUM), ("many", pooling))
    ]
    embeddings = CompressedEmbeddingBagCollection(
        tables=tables, policy=make_policy(Full(), optimizer, min_rows=0)
    )
    decay = 2.0 ** -torch.arange(8)
    rows = {key: torch.randn(30, 8) * decay @ torch.randn(8, 8) + 0.5 for key in ("one", "many")}
    embeddings.write([Values(tables=rows)], embeddings.state_dict())
    return build_model(CONFIGS[name], embeddings, 2).eval(), embeddings


def make_batch() -> tuple[Tensor, KeyedJaggedTensor]:
    """Returns dense features, one id, and bags of 0 to 3."""
    lengths = torch.cat([torch.ones(BATCH, dtype=torch.int64), torch.randint(0, 4, (BATCH,))])
    values = torch.randint(0, 30, (int(lengths.sum()),))
    sparse = KeyedJaggedTensor(keys=["one", "many"], values=values, lengths=lengths)
    return torch.randn(BATCH, 2), sparse


def spectrum_of(vectors: Tensor) -> Spectrum:
    moments = Moments.zeros(vectors.shape[-1])
    moments.add(vectors.flatten(0, -2))
    return Spectrum.of(moments)


def cut(spectrum: Spectrum, rank: int, vectors: Tensor) -> Tensor:
    mean, basis = spectrum.mean.float(), spectrum.basis(rank).float()
    return (vectors - mean) @ basis @ basis.t() + mean


@pytest.mark.parametrize("pooling", [PoolingType.SUM, PoolingType.MEAN])
@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_estimate_is_the_rise_of_logloss(name, optimizer, pooling) -> None:
    model, embeddings = make_model(name, optimizer, pooling)
    dense, sparse = make_batch()
    layers = candidates(model)
    outputs: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda _m, _x, y, key=key: outputs.update({key: y.detach()}))
        for key, layer in layers.items()
    ]
    logits = model(dense, sparse).detach()
    for hook in hooks:
        hook.remove()
    truth = torch.sigmoid(logits)  # the model is right, so its gradient vanishes

    def rise() -> float:
        loss = binary_cross_entropy_with_logits(model(dense, sparse), truth)
        return (loss - binary_cross_entropy_with_logits(logits, truth)).item()

    vectors = {key: embeddings.vectors(key) for key in ("one", "many")}
    spectra = {key: spectrum_of(value) for key, value in (outputs | vectors).items()}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = measure(model, embeddings, layers, spectra, [(dense, sparse)] * 2)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert set(found) == set(spectra)
    for key, spectrum in spectra.items():
        width = len(spectrum.mean)
        assert found[key].shape == (width + 1,)
        assert found[key][width] == 0
        rank = int((spectrum.lost_share() < 0.003).nonzero()[0])
        if key in layers:
            hook = layers[key].register_forward_hook(
                lambda _m, _x, y, s=spectrum, k=rank: cut(s, k, y)
            )
            actual = rise()
            hook.remove()
        else:
            tables = {key: cut(spectrum, rank, vectors[key])}
            embeddings.write([Values(tables=tables)], embeddings.state_dict())
            actual = rise()
            embeddings.write([Values(tables={key: vectors[key]})], embeddings.state_dict())
        assert found[key][rank].item() == pytest.approx(actual, rel=0.35, abs=1e-7), key


def test_components_that_no_logit_reads_cost_nothing() -> None:
    torch.manual_seed(0)
    vectors = torch.randn(500, 3) * torch.tensor([3.0, 1.0, 2.0])
    spectrum = spectrum_of(vectors)
    damage = Damage(spectrum)
    # The strongest component is the first column, but the logit reads the second alone.
    gradients = torch.tensor([0.0, 1.0, 0.0]).expand(500, 3)
    damage.add(vectors, gradients, torch.zeros(500))
    losses = damage.losses()
    expected = vectors[:, 1].var() * 0.25 / 2
    torch.testing.assert_close(losses[:3], expected.expand(3).double(), rtol=0.1, atol=0)
    assert losses[3] == 0


@pytest.mark.parametrize("pooling", [PoolingType.SUM, PoolingType.MEAN])
def test_the_mean_counts_as_the_weights_of_ids_say(pooling: PoolingType) -> None:
    table = EmbeddingBagConfig(
        name="many", feature_names=["many"], num_embeddings=9, embedding_dim=3, pooling=pooling
    )
    embeddings = CompressedEmbeddingBagCollection(
        tables=[table], policy=make_policy(Full(), "adam", min_rows=0), is_weighted=True
    )
    vectors = torch.tensor([1.0, -2.0, 0.5]).expand(9, 3)
    embeddings.write([Values(tables={"many": vectors})], embeddings.state_dict())
    sparse = KeyedJaggedTensor(
        keys=["many"],
        values=torch.arange(8),
        lengths=torch.tensor([2, 2, 0, 3, 1]),
        weights=torch.tensor([0.25, 0.25, 0.25, 0.25, 0.5, 0.5, 2.0, 3.0]),
    )

    class Sum(nn.Module):
        def forward(self, _dense: Tensor, bags: KeyedJaggedTensor) -> Tensor:
            found: Tensor = embeddings(bags).values().sum(dim=1)
            return found

    batches = [(torch.zeros(5, 0), sparse)]
    found = measure(Sum(), embeddings, {}, {"many": spectrum_of(vectors)}, batches)
    torch.testing.assert_close(found["many"], torch.zeros(4).double(), rtol=0, atol=1e-12)


def test_nothing_measured_costs_nothing() -> None:
    assert Damage(spectrum_of(torch.randn(9, 2))).losses().tolist() == [0, 0, 0]
