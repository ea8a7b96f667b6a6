#!/usr/bin/env bash
#
# Check everything, then submit one training run to Slurm, or run it here.
#
# Usage: bash submit.sh [FILE | --resume RUN] [--local | --chain N] [--dry-run] [key=value ...]
#                       [-- SBATCH_OPTION ...]
#
#   FILE            settings of the run; what it does not name is as in config.yaml, the default.
#                   Also: --config FILE
#   --resume RUN    continue a run with its own settings and, if none are given, its own options
#                   for sbatch
#   --local         run the same job on this machine: all its GPUs, or two processes without one
#   --chain N       submit N jobs, each waiting for the one before it to end: for a short time limit
#                   on a site that does not requeue jobs; jobs that are not needed end at once
#   --dry-run       do all checks and print the commands, but submit nothing
#   key=value       change a setting for this run:  optim.learning_rate=1e-3 run.name=second
#   -- OPTION ...   options for sbatch, over those in train.slurm:  -- --nodes=4 --time=2:00:00
#
# Prints the job id alone on stdout, of a chain that of its first job. A run.name that exists is
# resumed. The job uses a copy of code and settings, so editing them while it waits changes nothing.
# TRAINSTACK_FAULT="kill:rank=1,step=25" breaks the run on purpose: see resilience/faults.py.
# Exit: 0 done, 1 could not, 2 asked wrongly, 78 the run belongs to another job or experiment.

[ "${BASH##*/}" = bash ] || exec bash "$0" "$@" # called as: sh submit.sh
set -euo pipefail

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# What a job sees of the environment here, beside the names that train.slurm takes from it: nothing
# that decides what the job does, and never a token, which Slurm would keep in its records.
ALLOWED='PATH|LD_LIBRARY_PATH|HOME|USER|LOGNAME|SHELL|LANG|LC_[A-Z]+|TZ'
ALLOWED+='|MODULES|MODULEPATH|MODULESHOME|LMOD_[A-Z_]+|TRAINSTACK_CHAIN|TRAINSTACK_FAULT'
ALLOWED+='|WANDB_PROJECT|WANDB_ENTITY|TRACKIO_PROJECT'
SECRET='TOKEN|SECRET|PASSW|API_?KEY|CREDENTIAL'
# What people set to decide something of a job, and are told of if it does not reach it.
MEANT='(OMP|MKL|NCCL|GLOO|UCX|FI|TORCH|TORCHINDUCTOR|PYTORCH|TRITON|SBATCH)_.+'
MEANT+='|CUDA_(VISIBLE_DEVICES|DEVICE_ORDER|LAUNCH_BLOCKING|MODULE_LOADING)'
# Options of sbatch for one resource: on the command line, one takes the place of all #SBATCH lines
# of its kind. sbatch itself would take both, and refuses some pairs.
RESOURCES=('--cpus-per-task|-c|--cpus-per-gpu' '--mem|--mem-per-cpu|--mem-per-gpu'
  '--gpus|-G|--gpus-per-node|--gpus-per-task|--gpus-per-socket|--gres[= ][^ ]*gpu'
  '--ntasks|-n|--ntasks-per-node|--ntasks-per-gpu|--ntasks-per-core|--ntasks-per-socket')
WITHOUT_VALUE='-H --hold -O --overcommit -s --oversubscribe -Q --quiet -v --verbose -k --no-kill'
WITHOUT_VALUE+=' --contiguous --requeue --no-requeue --spread-job --use-min-nodes --parsable'
WITHOUT_VALUE+=' --reboot --exclusive --nice --propagate --get-user-env'
unset TRAINSTACK_CHAIN  # set by --chain alone
export PYTHONSAFEPATH=1 # a json.py in the user's current folder is not Python's

usage() { sed -n '3,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" || true; } # nobody may read it
log() { printf 'submit.sh: %s\n' "$*" >&2; }
die() {
  log "error: $1"
  keep_refusal "submit.sh: error: $1" || true
  exit "${2:-1}"
}

# For monitor.sh RUN --why, without what may be a token; job/submit.py keeps its own there.
# Sets: TRAINSTACK_HOME
keep_refusal() {
  local setting name="${RESUME:-}" folder
  # shellcheck source=/dev/null
  if [[ -z "${TRAINSTACK_HOME:-}" && -f "$HERE/env.sh" ]]; then source "$HERE/env.sh"; fi
  [[ -d "${TRAINSTACK_HOME:-}" ]] || return
  folder="$TRAINSTACK_HOME/cache/refused"
  for setting in ${SETTINGS[@]+"${SETTINGS[@]}"}; do
    if [[ "$setting" == run.name=* ]]; then name="${setting#*=}"; fi
  done
  [[ "$name" =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || name=.unnamed
  {
    mkdir -p "$folder" && sed -E "s/hf_[A-Za-z0-9]{8,}/.../g; s/(($SECRET)[A-Z_]*=)[^ ]*/\1.../g" \
      <<<"${1:0:2000}" >"$folder/$name"
  } 2>/dev/null # a colleague's file
}

# Sets: RUN_DIR
main() {
  local check said="" answer unused=""
  parse "$@"
  refuse_secrets
  load_environment
  # shellcheck source=slurm.sh
  source "$HERE/slurm.sh"
  if [[ -n "$RESUME" ]]; then find_run; fi
  check=("$TRAINSTACK_PYTHON" -m trainstack.job.submit --home "$TRAINSTACK_HOME"
    --repository "$HERE" --config "$CONFIG" --shell "$$" --asked-at "$(date +%s.%N)")
  # What Slurm says is passed on stdin: an argument may have 128 KiB, which 8000 jobs fill.
  if [[ -n "$IS_LOCAL" ]]; then
    check+=(--local)
    if said="$(ask_of_this_machine)"; then check+=(--queue); fi
  else
    command -v sbatch >/dev/null || die "no sbatch here; log in to the cluster, or use --local"
    unused="$(unused_names)"
    forget_outer_slurm
    write_job_script
    said="$(list_jobs)" ||
      die "Slurm does not answer: $said; try again when sinfo works, or use --local"
    said+=$'\n'"$(list_nodes)"$'\n'"$(try_job)"
    check+=(--queue --job-script "$JOB_SCRIPT")
  fi
  if [[ -n "$IS_DRY" ]]; then check+=(--dry-run); fi
  # Bash before 4.4 takes the expansion of an empty array for an unset variable.
  check+=(${SETTINGS[@]+"${SETTINGS[@]}"} -- ${SBATCH_OPTIONS[@]+"${SBATCH_OPTIONS[@]}"})

  answer="$(PYTHONPATH="$HERE" "${check[@]}" <<<"$said")" # "complete" or "ready", then the folder
  RUN_DIR="${answer#*$'\n'}"
  if [[ "${answer%%$'\n'*}" == complete ]]; then return; fi
  if [[ -n "$unused" ]]; then
    log "not passed to the job: $unused; train.slurm holds what a job is to have"
  fi
  if [[ -n "$IS_LOCAL" ]]; then run_here; else submit; fi
}

# Sets: CONFIG RESUME IS_LOCAL IS_DRY CHAIN SETTINGS SBATCH_OPTIONS
parse() {
  CONFIG="" RESUME="" IS_LOCAL="" IS_DRY="" CHAIN="" SETTINGS=() SBATCH_OPTIONS=()
  while (($#)); do
    case "$1" in
      -h | --help) usage && exit 0 ;;
      --config)
        (($# > 1)) || die "--config needs a file" 2
        name_file "$2"
        shift
        ;;
      --config=*) name_file "${1#*=}" ;;
      --resume)
        (($# > 1)) || die "--resume needs the name of a run; bash monitor.sh lists them" 2
        RESUME="$2"
        shift
        ;;
      --resume=*) RESUME="${1#*=}" ;;
      --local) IS_LOCAL=yes ;;
      --chain)
        (($# > 1)) || die "--chain needs a number of jobs, such as --chain 4" 2
        CHAIN="$2"
        check_chain_length
        shift
        ;;
      --chain=*)
        CHAIN="${1#*=}"
        check_chain_length
        ;;
      --dry-run) IS_DRY=yes ;;
      --)
        shift
        SBATCH_OPTIONS=("$@")
        break
        ;;
      --*.*=*) die "$1 is a setting, not an option; write ${1#--}" 2 ;;
      -*)
        die "$1 is not an option (see --help); a setting is key=value, options for sbatch come \
after --" 2
        ;;
      *.yaml | *.yml) if [[ "$1" == *=* ]]; then SETTINGS+=("$1"); else name_file "$1"; fi ;;
      *=*) SETTINGS+=("$1") ;;
      *) die "$1 is not a setting; write section.key=value, a file (.yaml), or see --help" 2 ;;
    esac
    shift
  done
  if [[ -n "$IS_LOCAL" ]] && ((${#SBATCH_OPTIONS[@]})); then
    die "--local runs without Slurm; leave out: ${SBATCH_OPTIONS[*]}" 2
  fi
  check_sbatch_options
  if [[ -n "$RESUME" ]]; then
    check_resume
    return
  fi
  CONFIG="${CONFIG:-$HERE/config.yaml}"
  # Python says so too, but may have to be installed first.
  [[ -e "$CONFIG" ]] || die "$CONFIG: no such file; check its path" 2
}

# Slurm's records and the run's copy of the code would keep them, also from a comment.
refuse_secrets() {
  local file found value="[\"']?[A-Za-z0-9_.-]{8}"
  local none="[A-Za-z_]+_(PATH|FILE|DIR)=|=[\"']?[0-9]+([^A-Za-z0-9_.-]|\$)"
  for file in train.slurm setup.sh; do
    found="$(sed -E "s/$none//g" "$HERE/$file" | grep -nE \
      "\\b[A-Za-z_]*($SECRET)(ORD)?S?(_[A-Z0-9_]*)?=$value|\\bhf_[A-Za-z0-9]{20}")" || continue
    die "$file:${found%%:*}: a secret, which Slurm and the run would keep; remove it, a job needs \
none; your shell may have it, or the file that wandb login or hf auth login writes" 2
  done
}

# Sets: CONFIG
name_file() {
  [[ -z "$CONFIG" ]] || die "one file of settings at a time, got $CONFIG and $1" 2
  CONFIG="$1"
}

check_resume() {
  local setting
  [[ "$RESUME" =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] ||
    die "--resume $RESUME is not the name of a run; bash monitor.sh lists them, and a run resumes \
from its newest checkpoint; to begin at another: run.branch_from=RUN@STEP run.name=NEW" 2
  [[ -z "$CONFIG" ]] ||
    die "--resume takes the settings of the run; leave out $CONFIG, or write key=value" 2
  for setting in ${SETTINGS[@]+"${SETTINGS[@]}"}; do
    [[ "$setting" != run.name=* ]] ||
      die "--resume $RESUME continues that run; for another one: bash submit.sh FILE $setting" 2
  done
}

# The settings of the run, and, where none are given, its options for sbatch.
# Sets: CONFIG SETTINGS SBATCH_OPTIONS
find_run() {
  local folder="$TRAINSTACK_HOME/runs/$RESUME" runs option
  CONFIG="$folder/config.yaml"
  if [[ ! -f "$CONFIG" ]]; then
    [[ ! -d "$folder" ]] ||
      die "run $RESUME has lost its settings, $CONFIG; bring them back, or name a file and run.name"
    runs="$(cd "$TRAINSTACK_HOME/runs" 2>/dev/null && printf '%s ' *)" || runs=""
    die "no run $RESUME in $TRAINSTACK_HOME/runs; there are: ${runs:-none yet}"
  fi
  SETTINGS=("run.name=$RESUME" ${SETTINGS[@]+"${SETTINGS[@]}"}) # a folder may have been renamed
  [[ -z "$IS_LOCAL" ]] || return 0
  if ((${#SBATCH_OPTIONS[@]})); then
    log "the options of before are not taken, since others are given: bash submit.sh --help"
    return
  fi
  if [[ ! -f "$folder/.sbatch_options" ]]; then
    log "what the run asked Slurm for on the command line is not known; train.slurm decides"
    return
  fi
  while IFS= read -r -d '' option; do
    if [[ -n "$option" ]]; then SBATCH_OPTIONS+=("$option"); fi # printf writes one of nothing
  done <"$folder/.sbatch_options"
  if ((${#SBATCH_OPTIONS[@]})); then log "with the options of before: ${SBATCH_OPTIONS[*]}"; fi
  check_sbatch_options
}

check_chain_length() {
  [[ "$CHAIN" =~ ^([2-9]|[1-9][0-9]{1,2})$ ]] ||
    die "--chain $CHAIN is not a number of jobs from 2 to 999; write --chain 4" 2
}

check_sbatch_options() {
  local option before=""
  [[ -z "$CHAIN" || -z "$IS_LOCAL" ]] ||
    die "--local has no time limit and needs no chain; leave out: --chain" 2
  for option in ${SBATCH_OPTIONS[@]+"${SBATCH_OPTIONS[@]}"}; do
    [[ ! "$option" =~ ^[a-z]+\.[a-z_]+= ]] ||
      die "$option is a setting; write it before the --" 2
    # sbatch would take it for the job's script.
    [[ "$option" == -* ]] ||
      [[ "$before" =~ ^(-[a-zA-Z]|--[^=]+)$ && " $WITHOUT_VALUE " != *" $before "* ]] ||
      die "$option is no option of sbatch, and the job is train.slurm; leave it out" 2
    before="$option"
    case "$CHAIN $option" in
      *" --array"* | *" -a"* | *" --wrap"*)
        die "one job at a time works on a run, by train.slurm; leave out: $option" 2
        ;;
      *" --export"*) die "train.slurm holds what a job is to have; leave out: $option" 2 ;;
      *" --output"* | *" -o"* | *" --error"* | *" -e"*)
        die "logs lie in the folder of the run, where monitor.sh looks; leave out: $option" 2
        ;;
      *" --wait" | *" -W" | *" :" | *" --help" | *" --usage" | *" --version")
        die "submit.sh submits one job and returns its id; leave out: $option" 2
        ;;
      *" --dry-run" | *" --local" | *" --chain" | *" --resume"* | *" --config"*)
        die "$option is an option of submit.sh, not of sbatch; write it before the --" 2
        ;;
      *" --test-only"*) die "--dry-run, before the --, makes all checks; leave out: $option" 2 ;;
      [0-9]*" --job-name"* | [0-9]*" -J"* | [0-9]*" --dependency"* | [0-9]*" -d"* | \
        [0-9]*" --requeue"*)
        die "--chain gives its jobs their name and order; leave out: $option" 2
        ;;
    esac
  done
}

# Sets: TRAINSTACK_HOME TRAINSTACK_PYTHON
load_environment() {
  local code=0
  # shellcheck source=/dev/null
  if [[ -f "$HERE/env.sh" ]]; then source "$HERE/env.sh"; fi
  bash "$HERE/setup.sh" --is-ready || code=$?
  if ((code == 3)); then exit 1; fi # it was edited, and has said so
  if ((code)); then
    [[ -n "$IS_LOCAL" && -z "$IS_DRY" ]] ||
      die "the environment of ${TRAINSTACK_HOME:-this project} is not ready; run: bash setup.sh"
    [[ ! -f "$HERE/env.sh" || -d "$TRAINSTACK_HOME" ]] ||
      die "$TRAINSTACK_HOME is not there; correct SHARED_DIR, PROJECT_NAME, or run: bash setup.sh"
    bash "$HERE/setup.sh"
  fi
  # shellcheck source=/dev/null
  source "$HERE/env.sh"
}

# A job of Slurm may work on a run that is to continue here.
ask_of_this_machine() {
  local jobs
  has_jobs || return 1
  forget_outer_slurm
  jobs="$(list_jobs)" || {
    log "Slurm does not answer: $jobs; that none of its jobs works on the run is not sure"
    return 1
  }
  printf '%s\n' "$jobs"
}

# What was set here for a job, by its name, and does not reach it.
unused_names() {
  local name names="" taken
  taken="$(taken_names)"
  while read -r name; do
    if [[ "$name" =~ ^($MEANT)$ && ! "$name" =~ ^($taken)$|$SECRET ]]; then names+=", $name"; fi
  done < <(compgen -e)
  printf '%s' "${names#, }"
}

# The names that the edit block of train.slurm takes from here, as NAME="${NAME:-...}": NAME|NAME
taken_names() {
  local taken='^(export )?([A-Za-z_][A-Za-z0-9_]*)="?\$\{\2[:}-].*'
  sed -nE "/^# --- Edit/,/^# -{20}/s/$taken/\2/p" "$HERE/train.slurm" | tr '\n' '|' | sed 's/|$//'
}

# train.slurm without the options of #SBATCH lines that one of the command line replaces.
# Sets: JOB_SCRIPT
write_job_script() {
  local kind value option edit=(-e '')
  for kind in "${RESOURCES[@]}"; do
    if [[ " ${SBATCH_OPTIONS[*]-} " =~ \ ($kind)([=:,\ 0-9]) ]]; then
      value='([=:,0-9][^ ]*|[[:space:]]+[^-# ][^ ]*)'
      edit+=(-e "s/^(#SBATCH.*[[:space:]])($kind)$value?/\1/" -e 's/^#SBATCH *$/##SBATCH/')
    fi
  done
  option='--(array|wrap|export|output|error|wait)([= ]|$)|-[aoeW]([ 0-9]|$)'
  option="$(grep -m 1 -nE "^#SBATCH.*[[:space:]]($option)" "$HERE/train.slurm")" || true
  [[ -z "$option" ]] ||
    die "train.slurm:${option%%:*}: submit.sh decides this; remove ${option#*:}" 2
  option="$(grep -m 1 -nE '^(export +)?[A-Za-z_][A-Za-z0-9_]* += ?' "$HERE/train.slurm")" || true
  [[ -z "$option" ]] ||
    die "train.slurm:${option%%:*}: bash takes no blank beside =; correct ${option#*:}" 2
  option="$(bash -n "$HERE/train.slurm" 2>&1)" || die "train.slurm is no bash: ${option%%$'\n'*}" 2
  [[ -d "${TMPDIR:-/tmp}" ]] || unset TMPDIR
  JOB_SCRIPT="$(mktemp)"
  trap 'rm -f "$JOB_SCRIPT"' EXIT
  sed -E "${edit[@]}" "$HERE/train.slurm" >"$JOB_SCRIPT"
}

# What sbatch would say to the job: "try|0|..." or "try|1|the reason".
try_job() {
  local said code=0
  said="$(ask sbatch --test-only --export=NIL ${SBATCH_OPTIONS[@]+"${SBATCH_OPTIONS[@]}"} \
    "$JOB_SCRIPT")" || code=$?
  said="$(tr '\n' ' ' <<<"$said")"
  printf 'try|%s|%s %s' "$code" "${said% }" "$( ((code)) && hint "$said")"
}

run_here() {
  local command=(bash "$RUN_DIR/code/train.slurm" "$RUN_DIR")
  if [[ -n "$IS_DRY" ]]; then
    printf 'TRAINSTACK_LOCAL=yes ' && printf '%q ' "${command[@]}" && printf '\n'
    return
  fi
  TRAINSTACK_LOCAL=yes exec "${command[@]}"
}

submit() {
  local run="${RUN_DIR##*/}" name command job jobs=() said code
  name="$run"
  if [[ -n "$CHAIN" ]]; then
    name="$(chain_name)"
    export TRAINSTACK_CHAIN=1
  fi
  command=(sbatch --parsable --job-name="$name" --output="$RUN_DIR/logs/%j.out"
    --chdir="$RUN_DIR" --export="$(allowed_names)" ${SBATCH_OPTIONS[@]+"${SBATCH_OPTIONS[@]}"})
  if [[ -n "$CHAIN" ]]; then command+=(--no-requeue --dependency=singleton); fi
  command+=("$RUN_DIR/code/job.slurm" "$RUN_DIR")
  if [[ -n "$IS_DRY" ]]; then
    print_jobs "${command[@]}"
    return
  fi
  cat "$JOB_SCRIPT" >"$RUN_DIR/code/job.slurm" # readable as the rest of the folder is
  said="$(mktemp)"
  [[ -f "$RUN_DIR/.sbatch_options" ]] || keep_options # also if sbatch refuses the job
  while ((${#jobs[@]} < ${CHAIN:-1})); do
    code=0
    job="$("${command[@]}" 2>"$said")" || code=$?
    # Without the name of the cluster, which may follow, and a banner of the site.
    job="$(sed -nE 's/^([0-9]+)(;.*)?$/\1/p' <<<"$job" | tail -n 1)"
    [[ -n "$job" ]] || code="${code/#0/1}"
    PYTHONPATH="$HERE" "$TRAINSTACK_PYTHON" -m trainstack.job.attempts submitted "$RUN_DIR" \
      --job "$job" --code "$code" --cause "$(tr '\n' ' ' <"$said")"
    if ((code)); then
      explain_refusal "$said" "$name" ${jobs[@]+"${jobs[@]}"}
      rm -f "$said"
      exit "$code"
    fi
    cat "$said" >&2
    jobs+=("$job")
    keep_options
  done
  rm -f "$said"
  log "run $run is queued; look: bash monitor.sh $run     log: $RUN_DIR/logs/${jobs[0]}.out"
  if [[ -n "$CHAIN" ]]; then
    log "then follow, one after the other: ${jobs[*]:1}; to end all: scancel --name=$name"
  fi
  printf '%s\n' "${jobs[0]}"
}

# For --resume; but not what was meant for this one time.
keep_options() {
  local option stored=() is_value=""
  for option in ${SBATCH_OPTIONS[@]+"${SBATCH_OPTIONS[@]}"}; do
    case "$option" in
      --dependency=* | --begin=* | --reservation=* | --hold | -H | -d?* | -b?*) is_value="" ;;
      --dependency | --begin | --reservation | -d | -b) is_value=yes ;;
      *)
        if [[ -z "$is_value" ]]; then stored+=("$option"); fi
        is_value=""
        ;;
    esac
  done
  printf '%s\0' ${stored[@]+"${stored[@]}"} >"$RUN_DIR/.sbatch_options"
}

# Slurm starts the jobs of one name and one user one after the other (singleton). Two projects may
# each have a run of this name, so the name of a chain also depends on the run's folder.
chain_name() {
  local digest
  digest="$(sha256sum <<<"$RUN_DIR")"
  printf '%s' "${RUN_DIR##*/}-${digest:0:8}"
}

allowed_names() {
  local name names=NIL allowed
  allowed="$ALLOWED|$(taken_names)"
  while read -r name; do
    if [[ "$name" =~ ^($allowed)$ && ! "$name" =~ $SECRET ]]; then names+=",$name"; fi
  done < <(compgen -e)
  printf '%s' "${names#NIL,}"
}

print_jobs() {
  local number
  for ((number = 0; number < ${CHAIN:-1}; number++)); do
    printf '%s' "${CHAIN:+TRAINSTACK_CHAIN=1 }"
    printf '%q ' "$@" && printf '\n'
  done
}

# What sbatch said (a file) in one line, and the jobs of this name that are in the queue already.
explain_refusal() {
  local said="$1" name="$2" which="the job" kept=""
  shift 2
  if [[ -n "$CHAIN" ]]; then which="job $(($# + 1)) of $CHAIN"; fi
  if (($#)); then
    kept="; in the queue are already $*; to end them: scancel --name=$name"
    printf '%s\n' "$1"
  fi
  log "error: sbatch refused $which: $(tr '\n' ' ' <"$said")$(hint "$(<"$said")")$kept"
}

# What to do about the refusals that people meet most.
hint() {
  case "$1" in
    *"mutually exclusive"*) printf '(leave out all but one, here or in train.slurm)' ;;
    *"generic resource"* | *"gres"* | *"GPU"*)
      printf '(no such GPUs here: sinfo -o %%G lists them; without: -- --gpus-per-node=0)'
      ;;
    *ccount*)
      printf '(put #SBATCH --account=NAME into train.slurm; '
      printf 'sacctmgr show assoc user=%s lists yours)' "$(id -un)"
      ;;
    *partition*) printf '(sinfo -s lists the partitions; put yours into train.slurm)' ;;
    *"node configuration"* | *"ode count"*)
      printf '(fewer nodes, GPUs or cores: sinfo -o "%%D %%c %%G" tells what there is)'
      ;;
    *imit*) printf '(shorten #SBATCH --time in train.slurm; sinfo -o "%%P %%l" lists the limits)' ;;
  esac
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then main "$@"; fi
