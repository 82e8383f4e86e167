"""For every test: no prices and no measured tables of the person who runs it."""

from __future__ import annotations

import pytest

from planner import aiconfigurator
from planner.market import PRICES_VARIABLE, SKYPILOT_VARIABLE


@pytest.fixture(autouse=True)
def no_prices_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides SkyPilot's catalogs and a prices file that this machine may have: answers would change."""
    monkeypatch.setenv(SKYPILOT_VARIABLE, "")
    monkeypatch.delenv(PRICES_VARIABLE, raising=False)


@pytest.fixture(autouse=True)
def no_installed_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves an installed aiconfigurator-core unread: its tables would stand in for the shipped ones."""
    monkeypatch.setattr(aiconfigurator, "can_read", lambda: False)
