"""The names that users import, and that they are the same as in cache_dit."""

import importlib.util
import inspect
import json
import subprocess
import sys
from enum import Enum

import pytest

import cachedit
import cachedit_kernels
from operands import python

# Names at cache_dit's top level that are its own machinery.
INTERNAL = {"ENV", "disable_print", "init_logger", "maybe_empty_cache", "parse_extra_modules", "version_tuple"}
# What is not the same, and why. **kwargs are not compared: here they are spelled out, or unknown names are errors.
DIFFERENT = {
    "enable_cache(pipe_or_adapter)": "required; None there stands for a model that workers of Ray load",
    **{
        f"{name}.to_kwargs": "arguments of objects that do not exist here: a forecaster is a function"
        for name in ("CalibratorConfig", "DMDCalibratorConfig", "FoCaCalibratorConfig", "TaylorSeerCalibratorConfig")
    },
    **{
        f"ParallelismConfig.strify({name})": "one tag for the pipeline"
        for name in ("text_encoder", "vae", "controlnet")
    },
    **{
        f"QuantizeConfig.{get}_svdq{what}": "of SVDQuant, which is not here"
        for get, whats in {"get": ("_kwargs", "_precision", "_rank"), "is": ("", "_dq", "_dq_few_shot", "_ptq")}.items()
        for what in whats
    },
    "QuantizeConfig.expand_configs": "internal",
    "QuantizeConfig.from_kwargs": "drops unknown names, which are errors here",
    "PatchFunctor.is_from_diffusers": "patches are applied to any transformer",
    "PatchFunctor.logging_patched": "internal",
}


def describe(value):
    """An enum's members or a member's name; else the parameters with their defaults, as text."""
    if isinstance(value, Enum):
        return value.name
    if inspect.isclass(value) and issubclass(value, Enum):
        return list(value.__members__)
    fields = getattr(value, "__dataclass_fields__", {})

    def default(parameter):
        factory = getattr(fields.get(parameter.name), "default_factory", None)
        if callable(factory) and parameter.default is not parameter.empty:
            return repr(factory())
        return describe(parameter.default) if isinstance(parameter.default, Enum) else repr(parameter.default)

    parameters = inspect.signature(value).parameters.values()
    return {p.name: default(p) for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


@pytest.mark.parametrize("name", cachedit.__all__)
def test_every_name_from_both_packages(name):
    assert getattr(cachedit_kernels, name) is getattr(cachedit, name)
    assert name in dir(cachedit_kernels)


def test_the_list_of_names_is_whole():
    imported = {
        name for name, value in vars(cachedit).items() if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert imported - {"Any"} == set(cachedit.__all__) - {"__version__"}


@pytest.mark.parametrize("names", cachedit._LATER.values(), ids=cachedit._LATER)
def test_names_that_are_to_come(names):
    for name in names:
        if name != "load":  # a module of ours
            with pytest.raises(ImportError, match=f"cachedit.{name} is not available in this version yet: "):
                exec(f"from cachedit import {name}")
    assert not hasattr(cachedit, "quantise")


def test_the_kernels_do_not_load_the_engine():
    result = python("""
import sys
import cachedit_kernels
assert "cachedit" not in sys.modules and not hasattr(cachedit_kernels, "__wrapped__") and "cachedit" not in sys.modules
assert not hasattr(cachedit_kernels, "enable_cash")
assert cachedit_kernels.enable_cache.__module__ == "cachedit.api"
""")
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def theirs():
    """What cache_dit exports, as ``describe`` gives it."""
    if importlib.util.find_spec("cache_dit") is None:
        pytest.skip("cache_dit is not installed")
    code = f"import inspect, json\nfrom enum import Enum\n\n{inspect.getsource(describe)}"
    result = python(
        code
        + """
import cache_dit
from types import ModuleType
names = {n: v for n, v in vars(cache_dit).items() if not n.startswith("_") and not isinstance(v, ModuleType)}
described = {}
for name, value in names.items():
    described[name] = describe(value) if callable(value) or isinstance(value, Enum) else None
    if name in ("BlockAdapterRegister", "PatchFunctor") or name.endswith("Config"):
        methods = [m for m in vars(value) if not m.startswith("_") and callable(getattr(value, m))]
        described |= {f"{name}.{m}": describe(getattr(value, m)) for m in methods}
print("DESCRIBED" + json.dumps(described))
"""
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.partition("DESCRIBED")[2])


def test_every_name_of_cache_dit_is_here_or_said_to_come(theirs):
    later = {name for names in cachedit._LATER.values() for name in names}
    missing = {name for name in theirs if "." not in name} - set(cachedit.__all__) - later - INTERNAL
    assert missing == set()


def test_arguments_and_defaults_are_those_of_cache_dit(theirs):
    differences = set()
    for name, described in theirs.items():
        owner, _, method = name.partition(".")
        if owner not in cachedit.__all__ or described is None:
            continue
        ours = getattr(cachedit, owner)
        if method and not hasattr(ours, method):
            differences.add(name)
            continue
        ours = describe(getattr(ours, method) if method else ours)
        if isinstance(described, str):  # a member of an enum
            differences |= set() if ours == described else {name}
            continue
        if isinstance(described, list):  # an enum; ours may have more
            differences |= {f"{name}.{member}" for member in described if member not in ours}
            continue
        if name == "ParallelismConfig":  # without its launcher's settings and its own state
            described = {key: value for key, value in described.items() if not key.startswith(("ray_", "_"))}
        for place, (parameter, default) in enumerate(described.items()):
            if list(ours.items())[place : place + 1] != [(parameter, default)]:
                differences.add(f"{name}({parameter})")
    assert sorted(differences) == sorted(DIFFERENT)


def test_imports_are_light():
    """What takes seconds to import is left to what needs it."""
    heavy = ("torch._dynamo", "torch.distributed.tensor", "diffusers")
    code = f"import sys, cachedit_kernels, cachedit; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
