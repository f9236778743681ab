"""The pages: what they show in doctest form runs, and the built site opens in a browser.

The browser is Debian's chromium. Without one the tests of it are skipped, and the reason says so;
where CI is set they fail, since `.ci/run` installs it. All are slow: `make site` runs them.
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

import pytest
from places import ROOT

DOCS = ROOT / "docs"
PAGES = (
    sorted(
        path for path in DOCS.rglob("*.md") if ">>>" in path.read_text() and "api" not in path.parts
    )
    if DOCS.exists()
    else []
)
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DOCS.exists(), reason="the pages are not part of a source distribution"),
]
IN_CI = os.environ.get("CI", "") not in ("", "0", "false")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None and not IN_CI, reason="no chromium on this machine: the site was not looked at"
)


class Fences(doctest.DocTestParser):
    """Examples of Markdown: a closing fence ends what is expected."""

    def parse(self, string, name="<string>"):
        """The examples of a page, its fences taken for empty lines."""
        return super().parse(re.sub(r"(?m)^```.*$", "", string), name)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(DOCS)))
def test_the_examples_of_a_page_give_what_it_shows(page):
    found = doctest.testfile(
        str(page), module_relative=False, optionflags=FLAGS, parser=Fences(), verbose=False
    )
    assert found.attempted > 0
    assert found.failed == 0


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The address of the built site, served from this process."""
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        build, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stdout + done.stderr

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))
    )
    # a browser that goes on to the next page leaves the one before
    server.handle_error = lambda *_: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from browser import Browser  # it needs tornado, which comes with jupyter

    assert CHROMIUM, (
        "CI has no chromium: install it (apt-get install chromium), as .ci/run does where it is "
        "root"
    )
    with Browser(tmp_path_factory.mktemp("chromium")) as found:
        yield found


PARTS = {  # what is looked for: words, and things by their selectors
    "/": (
        ["six pure functions", "What composes with what"],
        ["img[src*=futures]", "table", "pre code span"],
    ),
    "/tutorials/01_attention_is_a_function/": (
        ["They agree"],
        ["img[src*=attention_is_a_function_1]", ".shown svg rect"],
    ),
    "/tutorials/02_the_past_is_a_value/": (["The tree"], ["img[src*=the_past_is_a_value_1]"]),
    "/concepts/masks/": (["The algebra"], ["table"]),
    "/measured/decode/": (["llama.cpp"], ["table"]),
    "/api/kernels/": (
        ["Join attention over two disjoint sets of keys"],
        ["#funcattn\\.kernels\\.merge", "code"],
    ),
}


@needs_chromium
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 420])
@pytest.mark.parametrize("path", PARTS)
def test_a_page_renders_and_nothing_complains(site, browser, path, width, dark):
    browser.open(site + path, width=width, dark=dark)
    words, things = PARTS[path]
    text = browser.ask("document.body.innerText")
    assert [word for word in words if word not in text] == []
    assert [
        thing for thing in things if not browser.ask(f"!!document.querySelector({thing!r})")
    ] == []
    assert (
        browser.ask("[...document.images].filter(x => !x.complete || !x.naturalWidth).length") == 0
    )
    assert browser.ask("document.documentElement.scrollWidth") <= width  # nothing sticks out
    assert browser.ask("document.body.dataset.mdColorScheme") == ("slate" if dark else "default")
    assert browser.complaints == []


@needs_chromium
@pytest.mark.parametrize("query", ["speculation", "hessian", "futures"])
def test_search_answers(site, browser, query):
    browser.open(site + "/")
    browser.ask("document.querySelector('[data-md-toggle=search]').click()")
    browser.until("document.querySelector('.md-search__input').offsetParent !== null")
    browser.ask("document.querySelector('.md-search__input').focus()")
    browser.send("Input.insertText", text=query)
    browser.until("document.querySelectorAll('.md-search-result__item').length > 0")
    assert (
        query in browser.ask("document.querySelector('.md-search-result__list').innerText").lower()
    )
    assert browser.complaints == []


@needs_chromium
def test_every_page_of_the_navigation_is_there(site, browser):
    browser.open(site + "/")
    links = browser.ask(
        "[...document.querySelectorAll('.md-nav a[href]')].map(x => x.href.split('#')[0])"
    )
    pages = sorted({link for link in links if link.startswith(site)})
    assert len(pages) > 40
    for page in pages:
        with urllib.request.urlopen(page, timeout=20) as answer:
            assert answer.status == 200
