"""One pass over a dictionary equals the metrics taken one by one."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import r2_score

from monoloss_plugin import functional
from monoloss_plugin.evaluation import evaluate


class RandomDictionary:
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
    sae = RandomDictionary()
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


def test_another_similarity_space_and_no_labels(data) -> None:
    x, _ = data
    sae = RandomDictionary()
    other = torch.randn(70, 3, generator=torch.Generator().manual_seed(2))
    result = evaluate(sae, x, embeddings=other, batch_size=30)
    expected = functional.monoscore(sae.encode(x), other)
    torch.testing.assert_close(result.monoscore.scores.float(), expected)
    assert result.purity is None
    assert evaluate(sae, x, num_classes=3).purity is None
    assert "purity_binary" not in result.summary()


def test_bad_input_is_named(data) -> None:
    x, labels = data
    with pytest.raises(ValueError, match="labels: expected 70 rows to match features, got 69"):
        evaluate(RandomDictionary(), x, labels[:-1])
    with pytest.raises(ValueError, match="features: expected at least one sample"):
        evaluate(RandomDictionary(), x[:0])
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        evaluate(RandomDictionary(), x, batch_size=0)
    with pytest.raises(TypeError, match="features: expected a floating-point tensor"):
        evaluate(RandomDictionary(), labels.unsqueeze(1))


def test_progress_is_shown_when_asked_for(data, capsys) -> None:
    evaluate(RandomDictionary(), data[0], progress=True)
    assert "Evaluating" in capsys.readouterr().err
    evaluate(RandomDictionary(), data[0])
    assert capsys.readouterr().err == ""
