#!/usr/bin/env bash
# All checks that need a GPU, in stages of at most ten minutes each:
#
#   benchmarks/gpu/check.sh OUT verify     # the tests
#   benchmarks/gpu/check.sh OUT exact      # exactness on large data, 10,000 repeats, the memory checker
#   benchmarks/gpu/check.sh OUT speed      # roofs, the selection against other ways, each kernel
#   benchmarks/gpu/check.sh OUT tune       # other block sizes
#   benchmarks/gpu/check.sh OUT step       # a training step and its profile
#   benchmarks/gpu/check.sh OUT cifar      # ResNet-18 on CIFAR-10; rerun to resume
#   benchmarks/gpu/check.sh OUT rehearse   # the part that runs on a CPU, in Triton's interpreter
#
# Several stages run one after another. OUT gets STAGE.txt for each, speed.csv,
# profile.txt and, of cifar, the JSON of each finished run. A step that fails or runs out of time is
# reported, the next one runs, and the exit status is 1. To keep the rows:
#
#   tail -n +2 OUT/speed.csv >>benchmarks/speed/results.csv
#
# and write the times into TUNING.md. Before the first stage, as everywhere:
#
#   python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e '.[dev]'
#   export PYTHON=.venv/bin/python
#
# or any Python with PyTorch, Triton, pytest, hypothesis and scikit-learn. exact needs compute-sanitizer from
# the CUDA toolkit; cifar needs pyautoattack and the data.
#
#   MINUTES=9        limit for cifar; finished epochs are kept in RUNS
#   RUNS=folder      checkpoints, weights and finished runs of cifar (runs/gpu-short)
#   CIFAR=folder     directory of cifar-10-batches-py (data; `run.py --download` fetches it)
#   LABEL=text       name of data whose files are not the originals
#   METHODS=a,b      of cifar (trades-pre,cure,trades-pre-revision,cure-random), SEEDS=0,1
#   AUTO_ATTACK=n    images for AutoAttack (1000); 0 needs no pyautoattack
set -uo pipefail
stages=" verify exact speed tune step cifar rehearse "
die() { echo "check.sh: $*" >&2; exit 2; }
[ $# -ge 2 ] || die "give a folder and stages, of$stages"
[[ $stages != *" $1 "* ]] || die "$1 is a stage: the first argument is the folder for what it leaves"
for stage in "${@:2}"; do [[ $stages == *" $stage "* ]] || die "no stage $stage; there are$stages"; done
out=$(mkdir -p "$1" && cd "$1" && pwd) || die "cannot write to $1"
shift
cd "$(dirname "$0")/../.." || exit 2
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
if [ "$*" != rehearse ]; then
  "$python" -c 'import torch, triton, sys; sys.exit(not torch.cuda.is_available())' ||
    die "$python needs PyTorch, Triton and a GPU; PYTHON=.venv/bin/python names another"
fi

run() { # seconds, command...
  local limit=$1 start=$SECONDS
  shift
  echo "+ $*"
  timeout "$limit" "$@"
  local rc=$?
  [ $rc -eq 124 ] && echo "FAILED: out of time after $limit s: $*"
  [ $rc -eq 0 ] || [ $rc -eq 124 ] || echo "FAILED with $rc after $((SECONDS - start)) s: $*"
  echo "  $((SECONDS - start)) s"
}

kernels() { # seconds, flags...
  local limit=$1
  shift
  run "$limit" "$python" benchmarks/speed/selection.py --device cuda --csv "$out/speed.csv" --keep 0.5 "$@"
}

step() { # seconds, flags...
  local limit=$1
  shift
  run "$limit" "$python" benchmarks/speed/step.py --device cuda --network resnet18 --amp --channels-last \
    --csv "$out/speed.csv" "$@"
}

verify() {
  run 60 nvidia-smi
  run 60 "$python" -c 'import torch, triton; print(torch.__version__, triton.__version__, torch.cuda.get_device_name())'
  run 120 "$python" -m pytest -q -p no:cacheprovider tests/optimizer/test_gpu.py
  run 150 "$python" -m pytest -q -p no:cacheprovider tests/select
  run 240 env RGP_TEST_DEVICE=cuda "$python" -m pytest -q -p no:cacheprovider tests --ignore tests/select \
    --ignore tests/optimizer/test_gpu.py --ignore tests/distributed --ignore tests/examples --ignore tests/robustness
}

exact() {
  local tool
  run 290 "$python" benchmarks/gpu/exact.py
  command -v compute-sanitizer >/dev/null || { echo "FAILED: compute-sanitizer of the CUDA toolkit is not here"; return; }
  for tool in memcheck racecheck synccheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 run 90 compute-sanitizer --tool $tool --error-exitcode 1 \
      "$python" benchmarks/gpu/exact.py --small
  done
}

speed() {
  run 40 "$python" benchmarks/gpu/roofs.py --csv "$out/speed.csv"
  kernels 90 --models resnet18,wrn34-10,vit-b --rounds 20 --providers ours,ours-graph,topk,topk-graph
  kernels 60 --models resnet18,wrn34-10,vit-b --rounds 20 --dtypes bfloat16 --providers ours,ours-graph,topk-graph
  kernels 60 --models 1b --rounds 10 --dtypes float32,bfloat16 --providers ours,ours-graph,topk-graph
  kernels 90 --models resnet18 --rounds 3 --providers ours,ours-graph,kthvalue,percentile,topk-compile
  kernels 60 --models resnet18,vit-b --rounds 10 --scopes global --providers ours,ours-graph,topk
  run 60 "$python" benchmarks/speed/host.py --device cuda --models resnet18,wrn34-10,vit-b --keep 0.5 --repeats 20 \
    --csv "$out/speed.csv"
  run 90 "$python" benchmarks/gpu/kernels.py --models resnet18,wrn34-10,vit-b --dtypes float32,bfloat16 --csv "$out/speed.csv"
}

tune() {
  run 560 "$python" benchmarks/gpu/kernels.py --models resnet18,vit-b --dtypes float32,bfloat16 --variants all \
    --csv "$out/speed.csv"
}

step_stage() {
  step 200 --batch-sizes 128 256 512 --profile "$out/profile.txt"
  step 90 --batch-sizes 128 512 --attack graph --providers trades cure
  step 180 --batch-sizes 128 512 --attack compile-graph --providers trades cure cure-update --profile "$out/profile.txt"
}

cifar() {
  local runs=${RUNS:-runs/gpu-short}
  timeout $((60 * ${MINUTES:-9})) "$python" benchmarks/robustness/run.py --preset gpu-short --device cuda \
    --data-dir "${CIFAR:-data}" ${LABEL:+--data-label "$LABEL"} ${AUTO_ATTACK:+--auto-attack "$AUTO_ATTACK"} \
    --methods "${METHODS:-trades-pre,cure,trades-pre-revision,cure-random}" --seeds "${SEEDS:-0}" \
    --runs "$runs/weights" --results "$runs/results"
  case $? in
    0) ;;
    124) echo "out of time; rerun the stage to resume from the last epoch" ;;
    *) echo "FAILED: cifar" ;;
  esac
  mkdir -p "$out/gpu-short" && cp "$runs"/results/*.json "$out/gpu-short/"
}

rehearse() {
  run 600 "$python" benchmarks/gpu/exact.py --device cpu --small
  run 120 "$python" benchmarks/gpu/roofs.py --device cpu --rounds 1 --weights 40000 --csv "$out/speed.csv"
  run 120 "$python" benchmarks/speed/selection.py --rounds 2 --models tiny --csv "$out/speed.csv"
  run 120 "$python" benchmarks/speed/host.py --repeats 2 --models tiny --csv "$out/speed.csv"
  run 120 "$python" benchmarks/gpu/kernels.py --device cpu --models tiny --calls 1 --csv "$out/speed.csv"
  run 120 "$python" benchmarks/speed/step.py --rounds 1 --steps 1 --batch-sizes 4 --csv "$out/speed.csv" \
    --profile "$out/profile.txt"
  run 300 "$python" benchmarks/robustness/run.py --preset test --device cpu --seeds 0 --runs "$out/runs" \
    --results "$out/results" --methods trades-pre,cure,trades-pre-revision,cure-random
}

status=0
for stage; do
  [ "$stage" = step ] && call=step_stage || call=$stage
  $call 2>&1 | tee "$out/$stage.txt"
  grep -q '^FAILED' "$out/$stage.txt" && status=1
done
for stage; do grep -H '^FAILED' "$out/$stage.txt"; done
exit $status
