"""``monoloss hosts``."""

from __future__ import annotations

from dataclasses import asdict

from monoloss_plugin.cli.output import Output, table
from monoloss_plugin.hosts import HOSTS, Host


def hosts() -> Output:
    """List the trainers that take our losses: what is installed, what is tested, how to attach."""
    content = {
        key: {**asdict(host), "installed": host.installed, "fits": host.fits}
        for key, host in HOSTS.items()
    }
    rows = [
        (host.name, _installed(host), f"{host.versions} ({host.tested})", host.supports)
        for host in HOSTS.values()
    ]
    lines = [(f"monoloss_plugin.adapters.{key}", host.attach) for key, host in HOSTS.items()]
    lines += [("monoloss_plugin", "monoloss = attach(module, MonoLoss(lam=3e-4), latents=...)")]
    return Output(
        {"hosts": content},
        [
            table("trainer", "installed", "made for (tested)", "for", rows=rows),
            table("import", "the line that attaches", rows=lines),
        ],
    )


def _installed(host: Host) -> str:
    """Return what is installed, as the table shows it."""
    if host.installed is None:
        return f"no: {host.install}"
    return host.installed if host.fits else f"{host.installed}: not made for it"
