"""ftrain on the checkpoint and the tokens that the witnesses have: alone, or under torchrun on a mesh.

Nothing of its own is in here: model, plan, mesh and step are put together as a training run does it.
"""

from setting import ADAM, arguments, batches, next_tokens, parse, write

from ftrain.job import make_job
from ftrain.launch import finish, init
from ftrain.mesh import resolve
from ftrain.model import find_model
from ftrain.ops import fill_batch
from ftrain.optim import AdamW, Schedule
from ftrain.plan import find_plan
from ftrain.pretrained import init_from
from ftrain.step import Recipe, make_train_step


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--plan", default="fsdp_sp_ep")
    parser.add_argument("--compile", default="inductor")
    parser.add_argument("--remat", default="none")
    args = parse(parser)

    process = init()
    mesh = resolve(args.fsdp, args.sp, args.ep, 1, process.world)
    model = find_model(args.model)
    job = make_job(model, find_plan(args.plan), mesh, remat=args.remat)
    state = init_from(args.model, model, job.placements, job.device_mesh)

    beta1, beta2 = ADAM["betas"]
    adam = AdamW(ADAM["lr"], beta1, beta2, ADAM["eps"], ADAM["weight_decay"], args.clip)
    recipe = Recipe(adam, Schedule(args.steps, "constant"), router_aux=args.router_aux)
    step = make_train_step(model, job.sharding, job.ops, recipe, args.compile)

    seen = {"loss": [], "grad_norm": []}
    for ids in batches(args):
        batch = fill_batch({"input_ids": ids, "labels": next_tokens(ids)})
        state, metrics = step(state, job.microbatches(batch))
        balance = args.router_aux * metrics["router_aux_loss"] if args.router_aux else 0.0
        seen["loss"].append(float(metrics["loss"] + balance))
        seen["grad_norm"].append(float(metrics["grad_norm"]))
    if process.rank == 0:
        write(args, f"ftrain {args.plan} {args.compile}", seen)
    finish()


if __name__ == "__main__":
    main()
