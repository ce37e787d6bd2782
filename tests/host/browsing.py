"""A browser for tests of the host's page."""

import shutil
from contextlib import contextmanager

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=3600,2200",
)
# A page loads a graph of its own when it starts, the last one that was open: any that is loaded before it is lost.
READY = """
const {app, LiteGraph} = window;
return !!(app && app.graph && LiteGraph && LiteGraph.registered_node_types['ProFusion_ToyboxLoader']
  && app.extensionManager && app.extensionManager.workflow && app.extensionManager.workflow.activeWorkflow);
"""


@contextmanager
def browsing(profile):
    """A browser with a profile of its own in this folder."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options, Service(DRIVER))
    browser.set_script_timeout(120)
    try:
        yield browser
    finally:
        browser.quit()


def open_page(browser, server, **settings):
    """The server's page, once it has its nodes; settings: the user's."""
    from selenium.webdriver.support.ui import WebDriverWait

    for name, value in settings.items():
        server.post(f"/settings/{name}", value)
    if browser.current_url.startswith("http"):
        # A page that is loaded again goes on under its id, and the host, which may notice only then that the socket of
        # the page before is closed, forgets the new one with it: nothing that runs is shown any more.
        browser.execute_script("sessionStorage.clear(); window.name = ''")
    browser.get(f"http://127.0.0.1:{server.port}/")
    WebDriverWait(browser, 180).until(lambda b: b.execute_script(READY))
