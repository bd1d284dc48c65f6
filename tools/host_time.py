"""Time what a training run does between its compiled calls: python tools/host_time.py [flags of ftrain].

A run of the default job (or as the flags say) in a directory of its own. What is counted is all that the loop
does from one compiled call's return to the next one's start: waiting for the batch, preparing the call, taking
the metrics to the host, recording and printing them. Medians and quartiles over the steps, without those beside an
evaluation, a checkpoint or the first call.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as a run has it; must be set before torch starts its threads

import statistics
import sys
import tempfile
import time

import torch

from ftrain import config, train

STEPS = 60


def main(flags: list[str]) -> None:
    calls: list[tuple[float, float]] = []  # when each compiled call began and ended
    torch_compile = torch.compile

    def compile(*args, **kwargs):
        compiled = torch_compile(*args, **kwargs)

        def timed(*of_call):
            began = time.perf_counter()
            result = compiled(*of_call)
            calls.append((began, time.perf_counter()))
            return result

        return timed

    torch.compile = compile
    with tempfile.TemporaryDirectory() as out:
        cfg = config.parse([*f"--steps {STEPS} --save-every 0 --eval-every 0 --log-every 1".split(), *flags, "--out", out])
        train.main(cfg)
    within = [end - began for began, end in calls[2:]]
    between = [1000 * (began - end) for (_, end), (began, _) in zip(calls[1:], calls[2:])]
    low, middle, high = statistics.quantiles(between, n=4)
    print(f"compiled call: median {1000 * statistics.median(within):.1f} ms over {len(within)} steps")
    print(f"between two: median {middle:.2f} ms, quartiles {low:.2f} and {high:.2f} ms, least {min(between):.2f} ms")


if __name__ == "__main__":
    main(sys.argv[1:])
