"""Streams that change or vanish within a request and between requests, and those that gradients are wanted of."""

import logging
import types

import pytest
import torch
from torch import nn

import cachedit
from cachedit import BlockAdapter, ForwardPattern, TaylorSeerCalibratorConfig
from holds import enable, reused, reusing
from toys import make_toy, run_toy, toy_inputs

P1 = ForwardPattern.Pattern_1


def enabled(**fields):
    return enable(make_toy(), reusing(max_warmup_steps=0, **fields))


class TestChangesOfStreams:
    @pytest.mark.parametrize("change", [{"batch": 3}, {"tokens": 7}], ids=str)
    def test_within_a_request_starts_afresh_and_says_so(self, change, caplog):
        model = enabled()
        with torch.no_grad(), caplog.at_level(logging.WARNING):
            for step in range(3):
                model(**toy_inputs(step, 6))
            for step in range(3, 6):
                model(**toy_inputs(step, 6, **change))
        assert reused(model) == [[1, 2, 4, 5]]
        assert [record.message for record in caplog.records if "changed within a request at step 3" in record.message]

    def test_mask_goes_on_where_it_was(self):
        model = enabled(steps_computation_mask=[1, 0, 1, 0, 0, 1, 0, 1], steps_computation_policy="static")
        with torch.no_grad():
            for step in range(8):
                model(**toy_inputs(step, 8, tokens=5 if step < 2 else 7))
        assert reused(model) == [[1, 3, 4, 6]]

    @pytest.mark.parametrize("change", [{"batch": 3}, {"tokens": 7}], ids=str)
    def test_between_requests_starts_afresh_silently(self, change, caplog):
        model = enabled(num_inference_steps=3)
        with caplog.at_level(logging.WARNING):
            run_toy(model, 3)
            run_toy(model, 3, **change)
        assert reused(model) == [[1, 2]] and not caplog.records

    def test_dtype(self):
        model = enabled()
        run_toy(model, 2)
        model.to(torch.bfloat16)
        with torch.no_grad():
            inputs = {name: value.bfloat16() for name, value in toy_inputs(2, 6).items()}
            for _ in range(2):
                out = model(**inputs)
        assert out.dtype == torch.bfloat16 and reused(model) == [[1, 3]]

    def test_encoder_stream_that_vanishes_and_comes_back(self, caplog):
        class Optional(nn.Module):
            def forward(self, hidden_states, encoder_hidden_states=None):
                if encoder_hidden_states is None:
                    return hidden_states * 1.01, None
                return hidden_states * 1.01, encoder_hidden_states * 1.02

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.blocks = nn.ModuleList(Optional() for _ in range(4))

            def forward(self, h, e):
                for block in self.blocks:
                    h, e = block(h, encoder_hidden_states=e)
                return h, e

        model = Model()
        cachedit.enable_cache(
            BlockAdapter(transformer=model, blocks=model.blocks, forward_pattern=ForwardPattern.Pattern_0),
            reusing(max_warmup_steps=0),
        )
        h, e = torch.ones(1, 2, 4), torch.ones(1, 3, 4)
        with torch.no_grad():
            for encoder in (e, e, None, None, e, e):
                out = model(h, encoder)
                torch.testing.assert_close(out[0], h * 1.01**4)
                assert (out[1] is None) == (encoder is None)
        assert reused(model) == [[1, 3, 5]]
        assert sum("changed within a request" in record.message for record in caplog.records) == 2

    def test_encoder_stream_that_the_last_block_drops(self):
        """SD3: there is nothing of it to forecast."""

        class Last(nn.Module):
            def forward(self, hidden_states, encoder_hidden_states):
                return None, hidden_states + 0.1 * encoder_hidden_states.mean(1, keepdim=True)

        model = make_toy(pattern=P1, depth=4)
        model.blocks[-1] = Last()

        def forward(self, h, e):
            for block in self.blocks:
                e, h = block(hidden_states=h, encoder_hidden_states=e)
            return h, e

        model.forward = types.MethodType(forward, model)
        adapter = BlockAdapter(transformer=model, blocks=model.blocks, forward_pattern=P1)
        h, e = torch.ones(1, 2, 8), torch.ones(1, 3, 8)
        with torch.no_grad():
            expected = model(h, e)[0]
            cachedit.enable_cache(adapter, reusing(max_warmup_steps=0), TaylorSeerCalibratorConfig())
            for _ in range(4):
                hidden, encoder = model(h, e)
                torch.testing.assert_close(hidden, expected)
                assert encoder is None
        assert reused(model) == [[1, 2, 3]]


class TestGradients:
    def test_training_bypasses_the_cache_and_warns_once(self, caplog):
        model = enabled()
        model.requires_grad_(True)
        with caplog.at_level(logging.WARNING):
            for step in range(3):
                model(**toy_inputs(step, 3)).sum().backward()
        assert sum("bypassed" in record.message for record in caplog.records) == 1
        assert model.blocks[3].mix.weight.grad is not None
        assert reused(model) == [[]]
        run_toy(model, 3)  # without gradients the cache serves
        assert reused(model) == [[1, 2]]

    def test_inputs_that_require_grad(self, caplog):
        model = enabled()
        for step in range(3):
            inputs = toy_inputs(step, 3)
            hidden = inputs["hidden_states"].requires_grad_()
            model(**inputs).sum().backward()
            assert hidden.grad is not None
        assert reused(model) == [[]]
        assert sum("wanted of the blocks' inputs" in record.message for record in caplog.records) == 1

    def test_grad_mode_without_anything_to_train_is_served(self):
        model = enabled()
        for step in range(3):
            model(**toy_inputs(step, 3))
        assert reused(model) == [[1, 2]]
