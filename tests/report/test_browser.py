"""The page in a real browser, without a network."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from dinocomp.report import read_run, render_comparison, write_page, write_report

from ..helpers import until
from .folders import write_run

pytestmark = pytest.mark.slow

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
DRIVER = shutil.which("chromedriver")
ALONE = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--window-size=1280,900",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # no name is looked up
)
PHONE = {"deviceMetrics": {"width": 390, "height": 844, "pixelRatio": 2.0, "touch": True}}


@pytest.fixture(scope="module", params=["desk", "phone"])
def browser(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    if not (CHROMIUM and DRIVER):
        reason = "there is no browser; type apt-get install -y chromium chromium-driver"
        if os.environ.get("DINOCOMP_NEED_BROWSER") == "1":
            pytest.fail(f"{reason} (DINOCOMP_NEED_BROWSER=1)")
        pytest.skip(reason)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for word in (*ALONE, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    if request.param == "phone":
        options.add_experimental_option("mobileEmulation", PHONE)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(60)
    driver.phone = request.param == "phone"
    yield driver
    driver.quit()


def load(browser, page: Path):
    """Opens a page and waits until its charts are drawn; gives what runs a script in it."""
    browser.get(page.as_uri())
    ask = browser.execute_script
    until(lambda: ask("return [...document.querySelectorAll('.plot')].every(plot => plot.querySelector('.main-svg'))"))
    return ask


def check(browser, ask) -> None:
    """What holds of every page: nothing is fetched, nothing complains, all curves are there, a phone can show it."""
    assert [entry["message"] for entry in browser.get_log("browser")] == []
    assert ask("return performance.getEntriesByType('resource').map(entry => entry.name)") == []
    drawn = ask(
        "return [...document.querySelectorAll('.plot')].map(plot =>"
        " [...plot.querySelectorAll('.js-line')].filter(line => line.getAttribute('d').length > 9).length)"
    )
    assert len(drawn) > 5 and all(drawn), drawn
    wide = ask(
        "return [document.documentElement.scrollWidth, innerWidth, Math.min(...[...document.querySelectorAll("
        "'body *')].filter(e => e.checkVisibility() && [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim()))"
        ".map(e => parseFloat(getComputedStyle(e).fontSize)))]"
    )
    assert wide[0] <= wide[1] and wide[2] >= 12, wide
    if browser.phone:
        assert wide[1] == 390


def test_report(browser, tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path / "run", pictures=(10, 500, 1000), warnings=("<script>alert(1)</script>",)))
    ask = load(browser, page)
    check(browser, ask)
    slide(ask)
    zoom(browser, ask)
    press(ask)
    # In the dark, the same without being loaded again.
    background = "return document.querySelector('.plot .main-svg').style.background"
    light = ask(background)
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    until(lambda: ask(background) != light)
    check(browser, ask)


def slide(ask) -> None:
    """The slider chooses the picture."""
    seen = "return [...document.querySelectorAll('[data-slider] img')].filter(i => i.checkVisibility()).map(i => i.alt)"
    assert ask(seen) == ["PCA of patch features at iteration 1,000"]
    ask(
        "const slider = document.getElementById('pca-slider'); slider.value = 0;"
        "slider.dispatchEvent(new Event('input'))"
    )
    assert ask(seen) == ["PCA of patch features at iteration 10"]
    assert ask("return document.querySelector('output').textContent") == "iteration 10"
    assert ask("return [...document.images].filter(image => !image.hidden).every(image => image.naturalWidth > 0)")


def zoom(browser, ask) -> None:
    """Dragging zooms all charts, a phone's only when asked to; and back."""
    from selenium.webdriver import ActionChains

    def ranges() -> list:
        return ask("return [...document.querySelectorAll('.plot')].map(plot => plot._fullLayout.xaxis.range)")

    before = ranges()
    loss = browser.find_element("css selector", "[data-chart=loss]")
    ask("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", loss)
    mode = "return document.querySelector('[data-chart=loss]')._fullLayout.dragmode"
    if browser.phone:
        assert ask(mode) is False, "a finger scrolls the page"
        browser.find_element("css selector", ".chart:has([data-chart=loss]) button[data-do=zoom]").click()
        assert ask(mode) == "zoom"
        return
    area = browser.find_element("css selector", "[data-chart=loss] .nsewdrag")
    hold = ActionChains(browser).move_to_element_with_offset(area, -80, 0).click_and_hold()
    hold.move_by_offset(160, 5).release().perform()
    until(lambda: all(now[1] - now[0] < 0.8 * (was[1] - was[0]) for now, was in zip(ranges(), before, strict=True)))
    ask("Plotly.relayout(document.querySelector('[data-chart=loss]'), {'xaxis.autorange': true})")
    until(lambda: all(abs(now[1] - was[1]) < 1 for now, was in zip(ranges(), before, strict=True)))


def press(ask) -> None:
    """Buttons change the axes, and smooth."""
    state = (
        "const plot = document.querySelector('[data-chart=loss]');"
        "return [plot._fullLayout.xaxis.type, plot._fullLayout.yaxis.type, plot.data.length]"
    )
    one, _, curves = ask(state)
    assert one == "linear"
    for do in ("x", "y", "smooth"):
        ask(f"document.querySelector('.chart:has([data-chart=loss]) button[data-do={do}]').click()")
    until(lambda: ask(state) == ["log", "log", 2 * curves])
    for do in ("x", "y", "smooth"):
        ask(f"document.querySelector('.chart:has([data-chart=loss]) button[data-do={do}]').click()")
    until(lambda: ask(state) == ["linear", "linear", curves])


def test_a_run_that_was_killed(browser, tmp_path: Path) -> None:
    """It says that it is running; the page says that there is no news."""
    ask = load(browser, write_report(write_run(tmp_path / "run", status="running")))
    assert "the run may have been killed" in ask("return document.querySelector('[data-updated]').textContent")
    assert browser.get_log("browser") == []


def test_comparison(browser, tmp_path: Path) -> None:
    records = [read_run(write_run(tmp_path / name, pictures=(10,))) for name in ("one", "two", "three")]
    write_page(tmp_path / "compare.html", render_comparison(records))
    ask = load(browser, tmp_path / "compare.html")
    check(browser, ask)
    colours = ask(
        "return [...document.querySelectorAll('.plot')].map(plot => plot.data.map(curve => curve.line.color).join())"
    )
    assert len(set(colours)) == 1 and len(set(colours[0].split(","))) == 3, "a run has one colour everywhere"
