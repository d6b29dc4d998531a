"""Rows are read as ``evaluate`` reads them."""

from __future__ import annotations

import torch

from monoloss_plugin import load_features
from monoloss_plugin.saes import rows
from monoloss_plugin.saes.rows import Rows


def test_a_set_and_its_tensor_give_the_same_batches(monkeypatch) -> None:
    monkeypatch.setattr(rows, "BATCH", 250)
    features = load_features("digits", "held_out")
    stored = features.tensor()
    assert stored.dtype == torch.float16
    for unit_norm in (True, False):
        expected = stored.float()
        if unit_norm:
            expected = expected / expected.norm(dim=1, keepdim=True)
        for given in (features, stored, stored.reshape(-1, 1, 64), stored.numpy()):
            found = list(Rows.of(given, unit_norm).batches())
            assert [len(batch) for batch in found] == [250, 250, 99]
            torch.testing.assert_close(torch.cat(found), expected)


def test_a_sample_holds_each_row_at_most_once_and_follows_its_seed() -> None:
    every = Rows.of(torch.arange(1000.0)[:, None], unit_norm=False)
    first, again, other = (every.sample(300, seed).flatten().tolist() for seed in (1, 1, 2))
    assert first == again != other
    assert len(set(first)) == 300
    assert 400 < sum(first) / 300 < 600  # not the first rows
    assert every.sample(1000, 0).flatten().tolist() == list(range(1000))
