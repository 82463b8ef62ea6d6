"""The report, opened in headless Chromium: nothing is fetched or logged, and it reads on a phone and in the dark.

Screenshots go to `runs/browser`. Skipped without `chromium` on the PATH.
"""

import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from trainer_ext.cli import app

pytestmark = pytest.mark.soak

SHOTS = Path(__file__).parents[2] / "runs" / "browser"
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 400, "height": 800}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Of some modes and of stock's error in them."""
    folder = tmp_path_factory.mktemp("report")
    words = "parity run --dataset sample --modes single,ga4,ragged --include-stock --whole-batch --max-steps 8"
    found = CliRunner().invoke(app, [*words.split(), "--output-dir", str(folder)])
    assert found.exit_code == 0, found.output
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser():
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("there is no chromium on the PATH")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as session:
        browser = session.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("window", [WIDE, NARROW], ids=["wide", "narrow"])
def test_the_report_in_a_browser(browser, report, window, scheme):
    page = browser.new_page(viewport=window, color_scheme=scheme)
    said, fetched = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: fetched.append(request.url))
    page.goto(report.as_uri())
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{window['width']}_{scheme}.png", full_page=True)
    assert said == []
    assert [url for url in fetched if not url.startswith("data:")] == [report.as_uri()]
    verdict = page.locator("h1, h2, [class*=verdict]").all_inner_texts()
    assert any("equal" in text for text in verdict), verdict
    for name in ("stock:ga4", "the loss is not divided by the whole step's items"):
        assert page.get_by_text(name).first.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= window["width"]  # tables scroll in themselves
    red, green, blue = (
        int(part) for part in re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).color"))[:3]
    )
    assert (red + green + blue < 384) == (scheme == "light")  # dark text on light ground, or the other way
    plots = page.locator("svg")
    assert plots.count() >= 3
    assert all(plots.nth(i).get_attribute("aria-label") or plots.nth(i).locator("title").count() for i in range(3))
    page.close()
