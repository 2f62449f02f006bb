"""Fixtures of the tests of the page, which name this module in pytest_plugins."""

from __future__ import annotations

import time

import pytest
from page_support import PAGE, Between, Page, fill
from support import Site


@pytest.fixture
def empty(tmp_path):
    """A dashboard in this process without a request, at the time of now, whose collector records."""
    made = Site(tmp_path, PAGE)
    made.now = time.time()
    made.status.update(
        state="recording", last_event=made.now - 4, endpoint="127.0.0.1:8317", mode="pop", events=3, rejected=0,
        ignored=0, publishing=True, since=made.now - 100, until=None,
    )  # fmt: skip
    yield made
    made.close()


@pytest.fixture
def site(empty):
    """The same with known requests and quotas."""
    fill(empty)
    return empty


@pytest.fixture
def between(empty):
    """What stands between the browser and the site."""
    made = Between(empty)
    yield made
    made.close()


@pytest.fixture
def page(browser, empty):
    """The page of the site, in English; console errors and requests to another host fail the test."""
    browser.resize(1440, 900, 1)
    browser.emulate(dark=False, print=False)
    browser.goto("about:blank")
    browser.console_errors()
    browser.requested_urls()
    made = Page(browser, empty)
    yield made
    made.check()
    browser.goto("about:blank")  # so that nothing asks on while the servers close
