"""One pass over an SAE equals the metrics taken one by one."""

from __future__ import annotations

import pytest
import torch
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sklearn.metrics import r2_score

from monoloss_plugin import functional, load_features, load_pretrained
from monoloss_plugin.evaluation import evaluate
from monoloss_plugin.features import FeatureBatches


class RandomSAE:
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.encoder = torch.randn(6, 20, generator=generator)
        self.decoder = torch.linalg.pinv(self.encoder)

    def encode(self, x):
        return (x @ self.encoder - 2).relu()

    def decode(self, latents):
        return latents @ self.decoder


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(70, 6, generator=generator), torch.arange(70) % 3


@pytest.mark.parametrize("batch_size", [7, 64, 1000])
def test_one_pass_gives_every_metric(data, batch_size) -> None:
    x, labels = data
    sae = RandomSAE()
    result = evaluate(sae, x, labels, batch_size=batch_size)
    a = sae.encode(x)
    scores = functional.monoscore(a, x)
    torch.testing.assert_close(result.monoscore.scores.float(), scores)
    torch.testing.assert_close(result.purity, functional.class_purity(a, labels, 3))
    assert result.r2 == pytest.approx(r2_score(x.numpy(), sae.decode(a).numpy()), abs=1e-6)
    assert result.l0 == pytest.approx((a > 0).sum(1).float().mean().item())
    torch.testing.assert_close(result.frequency, (a > 0).float().mean(0))
    assert result.num_dead == int((a.sum(0) == 0).sum())
    summary = result.summary()
    assert summary["monoscore"] == pytest.approx(scores.mean().item(), abs=1e-6)
    assert summary["defined_share"] == pytest.approx((scores != 0).float().mean().item())


class SparseSAE(RandomSAE):
    """A hundred latents, few of them on."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.encoder = torch.randn(6, 100, generator=generator)
        self.decoder = torch.linalg.pinv(self.encoder)
        self.decoded: list[torch.layout] = []

    def encode(self, x):
        pre = x @ self.encoder
        kept = pre.topk(3, dim=1)
        return torch.zeros_like(pre).scatter(1, kept.indices, kept.values.relu())

    def decode(self, latents):
        self.decoded.append(latents.layout)
        return latents @ self.decoder + 1


class KnowsNoSparse(SparseSAE):
    def decode(self, latents):
        return super().decode(latents.view(len(latents), 1, -1)).squeeze(1)


class MistakesSparse(SparseSAE):
    def decode(self, latents):
        return super().decode(latents) * (1 if latents.layout == torch.strided else 2)


class EncodesToCOO(SparseSAE):
    def encode(self, x):
        return super().encode(x).to_sparse()


@pytest.mark.parametrize(
    ("kind", "layouts"),
    [
        (SparseSAE, [torch.strided] + 5 * [torch.sparse_csr]),
        (KnowsNoSparse, 5 * [torch.strided]),
        (MistakesSparse, [torch.strided, torch.sparse_csr] + 4 * [torch.strided]),
        (EncodesToCOO, 5 * [torch.sparse_coo]),
    ],
)
def test_sparse_latents_are_decoded_sparse_where_that_is_the_same(data, kind, layouts) -> None:
    x, labels = data
    sae = kind()
    result = evaluate(sae, x, labels, batch_size=14)
    assert sae.decoded == layouts[: len(sae.decoded)]
    assert len(sae.decoded) >= 5
    plain = SparseSAE()
    a = plain.encode(x)
    assert result.r2 == pytest.approx(r2_score(x.numpy(), plain.decode(a).numpy()), abs=1e-5)
    torch.testing.assert_close(result.monoscore.scores.float(), functional.monoscore(a, x))
    torch.testing.assert_close(result.purity, functional.class_purity(a, labels, 3), equal_nan=True)
    torch.testing.assert_close(result.frequency, (a > 0).float().mean(0))


class InHalfPrecision(torch.nn.Module):
    """A module whose parameters say where and in what it computes."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.encoder = torch.nn.Parameter(torch.randn(6, 20, generator=generator))

    def encode(self, x):
        return (x.float() @ self.encoder).relu()

    def decode(self, latents):
        return latents @ self.encoder.T


def test_features_in_half_precision_and_a_module(data) -> None:
    x, labels = data
    result = evaluate(InHalfPrecision(), x.half(), labels, device="cpu")
    expected = evaluate(InHalfPrecision(), x.half().float(), labels)
    assert result.summary() == pytest.approx(expected.summary(), abs=1e-5)


def test_another_similarity_space_and_no_labels(data) -> None:
    x, _ = data
    sae = RandomSAE()
    other = torch.randn(70, 3, generator=torch.Generator().manual_seed(2))
    result = evaluate(sae, x, embeddings=other, batch_size=30)
    expected = functional.monoscore(sae.encode(x), other)
    torch.testing.assert_close(result.monoscore.scores.float(), expected)
    assert result.purity is None
    assert evaluate(sae, x, num_classes=3).purity is None
    assert "purity_binary" not in result.summary()


def test_a_nan_is_named_whatever_way_is_taken(data) -> None:
    x, _ = data
    bad = x.clone()
    bad[3, 2] = float("nan")
    for sae in (RandomSAE(), SparseSAE()):
        with pytest.raises(ValueError, match="contains NaN or infinite"):
            evaluate(sae, bad)


def test_leading_dimensions_go_together(data) -> None:
    x, labels = data
    folded = evaluate(
        RandomSAE(),
        x.reshape(7, 10, 6),
        labels.reshape(7, 10),
        embeddings=x.reshape(7, 10, 6),
    )
    assert folded.summary() == evaluate(RandomSAE(), x, labels).summary()


def test_bad_input_is_named(data) -> None:
    x, labels = data
    with pytest.raises(ValueError, match="num_classes: expected at least 1, got 0"):
        evaluate(RandomSAE(), x, labels, num_classes=0)
    with pytest.raises(ValueError, match="labels: expected 70 rows to match features, got 69"):
        evaluate(RandomSAE(), x, labels[:-1])
    with pytest.raises(ValueError, match="features: expected at least one sample"):
        evaluate(RandomSAE(), x[:0])
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        evaluate(RandomSAE(), x, batch_size=0)
    with pytest.raises(TypeError, match="features: expected a floating-point tensor"):
        evaluate(RandomSAE(), labels.unsqueeze(1))


def test_progress_is_shown_when_asked_for(data, capsys) -> None:
    evaluate(RandomSAE(), data[0], batch_size=30, progress=True)
    shown = capsys.readouterr().err
    assert "Evaluating" in shown
    assert "70.0/70.0" in shown
    evaluate(RandomSAE(), data[0])
    assert capsys.readouterr().err == ""


def test_where_no_sample_has_a_label_no_latent_has_a_purity() -> None:
    found = evaluate(RandomSAE(), torch.rand(6, 6), torch.full((6,), -1)).purity
    assert found is not None
    assert found.binary.isnan().all()


def test_a_batchtopk_sae_in_training_is_said_to_select_over_batches(recwarn) -> None:
    training = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=6, d_sae=8, k=2))
    torch.nn.init.constant_(training.b_enc, 10.0)  # all pre-activations are positive: L0 is k
    x = torch.randn(16, 6)
    with pytest.warns(UserWarning, match="selects over each batch"):
        evaluate(training, x)
    assert evaluate(training, x, batch_size=4).l0 == 2.0  # over each batch, as it says
    recwarn.clear()
    evaluate(RandomSAE(), x)
    assert not recwarn


@pytest.fixture(scope="module")
def held_out():
    return load_features("digits", "held_out")


def test_every_row_is_scored_of_sets_and_of_batches_however_they_shuffle(held_out) -> None:
    sae = load_pretrained("digits").sae
    in_order = FeatureBatches(held_out, batch_size=100, shuffle="none", drop_last=False)
    expected = evaluate(sae, list(in_order), num_classes=10)
    assert expected.monoscore.num_samples == 599
    for data in (held_out, FeatureBatches(held_out, batch_size=100, seed=3)):
        found = evaluate(sae, data)
        assert found.monoscore.num_samples == 599
        assert found.summary() == pytest.approx(expected.summary(), rel=1e-6)
    assert data.state_dict()["batch"] == 0  # an epoch under way stays where it is
    half = evaluate(sae, FeatureBatches(held_out, batch_size=100, shard=(1, 2)))
    assert half.monoscore.num_samples == 299


def trained_on(inputs: str | None, scale: float | None = None):
    sae = load_pretrained("digits").sae
    sae.cfg.metadata.monoloss = {"inputs": inputs, "input_mean_square_norm": scale}
    return sae


@pytest.mark.parametrize(("inputs", "scale"), [("unit norm", None), (None, 1.0)])
def test_features_of_another_scale_are_scaled_as_the_sae_was_trained(held_out, inputs, scale):
    sae, stored = trained_on(inputs, scale), held_out.tensor().float()
    expected = evaluate(sae, held_out).summary()
    expected = {name: value for name, value in expected.items() if "purity" not in name}
    with pytest.warns(UserWarning, match="features: scaled to unit norm, because the SAE") as said:
        assert evaluate(sae, stored * 7).summary() == pytest.approx(expected, rel=1e-4)
    assert said[0].filename == __file__
    unscaled = FeatureBatches(held_out, batch_size=100, normalize=False)
    with pytest.warns(UserWarning, match="features: scaled to unit norm"):
        found = evaluate(sae, unscaled).summary()
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    with pytest.warns(UserWarning, match=r"R² is -\d.*worse than the mean.*on the scale"):
        assert evaluate(sae, stored * 7, normalize=False).r2 < 0


def test_an_sae_of_features_as_they_are_gets_them_as_they_are(held_out, recwarn) -> None:
    unit = torch.nn.functional.normalize(held_out.tensor().float(), dim=1)
    sae = trained_on("as they are")
    assert evaluate(sae, held_out).r2 != evaluate(sae, unit).r2
    unknown = trained_on(None)
    assert evaluate(unknown, held_out).r2 == pytest.approx(evaluate(unknown, unit).r2, rel=1e-4)
    with pytest.raises(ValueError, match="batches are scaled to unit norm, and the SAE takes"):
        evaluate(sae, FeatureBatches(held_out, batch_size=100))


@pytest.mark.parametrize("batched", [False, True])
def test_rows_of_a_training_split_are_said(batched: bool) -> None:
    features = load_features("digits", "train")
    given = FeatureBatches(features, batch_size=256) if batched else features
    with pytest.warns(UserWarning, match="features: these are of the split 'train'") as said:
        evaluate(load_pretrained("digits").sae, given)
    assert said[0].filename == __file__
