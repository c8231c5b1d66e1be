"""TeaCache (arXiv 2411.19108): reuse while the estimated change of the output, added up step by step, stays small.

The estimate comes from a signal that is known before the blocks run, such as the first block's modulated input: its
relative L1 change from one step to the next goes through a polynomial that was fitted to the model. What the signal of
a transformer is, and which polynomial belongs to which checkpoint, is in :mod:`cachedit.models.signals`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

from .config import BasicCacheConfig, CacheType, _check_choice, _check_real
from .policy import Decision, Policy

__all__ = ["POLYNOMIALS", "TeaCacheConfig", "TeaCachePolicy", "fit_coefficients"]

METRICS = ("l1", "sea")

POLYNOMIALS: dict[str, tuple[float, ...]] = {
    # Published coefficients, highest power first. Sources are repositories at a commit.
    #
    # ali-vilab/TeaCache 7c10efc, TeaCache4FLUX/teacache_flux.py
    "flux": (4.98651651e02, -2.83781631e02, 5.58554382e01, -3.82021401e00, 2.64230861e-01),
    # welltop-cn/ComfyUI-TeaCache 91dff8e, nodes.py
    "flux-kontext": (-1.04655119e03, 3.12563399e02, -1.69500694e01, 4.10995971e-01, 3.74537863e-02),
    # vllm-project/vllm-omni 011a7ac, vllm_omni/diffusion/cache/teacache/config.py. Round numbers; they are credited to
    # ComfyUI-TeaCache, which has none for Qwen-Image at 91dff8e.
    "qwen-image": (-450.0, 280.0, -45.0, 3.2, -0.02),
    # ali-vilab/TeaCache 7c10efc, TeaCache4Wan2.1/teacache_generate.py, without and with --use_ret_steps
    "wan2.1-t2v-1.3b": (2.39676752e03, -1.31110545e03, 2.01331979e02, -8.29855975e00, 1.37887774e-01),
    "wan2.1-t2v-14b": (-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404),
    "wan2.1-i2v-480p": (-3.02331670e02, 2.23948934e02, -5.25463970e01, 5.87348440e00, -2.01973289e-01),
    "wan2.1-i2v-720p": (-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683),
    "wan2.1-t2v-1.3b-ret": (-5.21862437e04, 9.23041404e03, -5.28275948e02, 1.36987616e01, -4.99875664e-02),
    "wan2.1-t2v-14b-ret": (-3.03318725e05, 4.90537029e04, -2.65530556e03, 5.87365115e01, -3.15583525e-01),
    "wan2.1-i2v-480p-ret": (2.57151496e05, -3.54229917e04, 1.40286849e03, -1.35890334e01, 1.32517977e-01),
    "wan2.1-i2v-720p-ret": (8.10705460e03, 2.13393892e03, -3.72934672e02, 1.66203073e01, -4.17769401e-02),
    # ali-vilab/TeaCache 7c10efc, TeaCache4HunyuanVideo/teacache_sample_video.py
    "hunyuan-video": (7.33226126e02, -4.01131952e02, 6.75869174e01, -3.14987800e00, 9.61237896e-02),
    # ali-vilab/TeaCache 7c10efc, TeaCache4CogVideoX1.5/teacache_sample_video.py; the 5b serves its I2V as well, and
    # ConsisID (TeaCache4ConsisID/teacache_sample_video.py)
    "cogvideox-2b": (-3.10658903e01, 2.54732368e01, -5.92380459e00, 1.75769064e00, -3.61568434e-03),
    "cogvideox-5b": (-1.53880483e03, 8.43202495e02, -1.34363087e02, 7.97131516e00, -5.23162339e-02),
    "cogvideox1.5-5b": (2.50210439e02, -1.65061612e02, 3.57804877e01, -7.81551492e-01, 3.58559703e-02),
    "cogvideox1.5-5b-i2v": (1.22842302e02, -1.04088754e02, 2.62981677e01, -3.06009921e-01, 3.71213220e-02),
    # ali-vilab/TeaCache 7c10efc, TeaCache4LTX-Video/teacache_ltx.py
    "ltx-video": (2.14700694e01, -1.28016453e01, 2.31279151e00, 7.92487521e-01, 9.69274326e-03),
    # ali-vilab/TeaCache 7c10efc, TeaCache4Mochi/teacache_mochi.py
    "mochi": (-3.51241319e03, 8.11675948e02, -6.09400215e01, 2.42429681e00, 3.05291719e-03),
    # ali-vilab/TeaCache 7c10efc, TeaCache4Lumina2/teacache_lumina2.py, its two versions
    "lumina2": (393.76566581, -603.50993606, 209.10239044, -23.00726601, 0.86377344),
    "lumina2-v2": (
        225.7042019806413,
        -608.8453716535591,
        304.1869942338369,
        124.21267720116742,
        -1.4089066892956552,
    ),
    # ali-vilab/TeaCache 7c10efc, TeaCache4HiDream-I1/teacache_hidream_i1.py
    "hidream-i1-full": (-3.13605009e04, -7.12425503e02, 4.91363285e01, 8.26515490e00, 1.08053901e-01),
}


@dataclasses.dataclass
class _TeaCacheFields:
    """A class of their own, so that they come before the fields of BasicCacheConfig."""

    rel_l1_thresh: float = 0.2
    coefficients: Sequence[float] | str | None = None
    metric: str = "l1"


@dataclasses.dataclass
class TeaCacheConfig(BasicCacheConfig, _TeaCacheFields):
    """When to compute and when to reuse, as TeaCache decides it.

    Args:
        rel_l1_thresh: Steps are reused as long as the estimated changes since the last computed step add up to less
            than this. 0 or less never reuses. Useful values differ from model to model: docs/teacache.md.
        coefficients: The polynomial from the signal's relative change to the output's: numbers, highest power first; or
            the name of a published one (:data:`POLYNOMIALS`). None: the published one for this model, where its
            configuration tells which; else enabling fails, and names those to choose from. Numbers are applied to the
            signal in ``cachedit.models.signals.SIGNALS``.
        metric: ``"l1"``, or ``"sea"`` for SeaCache (arXiv 2602.18993): the signal is filtered, and its changes add up
            as they are (``coefficients`` then default to the identity).

    These fields of :class:`BasicCacheConfig` have other defaults:

        Fn_compute_blocks: 1. The signal is known once the first block has begun; more of them measure nothing more.
        max_warmup_steps: 1. The first step is always computed. The last one too, where the number of steps is known.

    These have no meaning here, and an error says so where they are set: ``residual_diff_threshold``,
    ``max_accumulated_residual_diff_threshold``. All others are as they are there. A step that they make computed
    clears the sum of changes; a step that a static mask makes reused adds nothing to it.
    """

    cache_type: CacheType = CacheType.TeaCache
    Fn_compute_blocks: int = 1
    max_warmup_steps: int = 1

    def validate(self) -> None:
        """Check types and ranges of every field.

        Raises:
            ValueError: For a value out of range, or a field that has no meaning here.
            TypeError: For a value of the wrong type.
        """
        super().validate()
        for name in ("residual_diff_threshold", "max_accumulated_residual_diff_threshold"):
            if getattr(self, name) != getattr(BasicCacheConfig, name):
                raise ValueError(f"{name} has no meaning for TeaCacheConfig: set rel_l1_thresh")
        _check_real("rel_l1_thresh", self.rel_l1_thresh)
        _check_choice("metric", self.metric, METRICS)
        given = self.coefficients
        if isinstance(given, str):
            _check_choice("coefficients", given, tuple(POLYNOMIALS))
        elif given is not None:
            _check_coefficients(given)

    def make_policy(self, total_steps: int | None) -> Policy:
        """Return the policy of one request, branch and section, if the configuration has coefficients."""
        return TeaCachePolicy(self, total_steps)

    def strify(self) -> str:
        """Return a short tag of the settings, for logs and file names."""
        tag = super().strify().replace(f"_R{self.residual_diff_threshold}", f"_T{self.rel_l1_thresh}")
        return tag if self.metric == "l1" else f"{tag}_{self.metric}"


class TeaCachePolicy(Policy):
    """Decides the steps of one branch of one request as TeaCache does.

    To be asked as :class:`Policy`, with ``diff`` the signal's relative change since the step before, computed or not:
    ``sum |now - before| / sum |before|``. So the signal has to be kept at every step.

    Two things differ from the authors' code. A negative estimate counts by its size: far from what it was fitted to, a
    polynomial of degree four leaves for minus infinity as soon as for plus, and there a running sum sinks below the
    threshold and stays there. And a change of NaN or infinity is counted.

    Args:
        config: Validated configuration.
        total_steps: Steps of the request, if known; the last one is computed.
        coefficients: The polynomial, highest power first. Default: the configuration's.

    Raises:
        ValueError: If there are no coefficients, or the configuration's mask does not have ``total_steps`` entries.
    """

    config: TeaCacheConfig

    def __init__(
        self, config: TeaCacheConfig, total_steps: int | None = None, coefficients: Sequence[float] | None = None
    ):
        super().__init__(config, total_steps)
        if coefficients is None:
            given = config.coefficients
            coefficients = POLYNOMIALS[given] if isinstance(given, str) else given
        if coefficients is None:
            raise ValueError("coefficients: neither given nor in the configuration")
        self.coefficients = tuple(float(coefficient) for coefficient in coefficients)  # tensors and arrays as well
        self.threshold = config.rel_l1_thresh
        self.last = None if total_steps is None else total_steps - 1

    def plan(self) -> Decision:
        """Decide as far as the signal's change is not needed."""
        decision = super().plan()
        if decision is Decision.MEASURE and self.step == self.last:
            return self._compute("last step")
        return decision

    def decide(self, diff: float | None) -> Decision:
        """Decide with the signal's change: reuse while the estimates add up to less than the threshold."""
        if diff is None or not math.isfinite(diff):
            return super().decide(diff)
        return super().decide(self.accumulated + self.estimate(diff))

    def record(
        self, decision: Decision, diff: float | None, stored: bool = True, pruned: int = 0, blocks: int = 0
    ) -> None:
        """Take note that the step was carried out, and move to the next; see :meth:`Policy.record`."""
        accumulated = self.accumulated
        super().record(decision, diff, stored, pruned, blocks)
        if decision is Decision.REUSE:
            self.accumulated = accumulated + (0.0 if diff is None else self.estimate(diff))

    def estimate(self, change: float) -> float:
        """The output's relative change, from the signal's."""
        value = 0.0
        for coefficient in self.coefficients:
            value = value * change + coefficient
        return abs(value)


def fit_coefficients(changes: Iterable[tuple[float, float]], degree: int = 4) -> tuple[float, ...]:
    """Fit a polynomial for a model that has none: least squares, as TeaCache's authors do it.

    Args:
        changes: Pairs ``(signal, output)`` of relative L1 changes from one step to the next, without a cache; the
            authors took all steps of 70 prompts. At least ``degree + 1`` pairs.
        degree: Degree of the polynomial.

    Returns:
        ``degree + 1`` coefficients, highest power first: ``TeaCacheConfig(coefficients=...)``.

    Raises:
        ValueError: If there are too few pairs with different signal changes.
    """
    import torch  # the policy itself needs none

    pairs = torch.tensor(list(changes), dtype=torch.float64).reshape(-1, 2)
    signal, output = pairs.unbind(1)
    if signal.unique().numel() <= degree:
        raise ValueError(
            f"changes: degree {degree} takes at least {degree + 1} different signal changes, got "
            f"{signal.unique().numel()}"
        )
    # Powers of small numbers are of very different sizes; scaled columns keep the problem solvable.
    powers = torch.vander(signal, degree + 1)
    scale = powers.norm(dim=0)
    solution = torch.linalg.lstsq(powers / scale, output[:, None], driver="gelsd").solution[:, 0]
    return tuple((solution / scale).tolist())


def _check_coefficients(given: Iterable[float]) -> None:
    try:
        numbers = [float(coefficient) for coefficient in given]
    except (TypeError, ValueError):
        raise TypeError(f"coefficients must be numbers, highest power first, or a name, got {given!r}") from None
    if not numbers or not all(map(math.isfinite, numbers)):
        raise ValueError(f"coefficients must be at least one number, all of them finite, got {given!r}")
