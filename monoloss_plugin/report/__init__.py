"""A page that shows the latents of SAEs: one HTML file, which needs no network.

It needs the extra ``report``.
"""

from monoloss_plugin.report.content import write_report

__all__ = ["write_report"]
