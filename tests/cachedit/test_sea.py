"""SeaCache's filter, against cosines worked out by hand and against the equations written out without shortcuts."""

import math

import pytest
import torch

from cachedit.sea import SEA_MODELS, find_sea, sea_filter
from cachedit.teacache import POLYNOMIALS, TeaCacheConfig
from first_blocks import CASES


def cosine(length: int, cycles: int) -> torch.Tensor:
    return torch.cos(2 * math.pi * cycles * torch.arange(length) / length)


def as_signal(grid_values: torch.Tensor) -> torch.Tensor:
    return grid_values.reshape(1, -1, 1)


def test_frequencies_of_one_axis_by_hand():
    # Four tokens have frequencies 0, 1/4, 1/2 and -1/4. At a = b = 1/2 and an exponent of 2 the gain is 2 / (1 + f**2).
    gains = {0: 2.0, 1: 2 / (1 + 1 / 16), 2: 2 / (1 + 1 / 4)}
    mean = (gains[0] + 2 * gains[1] + gains[2]) / 4
    for cycles, gain in gains.items():
        signal = as_signal(cosine(4, cycles))
        torch.testing.assert_close(sea_filter(signal, (4,), 0.5, 2.0), signal * gain / mean)


def test_gains_of_two_axes_are_multiplied():
    def gain(cycles):  # at sigma 3/4, exponent 3, over 8 tokens
        return 0.25 / (0.25**2 + 0.75**2 * (cycles / 8) ** 3)

    mean = (gain(0) + 2 * gain(1) + 2 * gain(2) + 2 * gain(3) + gain(4)) / 8
    signal = as_signal(cosine(8, 1)[:, None] * cosine(8, 3))
    expected = signal * (gain(1) / mean) * (gain(3) / mean)
    torch.testing.assert_close(sea_filter(signal, (8, 8), 0.75, 3.0), expected)


def equations(signal: torch.Tensor, grid: tuple[int, ...], sigma: float, exponent: float) -> torch.Tensor:
    """Eq. 5 to Eq. 7 in float64 over the full spectrum, with the power law as it stands."""
    a, b = 1 - sigma, sigma
    gain = torch.ones(grid, dtype=torch.float64)
    for axis, length in enumerate(grid):
        power = 1 / (torch.fft.fftfreq(length, dtype=torch.float64).abs() ** exponent + 1e-16)
        response = a * power / (a * a * power + b * b)
        gain = gain * response.reshape([-1 if i == axis else 1 for i in range(len(grid))])
    axes = tuple(range(1, 1 + len(grid)))
    spectrum = torch.fft.fftn(signal.double().unflatten(1, grid), dim=axes)
    return torch.fft.ifftn(spectrum * (gain / gain.mean())[..., None], dim=axes).real.flatten(1, len(grid))


@pytest.mark.parametrize("grid", [(6,), (5, 4), (4, 7), (3, 4, 6), (1, 3, 5)])
@pytest.mark.parametrize("sigma", [0.001, 0.3, 0.9, 0.999])
def test_against_the_equations(grid, sigma):
    torch.manual_seed(0)
    signal = torch.randn(2, math.prod(grid), 3)
    filtered = sea_filter(signal, grid, sigma, float(len(grid)))
    torch.testing.assert_close(filtered.double(), equations(signal, grid, sigma, len(grid)), rtol=1e-4, atol=1e-5)


def test_no_noise_passes_everything_and_pure_noise_the_mean():
    torch.manual_seed(0)
    signal = torch.randn(2, 24, 3)
    torch.testing.assert_close(sea_filter(signal, (4, 6), 0.0, 2.0), signal)
    # All of the gain is at frequency 0, and the mean of the gains is 1.
    expected = signal.mean(1, keepdim=True).expand_as(signal) * 24
    torch.testing.assert_close(sea_filter(signal, (4, 6), 1.0, 2.0), expected, rtol=1e-2, atol=1e-2)


def test_sigma_as_a_tensor_and_other_dtypes():
    torch.manual_seed(0)
    signal = torch.randn(1, 16, 4)
    expected = sea_filter(signal, (4, 4), 0.4, 2.0)
    torch.testing.assert_close(sea_filter(signal, (4, 4), torch.tensor([0.4]), 2.0), expected)
    half = sea_filter(signal.bfloat16(), (4, 4), 0.4, 2.0)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=2e-2, atol=2e-2)
    assert signal.equal(torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(0)))  # not written to


def test_high_frequencies_count_less_the_more_noise_there_is():
    low, high = (0.1 * as_signal(cosine(16, cycles)) for cycles in (1, 7))
    before = as_signal(torch.ones(16))

    def distance(change, sigma):
        now, then = (sea_filter(signal, (16,), sigma, 2.0) for signal in (before + change, before))
        return float((now - then).abs().sum() / then.abs().sum())

    for sigma in (0.2, 0.5, 0.8):  # the ratio of the gains
        expected = ((1 - sigma) ** 2 + (sigma / 16) ** 2) / ((1 - sigma) ** 2 + (7 * sigma / 16) ** 2)
        assert distance(high, sigma) / distance(low, sigma) == pytest.approx(expected, rel=1e-4)


def test_wrong_number_of_tokens_is_an_error():
    with pytest.raises(
        ValueError, match=r"signal must be \[B, 12, C\] for a grid of \(3, 4\) tokens, got \(2, 13, 8\)"
    ):
        sea_filter(torch.zeros(2, 13, 8), (3, 4), 0.5, 2.0)


@pytest.mark.parametrize(
    ("name", "grid", "sigma"),
    [
        ("FluxTransformer2DModel", (4, 4), 0.6),
        ("HunyuanVideoTransformer3DModel", (2, 4, 4), 0.0006),
        ("WanTransformer3DModel", (2, 4, 4), 0.6),
    ],
)
def test_grid_and_sigma_come_from_the_call(name, grid, sigma):
    torch.manual_seed(0)
    model, call = CASES[name].build(), CASES[name].call()
    sea, coefficients = find_sea(model, TeaCacheConfig(metric="sea"))
    tapped = []

    def hook(module, args, kwargs, output):
        tapped.append(sea.signal.read(args, kwargs, output))

    model.get_submodule(sea.signal.module).register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        model(**call)
    assert sea.grid(model.config, call) == grid
    assert sea.sigma(call).item() == pytest.approx(sigma)
    assert coefficients == (1.0, 0.0)
    assert sea.exponent == len(grid)
    assert sea_filter(tapped[0], grid, sea.sigma(call), sea.exponent).shape == tapped[0].shape


def test_models_without_a_grid_are_an_error_that_names_those_with_one():
    with pytest.raises(ValueError, match=r"does for FluxTransformer2DModel, .*; got Linear"):
        find_sea(torch.nn.Linear(1, 1), TeaCacheConfig(metric="sea"))


def test_coefficients_may_be_given():
    model = type("FluxTransformer2DModel", (torch.nn.Module,), {})()
    assert find_sea(model, TeaCacheConfig(metric="sea", coefficients="flux"))[1] == POLYNOMIALS["flux"]
    assert find_sea(model, TeaCacheConfig(metric="sea", coefficients=[2.0, 0.0]))[1] == (2.0, 0.0)
    assert set(SEA_MODELS) == {
        "FluxTransformer2DModel",
        "HunyuanVideoTransformer3DModel",
        "WanTransformer3DModel",
    }
