from __future__ import annotations

import pytest
import torch

from monoloss_plugin.gallery.signatures import Signatures
from monoloss_plugin.kernels.support import support_of


def activations(num_rows: int = 2000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(num_rows, 30, generator=generator)
    a[a < 0.8] = 0.0
    a[:, 1] = 2 * a[:, 0]  # the same samples
    a[:, 2] = a[:, 0] + 0.3 * a[:, 3]
    a[:, 4] = 1.0  # constant
    a[:, 5] = -a[:, 0]  # never positive
    return a


@pytest.mark.parametrize("sparse", [False, True])
def test_cosines_of_signatures_are_near_the_correlations_of_activations(sparse: bool) -> None:
    a = activations()
    found = Signatures(30, torch.device("cpu"))
    for rows in torch.arange(2000).split(300):
        found.add(rows, support_of(a[rows]) if sparse else a[rows])
    unit = torch.nn.functional.normalize(found.compute().double(), dim=1)
    varies = [k for k in range(30) if k not in (4, 5)]
    errors = (unit @ unit.T - torch.corrcoef(a.clamp(min=0).double().T))[varies][:, varies]
    assert float(errors[0, 1].abs()) < 1e-4
    assert float(errors.square().mean().sqrt()) < 0.05  # stated: 0.044
    assert float(errors.abs().max()) < 0.2
    assert float(found.compute()[4].norm()) < 1e-3 * float(found.compute()[0].norm())
    assert float(found.compute()[5].norm()) == 0


def test_signatures_do_not_depend_on_the_order_and_are_of_one_space() -> None:
    a = activations()
    whole, shuffled = (Signatures(30, torch.device("cpu")) for _ in range(2))
    whole.add(torch.arange(2000), a)
    for rows in torch.randperm(2000, generator=torch.Generator().manual_seed(1)).split(77):
        shuffled.add(rows, a[rows])
    torch.testing.assert_close(whole.compute(), shuffled.compute(), rtol=1e-4, atol=1e-3)
