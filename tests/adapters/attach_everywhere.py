"""A pytest plugin that attaches a loss term with lam=0 to every training SAE that a test makes.

At lam=0 a term changes nothing, so SAELens must pass its own tests with it. To see that, run this
in a checkout of SAELens. Its tests are a package called ``tests`` too, so give pytest the folder
of this file instead of its full name::

    PYTHONPATH=THIS_REPOSITORY/tests/adapters python -m pytest -p attach_everywhere tests

Some of its tests compare coefficients, logs or metadata with exact dictionaries. They fail, because
the term's name is in there too. ``--attach OffSupportL1`` attaches another term. The last lines say
how many SAEs got the term.
"""

from __future__ import annotations

from collections import Counter
from functools import wraps
from typing import Any

import pytest
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

import monoloss_plugin
from monoloss_plugin.adapters.sae_lens import add_loss

_counts: Counter[str] = Counter()


def attach_after_init(sae_class: type, loss: str, counts: Counter[str]) -> None:
    """Make a class attach the term to each SAE once it is complete, and count the SAEs."""
    init = sae_class.__init__

    @wraps(init)
    def init_and_attach(self: Any, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        if type(self).__init__ is not init_and_attach:  # a subclass has more to do
            return
        try:
            add_loss(self, getattr(monoloss_plugin, loss)(lam=0.0))
            counts[f"attached to {self.cfg.architecture()}"] += 1
        except ValueError:  # the term cannot work on this SAE
            counts[f"refused by {self.cfg.architecture()}"] += 1

    sae_class.__init__ = init_and_attach


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--attach", default="MonoLoss", help="the loss term to attach everywhere")


def pytest_configure(config: pytest.Config) -> None:
    for sae_class, _ in SAE_TRAINING_CLASS_REGISTRY.values():
        attach_after_init(sae_class, config.getoption("attach"), _counts)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counted = ", ".join(f"{what} {times} times" for what, times in sorted(_counts.items()))
    terminalreporter.write_line(f"loss terms: {counted or 'attached to nothing'}")
