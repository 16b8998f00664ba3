"""Plans are made for the planner's recorded hosts."""

from __future__ import annotations

from tests.planner.conftest import data as data
