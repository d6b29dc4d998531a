"""The recipes of docs/hosts/git_only.md, on modules of the same interface as the libraries'."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from monoloss_plugin import functional
from tests.pages import py_blocks

SAEV, PRISMA = py_blocks("docs/hosts/git_only.md")


class Coder(nn.Module):
    """A TopK SAE."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(64, 96), nn.Linear(96, 64)

    def encode(self, x: Tensor) -> Tensor:
        z = self.encoder(x)
        kept = z.topk(6, dim=-1)
        return torch.zeros_like(z).scatter(-1, kept.indices, kept.values)


class SaevOutput(NamedTuple):
    h_x: Tensor
    f_x: Tensor
    x_hats: Tensor


@dataclass(frozen=True, slots=True)
class SaevLoss:
    mse: Tensor
    aux: Tensor

    @property
    def loss(self) -> Tensor:
        return self.mse + self.aux


class SaevObjective(nn.Module):
    """As saev's MatryoshkaObjective: called with an SAE and activations."""

    def forward(self, sae: Coder, x: Tensor) -> tuple[SaevLoss, SaevOutput]:
        f_x = sae.encode(x)
        x_hats = sae.decoder(f_x)[:, None]
        mse = (x_hats - x[:, None]).square().mean()
        return SaevLoss(mse, torch.zeros(())), SaevOutput(sae.encoder(x), f_x, x_hats)


def test_saev(images, monkeypatch) -> None:
    train = SimpleNamespace(nn=SimpleNamespace(get_objective=lambda cfg: SaevObjective()))
    trained: list[Any] = []
    train.Config, train.main = dict, trained.append
    monkeypatch.setitem(__import__("sys").modules, "saev", SimpleNamespace())
    framework = SimpleNamespace(train=train)
    monkeypatch.setitem(__import__("sys").modules, "saev.framework", framework)
    exec(SAEV, {})
    assert len(trained) == 1

    sae, x = Coder(), images[:100]
    loss, out = train.nn.get_objective(None)(sae, x)
    plain, _ = SaevObjective()(sae, x)
    term = 3e-4 * functional.monoloss(out.f_x.relu(), x)  # the mean over elements, of unit norm
    torch.testing.assert_close(loss.loss, plain.loss + term)
    assert loss.mse == plain.mse
    evaluating = train.nn.get_objective(None).eval()
    assert evaluating(sae, x)[0] == replace(plain)


class PrismaCoder(Coder):
    """As ViT-Prisma's StandardSparseAutoencoder: a tuple whose third entry is the loss."""

    def forward(self, x: Tensor, dead_neuron_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        acts = self.encode(x).relu()
        out = self.decoder(acts)
        norm = (x - x.mean(0)).norm(dim=-1, keepdim=True)
        mse = ((out - x).square() / norm).mean()
        return out, acts, mse, mse, torch.zeros(()), torch.zeros(()), torch.zeros(())


def test_vit_prisma(images) -> None:
    trainer = SimpleNamespace(sparse_coder=PrismaCoder(), run=lambda: None)
    x = 3 * images[:500]
    exec(PRISMA, {"trainer": trainer, "activations": x})
    found = trainer.sparse_coder(x, None)
    plain = PrismaCoder()(x)
    # What the library's loss is, in the paper's: the same errors on inputs of unit norm.
    ratio = (plain[2] / ((plain[0] - x) / 3).square().mean()).item()
    term = functional.monoloss(plain[1], x)
    added = ((found[2] - plain[2]) / term).item()
    assert added == pytest.approx(3e-4 * ratio, rel=0.05)  # norms of single inputs differ a little
    assert len(found) == 7
    assert torch.equal(trainer.sparse_coder.eval()(x)[2], plain[2])
