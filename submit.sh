#!/usr/bin/env bash
#
# Check everything, then submit one training run to Slurm, or run it here.
#
# Usage: bash submit.sh [--config FILE] [--local | --chain N] [--dry-run] [key=value ...]
#                       [-- SBATCH_OPTION ...]
#
#   --config FILE   settings of the run (default: config.yaml beside this file)
#   --local         run the same job on this machine: all its GPUs, or two processes without one
#   --chain N       submit N jobs, each waiting for the one before it to end, where the time limit is
#                   short and the site does not requeue jobs; those that are left over end at once
#   --dry-run       do all checks and print the commands, but submit nothing
#   key=value       change a setting for this run:  optim.learning_rate=1e-3 run.name=second
#   -- OPTION ...   options for sbatch, over those in train.slurm:  -- --nodes=4 --time=2:00:00
#
# Prints the job id alone on stdout, of a chain that of its first job. A run.name that exists is
# continued. The job uses a copy of code and settings, so that editing them while it waits changes
# nothing. TRAINSTACK_FAULT="kill:rank=1,step=25" breaks it on purpose: see trainstack/resilience/faults.py.
# Exit: 0 done, 1 could not, 2 asked wrongly, 78 the run belongs to another job or experiment.

set -euo pipefail

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# What a job may see of the environment here: never a token, which Slurm would keep in its records.
ALLOWED='^(PATH|LD_LIBRARY_PATH|HOME|USER|LOGNAME|SHELL|LANG|LC_[A-Z]+|TZ|TMPDIR|MODULEPATH|MODULESHOME|LMOD_[A-Z_]+|MODULES|NPROC_PER_NODE|MASTER_PORT|TRAINSTACK_CHAIN|TRAINSTACK_FAULT|OMP_NUM_THREADS|OMP_[A-Z_]+|NCCL_[A-Z0-9_]+|GLOO_[A-Z_]+|TORCH_[A-Z_]+|TORCHINDUCTOR_[A-Z_]+|PYTORCH_[A-Z_]+|CUDA_[A-Z_]+|UCX_[A-Z_]+|FI_[A-Z_]+)$'
SECRET='TOKEN|SECRET|PASSW|API_?KEY|CREDENTIAL'
unset TRAINSTACK_CHAIN  # set by --chain alone
export PYTHONSAFEPATH=1 # a json.py in the user's current folder is not Python's

usage() { sed -n '3,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
log() { printf 'submit.sh: %s\n' "$*" >&2; }
die() {
  log "error: $1"
  exit "${2:-1}"
}

main() {
  local config="$HERE/config.yaml" is_local="" is_dry="" chain="" settings=() sbatch_options=() queue=""
  parse "$@"
  load_environment
  local check=("$TRAINSTACK_PYTHON" -m trainstack.job.submit --home "$TRAINSTACK_HOME"
    --repository "$HERE" --config "$config")
  if [[ -n "$is_local" ]]; then check+=(--local); fi
  find_queue
  if [[ -n "$is_dry" ]]; then check+=(--dry-run); fi
  check+=(${settings[@]+"${settings[@]}"} -- ${sbatch_options[@]+"${sbatch_options[@]}"})

  local answer run_dir state
  answer="$(PYTHONPATH="$HERE" "${check[@]}" <<<"$queue")"
  state="${answer%%$'\n'*}"
  run_dir="${answer#*$'\n'}"
  if [[ "$state" == complete ]]; then return; fi
  if [[ -n "$is_local" ]]; then run_here; else submit; fi
}

parse() {
  while (($#)); do
    case "$1" in
      -h | --help) usage && exit 0 ;;
      --config)
        (($# > 1)) || die "--config needs a file" 2
        config="$2"
        shift
        ;;
      --config=*) config="${1#*=}" ;;
      --local) is_local=yes ;;
      --chain)
        (($# > 1)) || die "--chain needs a number of jobs, such as --chain 4" 2
        set_chain "$2"
        shift
        ;;
      --chain=*) set_chain "${1#*=}" ;;
      --dry-run) is_dry=yes ;;
      --)
        shift
        sbatch_options=("$@")
        break
        ;;
      -*) die "$1 is no option of submit.sh; options for sbatch go behind --, see --help" 2 ;;
      *) settings+=("$1") ;;
    esac
    shift
  done
  if [[ -n "$is_local" ]] && ((${#sbatch_options[@]})); then
    die "--local runs without Slurm; leave out: ${sbatch_options[*]}" 2
  fi
  if [[ -n "$chain" ]]; then check_chain; fi
}

set_chain() {
  [[ "$1" =~ ^([2-9]|[1-9][0-9]{1,2})$ ]] ||
    die "--chain $1 is no number of jobs from 2 to 999; write --chain 4" 2
  chain="$1"
}

check_chain() {
  local option
  [[ -z "$is_local" ]] || die "--local has no time limit and needs no chain; leave out: --chain" 2
  for option in ${sbatch_options[@]+"${sbatch_options[@]}"}; do
    case "$option" in
      --job-name* | -J* | --dependency* | -d* | --requeue | --array* | -a*)
        die "--chain gives its jobs their name and order; leave out: $option" 2
        ;;
    esac
  done
}

load_environment() {
  # shellcheck source=/dev/null
  if [[ -f "$HERE/env.sh" ]]; then source "$HERE/env.sh"; fi
  if ! bash "$HERE/setup.sh" --check; then
    [[ -n "$is_local" ]] || die "the environment is not ready; run: bash setup.sh"
    bash "$HERE/setup.sh"
  fi
  # shellcheck source=/dev/null
  source "$HERE/env.sh"
}

# What runs and waits, so that a run with a live job is not given to a second one. Told on stdin: an
# argument may have 128 KiB, which 8000 jobs fill.
find_queue() {
  if [[ -n "$is_local" ]]; then # a job of Slurm may work on the run all the same
    queue="$(squeue --noheader --format='%A %T' 2>/dev/null)" && check+=(--queue)
    return 0
  fi
  command -v sbatch >/dev/null || die "no sbatch here; log in to the cluster, or use --local"
  queue="$(squeue --noheader --format='%A %T' 2>&1)" ||
    die "Slurm does not answer: ${queue%%$'\n'*}; try again when sinfo works"
  check+=(--queue)
}

run_here() {
  local command=(bash "$run_dir/code/train.slurm" "$run_dir")
  if [[ -n "$is_dry" ]]; then
    printf '%q ' "${command[@]}" && printf '\n'
    return
  fi
  TRAINSTACK_LOCAL=yes exec "${command[@]}"
}

submit() {
  local name="${run_dir##*/}" job_name names jobs=() command
  job_name="$name"
  if [[ -n "$chain" ]]; then name_chain; fi
  names="$(allowed_names)"
  command=(sbatch --parsable --job-name="$job_name" --output="$run_dir/logs/%j.out"
    --chdir="$run_dir" --export="$names" ${sbatch_options[@]+"${sbatch_options[@]}"})
  if [[ -n "$chain" ]]; then command+=(--no-requeue --dependency=singleton); fi
  command+=("$run_dir/code/train.slurm" "$run_dir")
  if [[ -n "$is_dry" ]]; then
    print_jobs
    return
  fi
  while ((${#jobs[@]} < ${chain:-1})); do submit_job; done
  log "run $name is queued; look: bash monitor.sh $name     log: $run_dir/logs/${jobs[0]}.out"
  if [[ -n "$chain" ]]; then
    log "behind ${jobs[0]} wait, one after the other: ${jobs[*]:1}; to end all: scancel --name=$job_name"
  fi
  printf '%s\n' "${jobs[0]}"
}

# Slurm starts the jobs of one name and one user one after the other (singleton). Two projects may
# each have a run of this name, so the name goes by the run's folder.
name_chain() {
  local digest
  digest="$(sha256sum <<<"$run_dir")"
  job_name+="-${digest:0:8}"
  export TRAINSTACK_CHAIN=1
}

print_jobs() {
  local number
  for ((number = 0; number < ${chain:-1}; number++)); do
    printf '%s' "${chain:+TRAINSTACK_CHAIN=1 }"
    printf '%q ' "${command[@]}" && printf '\n'
  done
}

# Adds the id of one more job to jobs.
submit_job() {
  local job_id code=0 error which="the job" kept=""
  error="$(mktemp)"
  job_id="$("${command[@]}" 2>"$error")" || code=$?
  job_id="${job_id%%;*}"
  PYTHONPATH="$HERE" "$TRAINSTACK_PYTHON" -m trainstack.job.attempts submitted "$run_dir" \
    --job "$job_id" --code "$code"
  if ((code)); then
    if [[ -n "$chain" ]]; then which="job $((${#jobs[@]} + 1)) of $chain"; fi
    if ((${#jobs[@]})); then
      kept="; in the queue are already ${jobs[*]}; to end them: scancel --name=$job_name"
      printf '%s\n' "${jobs[0]}"
    fi
    log "error: sbatch refused $which: $(tr '\n' ' ' <"$error")$(hint "$(<"$error")")$kept"
    rm -f "$error"
    exit "$code"
  fi
  cat "$error" >&2
  rm -f "$error"
  jobs+=("$job_id")
}

allowed_names() {
  local name names=NIL
  while read -r name; do
    if [[ "$name" =~ $ALLOWED && ! "$name" =~ $SECRET ]]; then names+=",$name"; fi
  done < <(compgen -e)
  printf '%s' "${names#NIL,}"
}

# What to do about the refusals that people meet most.
hint() {
  case "$1" in
    *"generic resource"* | *"gres"* | *"GPU"*) printf '(no such GPUs here: sinfo -o %%G lists them; without: -- --gpus-per-node=0)' ;;
    *ccount*) printf '(put #SBATCH --account=NAME into train.slurm; sacctmgr show assoc user=%s lists yours)' "$(id -un)" ;;
    *partition*) printf '(sinfo -s lists the partitions; put yours into train.slurm)' ;;
    *"node configuration"* | *"ode count"*) printf '(fewer nodes, GPUs or cores: sinfo -o "%%D %%c %%G" tells what there is)' ;;
    *imit*) printf '(shorten #SBATCH --time in train.slurm; sinfo -o "%%P %%l" lists the limits)' ;;
  esac
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then main "$@"; fi
