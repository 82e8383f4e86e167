"""For every test: no prices and no measured tables of the person who runs it."""

from __future__ import annotations

import os

import pytest

from planner.hardware.aiconfigurator import TABLES_VARIABLE
from planner.hardware.prices import PRICES_VARIABLE, SKYPILOT_VARIABLE


def pytest_configure() -> None:
    """Hides SkyPilot's catalogs, a prices file and measured tables of this machine: answers would change."""
    os.environ[SKYPILOT_VARIABLE] = ""
    os.environ[TABLES_VARIABLE] = ""
    os.environ.pop(PRICES_VARIABLE, None)


@pytest.fixture(autouse=True)
def hidden_prices_stay_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undoes what a test sets of these."""
    monkeypatch.setenv(SKYPILOT_VARIABLE, "")
    monkeypatch.setenv(TABLES_VARIABLE, "")
    monkeypatch.delenv(PRICES_VARIABLE, raising=False)
