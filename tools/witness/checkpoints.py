"""Write the tiny models as transformers initialises them: checkpoints.py FOLDER -> FOLDER/{qwen3,qwen3_moe}."""

import sys
from pathlib import Path

import torch
from setting import MODELS
from transformers import AutoConfig, AutoModelForCausalLM

if __name__ == "__main__":
    for name, hf in MODELS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf), dtype=torch.float32)
        model.save_pretrained(Path(sys.argv[1]) / name)
