"""What the tools begin with: a model, a plan and a mesh brought together, a state, and a batch on the device.

To be imported before torch: it says how torch's threads wait for each other.
"""

import os
from collections.abc import Mapping

from ftrain.launch import Process, init, thread_defaults

thread_defaults(os.environ)

import torch
from torch import Tensor

from ftrain.job import Job, make_job
from ftrain.mesh import Mesh, resolve
from ftrain.model import Model, find_model
from ftrain.ops import fill_batch
from ftrain.plan import find_plan
from ftrain.state import State, init_state
from ftrain.transfer import to_device


def started(
    model: str | dict, rows: int, length: int, *, plan: str = "fsdp_sp_ep", mesh: Mesh = Mesh(-1, 1, 1),
    optimizer_state: str = "fp32", process: Process | None = None, **how,
) -> tuple[Process, Model, Job, State, list[Mapping[str, Tensor]]]:  # fmt: skip
    """A job, its first state, and this rank's part of a batch of random tokens, rows of `length`: each is one document,
    and none has padding.

    mesh: its sizes; -1: what the ranks give. process: this one, where its process group is there already; to end it is
    the caller's. how: as `make_job` takes it.
    """
    process = process or init()
    found = find_model(model)
    sizes = resolve(*mesh, 1, process.world)
    job = make_job(found, find_plan(plan), sizes, device_type=process.device.type, **how)
    tokens = torch.randint(found.cfg.vocab, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    batch = fill_batch({"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]})
    parts = [to_device(part, process.device) for part in job.microbatches(batch)]
    state = init_state(found.specs, job.placements, job.device_mesh, 0, optimizer_state)
    return process, found, job, state, parts
