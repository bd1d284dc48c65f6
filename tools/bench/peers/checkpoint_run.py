"""Write a model as transformers initialises it: checkpoint_run.py CONFIG.json FOLDER."""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

if __name__ == "__main__":
    config = json.loads(Path(sys.argv[1]).read_text())
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32).save_pretrained(sys.argv[2])
