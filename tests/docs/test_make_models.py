import importlib.util
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
SPEC = importlib.util.spec_from_file_location("make_models", DOCS / "make_models.py")
make_models = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(make_models)


def test_page_is_up_to_date():
    assert (DOCS / "models.md").read_text() == make_models.render(), (
        "run docs/make_models.py and look at the difference"
    )
