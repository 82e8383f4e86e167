"""For every test: no prices of the person who runs it."""

from __future__ import annotations

import pytest

from planner.market import PRICES_VARIABLE, SKYPILOT_VARIABLE


@pytest.fixture(autouse=True)
def no_prices_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides SkyPilot's catalogs and a prices file that this machine may have: answers would change."""
    monkeypatch.setenv(SKYPILOT_VARIABLE, "")
    monkeypatch.delenv(PRICES_VARIABLE, raising=False)
