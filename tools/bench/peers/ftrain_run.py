"""ftrain: its job, plan and compiled step, put together as a training run does it."""

import os

from ftrain.launch import finish, init, thread_defaults

thread_defaults(os.environ)  # before torch is imported

import shared
import torch

from ftrain.job import make_job
from ftrain.mesh import Mesh
from ftrain.model import find_model
from ftrain.ops import fill_batch
from ftrain.optim import AdamW, Schedule
from ftrain.plan import find_plan
from ftrain.pretrained import init_from
from ftrain.step import Recipe, make_train_step


def make_step(work: shared.Work, mode: str = "inductor"):
    """-> (the job, step(ids [B, S]) -> (loss, norm)). Needs an initialised process group.

    Where it is captured, `step.program(ids)` is what it runs.
    """
    model = find_model(work.model)
    mesh = Mesh(work.fsdp, work.sp, work.ep)
    job = make_job(model, find_plan("fsdp_sp_ep"), mesh, precision=work.dtype, remat=work.remat)
    state = init_from(work.model, model, job.placements, job.device_mesh)
    adam = AdamW(work.lr, work.beta1, work.beta2, work.eps, weight_decay=0.0, clip=work.clip)
    recipe = Recipe(adam, Schedule(work.steps, "constant"))
    train_step = make_train_step(model, job.sharding, job.ops, recipe, mode)

    def parts(ids) -> list[dict[str, torch.Tensor]]:
        batch = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(shared.next_tokens(ids))}
        return job.microbatches(fill_batch(batch))

    def step(ids) -> tuple[float, float]:
        nonlocal state
        state, metrics = train_step(state, parts(ids))
        return float(metrics["loss"]), float(metrics["grad_norm"])

    step.program = lambda ids: train_step.program(state, parts(ids))
    return job, step


def main() -> None:
    work = shared.read()
    init()
    _, step = make_step(work, "inductor" if work.compile else "off")
    shared.write(work, shared.train(work, step))
    finish()


if __name__ == "__main__":
    main()
