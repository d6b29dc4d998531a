"""What lam becomes in a host, and what the log and the records say of it."""

from __future__ import annotations

import logging

import pytest
import torch

from monoloss_plugin import MonoLoss
from monoloss_plugin.attaching import AttachedTerm
from monoloss_plugin.sae_terms import LamConversion


@pytest.mark.parametrize("reduction", ["sum", "mean", "fvu"])
def test_lam_is_converted_logged_and_recorded_once(reduction, caplog) -> None:
    inputs = 3 * torch.nn.functional.normalize(torch.randn(16, 8) + 1, dim=1)
    variance = inputs.var(0, correction=0).sum().item()
    per_norm = {"sum": 8.0, "mean": 1.0, "fvu": 8.0 / variance}[reduction]
    attached, record = AttachedTerm(MonoLoss(lam=1e-3), warm_up_steps=2, start=0.5), {}
    conversion = LamConversion("A host", reduction, logging.getLogger("monoloss_plugin.a_host"))
    for step in range(3):
        conversion.begin_step(step)
        factor = conversion.factor(attached, inputs * (step + 1), record)
        assert factor == pytest.approx(9 * per_norm, rel=1e-5)
    (said,) = caplog.records
    assert said.levelno == logging.WARNING
    assert f"is {factor:g} times lam: {1e-3 * factor:g}" in said.getMessage()
    assert said.getMessage().endswith("Samples are compared by the SAE's inputs")
    assert record["input_mean_square_norm"] == pytest.approx(9, rel=1e-5)
    term = record["terms"]["monoloss"]
    assert (term["lam"], term["warm_up_steps"], term["factor"]) == (1e-3, 2, factor)
    assert term["start"] == 0.5

    resumed = LamConversion("A host", reduction, conversion.logger)
    resumed.begin_step(3)
    assert resumed.factor(attached, inputs * 7, record) == factor
    conversion.begin_step(0)  # another run measures its own inputs
    grown = 4 if reduction != "fvu" else 1  # which does not depend on scale
    twice = conversion.factor(attached, inputs * 2, record)
    assert twice == pytest.approx(grown * factor, rel=1e-5)
    assert conversion.factor(attached, inputs, record, times=2) == pytest.approx(2 * twice)

    again = AttachedTerm(MonoLoss(lam=0.5))  # in the place of a term that was removed
    conversion.factor(again, inputs, record)
    assert "lam 0.5 is measured" in caplog.messages[-1]
    assert record["terms"]["monoloss"]["lam"] == 0.5
