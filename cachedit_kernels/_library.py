"""The torch.library namespace `cachedit`: every operator's schema is defined here, from Python, exactly once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "cachedit"

# A fragment, so that each operator's op.py (and the compiled library) can add to the namespace.
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def define(schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Defines an operator by its schema, `name[.overload](...) -> ...`, and returns what calls it."""
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema.partition("(")[0]
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    packet, _, overload = name.partition(".")
    operator: Callable[..., Any] = getattr(getattr(getattr(torch.ops, NAMESPACE), packet), overload or "default")
    return operator
