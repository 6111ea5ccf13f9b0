"""A real browser without a window, where one is installed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

REQUIRED = "ANOMALY_CLIP_BROWSER"
"""Set where the tests must not be skipped."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    "--headless=new",
    "--no-sandbox",  # which root, as in a container, cannot have
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--no-first-run",
    "--hide-scrollbars",
)


@contextmanager
def browser() -> Iterator[webdriver.Chrome]:
    """Start a browser; skips where there is none, or fails where one was promised."""
    program = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    folder = os.environ.get("CHROMEWEBDRIVER")  # where GitHub's machines keep it
    driver = shutil.which("chromedriver", path=folder) or shutil.which("chromedriver")
    if program is None or driver is None:
        missing = "needs Chromium and chromedriver (Debian: chromium chromium-driver)"
        if os.environ.get(REQUIRED):
            pytest.fail(missing)
        pytest.skip(missing)
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for word in QUIET:
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(service=Service(driver), options=options)
    try:
        yield started
    finally:
        started.quit()


def open_page(
    started: webdriver.Chrome,
    page: Path,
    width: int = 1280,
    theme: Literal["light", "dark"] = "light",
) -> None:
    """Open a page in a window of a width in CSS pixels."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    started.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    wanted = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    started.execute_cdp_cmd("Emulation.setEmulatedMedia", wanted)
    started.get(page.as_uri())
