"""What sketches cost and save against sums in full: microseconds a position, and bytes a task writes.

    python benchmarks/sketch.py

Made-up factors of 8 samples a position whose spectrum falls as 1 / i, one layer, one thread; positions in one group or in 300.
"""

from __future__ import annotations

import time

import torch

from fisher_ray.sums import Sums

POSITIONS, SAMPLES, BATCH = 2048, 8, 512


def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    print("d_model  groups  rows  us a position  MiB in memory, float64  of the trace held")
    for d_model in (768, 2048):
        spread = torch.arange(1, d_model + 1) ** -0.5
        factors = torch.randn(POSITIONS, SAMPLES, d_model, generator=generator) * spread
        activations = torch.randn(POSITIONS, 1, d_model, generator=generator)
        for groups in (1, 300):
            member = torch.randint(groups, (POSITIONS,), generator=generator)
            for rows in (None, 16, 64):
                if rows is None and groups * d_model > 300_000:
                    continue  # 28 GiB
                sums = Sums([0], d_model, [str(i) for i in range(groups)], sketch=rows)
                start = time.perf_counter()
                for some in torch.arange(POSITIONS).split(BATCH):
                    sums.add(0, factors[some], activations[some], member[some])
                took = time.perf_counter() - start
                packed = sums.packed(0)
                held = sum(group.square("fisher").trace() for group in packed.groups.values())
                share = held / sum(group.fisher.trace for group in packed.groups.values())
                size = len(packed.to_bytes()) / 2**20
                print(
                    f"{d_model:7d}  {groups:6d}  {rows or 'all':>4}  {took / POSITIONS * 1e6:13.0f}  {size:22.1f}  {share:.0%}"
                )


if __name__ == "__main__":
    main()
