import importlib
import inspect

import diffusers
import pytest
from torch import nn

from cachedit.adapter import plan_for
from cachedit.models import MODELS, UNCOVERED, find_entry, find_transformers
from pipelines import BUILDERS, LOOPS, build

# Lists of which the rows say nothing: one that its loop runs over in slices, and one that a patch pairs with another.
LEFT_OUT = {
    ("LatteTransformer3DModel", "temporal_transformer_blocks"),
    ("MotifVideoTransformer3DModel", "single_transformer_blocks"),
}


@pytest.fixture(scope="module")
def transformers():
    """One of each class."""
    names = [*BUILDERS, *LOOPS]
    return {type(module).__name__: module for name in names for module in find_transformers(build(name).pipe)}


@pytest.mark.parametrize("name", [name for name in [*MODELS, *UNCOVERED] if not name.startswith("Nunchaku")])
def test_names_are_classes(name):
    assert issubclass(getattr(diffusers, name), diffusers.ModelMixin)


def test_every_row_is_tried_on_a_pipeline(transformers):
    assert set(MODELS) == set(transformers)


def test_every_list_of_blocks_is_in_its_row(transformers):
    """Small models have three blocks and more in the lists that matter, one or two in those before them."""
    for name, module in transformers.items():
        lists = {key for key, child in module.named_children() if isinstance(child, nn.ModuleList) and len(child) > 2}
        lists -= {"caption_projection", *(key for cls, key in LEFT_OUT if cls == name)}
        assert lists == {item.name for group in MODELS[name].sections for item in group}, name


def test_every_transformer_of_diffusers_is_covered_or_has_a_reason():
    exported = vars(importlib.import_module("diffusers.models.transformers")).values()
    found = {cls.__name__ for cls in exported if inspect.isclass(cls) and issubclass(cls, diffusers.ModelMixin)}
    assert found <= {*MODELS, *UNCOVERED} and not set(MODELS) & set(UNCOVERED)


def test_subclasses_have_their_base_class_row():
    class Finetuned(diffusers.FluxTransformer2DModel):
        pass

    model = Finetuned.__new__(Finetuned)
    assert find_entry(model) is MODELS["FluxTransformer2DModel"]


def test_reason_is_in_the_message():
    model = diffusers.UniDiffuserModel.__new__(diffusers.UniDiffuserModel)
    with pytest.raises(ValueError, match=r"UniDiffuserModel is not in the model table.*skip connec.*BlockAdapter"):
        plan_for(model)
