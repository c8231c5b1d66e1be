"""A policy of one's own: reuse while the drift since the last computed step fits a budget that grows with the step.

python examples/own_policy.py
"""

import torch

import cachedit
from cachedit import Decision, PolicyConfig, StepView, TaylorSeerCalibratorConfig
from cachedit.embedded import load_pipeline


class GrowingBudget:
    """Early steps lay out the picture and are computed; later ones may drift the further, the later they are."""

    def decide(self, step: StepView) -> Decision:
        total = step.total_steps or 28
        if step.step < 3 or step.step == total - 1:
            return Decision.COMPUTE
        if step.diff is None:
            return Decision.MEASURE  # asked again, with the difference
        budget = 0.1 + 0.2 * step.step / total
        return Decision.REUSE if step.diff < budget else Decision.COMPUTE


def main() -> None:
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    cachedit.enable_cache(pipe, PolicyConfig(Fn_compute_blocks=1, policy=GrowingBudget), TaylorSeerCalibratorConfig())
    pipe("a red circle left of a blue square", num_inference_steps=28, generator=torch.Generator().manual_seed(0))
    cachedit.summary(pipe, details=True)


if __name__ == "__main__":
    main()
