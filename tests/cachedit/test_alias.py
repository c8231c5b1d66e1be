import importlib
import importlib.util
import sys
import threading
from types import ModuleType

import pytest

import cachedit
from cachedit import alias
from operands import python

NAMES = {
    "cache_dit": "BlockAdapter DBCacheConfig ForwardPattern NONE Pattern_3 __version__ enable_cache strify",
    "cache_dit.caching": "ForwardPattern PatchFunctor block_range load_configs",
    "cache_dit.caching.load_configs": "load_cache_config load_configs",
    "cache_dit.caching.patch_functors": "PatchFunctor",
    "cache_dit.caching.block_adapters": "BlockAdapter BlockAdapterRegister",
    "cache_dit.caching.cache_contexts": "DBCacheConfig CalibratorConfig",
    "cache_dit.caching.cache_contexts.calibrators": "TaylorSeerCalibratorConfig DMDCalibratorConfig",
}


@pytest.fixture(autouse=True)
def nothing_is_left():
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "cache_dit"}
    finders = list(sys.meta_path)
    yield
    alias.uninstall()
    alias.uninstall()  # again: nothing happens
    assert {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "cache_dit"} == before
    assert sys.meta_path == finders


@pytest.fixture
def installed():
    alias.install(override=True)


def origin():
    spec = importlib.util.find_spec("cache_dit")
    return spec and spec.origin


@pytest.mark.parametrize("module", NAMES)
def test_what_scripts_import(installed, module):
    for name in NAMES[module].split():
        scope = {}
        exec(f"from {module} import {name}", scope)
        assert scope[name] is getattr(cachedit, name)
        assert getattr(importlib.import_module(module), name) is scope[name]


def test_metrics_and_platforms(installed):
    import cache_dit.metrics
    from cache_dit.platforms import current_platform

    import cachedit.metrics
    import cachedit.platforms

    assert current_platform is cache_dit.platforms.current_platform is cachedit.platforms.current_platform
    assert cache_dit.metrics.compute_psnr is cachedit.metrics.compute_psnr
    assert set(cachedit.__all__) <= set(dir(cache_dit)) and "compute_ssim" in dir(cache_dit.metrics)


def test_a_function_and_a_module_of_one_name(installed):
    import cache_dit.caching.load_configs
    from cache_dit.caching import load_configs

    assert load_configs is cache_dit.caching.load_configs is cachedit.load_configs
    assert sys.modules["cache_dit.caching.load_configs"].load_configs is load_configs


@pytest.mark.parametrize(
    ("statement", "error", "message"),
    [
        (
            "from cache_dit import layerwise_offload",
            ImportError,
            "cachedit.layerwise_offload is not available in this version yet: layerwise off",
        ),
        ("import cache_dit; cache_dit.load", ImportError, "cachedit.load is not available in this version yet"),
        ("from cache_dit import enable_cash", ImportError, "cannot import name 'enable_cash' from 'cache_dit'"),
        ("import cache_dit; cache_dit.config", AttributeError, "module 'cachedit' has no attribute 'config'"),
        ("from cache_dit.platforms import CudaPlatform", ImportError, "cannot import name 'CudaPlatform'"),
        ("import cache_dit.offload", ModuleNotFoundError, "No module named 'cache_dit.offload'"),
    ],
)
def test_what_is_not_there(installed, statement, error, message):
    with pytest.raises(error, match=message):
        exec(statement)


def test_nothing_is_imported_before_it_is_used():
    result = python("""
import sys
import cachedit.alias
cachedit.alias.install(override=True)
assert not [name for name in sys.modules if name.partition(".")[0] == "cache_dit"]
import cache_dit.platforms, cache_dit.metrics
assert "cachedit.platforms" not in sys.modules and "cachedit.metrics" not in sys.modules
cache_dit.platforms.current_platform
assert "cachedit.platforms" in sys.modules and "cachedit.metrics" not in sys.modules
""")
    assert result.returncode == 0, result.stderr


def not_imported():
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] != "cache_dit"}


def test_the_real_package_is_found_unless_overridden(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "modules", not_imported())
    (tmp_path / "cache_dit.py").write_text("real = True")
    monkeypatch.syspath_prepend(tmp_path)
    real = str(tmp_path / "cache_dit.py")
    for override, expected in [(False, real), (True, "cachedit.alias"), (True, "cachedit.alias"), (False, real)]:
        alias.install(override)
        assert origin() == expected
        assert sum(finder is alias._finder for finder in sys.meta_path) == 1
    alias.uninstall()
    assert origin() == real


def test_without_the_real_package(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [])  # nothing else finds anything
    monkeypatch.setattr(sys, "modules", not_imported())
    assert origin() is None
    alias.install()
    assert origin() == "cachedit.alias"
    alias.uninstall()
    assert origin() is None


def test_what_was_imported_before_comes_back(monkeypatch):
    real, part = ModuleType("cache_dit"), ModuleType("cache_dit.part")
    monkeypatch.setitem(sys.modules, "cache_dit", real)
    monkeypatch.setitem(sys.modules, "cache_dit.part", part)
    alias.install()
    assert importlib.import_module("cache_dit") is real
    alias.install(override=True)
    assert importlib.import_module("cache_dit") is not real and "cache_dit.part" not in sys.modules
    alias.uninstall()
    assert importlib.import_module("cache_dit") is real and sys.modules["cache_dit.part"] is part


def test_from_many_threads():
    failures = []

    def work():
        try:
            for _ in range(50):
                alias.install(override=True)
                assert importlib.import_module("cache_dit").DBCacheConfig is cachedit.DBCacheConfig
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sum(finder is alias._finder for finder in sys.meta_path) == 1
