"""The stand-ins, where a fault of theirs would let the tests of the program pass for nothing."""

from __future__ import annotations

import socket
from urllib.parse import quote


def test_browser_hears_what_goes_wrong_on_a_page_and_what_it_loads(browser):
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        address = f"http://127.0.0.1:{nobody.getsockname()[1]}/x.png"
    page = f"<img src={address} onerror='document.title = 1'><script>missing()</script>"
    browser.goto("data:text/html," + quote(page))
    browser.wait_until("document.title === '1'")
    assert any("missing is not defined" in error for error in browser.console_errors())
    assert address in browser.requested_urls()
