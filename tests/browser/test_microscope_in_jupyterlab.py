"""The microscope in a real browser: JupyterLab runs its notebook, Chromium types a text and moves sliders, in the light and the dark theme.

`make test-browser` installs what this needs (playwright, Chromium) and runs it. With MINIGEN_SCREENSHOTS=FOLDER the pictures are kept.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect, sync_playwright

ROOT = Path(__file__).parent.parent.parent
NOTEBOOK = "07_spectra_microscope.ipynb"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TEXT = "Dora lives in Athens. Dora plays the flute. The pet of Ivan is a goat."
MINUTES = 60_000  # milliseconds


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(url: str, server: subprocess.Popen, seconds: int = 120) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"JupyterLab did not answer at {url} within {seconds} s")


@pytest.fixture(scope="module", params=["Light", "Dark"])
def theme(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def lab(theme, tmp_path_factory):
    """The address of a JupyterLab in this theme, on a copy of the notebook."""
    folder, settings = tmp_path_factory.mktemp("notebooks"), tmp_path_factory.mktemp("settings")
    shutil.copy(ROOT / "notebooks" / NOTEBOOK, folder)
    chosen = settings / "@jupyterlab" / "apputils-extension"
    chosen.mkdir(parents=True)
    (chosen / "themes.jupyterlab-settings").write_text(json.dumps({"theme": f"JupyterLab {theme}"}))
    (chosen / "notification.jupyterlab-settings").write_text(json.dumps({"fetchNews": "false"}))
    port = free_port()
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--IdentityProvider.token="]
    environment = os.environ | {"JUPYTERLAB_SETTINGS_DIR": str(settings), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(f"http://127.0.0.1:{port}/api", server)
        yield f"http://127.0.0.1:{port}/lab/workspaces/test/tree/{NOTEBOOK}?reset"
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="module")
def page(lab):
    """The notebook in Chromium, run from top to bottom."""
    assert CHROMIUM, "no Chromium was found; install it (Debian: apt-get install chromium)"
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=quiet)
        page = browser.new_page(viewport={"width": 1400, "height": 1700})
        page.set_default_timeout(1 * MINUTES)
        page.goto(lab)
        page.locator(".jp-NotebookPanel .jp-CodeCell").first.wait_for()
        expect(page.locator(".jp-NotebookPanel .jp-Toolbar-kernelName")).to_contain_text("Python")
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name=re.compile("^Run All Cells")).click()
        yield page
        browser.close()


@pytest.fixture(scope="module")
def microscope(page) -> Locator:
    """The widget that holds figures 1, 3 and 5, once the notebook has come to it."""
    widget = page.locator(".jp-OutputArea-output:has(.minigen-tokens)").first
    widget.wait_for(state="attached", timeout=3 * MINUTES)
    settle(page)
    widget.scroll_into_view_if_needed()
    return widget


def picture(microscope: Locator, name: str) -> str:
    return microscope.locator(f"img.minigen-{name}").get_attribute("src")


def settle(page: Page) -> None:
    """Wait until the kernel has done all that was asked of it; while it is busy, JupyterLab holds back what is typed."""
    page.wait_for_timeout(500)
    expect(page.locator(".jp-Notebook-ExecutionIndicator").first).to_have_attribute("data-status", "idle", timeout=2 * MINUTES)


def press(microscope: Locator, slider: str, key: str) -> None:
    """Move the slider with this description by one step, from the keyboard."""
    handle = microscope.locator(".widget-slider", has=microscope.page.get_by_text(slider, exact=True)).locator(".noUi-handle").first
    handle.scroll_into_view_if_needed()
    handle.focus()
    handle.press(key)


def test_a_text_and_two_sliders_change_pictures_and_answers(page: Page, microscope: Locator, theme: str):
    status, answers, question = microscope.locator(".minigen-status"), microscope.locator(".minigen-answers"), microscope.locator("input[type=text]").first
    microscope.locator("textarea").fill(TEXT)
    settle(page)
    said = []
    for asked in ("Where does Dora live?", "What does Dora play?"):
        question.fill(asked)
        question.press("Enter")
        settle(page)
        microscope.get_by_role("button", name="Read").click()
        settle(page)
        expect(status).to_contain_text("answered")
        expect(answers).to_contain_text("adapter")
        said.append(answers.text_content())
    assert said[0] != said[1]

    before = {name: picture(microscope, name) for name in ("spectrum", "stream", "tokens")}
    press(microscope, "layer", "ArrowRight")
    settle(page)
    assert all(picture(microscope, name) != drawn for name, drawn in before.items())
    shares = picture(microscope, "tokens")
    press(microscope, "direction", "ArrowRight")
    settle(page)
    assert picture(microscope, "tokens") != shares

    assert page.evaluate("document.body.dataset.jpThemeLight") == str(theme == "Light").lower()
    if folder := os.environ.get("MINIGEN_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        microscope.screenshot(path=Path(folder) / f"microscope_{theme.lower()}.png")


def test_an_empty_text_leaves_a_message_that_can_be_read(page: Page, microscope: Locator):
    microscope.locator("textarea").fill(" ")
    settle(page)
    microscope.get_by_role("button", name="Read").click()
    settle(page)
    expect(microscope.locator(".minigen-status")).to_contain_text("no text was given")
    expect(microscope.locator("img.minigen-spectrum")).to_be_hidden()
