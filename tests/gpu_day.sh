#!/usr/bin/env bash
# Ten minutes on a GPU: first what must be right, then how fast it is. From the repository's root:
#
#     bash tests/gpu_day.sh                      # the 3B's shape
#     bash tests/gpu_day.sh 3b predict baseline  # these parts alone
#     SCALE=10 bash tests/gpu_day.sh tiny-short  # a trial of this script on a CPU
#
# Parts run in the order below, each within its own seconds and all within $LIMIT; $SCALE multiplies
# both. A part that fails stops nothing. Logs and JSON go to $OUT, where summary.txt has a line for
# each part.

size=${1:-3b}
wanted=" ${*:2} "
out=${OUT:-gpu_day}
python=${PYTHON:-python}
scale=${SCALE:-1}
ends=$((SECONDS + scale * ${LIMIT:-570}))
mkdir -p "$out"
: > "$out/summary.txt"

# part NAME SECONDS COMMAND...: run it if it is wanted and time is left
part() {
    local name=$1 seconds=$((scale * $2)) left=$((ends - SECONDS)) began=$SECONDS
    shift 2
    [[ $wanted == "  " || $wanted == *" $name "* ]] || return
    if ((left < 15)); then
        echo "$name: not run, no time left" | tee -a "$out/summary.txt"
        return
    fi
    rm -f "$out/$name.json"
    timeout --kill-after 5 $((seconds < left ? seconds : left)) "$@" > "$out/$name.log" 2>&1
    echo "$name: exit $?, $((SECONDS - began)) s. $(result "$name")" | tee -a "$out/summary.txt"
}

# result NAME: the figures of a part's JSON in a line, or the last line of its log
result() {
    local json="$out/$1.json"
    if [[ -s $json ]]; then
        "$python" - "$json" << 'PYTHON'
import json, sys
found = json.load(open(sys.argv[1]))
figures = {name: found[name] for name in ("ours", "baseline", "ratio", "floor")} | found["details"]
shown = [f"{name} {value:.4g}" for name, value in figures.items() if value is not None]
print(f"{', '.join(shown)}, {found['peak_memory'] / 2**30:.1f} GiB on {found['device']}")
PYTHON
    else
        tail -n 1 "$out/$1.log"
    fi
}

# bench NAME SECONDS WHAT [FLAGS...]: one of tests/bench.py
bench() {
    local name=$1 seconds=$2 what=$3
    shift 3
    part "$name" "$seconds" "$python" -m tests.bench "$what" --model-size "$size" --repeats 2 \
        --json "$out/$name.json" "$@"
}

part versions 60 "$python" -c "import torch, transformers as t
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'
print(f'torch {torch.__version__}, transformers {t.__version__}, {gpu}')"
part sampling 90 "$python" -m pytest -q -x -m cuda tests/test_cuda.py -k sampl
part training 120 "$python" -m pytest -q -m cuda tests/test_cuda.py -k "not sampl"
bench sampler 100 sampler --no-baseline
bench step 110 step --no-baseline --checkpointing on
bench step-without-checkpointing 90 step --no-baseline --checkpointing off
bench step-lora 80 step --no-baseline --lora-rank 16
bench sampler-3-stages 75 sampler --no-baseline --num-stages 3
bench predict 90 predict --no-baseline
bench baseline 60 sampler --repeats 1
