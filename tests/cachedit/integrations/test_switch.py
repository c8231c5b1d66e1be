"""The switch that docs/sglang.md and docs/vllm-omni.md give, as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[3] / "docs"

SCRIPT = """
import multiprocessing, sys

def origin():
    import cache_dit
    from cache_dit.caching.block_adapters import FakeDiffusionPipeline
    return cache_dit.enable_cache.__module__, cache_dit.__spec__.origin

if __name__ == "__main__":
    assert "torch" not in sys.modules  # the switch costs nothing where cache_dit is not used
    expected = ("cachedit.api", "cachedit.alias")
    assert origin() == expected
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(origin) == expected
"""


@pytest.mark.parametrize("page", ["sglang.md", "vllm-omni.md"])
def test_the_switch_reaches_every_process(tmp_path, page):
    (switch,) = re.findall(r"```sh\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    (tmp_path / "script.py").write_text(SCRIPT)
    command = f"{switch}\n{sys.executable} script.py"
    done = subprocess.run(["bash", "-euc", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
