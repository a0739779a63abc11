#!/usr/bin/env bash
# All that a GPU is needed for, in one command of under ten minutes:
#
#   benchmarks/gpu_check.sh OUT             # tests, exactness, benchmarks, profile; on a GPU
#   benchmarks/gpu_check.sh OUT --rehearse  # the same as far as it goes on a CPU, in the interpreter
#   CIFAR=folder benchmarks/gpu_check.sh OUT   # and two short CIFAR-10 runs, in the time that is left
#
# OUT gets log.txt, speed.csv, profile.txt and, of CIFAR-10, cifar.txt and results. A step that fails or
# runs too long is noted in the log, and the next one runs all the same.
set -uo pipefail
out=$(mkdir -p "${1:?usage: gpu_check.sh OUT [--rehearse]}" && cd "$1" && pwd)
rehearse=${2:-}
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
failed=0

run() { # seconds, command...
  local limit=$1 start=$SECONDS
  shift
  echo "+ $*"
  timeout "$limit" "$@" || { echo "FAILED with $? after $((SECONDS - start)) s: $*"; failed=$((failed + 1)); }
  echo "  $((SECONDS - start)) s"
}

check() {
  if [ -n "$rehearse" ]; then
    run 600 "$python" benchmarks/gpu_exact.py --device cpu --small
    run 120 "$python" benchmarks/bench_kernels.py --rounds 2 --models tiny --csv "$out/speed.csv"
    run 120 "$python" benchmarks/bench_step.py --rounds 1 --steps 1 --batch-size 4 --csv "$out/speed.csv"
    return
  fi
  "$python" -c 'import torch, triton; print(torch.__version__, triton.__version__, torch.cuda.get_device_name())'
  run 150 "$python" -m pytest -q -x -p no:cacheprovider tests/test_gpu.py tests/test_backends.py
  run 120 "$python" benchmarks/gpu_exact.py
  local models=resnet18,wrn34-10,vit-b kernels=(benchmarks/bench_kernels.py --device cuda --csv "$out/speed.csv")
  run 90 "$python" "${kernels[@]}" --models $models --rounds 20 --keep 0.5 \
    --providers ours,ours-graph,topk,topk-graph
  run 60 "$python" "${kernels[@]}" --models $models,1b --rounds 10 --keep 0.5 \
    --dtypes float32,bfloat16 --providers ours,ours-graph
  run 40 "$python" "${kernels[@]}" --models resnet18 --rounds 3 --keep 0.5 \
    --providers ours,kthvalue,percentile,topk-compile
  run 40 "$python" "${kernels[@]}" --models resnet18,vit-b --rounds 10 --keep 0.5 --scopes global \
    --providers ours,ours-graph,topk
  run 90 "$python" benchmarks/bench_step.py --device cuda --network resnet18 --amp --channels-last \
    --csv "$out/speed.csv"
  run 60 "$python" benchmarks/gpu_profile.py --models resnet18,vit-b >"$out/profile.txt" 2>&1
  if [ -n "${CIFAR:-}" ]; then
    for method in trades cure; do
      run 150 "$python" examples/cifar10_cure.py --data cifar10 --data-dir "$CIFAR" --method $method \
        --epochs 1 --warmup-epochs 1 --out "$out/cifar-$method" >>"$out/cifar.txt" 2>&1
    done
  fi
}

check 2>&1 | tee "$out/log.txt"
grep -c '^FAILED' "$out/log.txt" | sed 's/$/ step(s) failed/'
! grep -q '^FAILED' "$out/log.txt"
