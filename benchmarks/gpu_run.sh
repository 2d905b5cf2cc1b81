#!/usr/bin/env bash
# Everything to run when there is a GPU, in steps of less than ten minutes. Needs no network and no root.
#
#   benchmarks/gpu_run.sh [--device cuda|cpu] [--quick] [--out DIR] [--peers DIR] [--minutes M] [STEP...]
#
# Steps: build, chip (what the cycle model cannot know), primitives (of the CUDA kernels, on Hopper), validate, bench (roofs,
# peers and ours in turns), tune, model, parity, sanitize, report. All, where none is named.
# --device cpu --quick goes through all of it at small sizes: the check that the script itself works.
# --peers DIR: wheels (and .tar.xz trees) of packages to measure against; they are unpacked beside the results, not installed.
# --minutes M: begin no further work after M minutes of this call (default 8); the same command goes on with what is left,
#   and skips the steps that DIR/steps.log calls done with a build; only build comes again each time, for another machine.
# DIR (default out/gpu) ends up with at most 9 files: rows (*.jsonl), steps.log, sanitize.log, report.html. Then
#   sora-fast bench collect DIR
# keeps the rows in benchmarks/results/<gpu>/, and sora-fast tune --from DIR/tune.jsonl --ship the configs that won.
# PYTHON names the interpreter (default python3), SORA_FAST_COMMIT the commit of a copy without .git. The card's clocks and
# power limits are left alone.
set -euo pipefail
cd "$(dirname "$0")/.."

device=cuda quick="" out=out/gpu peers="" minutes=8 steps=()
while [ $# -gt 0 ]; do
  case $1 in
    --device|--out|--peers|--minutes)
      [ $# -gt 1 ] || { echo "gpu_run.sh: expected a value after $1, got none; --help shows which" >&2; exit 2; } ;;&
    --device) device=$2; shift 2 ;;
    --quick) quick=1; shift ;;
    --out) out=$2; shift 2 ;;
    --peers) peers=$2; shift 2 ;;
    --minutes) minutes=$2; shift 2 ;;
    -h|--help) sed -n '2,19s/^# \{0,1\}//p' "$0"; exit 0 ;;
    -*) echo "gpu_run.sh: expected one of the flags that --help shows, got $1; check the spelling" >&2; exit 2 ;;
    *) steps+=("$1"); shift ;;
  esac
done
if ! [[ $minutes =~ ^[1-9][0-9]*$ ]]; then
  echo "gpu_run.sh: expected --minutes as a whole number from 1 on, got $minutes; give one" >&2
  exit 2
elif [ -n "$peers" ] && [ ! -d "$peers" ]; then
  echo "gpu_run.sh: expected --peers to be a folder, got $peers; check the path" >&2
  exit 2
fi
named=${#steps[@]}
[ "$named" -gt 0 ] || steps=(build chip primitives validate bench tune model parity sanitize report)

python=${PYTHON:-python3}
work=$out.work
mkdir -p "$out" "$work"
touch "$out/steps.log"
suite=full
[ -z "$quick" ] || suite=quick

if [ -n "$peers" ] && [ ! -e "$work/peers/unpacked" ]; then
  rm -rf "$work/peers"
  mkdir -p "$work/peers/wheels"
  for wheel in "$peers"/*.whl; do
    [ ! -e "$wheel" ] || "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$work/peers/wheels" "$wheel"
  done
  for tree in "$peers"/*.tar.xz; do
    [ -e "$tree" ] || continue
    folder=$work/peers/$(basename "$tree" .tar.xz)
    mkdir -p "$folder"
    tar -C "$folder" -xf "$tree"
  done
  touch "$work/peers/unpacked"
fi
for folder in "$work"/peers/*/; do
  [ -d "$folder" ] || continue
  folder=$(cd "$folder" && pwd)
  PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$folder
  # a .pth file that --target and tar do not honour
  [ ! -d "$folder/nvidia_cutlass_dsl/dsl_packages" ] || PYTHONPATH=$PYTHONPATH:$folder/nvidia_cutlass_dsl/dsl_packages
  export PYTHONPATH
done

began=$SECONDS
left() { echo $((minutes * 60 - (SECONDS - began))); }
spare() { awk "BEGIN { print $(left) / 60 - 0.5 }"; } # minutes, with half a one to end in
fast() { "$python" -m sora_fast.cli "$@"; }

# Each step returns 0 when it is done, 3 when it has stopped with work left, anything else when it has failed.
step_build() {
  SORA_FAST_BUILD_CUDA=$([ "$device" = cpu ] && echo auto || echo 1) \
    "$python" -m pip install --quiet --no-build-isolation --no-deps -e . && fast info
}

# L2 under TMA, WGMMAs in flight, latencies, the clock under load: a minute
step_chip() { "$python" -m sora_fast.benchmarks.chip --device "$device" --jsonl "$out/chip.jsonl"; }

# what the CUDA kernels are made of, before they are judged
step_primitives() {
  rm -f "$work/primitives.jsonl"
  "$python" -m sora_fast.benchmarks.primitives --device "$device" --jsonl "$work/primitives.jsonl"
}

step_validate() {
  local status=0
  fast validate --device "$device" --jsonl "$out/validate.jsonl" || status=$?
  [ ! -e "$work/primitives.jsonl" ] || cat "$work/primitives.jsonl" >>"$out/validate.jsonl"
  return "$status"
}

measure() { # SUITE FOLDER FILE [FAMILY...]: what there is after any ending is kept
  local status=0
  fast bench "${@:4}" --suite "$1" --device "$device" --out "$work/$2" --minutes "$(spare)" ||
    status=$?
  [ ! -e "$work/$2/bench.jsonl" ] || cp "$work/$2/bench.jsonl" "$out/$3"
  return "$status"
}
# what decides where kernels pay comes first
step_bench() {
  measure "$suite" bench bench.jsonl convolution attention normalization modulation rotary patches latents
}
# into the user's cache, so that the steps that follow run what was found; on a CPU, where the tuner itself is tried with
# kernels interpreted, into a cache of this run's own
step_tune() {
  local status=0
  if [ "$device" = cpu ]; then
    TRITON_INTERPRET=1 SORA_FAST_CACHE=$work/tune/cache \
      tune quick modulation --case "norm_modulate / Mochi" --candidates 1 || status=$?
  else
    tune "$suite" || status=$?
  fi
  [ ! -e "$work/tune/tune.jsonl" ] || cp "$work/tune/tune.jsonl" "$out/tune.jsonl"
  return "$status"
}
tune() { # SUITE [FAMILY...] [FLAG...]
  fast tune "${@:2}" --suite "$1" --device "$device" --out "$work/tune/tune.jsonl" --minutes "$(spare)"
}
step_model() {
  if [ -n "$quick" ]; then measure quick model bench-model.jsonl model; else measure model model bench-model.jsonl; fi
}

step_parity() { "$python" -m sora_fast.benchmarks.loss_parity --device "$device" ${quick:+--quick} --out "$out"; }

step_sanitize() {
  if ! compgen -G "kernels/*.py" >/dev/null && ! compgen -G "csrc/*.cu" >/dev/null; then
    echo "SKIPPED: this version has no kernels of its own" | tee "$out/sanitize.log"
  elif [ "$device" = cpu ] || ! command -v compute-sanitizer >/dev/null; then
    echo "UNSUPPORTED: compute-sanitizer needs a GPU and the CUDA toolkit" | tee "$out/sanitize.log"
  elif [ $((SECONDS - began)) -gt 60 ] && [ "$(left)" -lt 420 ]; then
    return 3 # what follows may take 500 s, so it begins another call
  else
    local status=0
    : >"$out/sanitize.log"
    sanitize 300 memcheck -m sora_fast.cli validate --device cuda --small --backend triton --backend cuda --dtype bfloat16 || status=$?
    sanitize 80 memcheck -m sora_fast.benchmarks.primitives --device cuda || status=$?
    sanitize 120 racecheck -m sora_fast.cli validate --device cuda --small --backend cuda --dtype bfloat16 || status=$?
    if grep -q "Device not supported" "$out/sanitize.log"; then
      echo "UNSUPPORTED: compute-sanitizer does not run on this machine" | tee -a "$out/sanitize.log"
      return 0
    fi
    grep -E "^=== |ERROR SUMMARY|RACECHECK SUMMARY" "$out/sanitize.log"
    return "$status"
  fi
}

sanitize() { # SECONDS TOOL ARGUMENT...: of Python
  echo "=== $2: ${*:3}" >>"$out/sanitize.log"
  timeout "$1" compute-sanitizer --tool "$2" --error-exitcode 9 "$python" "${@:3}" >>"$out/sanitize.log" 2>&1
}

step_report() {
  local rows=()
  for file in "$out"/bench*.jsonl; do [ ! -e "$file" ] || rows+=("$file"); done
  [ "${#rows[@]}" -gt 0 ] || { echo "there are no rows to report"; return 1; }
  fast bench report "${rows[@]}" --out "$work/report" && cp "$work/report/report.html" "$out/report.html"
}

# Whether it was done, and not beside a build that had failed: without the extension there was nothing of ours to look at.
done_before() {
  awk -v step="$1" 'BEGIN { built = 1 } $1 == "build" { built = $2 == "done" } $1 == step && $2 == "done" && built { found = 1 }
    END { exit !found }' "$out/steps.log"
}

failed=0
for step in "${steps[@]}"; do
  if ! declare -F "step_$step" >/dev/null; then
    echo "gpu_run.sh: expected steps among build chip primitives validate bench tune model parity sanitize report, got $step" >&2
    exit 2
  fi
  if [ "$named" -eq 0 ] && [ "$step" != build ] && [ "$step" != report ] && done_before "$step"; then
    echo "=== $step was done before"
    continue
  fi
  if [ "$step" != report ] && [ "$(left)" -lt 60 ]; then
    echo "=== $step and what follows are left for the next call of the same command"
    exit 3
  fi
  echo "=== $step"
  start=$SECONDS status=0
  "step_$step" || status=$?
  case $status in
    0) verdict=done ;;
    3) verdict=unfinished ;;
    *) verdict="failed ($status)"; failed=1 ;;
  esac
  echo "$step $verdict after $((SECONDS - start)) s" | tee -a "$out/steps.log"
  if [ "$status" -eq 3 ]; then echo "=== the same command goes on"; exit 3; fi
done
exit "$failed"
