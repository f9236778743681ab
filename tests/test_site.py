"""The pages: what they show in doctest form runs, and the built site opens in a browser.

The browser is Debian's chromium. Without one on the machine the tests of it are skipped, and the reason says so: on a runner that
has nothing but pip, nobody has looked at the site. They are slow, for the site is built first: `make site` runs them.
"""

import doctest
import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = (
    sorted(path for path in DOCS.rglob("*.md") if ">>>" in path.read_text() and "api" not in path.parts) if DOCS.exists() else []
)
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: nobody has looked at the site")


class Fences(doctest.DocTestParser):
    """Examples of Markdown: a closing fence ends what is expected."""

    def parse(self, string, name="<string>"):
        """The examples of a page, its fences taken for empty lines."""
        return super().parse(re.sub(r"(?m)^```.*$", "", string), name)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(DOCS)))
def test_the_examples_of_a_page_give_what_it_shows(page):
    found = doctest.testfile(str(page), module_relative=False, optionflags=FLAGS, parser=Fences(), verbose=False)
    assert found.attempted > 0
    assert found.failed == 0


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The address of the built site, served from this process."""
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def opened(address, folder):
    """The page as the browser has it after its scripts ran, and what they said on the console."""
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={folder}"]
    command += ["--enable-logging=stderr", "--v=0", "--virtual-time-budget=15000", "--dump-dom", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, said


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("/", ["six pure functions", "What composes with what", "futures.png"]),
        ("/tutorials/01_attention_is_a_function/", ["They agree", "01_attention_is_a_function_1.png", "<svg"]),
        ("/tutorials/02_the_past_is_a_value/", ["The tree", "02_the_past_is_a_value_1.png"]),
        ("/api/kernels/", ["attend", "Attention over two disjoint", "log-sum-exp"]),
        ("/?q=speculation", ["md-search-result__item", "Speculation"]),
    ],
)
def test_a_page_renders_and_its_console_is_silent(site, tmp_path, path, parts):
    dom, said = opened(site + path, tmp_path)
    assert said == []
    assert [part for part in parts if part.lower() not in dom.lower()] == []


@pytest.mark.slow
@needs_chromium
def test_no_page_asks_for_what_is_not_there(site, tmp_path):
    dom, _ = opened(site + "/", tmp_path)
    links = {link for link in re.findall(r'href="([^"#?]+)"', dom) if not link.startswith(("http", "data:", "mailto:"))}
    assert len(links) > 40
    missing = []
    for link in sorted(links):
        address = f"{site}/{link.removeprefix('./').lstrip('/')}"
        try:
            with urllib.request.urlopen(address, timeout=20) as answer:
                assert answer.status == 200
        except OSError:
            missing.append(link)
    assert missing == []
