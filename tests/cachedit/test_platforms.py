import pytest
import torch

from cachedit.platforms import current_platform


def test_this_machine():
    assert current_platform.device_type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert current_platform.is_accelerator_available() == torch.cuda.is_available()
    torch.ones(1, device=current_platform.device_type)


def test_an_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert current_platform.device_type == "cuda" and current_platform.is_accelerator_available()
    assert current_platform.empty_cache is torch.cuda.empty_cache


def test_the_rest_is_torch_s_module_of_the_device():
    module = torch.get_device_module(current_platform.device_type)
    assert current_platform.synchronize is module.synchronize
    assert current_platform.device_count() == module.device_count()
    with pytest.raises(AttributeError, match="default_dtype"):
        current_platform.default_dtype()
