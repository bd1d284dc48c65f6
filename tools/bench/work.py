"""The rows of the benchmark, the models and batches they stand for, and who can run which. Python only."""

from fnmatch import fnmatchcase
from itertools import product
from typing import NamedTuple

VOCAB = 4096
TOKENS = 2048  # of a global batch, whatever the length of its rows
ADAM = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "clip": 1.0}
REMAT = "selective"  # the default of ftrain's command line
# (fsdp, sp, ep): fsdp and ep cut the batch, sp the sequence, and each multiplies the ranks.
MESHES = {"one": (1, 1, 1), "fsdp2": (2, 1, 1), "sp2": (1, 2, 1), "ep2": (1, 1, 2), "sp2ep2": (1, 2, 2)}


class Row(NamedTuple):
    """One piece of work: a model, the length of a batch's rows, the precision and the mesh."""

    family: str  # dense: Qwen3; moe: Qwen3-MoE
    hidden: int
    layers: int
    seq: int
    dtype: str
    mesh: str

    @property
    def model(self) -> str:
        return f"{self.family}-h{self.hidden}-l{self.layers}"

    @property
    def name(self) -> str:
        return f"{self.model}-s{self.seq}-{self.dtype}-{self.mesh}"


def matrix() -> list[Row]:
    """Every row there is."""
    dense = product(["dense"], (256, 512), (4, 8), (256, 1024), ("fp32", "bf16"), ("one", "fsdp2", "sp2"))
    experts = product(["moe"], (256,), (4, 8), (256, 1024), ("fp32", "bf16"), ("one", "fsdp2", "sp2", "ep2", "sp2ep2"))
    return [Row(*values) for values in (*dense, *experts)]


DEFAULT = (
    "dense-h256-l4-s256-*-one", "dense-h256-l4-s256-*-fsdp2",
    "moe-h256-l4-s256-fp32-ep2", "moe-h256-l4-s256-fp32-sp2ep2",
)  # fmt: skip


def find_rows(patterns: list[str]) -> list[Row]:
    """The rows whose names match any of the patterns (`*`, `?` and `[...]`), in the matrix's order.

    Raises ValueError for a pattern that matches none.
    """
    rows = matrix()
    for pattern in patterns:
        if not any(fnmatchcase(row.name, pattern) for row in rows):
            raise ValueError(
                f"--rows {pattern}: matches no row; names are like {rows[0].name}: dense or moe, h256 or h512 (dense), "
                f"l4 or l8, s256 or s1024, fp32 or bf16, and {', '.join(MESHES)} (one, fsdp2 and sp2 for dense)"
            )
    return [row for row in rows if any(fnmatchcase(row.name, pattern) for pattern in patterns)]


def config(row: Row) -> dict:
    """The row's Hugging Face config. No pad token: transformers alone would zero its embedding's row."""
    dense = {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": VOCAB, "hidden_size": row.hidden,
        "intermediate_size": 3 * row.hidden, "num_hidden_layers": row.layers, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": row.hidden // 8, "max_position_embeddings": 2048,
        "tie_word_embeddings": True, "use_cache": False, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    experts = {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8, "num_experts_per_tok": 2,
        "moe_intermediate_size": row.hidden, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
    }  # fmt: skip
    return dense if row.family == "dense" else dense | experts


class Peer(NamedTuple):
    """environment: whose Python runs it. script: in `peers/`. meshes, families: what it can run.
    mesh: that it runs on, where it is not the row's. compile: whether it compiles."""

    environment: str
    script: str
    meshes: tuple[str, ...]
    compile: bool = False
    families: tuple[str, ...] = ("dense", "moe")
    mesh: str | None = None


PEERS = {
    "ftrain": Peer("ftrain", "ftrain_run.py", tuple(MESHES), compile=True),
    "ftrain-one-rank": Peer("ftrain", "ftrain_run.py", ("sp2ep2",), compile=True, mesh="one"),
    "transformers": Peer("hf", "transformers_run.py", ("one", "fsdp2")),
    "transformers-compiled": Peer("hf", "transformers_run.py", ("one", "fsdp2"), compile=True),
    "accelerate": Peer("hf", "accelerate_run.py", ("fsdp2",)),
    "trainer": Peer("hf", "trainer_run.py", ("one", "fsdp2")),
    "veomni": Peer("veomni", "veomni_run.py", ("fsdp2", "sp2", "ep2")),
    "titan": Peer("titan", "titan_run.py", ("fsdp2", "sp2", "ep2"), compile=True),
    "jax": Peer("jax", "jax_run.py", ("one",), compile=True, families=("dense",)),
}
LIMITS = Peer("ftrain", "limits_run.py", tuple(MESHES))


def find_peers(row: Row, names: list[str]) -> dict[str, Peer]:
    """Those of the named peers (patterns too) that can run the row. ValueError for a name of none."""
    for name in names:
        if not any(fnmatchcase(peer, name) for peer in PEERS):
            raise ValueError(f"--peers {name}: valid peers are {', '.join(PEERS)}")
    wanted = {peer: how for peer, how in PEERS.items() if any(fnmatchcase(peer, name) for name in names)}
    return {p: how for p, how in wanted.items() if row.mesh in how.meshes and row.family in how.families}


def describe(row: Row, peer: Peer, steps: int, threads: int, remat: str = REMAT, **places: str) -> dict:
    """What a runner is told (`peers/shared.py`, Work). threads: of all ranks together; a rank has at least one."""
    fsdp, sp, ep = MESHES[peer.mesh or row.mesh]
    ranks = fsdp * sp * ep
    return {
        **places, **ADAM, "dtype": row.dtype, "steps": steps, "threads": max(1, threads // ranks),
        "fsdp": fsdp, "sp": sp, "ep": ep, "compile": peer.compile, "remat": remat,
    }  # fmt: skip
