#!/usr/bin/env bash
#
# What a job does, from its environment to its exit code. train.slurm reads this file from the
# job's own copy of the code and calls run_job; nothing here is run by hand.
#
# A job makes attempts, one after the other. Each starts train.py on all nodes (plan_launch, in
# train.slurm, is how) and waits for its end. Then Python tells, from what the ranks wrote into the
# run folder, how it ended and what follows: another attempt here, a requeue, or the end.
#
# A name in capitals belongs to the whole job; a function that changes one says so above it.

# By the name of what people edit and start.
log() { printf 'train.slurm: %s\n' "$*" >&2; }

# Sets: HOME_DIR PYTHON IS_ENDING
run_job() {
  HOME_DIR="$(dirname "$(dirname "$RUN_DIR")")"
  PYTHON="$HOME_DIR/venv/bin/python"
  set_environment
  name_job
  trap give_up EXIT # whatever breaks from here on, the run's status says so
  trap 'request_stop "Slurm warned of the end of the job"' USR1
  trap 'IS_ENDING=yes; request_stop "the job was asked to end"' TERM INT HUP
  [[ -z "${MODULES:-}" ]] || load_modules
  while :; do
    run_attempt
    [[ "$VERDICT" == restart && -z "${IS_ENDING:-}" ]] || break
  done
  leave
}

# Nothing on a compute node uses a network but that of its peers, and no secret is needed there.
set_environment() {
  unset HF_TOKEN HUGGING_FACE_HUB_TOKEN WANDB_API_KEY
  export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
  export HF_HUB_DISABLE_PROGRESS_BARS=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
  export PYTHONPATH="$RUN_DIR/code"
  export SLURM_EXPORT_ENV=ALL # sbatch got an allow-list; the tasks get all that is set here
  umask u=rwx,g+rx            # the group reads runs
}

# Sets: JOB RESTARTS ATTEMPT STOP_FILE
name_job() {
  if [[ -n "${TRAINSTACK_LOCAL:-}" ]]; then
    JOB="local-$(uname -n)-$$-$(date +%s)" # pids repeat, in a container at once
  else
    JOB="$SLURM_JOB_ID"
  fi
  RESTARTS="${SLURM_RESTART_COUNT:-0}"
  ATTEMPT=0 # none yet
  # Holds for all attempts until Slurm requeues the job, which then starts without it.
  STOP_FILE="$RUN_DIR/logs/$JOB.$RESTARTS.stop"
  rm -f "$STOP_FILE"
  # Compiled kernels on the node's own disk: on a shared one, ranks trip over each other's files.
  local cache="${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/trainstack-$UID-$JOB"
  export TRITON_CACHE_DIR="$cache/triton" TORCHINDUCTOR_CACHE_DIR="$cache/inductor"
}

# A batch shell is no login shell: it may have to learn what a module is.
load_modules() {
  local file
  for file in "${MODULESHOME:-/usr/share/modules}/init/bash" \
    "${LMOD_PKG:-/usr/share/lmod/lmod}/init/bash"; do
    # shellcheck source=/dev/null
    if ! type module >/dev/null 2>&1 && [[ -r "$file" ]]; then source "$file"; fi
  done
  type module >/dev/null 2>&1 || log "error: MODULES=$MODULES, but no module command on this node"
  # shellcheck disable=SC2086 # several modules are several words
  module load $MODULES
}

# One attempt, from the start of its ranks to their end. A rank that dies ends the others; the next
# attempt starts from the newest checkpoint, here and without a new wait in the queue.
# Sets: ATTEMPT ENDS_AT GONE_HOLDER
# shellcheck disable=SC2034 # plan_launch, in train.slurm, reads the last two
run_attempt() {
  local code=0
  ATTEMPT="$(job begin)" || code=$?
  [[ -n "$ATTEMPT" ]] || {
    trap - EXIT # complete, or another attempt would be of no use: it has said so
    exit "$code"
  }
  count_processes
  [[ -n "${TRAINSTACK_LOCAL:-}" ]] || choose_meeting_point
  ENDS_AT="$(end_of_job)"
  GONE_HOLDER="$(gone_holder)"
  plan_launch
  "${LAUNCH[@]}" &
  wait_for "$!" || code=$?
  finish "$code"
}

# Asks Python to record the begin or the end of an attempt.
job() {
  local command=("$PYTHON" -m trainstack.job.attempts "$1" "$RUN_DIR" --job "$JOB"
    --restarts "$RESTARTS")
  shift
  if [[ -n "${TRAINSTACK_CHAIN:-}" ]]; then command+=(--chain); fi
  "${command[@]}" "$@"
}

# Sets: NODES PROCESSES
count_processes() {
  local gpus cores threads
  gpus="$(count_gpus)"
  PROCESSES="${NPROC_PER_NODE:-$gpus}"
  ((PROCESSES > 0)) || PROCESSES=2
  if [[ -n "${TRAINSTACK_LOCAL:-}" ]]; then
    NODES=1
    cores="$(nproc)"
  else
    NODES="$SLURM_JOB_NUM_NODES"
    cores="${SLURM_CPUS_PER_TASK:-1}"
  fi
  threads=$((cores / PROCESSES))
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
}

# GPUs of this node. SLURM_GPUS_PER_NODE may carry a type ("h100:8"); GPUS_ON_NODE is the number.
count_gpus() {
  if [[ -z "${TRAINSTACK_LOCAL:-}" ]]; then
    printf '%s' "${SLURM_GPUS_ON_NODE:-0}"
  elif [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
    awk -F, '{ print ($0 == "") ? 0 : NF }' <<<"$CUDA_VISIBLE_DEVICES"
  else
    nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true
  fi
}

# The first host by Slurm's own list, never `hostname` (127.0.1.1 on many sites), and no fallback:
# nodes that meet themselves would train alone. The port follows from the job, below the ephemeral
# range (32768), where a passing connection may use it.
# Sets: HEAD PORT
choose_meeting_point() {
  local hosts base="$JOB" first
  hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
  HEAD="${hosts%%$'\n'*}"
  first=$((20000 + (base + ATTEMPT) % 10000))
  PORT="${MASTER_PORT:-$("$PYTHON" -m trainstack.job.attempts port "$first")}"
  log "job $JOB, attempt $ATTEMPT, $NODES nodes ($SLURM_JOB_NODELIST), meeting at $HEAD:$PORT"
}

# When Slurm will end the job, in seconds since 1970: in the environment since Slurm 23.02, before
# that from squeue. Empty if nobody knows.
end_of_job() {
  local ends_at="${SLURM_JOB_END_TIME:-}" text
  [[ -z "${TRAINSTACK_LOCAL:-}" ]] || return 0
  if [[ -z "$ends_at" ]]; then
    text="$(squeue --noheader --jobs="$JOB" --format=%e 2>/dev/null || true)"
    # To date(1) an empty text is last midnight.
    ends_at="$(date -d "${text:-N/A}" +%s 2>/dev/null || true)"
  fi
  printf '%s' "$ends_at"
}

# The job that still holds the run folder though it has ended, as Slurm knows: a job that was killed
# could not give the folder back. Empty if there is none.
gone_holder() {
  local holder queue
  [[ -z "${TRAINSTACK_LOCAL:-}" ]] || return 0
  holder="$("$PYTHON" -m trainstack.job.attempts holder "$RUN_DIR")" || return
  [[ "$holder" =~ ^[0-9]+$ && "$holder" != "$JOB" ]] || return 0
  queue="$(squeue --noheader --states=RUNNING,COMPLETING,SUSPENDED --format=%A)" || return 0
  grep -qx "$holder" <<<"$queue" || printf '%s' "$holder"
}

# A trap runs only between foreground commands, so the job runs in the background and is waited for.
wait_for() {
  local code=0
  while :; do
    code=0
    wait "$1" || code=$?
    kill -0 "$1" 2>/dev/null || return "$code"
  done
}

# Never a signal to srun: it would kill every task at once. Rank 0 looks for this file each step.
# shellcheck disable=SC2329 # the traps call it
request_stop() {
  [[ -f "$STOP_FILE" ]] || {
    printf '%s\n' "$1" >"$STOP_FILE.tmp" && mv "$STOP_FILE.tmp" "$STOP_FILE"
    log "$1: the ranks will save and stop"
  }
}

# The truth is in status.json: torchrun swallows exit codes, and srun may return 0 when a node dies.
# Sets: VERDICT CODE
finish() {
  local command=(job finish --attempt "$ATTEMPT" --stop-file "$STOP_FILE" --code "$1")
  CODE=0
  if [[ -n "${IS_ENDING:-}" ]]; then command+=(--ending); fi
  if is_taken_back; then command+=(--taken-back); fi
  VERDICT="$("${command[@]}")" || CODE=$?
}

# Whether Slurm has put the job back into the queue, or runs it elsewhere: after it lost a node,
# srun returns, even with 0, and this shell may still run.
is_taken_back() {
  local job
  [[ -z "${TRAINSTACK_LOCAL:-}" ]] || return 1
  job="$(scontrol show job "$JOB" 2>/dev/null)" || return 1
  [[ "$job" =~ Restarts=([0-9]+) ]] && ((BASH_REMATCH[1] != RESTARTS))
}

# Sets: IS_ENDING
# shellcheck disable=SC2329 # the trap calls it
give_up() {
  local code="$?"
  IS_ENDING=yes # nobody is left to restart anything
  finish "$code"
  exit "$CODE"
}

leave() {
  trap - EXIT
  if [[ "$VERDICT" == restart ]]; then finish "$CODE"; fi # it was asked to end between two attempts
  if [[ "$VERDICT" == requeue && -z "${TRAINSTACK_LOCAL:-}" ]]; then
    if [[ -n "${TRAINSTACK_CHAIN:-}" ]]; then
      leave_to_chain
    elif [[ -z "${IS_ENDING:-}" ]]; then
      log "back to the queue"
      scontrol requeue "$JOB" || log "this site does not requeue; to resume: the same bash" \
        "submit.sh; to queue the jobs that follow in advance: bash submit.sh --chain N"
    fi
  fi
  exit "$CODE"
}

# Slurm starts the next job of this name whatever the code; 0 tells a person not to look.
leave_to_chain() {
  local waiting
  waiting="$(squeue --noheader --states=PENDING --name="$SLURM_JOB_NAME" --format=%A)" || waiting=""
  if [[ -n "$waiting" ]]; then
    log "the next job of the chain resumes; to end all of them: scancel --name=$SLURM_JOB_NAME"
    exit 0
  fi
  log "this was the last job of the chain; to resume: the same bash submit.sh --chain N"
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
  log "error: job.sh is a part of train.slurm, which submit.sh starts; write: bash submit.sh"
  exit 2
fi
