"""Pictures of the page for the README, from real runs in Debian's chromium.

    asyncopd serve --root runs &
    python benchmarks/screenshot.py http://127.0.0.1:8321 RUN RUN/INDEX

writes docs/images/page_run.png and page_trajectory.png. The second run may be another one, with recording.top_k.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

IMAGES = Path(__file__).parent.parent / "docs" / "images"
COLOURS = 128
SETTLED_MS = 2500
"""Long enough for the charts of a finished run on two busy cores."""


def main() -> None:
    """Two pictures, 1280 pixels wide."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("origin")
    parser.add_argument("run_id")
    parser.add_argument("trajectory", metavar="RUN/INDEX", help="the response to show")
    parser.add_argument("--into", type=Path, default=IMAGES)
    asked = parser.parse_args()
    chromium = shutil.which("chromium")
    if chromium is None:
        parser.error("chromium is missing: apt-get install --yes chromium")
    views = {
        "page_run": (f"/runs/{asked.run_id}", 1835),
        "page_trajectory": ("/runs/{}/trajectories/{}".format(*asked.trajectory.split("/")), 640),
    }
    asked.into.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for name, (path, height) in views.items():
            page = browser.new_page(viewport={"width": 1280, "height": height}, color_scheme="light")
            page.goto(asked.origin + path)
            page.locator("h1").wait_for()
            page.wait_for_timeout(SETTLED_MS)
            target = asked.into / f"{name}.png"
            page.screenshot(path=target)
            # A page has few colours; a palette makes the file a third of its size.
            with Image.open(target) as shot:
                small = shot.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
            small.save(target, optimize=True)
            print(f"{target}: {target.stat().st_size:,} bytes")
        browser.close()


if __name__ == "__main__":
    main()
