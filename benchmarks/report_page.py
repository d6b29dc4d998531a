"""Measure a large page of latents in Chromium: ``python -m benchmarks.report``.

It writes a page of two SAEs with 8,192 latents each and 50,000 images, opens it from disk, and
prints sizes and times.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import Page as Tab
from playwright.sync_api import sync_playwright

from monoloss_plugin.report.page import write_page
from tests.report.synthetic import make_page

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
search.value = "thing 3";
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


def main() -> None:
    """Print what was measured as JSON."""
    page = make_page((8192, 8192), images=50_000, classes=1000, detail=8, distinct=2000)
    sizes = [len(file) for file in page.thumbnails]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        path = write_page(page, Path(folder) / "page.html")
        found = {
            "bytes_per_image": sum(sizes) / len(sizes),
            "file_mb": path.stat().st_size / 1e6,
            "write_s": time.perf_counter() - start,
        }
        found |= measure(path)
    print(json.dumps({name: round(value, 2) for name, value in found.items()}, indent=1))


if __name__ == "__main__":
    main()
