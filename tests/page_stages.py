"""The page in its states, each as full as it gets, for what measures and judges all of it in a browser."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from page_support import PAGE, Between, Page, save_quota
from support import Site, event, put
from webdriver import Browser

import usage_dashboard as app

STAGES = ("filled", "masked", "needs you", "first run", "300 accounts")
PERSON = ("relogin", "deactivated", "blocked", "region_blocked", "no_token", "proxy_unsupported")
RECORDING = {"state": "recording", "message": "Records.", "events": 9, "rejected": 0, "ignored": 0, "publishing": True,
             "endpoint": "127.0.0.1:8317", "mode": "pop", "since": 0, "until": None, "last_event": None}  # fmt: skip
LONG = {
    "dev.one@example.net": "grace.hopper-mathematics@subdomain.example.org (#ff5dd6)",
    "dev.two@example.net": "grace.hopper-mathematics@subdomain.example.org (#eb3c6f)",
    '"plus"': '"self_serve_business_usage_based"',
    "gpt-5.4-mini": "a-vendor/very-long-model-name-2026-11-20-thinking-xhigh",
    "An's laptop": "Continuous integration of the research department",
}


class Stages:
    """Shows the page in one state after the other; a context manager."""

    def __init__(self, browser: Browser, folder: Path) -> None:
        (folder / "demo").mkdir()
        world = app.DemoWorld(folder / "demo")
        told = world.status()
        world.store.close()
        self.sites = {name: site_of(folder / name, told, world.names) for name in ("demo", "empty", "many")}
        self.sites["empty"].status.update(state="wrong_password", message="Wrong key.", last_event=None)
        self.between, self.needs_person = Between(self.sites["demo"]), False
        for path in ("/api/summary", "/api/quota", "/api/requests"):
            self.between.changes[path] = self._lengthen
        self.page = Page(browser, self.between)

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *_: object) -> None:
        self.page.goto("about:blank")  # so that nothing asks on while the servers close
        self.between.close()
        for site in self.sites.values():
            site.close()

    def show(self, stage: str) -> Page:
        """Load the page in English in a state, with an account and a request unfolded where there are any."""
        page, site = self.page, self.between
        self.needs_person = stage == "needs you"
        if stage == "300 accounts":
            site = self.sites["many"]
            if not site.store.counts["stored"]:
                crowd(site, 300, requests=1000)
        is_first = stage == "first run"
        query = "?range=7d&status=failed" if stage == "filled" else "?range=7d"
        page.open(query, server=self.sites["empty"] if is_first else site, ready=not is_first)
        page.wait_until("!document.body.classList.contains('booting')")
        if stage == "masked":
            page.click("#privacy")
        if stage == "filled":
            page.script("for (const css of ['#requests tr[data-id] button', '#accounts .twist'])"
                        " document.querySelector(css).click()")  # fmt: skip
            page.wait_until("document.querySelector('#requests .detail')")
        return page

    def _lengthen(self, body: dict[str, Any]) -> None:
        """Give accounts, plans, models and keys of an answer long names; some requests stand for all."""
        del body.get("requests", [])[24:]
        text = json.dumps(body)
        for name, longer in LONG.items():
            text = text.replace(name, longer)
        body.update(json.loads(text))
        for row, state in zip(body.get("quotas", []) if self.needs_person else [], PERSON):
            row.update(state=state, message="Sign in again in the proxy.")


def site_of(folder: Path, told: dict[str, Any] = RECORDING, names: Any = None) -> Site:
    """Return a dashboard in this process at the time of now, with what its collector would say."""
    folder.mkdir(exist_ok=True)
    site = Site(folder, PAGE, names=names or {})
    site.now, site.status = time.time(), dict(told)
    return site


def crowd(site: Site, accounts: int, requests: int = 0, models: int = 8, keys: int = 6) -> None:
    """Store the quotas of so many accounts, and requests of all of them, of so many models and keys."""
    for n in range(accounts):
        save_quota(site, f"user{n}@example.com", n % 101, (7 * n) % 101)
    made = [
        event(at=site.now - 5 * n, request_id=f"r{n}", model=f"model-{n % models}",
              api_key=f"sk-…{n % keys:04} #{n % keys:06x}", source=f"user{n % accounts}@example.com",
              auth_index=f"{n % accounts:x}")
        for n in range(max(requests, accounts, models, keys))
    ]  # fmt: skip
    for first in range(0, len(made), 1000):
        put(site.store, *made[first : first + 1000])
