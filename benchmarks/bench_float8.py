"""What residual_float8 costs in quality and saves in memory on the embedded model: the table of docs/policies.md.

python benchmarks/bench_float8.py [--steps 28]
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import cachedit
from bench_policies import CALIBRATORS, MEASURED, cached
from cachedit import DBCacheConfig
from cachedit.cli.demo import PROMPTS, Demo
from cachedit.cli.quality import compare
from cachedit.embedded import load_pipeline

POLICIES = {
    "mask fast": DBCacheConfig(**MEASURED, steps_computation_mask="fast", steps_computation_policy="static"),
    "threshold 0.2": DBCacheConfig(**MEASURED, residual_diff_threshold=0.2, max_continuous_cached_steps=2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=28)
    steps = parser.parse_args().steps
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    demo = Demo(pipe, PROMPTS, seed=0)
    baseline = demo.draw(steps)
    for policy, config in POLICIES.items():
        for name, calibrator in CALIBRATORS.items():
            row = [f"{policy:>14} {name:>14}"]
            for float8 in (False, True):
                with cached(pipe, replace(config, residual_float8=float8), calibrator):
                    quality = compare(demo.draw(steps), baseline)
                    stats = cachedit.summary(pipe, logging=False)[0]
                row.append(
                    f"{quality.psnr_db:6.2f} dB (min {quality.psnr_db_min:.2f}) {stats.bytes_held / 1e6:6.3f} MB"
                )
            print(*row, f"{stats.main.skipped_blocks:.0%} skipped", sep="  ", flush=True)


if __name__ == "__main__":
    main()
