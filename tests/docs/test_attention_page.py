"""docs/attention.md lists the backends that there are."""

import re
from pathlib import Path

from diffusers.models.attention_dispatch import AttentionBackendName

from cachedit.attention import _MASKED, _MASKLESS

PAGE = (Path(__file__).parents[2] / "docs/attention.md").read_text()


def test_the_table_has_every_backend_and_whether_it_takes_masks():
    rows = re.findall(r"^\| (`.*?) \|.*\| (yes|no) \|$", PAGE, re.MULTILINE)
    masks = {name: answer for names, answer in rows for name in re.findall(r"`(\w+)`", names)}
    assert masks == {backend.value: "no" if backend.value in _MASKLESS else "yes" for backend in AttentionBackendName}
    assert f"Chroma and {len(_MASKED) - 3} more" in PAGE
