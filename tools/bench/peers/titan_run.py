"""torchtitan's own Trainer: FSDP2, with tensor parallelism (TP, for sp) or expert parallelism (EP), compiled."""

from dataclasses import dataclass

import shared
import titan_cpu  # (before any part of torchtitan)
import torch
import torch.distributed as dist
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.config import CompileConfig, Configurable, ParallelismConfig, TrainingConfig
from torchtitan.models import qwen3
from torchtitan.models.common import CosSinRoPE, Embedding, Linear
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.trainer import Trainer


class Batches(Configurable):
    """This rank's rows of the work's batches, in place of a dataset."""

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        path: str

    def __init__(self, config: Config, *, dp_rank: int, dp_world_size: int, **_):
        self.own = [shared.own_rows(ids, dp_rank, dp_world_size) for ids in shared.np.load(config.path)]

    def __iter__(self):
        for ids in self.own:
            yield {"input": torch.from_numpy(ids.copy())}, torch.from_numpy(shared.next_tokens(ids))

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


class NoTokenizer(Configurable):
    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        pass

    def __init__(self, config: Config, **_):
        pass


def model_spec(hf: dict) -> ModelSpec:
    """Qwen3 or Qwen3-MoE of these sizes, without the bias by which torchtitan balances experts: no peer has it."""
    dim, vocab, head_dim = hf["hidden_size"], hf["vocab_size"], hf["head_dim"]
    common = dict(
        n_layers=hf["num_hidden_layers"], dim=dim, n_heads=hf["num_attention_heads"],
        n_kv_heads=hf["num_key_value_heads"], head_dim=head_dim, attn_backend="sdpa",
        rope=CosSinRoPE.Config(
            dim=head_dim, max_seq_len=hf["max_position_embeddings"], theta=hf["rope_parameters"]["rope_theta"]
        ),
    )  # fmt: skip
    if hf["model_type"] == "qwen3_moe":
        layers = qwen3._build_qwen3_moe_layers(
            moe_hidden_dim=hf["moe_intermediate_size"], top_k=hf["num_experts_per_tok"],
            num_experts=hf["num_local_experts"], moe_comm_backend="standard", **common,
        )  # fmt: skip
        for layer in layers:
            layer.moe.load_balance_coeff = None
    else:
        layers = qwen3._build_qwen3_layers(hidden_dim=hf["intermediate_size"], **common)
    config = qwen3.Qwen3Model.Config(
        vocab_size=vocab, dim=dim, norm=qwen3._qwen3_norm(dim), layers=layers, enable_weight_tying=True,
        tok_embeddings=Embedding.Config(
            num_embeddings=vocab, embedding_dim=dim, param_init=qwen3._EMBEDDING_SKIP_INIT
        ),
        lm_head=Linear.Config(in_features=dim, out_features=vocab, param_init=qwen3._LINEAR_INIT),
    )  # fmt: skip
    return ModelSpec(
        name="qwen3", flavor="bench", model=config, parallelize_fn=titan_cpu.parallelize, pipelining_fn=None,
        post_optimizer_build_fn=None, state_dict_adapter=qwen3.Qwen3StateDictAdapter,
    )  # fmt: skip


def trainer(work: shared.Work) -> Trainer:
    rows, length = work.ids().shape[1:]
    precision = "bfloat16" if work.dtype == "bf16" else "float32"
    return Trainer.Config(
        model_spec=model_spec(work.config), dump_folder=work.out, tokenizer=NoTokenizer.Config(),
        dataloader=Batches.Config(path=work.batches),
        loss=CrossEntropyLoss.Config(global_vocab_size=work.config["vocab_size"]),
        optimizer=default_adamw(lr=work.lr, betas=(work.beta1, work.beta2), eps=work.eps, weight_decay=0.0),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=0, decay_ratio=0.0),
        training=TrainingConfig(
            local_batch_size=rows // (work.fsdp * work.ep), seq_len=length, steps=work.steps, max_norm=work.clip,
            mixed_precision_param=precision, disable_cuda_graphs=True,
        ),
        parallelism=ParallelismConfig(
            tensor_parallel_degree=work.sp, expert_parallel_degree=work.ep, spmd_backend="partial_dtensor"
        ),
        activation_checkpoint=None, compile=CompileConfig(enable=work.compile),
        metrics=MetricsProcessor.Config(log_freq=1),
        checkpoint=CheckpointManager.Config(
            enable=True, interval=10**9, folder="checkpoints", initial_load_path=work.model, initial_load_in_hf=True
        ),
    ).build()  # fmt: skip


def main() -> None:
    work = shared.read()
    made, seen = trainer(work), shared.Seen()
    made.metrics_processor.log = lambda step, loss, largest, norm, **_: seen.step(loss, norm)
    made.checkpointer.save = lambda *args, **kwargs: None
    seen.start()
    made.train()
    shared.write(work, seen)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
