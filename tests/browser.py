"""A headless browser for tests, if one is installed."""

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
"""Environment variable that makes a missing browser a failure instead of a skip."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    "--headless=new",
    "--no-sandbox",  # root, as in a container, cannot use the sandbox
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
    """Start a browser; skip the test if there is none, or fail if `REQUIRED` is set."""
    program = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    folder = os.environ.get("CHROMEWEBDRIVER")  # set on GitHub's runners
    driver = shutil.which("chromedriver", path=folder) or shutil.which("chromedriver")
    if program is None or driver is None:
        missing = "needs Chromium and chromedriver (Debian: chromium chromium-driver)"
        if os.environ.get(REQUIRED):
            pytest.fail(missing)
        pytest.skip(missing)
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in QUIET:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(service=Service(driver), options=options)
    try:
        yield chrome
    finally:
        chrome.quit()


def open_page(
    chrome: webdriver.Chrome,
    page: Path,
    width: int = 1280,
    theme: Literal["light", "dark"] = "light",
) -> None:
    """Open a page in a window of the given width in CSS pixels."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    chrome.get(page.as_uri())
