"""The guide "Adding a model" of docs/models.md, followed to the letter."""

import importlib.util
import re
from pathlib import Path

import pytest

import cachedit
from cachedit.models import MODELS, PIPELINES, pipelines, table
from pipelines import BUILDERS

PAGE = Path(__file__).parents[3] / "docs" / "models.md"
SPEC = importlib.util.spec_from_file_location("families", Path(__file__).with_name("test_families.py"))
families = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(families)
NAME = "InventedPipeline"


@pytest.fixture(scope="module")
def blocks():
    guide = PAGE.read_text().partition("## Adding a model\n")[2].partition("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", guide, re.DOTALL)


@pytest.fixture
def family(blocks, monkeypatch):
    for rows, module, block in ((MODELS, table, blocks[0]), (PIPELINES, pipelines, blocks[1])):
        for name, row in eval("{" + block + "}", dict(vars(module))).items():
            monkeypatch.setitem(rows, name, row)
    exec(blocks[2], {"__name__": "pipelines.invented"})
    try:
        yield families.make_family(NAME)
    finally:
        del BUILDERS[NAME]


def test_ten_lines(blocks):
    lines = [line for block in blocks for line in block.splitlines() if line]
    assert len(blocks) == 3 and len(lines) == 10


@pytest.mark.parametrize(
    "proof",
    [
        families.test_nothing_reusable_is_the_baseline,
        families.test_mask_equals_an_independent_executor,
        families.test_guidance_branches_are_kept_apart,
    ],
)
def test_they_make_a_passing_row(family, proof):
    assert family.tiny.pipe.__class__.__name__ == NAME
    proof(family)


def test_they_make_a_line_of_the_matrix(family):
    assert f"| {NAME} | InventedTransformer | blocks 2 | in turn | yes |" in cachedit.supported_matrix()


def test_without_them_it_is_not_known():
    assert NAME not in BUILDERS and NAME not in cachedit.supported_pipelines()[1]
