"""A page in a real browser at several widths: whatever of its text or drawings is cut off, covered or out of sight.

Each width is a frame of its own in one page; a script writes what it measured into that page, and chromium prints it.
No port is opened and nothing is loaded.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

WIDTHS = (360, 768, 1280, 1920)
NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--virtual-time-budget=10000",
)

MEASURE = Path(__file__).with_name("layout.js")


def browser() -> str | None:
    """The command of a browser of the chromium family; None where this machine has none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


def layout_faults(pages: Mapping[str, str], scratch: Path) -> list[str]:
    """A line for each text that leaves its card, its figure or the page, or covers another: which page, which width.

    The pages' content security policy is taken out: the measuring script is none of theirs.
    """
    frames = []
    for name, page in pages.items():
        open_page = re.sub(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", "", page)
        source, title = html.escape(open_page), html.escape(name)
        frames += [
            f'<iframe title="{title}" width="{width}" height="900" srcdoc="{source}"></iframe>' for width in WIDTHS
        ]
    file = scratch / "frames.html"
    script = MEASURE.read_text(encoding="utf-8")
    file.write_text(f"<!doctype html><meta charset=utf-8><body>{''.join(frames)}<script>{script}</script>", "utf-8")
    printed = _run("--dump-dom", "--window-size=2000,1000", scratch=scratch, file=file)
    (found,) = re.findall(r'<pre id="faults">(.*?)</pre>', printed, flags=re.DOTALL)
    return json.loads(html.unescape(found))


def rendered(page: Path, scratch: Path) -> str:
    """The page's document after its scripts have run, under its own content security policy."""
    return _run("--dump-dom", "--window-size=1280,1000", scratch=scratch, file=page)


def _run(*options: str, scratch: Path, file: Path) -> str:
    command = browser()
    assert command is not None
    profile = f"--user-data-dir={scratch / 'profile'}"
    done = subprocess.run(
        [command, *FLAGS, profile, *options, file.as_uri()], capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
