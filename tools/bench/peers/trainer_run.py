"""transformers' Trainer: one process, or DDP, which is what it runs on CPUs. bf16 is its autocast."""

import os

import shared
import torch
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments


class InOrder(Trainer):
    def _get_train_sampler(self, *args, **kwargs):
        return SequentialSampler(self.train_dataset)


class Clock(TrainerCallback):
    """Trainer logs a step after its end: what comes between two logs is a step, the loss read."""

    def __init__(self, seen: shared.Seen):
        self.seen = seen

    def on_train_begin(self, *args, **kwargs):
        self.seen.start()

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.seen.step(logs["loss"], logs["grad_norm"])


def main() -> None:
    work = shared.read()
    ids = work.ids()
    # Row by row, in the order in which its loader gives them out: a rank's rows, then the next rank's.
    rows = [{"input_ids": row, "labels": row} for row in torch.from_numpy(ids).flatten(0, 1)]
    distributed = {"ddp_backend": "gloo"} if work.ranks > 1 else {}
    args = TrainingArguments(
        output_dir=os.path.join(work.out, "trainer"), per_device_train_batch_size=ids.shape[1] // work.ranks,
        max_steps=work.steps, learning_rate=work.lr, lr_scheduler_type="constant", weight_decay=0.0,
        adam_beta1=work.beta1, adam_beta2=work.beta2, adam_epsilon=work.eps, max_grad_norm=work.clip,
        optim="adamw_torch_fused", bf16=work.dtype == "bf16", use_cpu=True, dataloader_pin_memory=False,
        logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, **distributed,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32, attn_implementation="sdpa")
    seen = shared.Seen()
    InOrder(model=model, args=args, train_dataset=rows, callbacks=[Clock(seen)]).train()
    shared.write(work, seen)


if __name__ == "__main__":
    main()
