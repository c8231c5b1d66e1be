"""Reads a YAML or JSON file into a dictionary; errors name the file and the line."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["Document", "read_document"]

Document = str | os.PathLike[str] | Mapping[str, Any]


def read_document(path_or_dict: Document) -> tuple[dict[str, Any], str]:
    """Return the content of a file or a dictionary, and the text that errors about it begin with.

    Args:
        path_or_dict: A JSON file (by the suffix ``.json``), another file, which is read as YAML, or a dictionary.

    Returns:
        A copy of the mapping at the top; ``"path: "``, or nothing for a dictionary.

    Raises:
        ValueError: If the file is malformed, gives a key twice, or holds something else than a mapping.
        FileNotFoundError: If there is no such file.
        ImportError: For a YAML file where PyYAML is not installed.
        TypeError: If ``path_or_dict`` is neither a path nor a dictionary.
    """
    if isinstance(path_or_dict, Mapping):
        return dict(path_or_dict), ""
    if not isinstance(path_or_dict, str | os.PathLike):
        raise TypeError(f"path_or_dict must be a path or a dictionary, got {type(path_or_dict).__name__}")
    path = Path(path_or_dict)
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}:{raw[: error.start].count(10) + 1}: not UTF-8: {error.reason}") from None
    content = _json(text, path) if path.suffix.lower() == ".json" else _yaml(text, path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: the file must hold a mapping of keys, got {content!r:.50}")
    return content, f"{path}: "


def _json(text: str, path: Path) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"{path}: {key} is given twice")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: malformed JSON: {error.msg}") from None


def _yaml(text: str, path: Path) -> Any:
    try:
        import yaml
    except ImportError:
        raise ImportError(f"{path}: YAML files need PyYAML (pip install pyyaml); JSON files do not") from None
    try:
        content = yaml.safe_load(text)
        repeated = _repeated_key(yaml.compose(text, yaml.SafeLoader))
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
        mark = getattr(error, "problem_mark", None)
        position = getattr(error, "position", None)  # of a character that YAML does not allow
        line = mark.line if mark is not None else None if position is None else text.count("\n", 0, position)
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise ValueError(f"{path}{'' if line is None else f':{line + 1}'}: malformed YAML: {reason}") from None
    if repeated is not None:
        raise ValueError(f"{path}:{repeated.start_mark.line + 1}: {repeated.value} is given twice")
    return content


def _repeated_key(root: Any) -> Any:
    """Find the node of a key that its mapping has before (PyYAML would keep the last), or None."""
    nodes, visited = [root], set()
    while nodes:
        node = nodes.pop()
        if node is None or id(node) in visited:  # aliases are the same node again
            continue
        visited.add(id(node))
        if node.id == "mapping":
            seen: set[str] = set()
            for key, value in node.value:
                nodes.append(value)
                if key.id == "scalar":
                    if key.value in seen:
                        return key
                    seen.add(key.value)
        elif node.id == "sequence":
            nodes.extend(node.value)
    return None
