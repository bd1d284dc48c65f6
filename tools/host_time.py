"""Time what a training run does between its compiled programs: python tools/host_time.py [flags of ftrain].

A run of the default job (or as the flags say) in a directory of its own. What is counted is all that the loop
does from the return of one step's program (program.py) to the start of the next one's: waiting for the batch, preparing
the call, taking the metrics to the host, recording and printing them. Also the share of it that this thread was at work, which other
programs on a busy machine change less.
"""

import os
import statistics
import sys
import tempfile
import time

from ftrain.launch import thread_defaults

thread_defaults(os.environ)  # before torch is imported

from ftrain import config, train
from ftrain.program import Program

STEPS = 60
Clock = tuple[float, float]  # seconds: of the wall's clock, and that this thread was on a CPU


def main(flags: list[str]) -> None:
    calls: list[tuple[Clock, Clock]] = []  # when each run of a program began and ended
    run = Program.__call__

    def timed(program: Program, inputs: list) -> list:
        began = clock()
        outputs = run(program, inputs)
        calls.append((began, clock()))
        return outputs

    Program.__call__ = timed
    with tempfile.TemporaryDirectory() as out:
        defaults = f"--steps {STEPS} --save-every 0 --eval-every 0".split()
        train.main(config.parse([*defaults, *flags, "--out", out]))
    say("the program", [(began, ended) for began, ended in calls[2:]])
    say("between two", [(ended, began) for (_, ended), (began, _) in zip(calls[1:], calls[2:])])


def clock() -> Clock:
    return time.perf_counter(), time.thread_time()


def say(what: str, spans: list[tuple[Clock, Clock]]) -> None:
    for i, kind in enumerate(("", " of this thread's work")):
        ms = [1000 * (ended[i] - began[i]) for began, ended in spans]
        low, middle, high = statistics.quantiles(ms, n=4)
        print(f"{what}: median {middle:.2f} ms{kind}, the middle half {low:.2f} to {high:.2f}, over {len(ms)} steps")


if __name__ == "__main__":
    main(sys.argv[1:])
