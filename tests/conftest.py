"""Shared by all tests."""

from __future__ import annotations

from hypothesis import settings

# No deadline: machines differ, and a first call may compile.
settings.register_profile("cachedit", deadline=None, print_blob=True)
settings.load_profile("cachedit")
