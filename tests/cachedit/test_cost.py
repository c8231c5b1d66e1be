"""What a step costs above the blocks that it runs, counted: operator calls and waits for the device. Never time."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import cachedit
import cachedit_kernels
from cachedit import BlockAdapter, DBCacheConfig, ForwardPattern, TaylorSeerCalibratorConfig

STEPS = 12
STREAMS = (torch.randn(1, 16, 8), torch.randn(1, 4, 8))

pytestmark = pytest.mark.skipif(
    cachedit_kernels.backends()["l1"]["cpu"].implementation != "cpp",
    reason="the reference implementations are made of many torch operators; only the compiled ones are counted",
)


class Empty(nn.Module):
    def forward(self, hidden_states, encoder_hidden_states):
        return encoder_hidden_states, hidden_states


class Loop(nn.Module):
    """Two linked lists of blocks that do nothing: whatever is counted is the cache's."""

    def __init__(self):
        super().__init__()
        self.duals = nn.ModuleList(Empty() for _ in range(19))
        self.singles = nn.ModuleList(Empty() for _ in range(38))

    def forward(self, hidden_states, encoder_hidden_states):
        for blocks in (self.duals, self.singles):
            for block in blocks:
                encoder_hidden_states, hidden_states = block(
                    hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states
                )
        return hidden_states, encoder_hidden_states


class Waits:
    """Counts what makes the host wait for the device: item, tolist, bool, float, int, numpy and cpu of tensors."""

    NAMES = ("item", "tolist", "__bool__", "__float__", "__int__", "numpy", "cpu", "nonzero")

    def __init__(self, monkeypatch):
        self.count = 0
        for name in self.NAMES:
            monkeypatch.setattr(torch.Tensor, name, self._counted(getattr(torch.Tensor, name)))

    def _counted(self, method):
        def wrapper(tensor, *args, **kwargs):
            self.count += 1
            return method(tensor, *args, **kwargs)

        return wrapper


def cached_loop(**config):
    model = Loop()
    adapter = BlockAdapter(
        transformer=model, blocks=[model.duals, model.singles], forward_pattern=ForwardPattern.Pattern_1, linked=True
    )
    settings = {"Fn_compute_blocks": 1, "max_warmup_steps": 0, "num_inference_steps": STEPS, **config}
    cachedit.enable_cache(adapter, DBCacheConfig(**settings), TaylorSeerCalibratorConfig())
    return model


def decided(model):
    """Why the last step was computed or reused."""
    return model._cachedit_controller.branches["default"].states[0].policy.records[-1].reason


def operators(model):
    """All operators that one forward calls, nested ones included."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        model(*STREAMS)
    return [event.name.removeprefix("cachedit::") for event in profiler.events() if "::" in event.name]


READ_BACK = ["aten::resolve_conj", "aten::resolve_neg"]  # what tolist() of the two sums calls; they do nothing
FORECAST = ["residual_forecast"]
CASES = [
    ("dynamic, computed", {"max_continuous_cached_steps": 0}, "max_continuous_cached_steps", ["residual_push"] * 2, 0),
    ("dynamic, reused", {"residual_diff_threshold": 1.0}, "diff", ["residual_l1", *READ_BACK, *FORECAST], 1),
    ("static mask, reused", {"steps_computation_mask": [1] + [0] * 11, "steps_computation_policy": "static"}, "mask",
     FORECAST, 0),
    ("static mask, computed", {"steps_computation_mask": [1] * 12, "steps_computation_policy": "static"}, "mask",
     ["residual_push"], 0),
]  # fmt: skip


@pytest.mark.parametrize(
    ("config", "reason", "expected", "waits"), [case[1:] for case in CASES], ids=[c[0] for c in CASES]
)
def test_operator_calls_and_waits(config, reason, expected, waits, monkeypatch):
    model = cached_loop(**config)
    with torch.no_grad():
        model(*STREAMS)  # allocates, and learns whether blocks work in place
    assert operators(model) == expected
    assert decided(model) == reason
    counter = Waits(monkeypatch)
    with torch.no_grad():
        model(*STREAMS)
    assert counter.count == waits


def test_measured_and_computed():
    """The step is measured, found to have moved, and computed: three calls, one wait."""
    model = cached_loop(residual_diff_threshold=0.1)

    class Scale(nn.Module):
        factor = torch.tensor(1.0)

        def forward(self, hidden_states, encoder_hidden_states):
            return encoder_hidden_states, hidden_states * Scale.factor

    model.duals._modules["0"] = Scale()
    for Scale.factor in (torch.tensor(2.0), torch.tensor(4.0)):
        names = operators(model)
    assert decided(model) == "diff"
    assert names == ["aten::mul", "residual_l1", *READ_BACK, "residual_push", "residual_push"]


def test_waits_are_noticed():
    with pytest.MonkeyPatch.context() as monkeypatch:
        counter = Waits(monkeypatch)
        assert torch.ones(1).item() and bool(torch.ones(1)) and torch.ones(1).tolist()
        assert counter.count == 3
