"""Make the pictures of the page of latents that docs/look.md shows. It needs Chromium.

Run it from the root of a checkout: ``python -m docs.screenshots``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from monoloss_plugin import load_features, load_pretrained, write_report
from tests.report.chromium import chromium, new_tab, open_page

IMAGES = Path(__file__).parent / "images"


def main() -> None:
    """Write the page of the bundled SAEs, and take pictures of two of its views."""
    names = {"with MonoLoss": "batchtopk-256-monoloss-0.003", "without": "batchtopk-256"}
    saes = {name: load_pretrained("digits", sae_id).sae for name, sae_id in names.items()}
    held_out, train = (load_features("digits", split) for split in ("held_out", "train"))
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        report = write_report(saes, held_out, Path(folder) / "report.html", train=train)
        with new_tab(browser, viewport={"width": 1280, "height": 900}) as tab:
            open_page(tab, report, "#latents")
            tab.screenshot(path=IMAGES / "report_latents.png")
            open_page(tab, report, "#latent-140")
            tab.screenshot(path=IMAGES / "report_latent.png")


if __name__ == "__main__":
    main()
