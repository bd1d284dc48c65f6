#!/bin/bash
# The whole comparison: witness.sh FOLDER [PYTHON]. FOLDER receives the witnesses' environments, the
# checkpoints and one JSON file a run; PYTHON (3.11, the default is python) has ftrain installed.
set -eu
work=$(realpath -m "$1")
ours=$(command -v "${2:-python}")
cd "$(dirname "$0")"
mkdir -p "$work/runs"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 WANDB_MODE=offline

environment() { # name, packages...: made once
    local at=$work/env-$1 && shift
    [ -e "$at/complete" ] && return
    "$ours" -m venv "$at"
    "$at/bin/pip" install -q "$@"
    touch "$at/complete"
}
environment transformers torch==2.13.0 numpy transformers==5.23.0 accelerate==1.15.0
# What VeOmni itself asks for includes CUDA kernels: on CPU it takes these, and its own wheel alone.
environment veomni torch==2.13.0 numpy transformers==5.9.0 "datasets>=2.20,<=2.21" "torchdata>=0.8,<1" \
    "blobfile>=3" "packaging<26" tiktoken psutil wandb "einops>=0.8.1" "matplotlib>=3.7" setuptools rich
"$work/env-veomni/bin/python" -c "import veomni" 2>/dev/null ||
    "$work/env-veomni/bin/pip" install -q --no-deps veomni==0.1.12

[ -d "$work/models/qwen3_moe" ] || "$work/env-transformers/bin/python" checkpoints.py "$work/models"

run() { # python, script, model, name, flags...: once; two ranks where a flag of a mesh dimension says so
    local python=$1 script=$2 model=$3 out=$work/runs/$3-$4.json && shift 4
    [ -e "$out" ] && return
    local start=("$python")
    [[ "$*" =~ --(fsdp|sp|ep)\ 2 ]] &&
        start=("$python" -m torch.distributed.run --standalone --nproc-per-node 2)
    echo "== ${out##*/}"
    "${start[@]}" "$script" "$work/models/$model" "$out" "$@" >"${out%.json}.log" 2>&1 ||
        { tail -n 20 "${out%.json}.log"; exit 1; }
}
for model in qwen3 qwen3_moe; do
    hf=("$work/env-transformers/bin/python" transformers_run.py $model)
    veomni=("$work/env-veomni/bin/python" veomni_run.py $model)
    ftrain=("$ours" ftrain_run.py $model)
    # The router's choice between two equal experts hangs on the last bit (README.md): the same kernels, then.
    compile=inductor && [ $model = qwen3_moe ] && compile=aot_eager
    run "${hf[@]}" transformers-8rows --streams 2
    run "${hf[@]}" transformers-4rows --streams 1
    for seed in 0 1 2; do
        run "${hf[@]}" nudged$seed-8rows --streams 2 --nudge $seed
        run "${hf[@]}" nudged$seed-4rows --streams 1 --nudge $seed
    done
    run "${hf[@]}" transformers-fsdp2 --fsdp 2
    run "${veomni[@]}" veomni-fsdp2 --fsdp 2
    run "${veomni[@]}" veomni-sp2 --sp 2
    run "${ftrain[@]}" ftrain-8rows --streams 2 --compile $compile
    run "${ftrain[@]}" ftrain-fsdp2 --fsdp 2 --compile $compile
    run "${ftrain[@]}" ftrain-sp2 --sp 2 --compile $compile
    run "${ftrain[@]}" ftrain-ep2 --ep 2 --compile $compile
done
run "${veomni[@]}" veomni-ep2 --ep 2
# The load-balancing loss, which VeOmni takes over each rank's own batch, and ftrain over the whole.
run "${hf[@]}" transformers-balance --streams 2 --router-aux 0.001
for seed in 0 1 2; do
    run "${hf[@]}" nudged$seed-balance --streams 2 --nudge $seed --router-aux 0.001
done
run "${ftrain[@]}" ftrain-balance --streams 2 --compile $compile --router-aux 0.001
run "${ftrain[@]}" ftrain-ep2-balance --ep 2 --compile $compile --router-aux 0.001
"$ours" compare.py "$work/runs"
