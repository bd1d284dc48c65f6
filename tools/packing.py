"""How well images of all sizes share out over ranks: padding, imbalance, and the number of sizes to compile for.

    python tools/packing.py --images 4 --ranks 1 8 32 128

Images are drawn with log-normal areas (median 448 x 448, patches of 14, from 56 x 56 to 1792 x 1792) and merged by
two, as Qwen2-VL's are; each rank's share of the batch has a Poisson number of them. Nothing is trained: this is the
arithmetic of `ftrain.items`.
"""

import argparse
import math

import numpy as np

from ftrain.items import Packing, bucket, share_out

GROUP = 4  # patches that are merged to one token: the smallest item


def patches(rng: np.random.Generator, n: int) -> list[int]:
    sides = np.clip(448 * np.exp(rng.normal(0, 0.5, (n, 2))), 56, 1792)
    return [int(np.prod(2 * np.maximum(np.round(side / 28), 1))) for side in sides]


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    args.add_argument("--images", type=float, default=4, help="images a rank and step, in the mean")
    args.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 32, 128])
    args.add_argument("--steps", type=int, default=200)
    given = args.parse_args()
    print("ranks  padding  imbalance  imbalance if each rank kept its own  sizes in", given.steps, "steps")
    for ranks in given.ranks:
        rng = np.random.default_rng(0)
        found, kept, sizes = [], [], set()
        for _ in range(given.steps):
            own = [patches(rng, rng.poisson(given.images)) for _ in range(ranks)]
            units = [u for of_rank in own for u in of_rank]
            loads = [sum(units[i] for i in of_rank) for of_rank in share_out(units, ranks)]
            padded = bucket(math.ceil(max(max(loads), 1) / GROUP)) * GROUP
            sizes.add(padded)
            found.append(Packing(sum(units), max(loads), padded, ranks))
            kept.append(Packing(sum(units), max(map(sum, own)), padded, ranks).imbalance)
        waste, imbalance = np.mean([p.waste for p in found]), np.mean([p.imbalance for p in found])
        print(f"{ranks:5}  {waste:7.1%}  {imbalance:9.2f}  {np.mean(kept):35.2f}  {len(sizes)}")


if __name__ == "__main__":
    main()
