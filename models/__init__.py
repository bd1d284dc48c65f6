"""The models: one module per family, named after its `model_type`, found by looking in this folder.

A family has `config(hf) -> cfg`, `specs(cfg) -> {name: ParamSpec}`, `forward(p, batch, cfg, ops) -> Output`
and `PRESETS`, published configurations by name. The other modules are what families share.
"""
