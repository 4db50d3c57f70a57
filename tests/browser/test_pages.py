"""The pages in headless Chromium: what it laid out, not what was written.

Not among CI's tests, for a bare machine has no browser: `bash tests/browser/run.sh`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

from ..pages import PAGES

pytestmark = pytest.mark.browser

# Runs in the page once everything is laid out, and leaves what it finds in the title.
PROBE = """<script>
addEventListener("load", () => { document.title = JSON.stringify({
  images: [...document.images].map(image => [image.naturalWidth, image.clientWidth]),
  tables: [...document.querySelectorAll("table")].map(t => [t.scrollWidth, t.clientWidth]),
  width: document.documentElement.scrollWidth,
  window: innerWidth,
  fetched: performance.getEntriesByType("resource").map(entry => entry.name)
           .filter(name => !name.startsWith("data:")),
  mode: document.compatMode,
}); });
</script>"""


def chromium(*arguments: str) -> str:
    program = shutil.which("chromium")
    assert program, "no chromium here; bash tests/browser/run.sh installs it"
    plain = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")
    done = subprocess.run(
        [program, *plain, *arguments], capture_output=True, text=True, timeout=300, check=True
    )
    return done.stdout


@pytest.mark.parametrize("name", PAGES)
def test_a_browser_shows_all_of_a_page(name: str, tmp_path: Path) -> None:
    page = PAGES[name](tmp_path)
    probe = tmp_path / "probe.html"
    probe.write_text(page.read_text().replace("</body>", f"{PROBE}</body>"))
    for width in (1280, 640):
        dom = chromium(f"--window-size={width},2000", "--dump-dom", probe.as_uri())
        found = json.loads(unescape(re.search(r"<title>(.*?)</title>", dom, re.DOTALL)[1]))
        assert found["mode"] == "CSS1Compat"  # standards mode
        assert found["fetched"] == []
        assert found["width"] <= found["window"], "the page scrolls sideways"
        assert found["images"]
        assert all(natural > 400 and shown > 400 for natural, shown in found["images"])
        if width == 1280:
            assert all(whole <= shown for whole, shown in found["tables"]), "a table is cut off"
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    picture = folder / f"{name}.png"
    chromium("--window-size=1280,4800", f"--screenshot={picture}", page.as_uri())
    assert picture.stat().st_size > 50_000
