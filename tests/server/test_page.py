"""The web page in a real browser."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgemoe import Sampling
from edgemoe.server.page import page
from edgemoe.server.settings import ServerSettings
from tests.support.browser import Browser, find_browser
from tests.support.running_server import RunningServer, running_server
from tests.support.waiting import wait_until

QUESTION = "What is 48 + 31?"
PROGRAM = find_browser()
with_browser = pytest.mark.skipif(PROGRAM is None, reason="no Chromium on this machine to open the page with")


@pytest.fixture
def browser(server: RunningServer, tmp_path: Path) -> Iterator[Browser]:
    assert PROGRAM is not None
    with Browser(PROGRAM, tmp_path) as made:
        made.open(server.url)
        made.until("find('state').dataset.state === 'ready'")
        yield made


def say(browser: Browser, text: str) -> None:
    browser.run(f"find('text').value = {text!r}; find('send').click()")


def last(browser: Browser, part: str) -> str:
    return str(browser.run(f"[...document.querySelectorAll('.assistant .{part}')].at(-1).textContent"))


def test_the_page_loads_nothing_from_elsewhere(server: RunningServer) -> None:
    text, _ = page()
    assert "http" not in text.replace("<!doctype html>", "")
    assert "innerHTML" not in text
    with urllib.request.urlopen(server.url) as answer:
        policy = answer.headers["content-security-policy"]
        assert answer.read().decode() == text
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


@with_browser
def test_a_chat_shows_the_librarys_reply(server: RunningServer, browser: Browser) -> None:
    say(browser, QUESTION)
    browser.until("!asking && conversation.length === 2")
    said = last(browser, "text")
    # The shipped model takes the likeliest token where a request does not say otherwise.
    assert said == server.engine.generate([{"role": "user", "content": QUESTION}], Sampling()).text
    assert said == browser.run("conversation[1].content")
    assert "tokens" in last(browser, "note")
    assert browser.run("[...document.querySelectorAll('.user .text')].map(each => each.textContent)") == [QUESTION]
    assert browser.complaints == []


@with_browser
def test_stop_ends_the_reply_at_once(server: RunningServer, browser: Browser) -> None:
    # Replies of the shipped model are short: this one is not to end by itself.
    browser.run("const plain = ask; ask = (path, o) => plain(path, o && o.body && path !== '/load' ? { ...o, body:"
                " JSON.stringify({ ...JSON.parse(o.body), ignore_eos: true, max_tokens: 1500 }) } : o); 0")  # fmt: skip
    say(browser, "Tell me a story.")
    browser.until("document.querySelector('.assistant .text')?.textContent.length > 20")
    assert browser.run("find('send').disabled") is True
    browser.run("find('stop').click()")
    wait_until(server.is_idle, seconds=15)
    browser.until("!asking")
    assert last(browser, "note") == "stopped"
    assert browser.run("find('send').disabled") is False


@with_browser
def test_text_is_never_markup(browser: Browser) -> None:
    say(browser, "<img src=x onerror=alert(1)><b>bold</b>")
    browser.until("!asking && document.querySelectorAll('.message').length === 2")
    assert browser.run("document.querySelectorAll('.message img, .message b').length") == 0
    assert browser.run("document.querySelector('.user .text').textContent") == "<img src=x onerror=alert(1)><b>bold</b>"


@with_browser
def test_the_plan_and_the_figures_are_shown(server: RunningServer, browser: Browser) -> None:
    browser.until("document.querySelectorAll('#plan tr').length > 5")
    rows = browser.run("[...document.querySelectorAll('#plan tr')].map(row => row.children[0].textContent)")
    assert rows == [what for what, _, _ in server.host.plan().lines()]
    figures = browser.run("[...document.querySelectorAll('.figure span')].map(each => each.textContent)")
    assert "expert hits" in figures
    assert "tokens/s, all replies" in figures
    shown = "[...document.querySelectorAll('.figure b')].map(each => each.textContent).join()"
    before = browser.run(shown)
    server.engine.generate("Once upon a time", Sampling(max_tokens=40, ignore_eos=True))
    browser.until(f"{shown} !== {before!r}", seconds=5)


@with_browser
def test_an_error_is_shown_and_the_conversation_goes_on(browser: Browser) -> None:
    say(browser, "owl " * 3000)
    browser.until("!asking && document.querySelectorAll('.message.error').length === 1")
    assert "context" in last(browser, "note")
    assert browser.run("conversation.length") == 0
    say(browser, QUESTION)
    browser.until("!asking && conversation.length === 2")


@with_browser
def test_unload_load_and_the_key(tmp_path: Path) -> None:
    assert PROGRAM is not None
    settings = ServerSettings(port=0, api_keys=frozenset({"secret-key"}))
    with running_server(settings, threads=1, context=512, state_folder="none") as server:
        with Browser(PROGRAM, tmp_path) as browser:
            browser.open(server.url)
            browser.until("!find('unlock').hidden")
            browser.run("find('key').value = 'secret-key'; find('key').dispatchEvent(new Event('change'))")
            browser.until("find('state').dataset.state === 'unloaded'")
            browser.run("find('load').click()")
            browser.until("find('state').dataset.state === 'ready'", seconds=120)
            browser.run("find('unload').click()")
            browser.until("find('state').dataset.state === 'unloaded'")
        assert server.host.state == "unloaded"
