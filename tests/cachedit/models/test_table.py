import diffusers
import pytest

from cachedit.models import MODELS, find_entry, find_transformers
from pipelines import BUILDERS, build


@pytest.mark.parametrize("name", MODELS)
def test_names_are_classes(name):
    assert issubclass(getattr(diffusers, name), diffusers.ModelMixin)


def test_every_row_is_tried_on_a_pipeline():
    tried = {type(module).__name__ for name in BUILDERS for module in find_transformers(build(name).pipe)}
    assert set(MODELS) == tried


def test_subclasses_have_their_base_class_row():
    class Finetuned(diffusers.FluxTransformer2DModel):
        pass

    model = Finetuned.__new__(Finetuned)
    assert find_entry(model) is MODELS["FluxTransformer2DModel"]
