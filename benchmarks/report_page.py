"""Measure ``write_report`` and its page at full size: ``python -m benchmarks.report_page``.

It makes 50,000 JPEG files of 224 pixels and an SAE of 8,192 latents, writes the page twice (the
second time with the thumbnails of the first), opens it in Chromium from disk, and prints times.
It takes about ten minutes on 2 CPU cores.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import constants
from PIL import Image
from playwright.sync_api import Page as Tab
from playwright.sync_api import sync_playwright
from sae_lens import TopKSAE, TopKSAEConfig
from sklearn.datasets import load_sample_images

from monoloss_plugin.evaluation import evaluate
from monoloss_plugin.features import FeatureSet
from monoloss_plugin.report import write_report

WIDTH, LATENTS = 768, 8192

WATCH = """
window.longTasks = [];
new PerformanceObserver((found) => longTasks.push(...found.getEntries().map((e) => e.duration)))
  .observe({ type: "longtask", buffered: true });
"""

SCROLL = """
() => new Promise((resolve) => {
  longTasks.length = 0;
  const frames = [];
  let last = performance.now();
  const step = (now) => {
    frames.push(now - last);
    last = now;
    scrollBy(0, 120);
    if (frames.length < 150) requestAnimationFrame(step);
    else {
      const longest_task_ms = Math.max(0, ...longTasks);
      resolve({ longest_frame_ms: Math.max(...frames), longest_task_ms });
    }
  };
  requestAnimationFrame(step);
})
"""

SEARCH = """
const search = document.getElementById("search");
search.value = "3";
search.dispatchEvent(new Event("input"))
"""


def timed(tab: Tab, action: str) -> float:
    """Return the milliseconds from an action to the frame after it."""
    script = f"""() => new Promise((resolve) => {{
      const start = performance.now();
      {action};
      requestAnimationFrame(() => setTimeout(() => resolve(performance.now() - start)));
    }})"""
    return float(tab.evaluate(script))


def measure(path: Path) -> dict[str, Any]:
    """Open the page, scroll its list, sort it, search it, and open a latent."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        tab = browser.new_context(offline=True, viewport={"width": 1280, "height": 900}).new_page()
        tab.add_init_script(WATCH)
        tab.goto(path.as_uri(), wait_until="load")
        first = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
        loading = "Math.max(0, ...longTasks)"
        found = {
            "first_contentful_paint_ms": tab.evaluate(first),
            "load_ms": tab.evaluate(
                "performance.timing.loadEventEnd - performance.timing.navigationStart"
            ),
            "longest_task_loading_ms": tab.evaluate(loading),
        }
        tab.evaluate("location.hash = '#latents'")
        found |= tab.evaluate(SCROLL)
        found["next_page_ms"] = timed(
            tab, "document.querySelector('.pager button:last-child').click()"
        )
        found["sort_ms"] = timed(tab, "document.querySelector('[data-column=support]').click()")
        found["search_ms"] = timed(tab, SEARCH)
        found["latent_ms"] = timed(tab, "location.hash = '#latent-302'")
        found["step_ms"] = timed(tab, "dispatchEvent(new KeyboardEvent('keydown', {key: 'j'}))")
        session = tab.context.new_cdp_session(tab)
        session.send("HeapProfiler.collectGarbage")
        found["heap_mb"] = session.send("Runtime.getHeapUsage")["usedSize"] / 1e6
        browser.close()
    return found


def make_photographs(folder: Path, count: int) -> list[str]:
    """Write JPEG files of 224 pixels, random pieces of scikit-learn's two photographs.

    Returns:
        Their ids.
    """
    generator = np.random.default_rng(0)
    photographs = [Image.fromarray(one) for one in load_sample_images().images]
    names = [f"{number % 10}/{number:05d}.jpg" for number in range(count)]
    for name in names[:10]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        photograph = photographs[generator.integers(len(photographs))]
        side = int(generator.integers(100, 400))
        left, top = (int(generator.integers(0, of - side)) for of in photograph.size)
        piece = photograph.resize((224, 224), box=(left, top, left + side, top + side))
        piece.save(folder / name, quality=90)
    return names


def make_features(ids: list[str]) -> FeatureSet:
    """Return features of 768 numbers in 300 clusters; a photograph's class is its cluster's."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(300, WIDTH, generator=generator)
    labels = torch.tensor([int(one[0]) for one in ids])
    cluster = 30 * labels + torch.randint(30, (len(ids),), generator=generator)
    x = centres[cluster] + torch.randn(len(ids), WIDTH, generator=generator)
    return FeatureSet.from_tensors(x.half(), labels, ids, classes=[str(c) for c in range(10)])


def make_sae(features: FeatureSet) -> TopKSAE:
    """Return a TopK SAE whose directions are some of the samples."""
    sae: TopKSAE = TopKSAE(TopKSAEConfig(d_in=WIDTH, d_sae=LATENTS, k=64))
    rows = torch.arange(LATENTS) * len(features) // LATENTS
    directions = torch.nn.functional.normalize(features.take(rows).float(), dim=1)
    with torch.no_grad():
        sae.W_dec.copy_(directions / 8)
        sae.W_enc.copy_(directions.T)
    return sae


@torch.no_grad()
def encode_all(sae: TopKSAE, features: FeatureSet) -> None:
    """What every measure needs: each sample encoded and decoded."""
    for batch in features.every_row(2048):
        sae.decode(sae.encode(torch.nn.functional.normalize(batch.features, dim=1)))


def main() -> None:
    """Print what was measured as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report_page", description=__doc__)
    parser.add_argument("--images", type=int, default=50_000)
    count = parser.parse_args().images
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        constants.HF_ASSETS_CACHE = f"{folder}/cache"  # no thumbnails of an earlier run
        photos, path = Path(folder) / "photos", Path(folder) / "page.html"
        features = make_features(make_photographs(photos, count))
        sae = make_sae(features)
        for name, work in {
            "encode_and_decode_s": lambda: encode_all(sae, features),
            "evaluate_s": lambda: evaluate(sae, features),
            "report_s": lambda: write_report({"sae": sae}, features, path, images=photos),
            "report_again_s": lambda: write_report({"sae": sae}, features, path, images=photos),
        }.items():
            start = time.perf_counter()
            work()  # type: ignore[no-untyped-call]  # SAELens has no types
            found[name] = time.perf_counter() - start
        found["file_mb"] = path.stat().st_size / 1e6
        found |= measure(path)
    print(json.dumps({name: round(value, 2) for name, value in found.items()}, indent=1))


if __name__ == "__main__":
    main()
