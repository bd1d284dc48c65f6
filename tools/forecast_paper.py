"""ftrain's forecast beside what VeOmni's paper measured (arXiv 2508.02317, appendix A): python tools/forecast_paper.py

128 GPUs of 80 GB, micro-batches of one sequence, full recomputation, bf16 over fp32 weights and moments.
"""

import time

import tyro

from ftrain.config import MeshConfig
from ftrain.model import find_model
from ftrain.plan import find_plan
from ftrain.planning import Asked, PlanConfig, forecast
from ftrain.roofline import find_hardware
from ftrain.search import estimate, estimated

# (tokens, sp) -> VeOmni's GB and tokens/s a GPU, torchtitan's; None: out of memory, "-": not measured.
DENSE = {  # Qwen2-7B
    (8192, 1): (21.91, 6940, 23.26, 6639), (8192, 4): (23.23, 3830, 22.55, 3590),
    (16384, 1): (24.45, 6583, 39.58, 6082), (16384, 4): (23.92, 4889, 25.08, 4056),
    (32768, 1): (31.41, 5315, 71.81, 4878), (32768, 4): (25.27, 4629, 30.13, 3727),
    (65536, 1): (43.0, 3725, None, None), (65536, 4): (28.7, 3452, 44.82, 2853),
    (131072, 1): (70.26, 2258, None, None), (131072, 4): (35.49, 2187, None, None),
}  # fmt: skip
EXPERTS = {  # Qwen3-30B-A3B, ep 8
    (8192, 1): (45.58, 2776), (8192, 4): (22.56, 1216), (16384, 1): (69.99, 2853), (16384, 4): (34.32, 1897),
    (32768, 1): (77.25, 2417), (32768, 4): (63.08, 2064), (65536, 1): (None, None), (65536, 4): (77.92, 1716),
    (131072, 1): (None, None), (131072, 4): (78.01, 1075),
}  # fmt: skip


def main(
    models: list[str] = ["Qwen2-7B", "Qwen3-30B-A3B"], hardware: str = "h100-80gb", remat: str = "full",
    shallow: bool = False,
) -> None:  # fmt: skip
    """shallow: from models with few layers, as `plan --search` estimates, in a fifth of the time."""
    plan, machine = find_plan("fsdp_sp_ep"), find_hardware(hardware)
    print("| model | tokens | mesh | VeOmni GB | torchtitan GB | ftrain GB | VeOmni tokens/s | torchtitan | ftrain | s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name in models:
        model, rows, ep = find_model(name), *((DENSE, 1) if name == "Qwen2-7B" else (EXPERTS, 8))
        for (length, sp), measured in rows.items():
            theirs = [*measured, "-", "-"][:4]
            cells = ["OOM" if value is None else value for value in theirs]
            mesh = MeshConfig(128 // sp // ep, sp, ep)
            began = time.perf_counter()
            asked = PlanConfig(name, mesh=mesh, seq_len=length, remat=remat), Asked(model, plan, machine)
            found = estimate(*asked) if shallow else estimated(forecast(*asked))
            print(
                f"| {name} | {length} | fsdp {mesh.fsdp}, sp {sp}, ep {ep} | {cells[0]} | {cells[2]} | "
                f"{found.peak / 1e9:.2f} | {cells[1]} | {cells[3]} | {found.speed:.0f} | "
                f"{time.perf_counter() - began:.0f} |", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
