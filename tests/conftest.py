"""Shared by all tests."""

from __future__ import annotations

import os

import torch
from hypothesis import settings

# No deadline: machines differ, and a first call may compile.
settings.register_profile("cachedit", deadline=None, print_blob=True)
settings.load_profile("cachedit")

if "PYTEST_XDIST_WORKER" in os.environ:  # one process per core: more threads would only wait for each other
    torch.set_num_threads(1)
