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
log() { printf 'train.slurm: %s\n' "$*" >&2 || true; }

# Sets: HOME_DIR PYTHON IS_ENDING ONE_A_NODE AVOID TRACKERS
run_job() {
  ONE_A_NODE=() AVOID="" TRACKERS=()
  HOME_DIR="$(dirname "$(dirname "$RUN_DIR")")"
  PYTHON="$HOME_DIR/venv/bin/python"
  # shellcheck source=slurm.sh
  source "$RUN_DIR/code/slurm.sh"
  set_environment
  name_job
  [[ -x "$PYTHON" ]] || {
    log "error: ${SLURMD_NODENAME:-$(uname -n)} does not see $PYTHON; all nodes must share the" \
      "file system of SHARED_DIR: tell your admin, or leave the node out: -- --exclude=NODE"
    exit 1
  }
  # The reader of a pipe may go first.
  if [[ -n "${TRAINSTACK_LOCAL:-}" ]]; then trap '' PIPE; fi
  # Once, in the background: else each rank compiles the modules that it imports.
  "$PYTHON" -m compileall -q "$RUN_DIR/code/trainstack" >/dev/null 2>&1 &
  trap give_up EXIT # whatever breaks from here on, the run's status says so
  trap 'request_stop "Slurm warned of the end of the job"' USR1
  trap 'IS_ENDING=yes; request_stop "the job was asked to end"' TERM INT HUP
  [[ -z "${MODULES:-}" ]] || load_modules
  set_environment # again: what modules bring of another Python goes
  while :; do
    run_attempt
    [[ "$VERDICT" == restart && -z "${IS_ENDING:-}" ]] || break
  done
  leave
}

# Nothing on a compute node uses a network but that of its peers, no secret is needed there, and
# nothing of a person's own Python gets in.
set_environment() {
  unset PYTHONHOME PYTHONSTARTUP PYTHONUSERBASE
  export PYTHONNOUSERSITE=1
  unset HF_TOKEN HUGGING_FACE_HUB_TOKEN WANDB_API_KEY
  export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}" # else it warns of names in every job
  export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
  export HF_HUB_DISABLE_PROGRESS_BARS=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
  export PYTHONPATH="$RUN_DIR/code"
  # The last collectives tell which rank holds up the others; segments that grow leave fewer gaps.
  export TORCH_NCCL_TRACE_BUFFER_SIZE=2000 TORCH_NCCL_ENABLE_TIMING=1 # else no begin is known
  export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
  export SLURM_EXPORT_ENV=ALL # sbatch got an allow-list; the tasks get all that is set here
  umask u=rwx,g+rx            # the group reads runs
}

# Sets: JOB RESTARTS ATTEMPT STOP_FILE SCRATCH
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
  # All that the job leaves on a node is in this folder of its own disk, compiled kernels too: on a
  # shared disk, ranks trip over each other's. launch.py makes it; the end of the job removes it.
  SCRATCH="${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/trainstack-$UID-$JOB"
  mkdir -p "$SCRATCH" && chmod 700 "$SCRATCH"
  export TMPDIR="$SCRATCH"
  export TORCHINDUCTOR_CACHE_DIR="$SCRATCH/kernels" TRITON_CACHE_DIR="$SCRATCH/kernels/triton"
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
    end_trackers
    write_report
    exit "$code"
  }
  ((${#TRACKERS[@]})) || start_trackers
  count_processes
  if [[ -z "${TRAINSTACK_LOCAL:-}" ]]; then
    if ! { describe_tasks && find_blind_nodes; }; then
      finish 1 # it was written down why
      return
    fi
    choose_meeting_point
  fi
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
    cores="$(cpus_per_node)"
  fi
  if ((gpus)) && ! command -v nvidia-smi >/dev/null && ! command -v rocm-smi >/dev/null; then
    log "GPUs are named, but $(uname -n) has no nvidia-smi: without CUDA this trains on the CPU"
  fi
  threads=$((cores / PROCESSES))
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
}

# GPUs of this node: by Slurm, where it counts them, else those that are there and may be seen.
count_gpus() {
  local counted="" node
  if [[ -z "${TRAINSTACK_LOCAL:-}" ]]; then
    counted="${SLURM_GPUS_ON_NODE:-}"
    if [[ -z "$counted" ]]; then
      node="$(ask scontrol show node "${SLURMD_NODENAME:-$(uname -n)}")" || node=""
      if [[ "$node" == *Gres=*gpu* ]]; then counted=0; fi # it counts them, and gave this job none
    fi
  fi
  if [[ -n "$counted" ]]; then
    printf '%s' "$counted"
  elif [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
    # What follows a number that is none, as -1, is not there (CUDA's own rule).
    awk -F, '{ n = 0; while (n < NF && $(n + 1) !~ /^-/ && $(n + 1) != "") n++; print n }' \
      <<<"$CUDA_VISIBLE_DEVICES"
  else
    nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true
  fi
}

# The CPUs that the job has on each of its nodes, by which option of sbatch ever; of nodes that
# differ, the least: 4(x2),3 is 3. Fewer where this shell may use fewer (--hint=nomultithread).
cpus_per_node() {
  local each least="" usable
  for each in ${SLURM_JOB_CPUS_PER_NODE//,/ }; do
    each="${each%%(*}"
    if [[ -z "$least" ]] || ((each < least)); then least="$each"; fi
  done
  usable="$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)"
  if ((usable < $(nproc --all) && usable < least)); then least="$usable"; fi
  printf '%s' "$least"
}

# How srun starts one task on each node, with all the GPUs of the job there, whatever tasks and
# GPUs per task the job was asked with. Fails if the nodes do not have as many GPUs each.
# Sets: ONE_A_NODE CPUS
# shellcheck disable=SC2034 # plan_launch, in train.slurm, reads them
describe_tasks() {
  local name total="${SLURM_GPUS:-}" gpus="${SLURM_GPUS_ON_NODE:-0}"
  total="${total#*:}" # of a type, or none; several types are not counted
  if [[ "$total" =~ ^[0-9]+$ ]] && ((total != gpus * NODES)); then
    job fail --attempt "$ATTEMPT" --code 2 --cause "Slurm spread $total GPUs unevenly over $NODES \
nodes; ask for as many on each, by #SBATCH --gpus-per-node=N in train.slurm"
    return 1
  fi
  CPUS="$(cpus_per_node)"
  while read -r name; do
    case "$name" in
      SLURM_CPUS_PER_* | SLURM_NTASKS* | SLURM_NPROCS | SLURM_TRES_PER_TASK | SLURM_DISTRIBUTION | \
        SLURM_GPUS | SLURM_GPUS_PER_* | SLURM_GPU_BIND | SLURM_CPU_BIND* | SRUN_*)
        unset "$name" # srun takes it for an option
        ;;
    esac
  done < <(compgen -e)
  ONE_A_NODE=(--nodes="$NODES" --ntasks="$NODES" --ntasks-per-node=1 --export=ALL)
  if ((gpus)); then ONE_A_NODE+=(--gres="gpu:$gpus"); fi
}

# Nodes that do not see the environment or the run folder end a job in ways that name nobody. Fails
# if there are such, or if srun cannot reach all.
# Sets: AVOID
find_blind_nodes() {
  local said code=0 look
  AVOID=""
  ((NODES > 1)) || return 0
  # shellcheck disable=SC2016 # for the shell of the node
  look='[[ -x "$0" && -d "$1" ]] || echo "blind|${SLURMD_NODENAME:-$(uname -n)}"'
  said="$(cd / && timeout 60 srun "${ONE_A_NODE[@]}" --cpus-per-task=1 --overlap --gres=none \
    --chdir=/ bash -c "$look" "$PYTHON" "$RUN_DIR/code" 2>&1)" || code=$?
  ((code != 124)) || return 0 # so many nodes: the launch itself will tell
  AVOID="$(sed -n 's/^blind|//p' <<<"$said" | sort | paste -sd,)"
  if [[ -n "$AVOID" ]]; then
    said="$AVOID: no sight of $PYTHON or $RUN_DIR there; all nodes must share the file system of \
SHARED_DIR; tell your admin, or leave the node out: -- --exclude=$AVOID"
  elif ((code)); then
    said="srun fails on $SLURM_JOB_NODELIST (code $code): $(tr '\n' ' ' <<<"$said")"
  else
    return 0
  fi
  code=1 # whatever srun said: it may pass
  if [[ -n "$AVOID" ]]; then are_there_others || AVOID="" code=2; fi
  job fail --attempt "$ATTEMPT" --cause "$said" ${AVOID:+--elsewhere} --code "$code"
  return 1
}

# Whether Slurm may start the job on other nodes than those to leave out, with those it leaves out.
# Sets: AVOID
are_there_others() {
  local job count all=0
  job="$(ask scontrol show job "$JOB")" || return 1
  [[ "$job" == *" ReqNodeList=(null)"* && "$job" =~ Partition=([^ ]+) ]] || return 1
  while read -r count; do
    ((all += count)) || true
  done < <(ask sinfo --noheader --partition="${BASH_REMATCH[1]}" --format='nodes|%D' |
    sed -n 's/^nodes|//p')
  if [[ "$job" =~ ExcNodeList=([^ ()]+) ]]; then AVOID+=",${BASH_REMATCH[1]}"; fi
  count="${AVOID//[!,]/}"
  ((all > NODES + ${#count}))
}

# The first host by Slurm's own list, never `hostname` (127.0.1.1 on many sites), and no fallback:
# nodes that meet themselves would train alone. The port follows from the job, below the ephemeral
# range (32768), where a passing connection may use it.
# Sets: HEAD PORT
choose_meeting_point() {
  local hosts base="$JOB" first
  hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
  hosts="$(grep -xE '[A-Za-z0-9._-]+' <<<"$hosts" | tail -n "$NODES")" # without a site's banner
  HEAD="${hosts%%$'\n'*}"
  first=$((20000 + (base + ATTEMPT) % 10000))
  PORT="$("$PYTHON" -m trainstack.job.attempts port "$first")"
  log "job $JOB, attempt $ATTEMPT on $SLURM_JOB_NODELIST, meeting at $HEAD:$PORT"
}

# When Slurm will end the job, in seconds since 1970: in the environment since Slurm 23.02, before
# that from squeue. Empty if nobody knows.
end_of_job() {
  local ends_at="${SLURM_JOB_END_TIME:-}" text
  [[ -z "${TRAINSTACK_LOCAL:-}" ]] || return 0
  if [[ -z "$ends_at" ]]; then
    text="$(ask squeue --noheader --jobs="$JOB" --format='end|%e' || true)"
    text="$(sed -n 's/^end|//p' <<<"$text")"
    # To date(1) an empty text is last midnight.
    ends_at="$(date -d "${text:-N/A}" +%s 2>/dev/null || true)"
  fi
  printf '%s' "$ends_at"
}

# The job that still holds the run folder though it has ended, as Slurm knows: a job that was killed
# could not give the folder back. Empty if there is none.
gone_holder() {
  local queue
  [[ -z "${TRAINSTACK_LOCAL:-}" ]] || return 0
  queue="$(list_jobs)" || return 0
  job holder <<<"$queue"
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
  local job="" preempted
  CODE=0
  if [[ -z "${TRAINSTACK_LOCAL:-}" ]]; then job="$(ask scontrol show job "$JOB")" || job=""; fi
  # Slurm put the job back into the queue, or runs it elsewhere: after it lost a node, srun returns,
  # even with 0, and this shell may still run.
  if [[ "$job" =~ Restarts=([0-9]+) ]] && ((BASH_REMATCH[1] != RESTARTS)); then
    command+=(--taken-back)
  fi
  # What it preempts it warns by SIGTERM to the tasks alone, who may not be able to hear it yet. A
  # time before the start is of an earlier start.
  if [[ "$job" =~ PreemptTime=([0-9][^ ]*) ]] && preempted="${BASH_REMATCH[1]}" &&
    [[ "$job" =~ StartTime=([0-9][^ ]*) && ! "$preempted" < "${BASH_REMATCH[1]}" ]]; then
    request_stop "Slurm needs the nodes for another job"
    command+=(--preempted)
  fi
  if [[ -n "${IS_ENDING:-}" ]]; then command+=(--ending); fi
  VERDICT="$("${command[@]}")" || CODE=$?
}

# Sets: IS_ENDING
# shellcheck disable=SC2329 # the trap calls it
give_up() {
  local code="$?"
  IS_ENDING=yes # nobody is left to restart anything
  finish "$code"
  end_trackers
  remove_scratch
  write_report
  exit "$CODE"
}

leave() {
  trap - EXIT
  if [[ "$VERDICT" == restart ]]; then finish "$CODE"; fi # it was asked to end between two attempts
  # Before a requeue: at that, Slurm ends this shell. Soon, for the time of the job may be up.
  end_trackers
  remove_scratch
  if [[ "$VERDICT" == requeue && -z "${TRAINSTACK_LOCAL:-}" ]]; then
    if [[ -n "${TRAINSTACK_CHAIN:-}" ]]; then
      leave_to_chain
    elif [[ -z "${IS_ENDING:-}" ]]; then
      log "back to the queue${AVOID:+, for other nodes than $AVOID}"
      if requeue; then exit "$CODE"; fi # the report is left to the end of the next start
      log "this site does not requeue; to resume: bash submit.sh" \
        "--resume ${RUN_DIR##*/}; to queue the jobs that follow in advance, too: --chain N"
    fi
  fi
  write_report
  exit "$CODE"
}

# Shows the run in the trackers of log.report_to, as its files grow. Each is a process of its own
# that may break, hang or die: nothing depends on it.
# Sets: TRACKERS
start_trackers() {
  local name
  for name in wandb trackio; do
    grep -qw "$name" "$RUN_DIR/config.yaml" || continue # Python looks closer
    "$PYTHON" -m trainstack track "$RUN_DIR" --to "$name" --follow "$$" "$JOB" \
      >>"$RUN_DIR/logs/$JOB.$name.log" 2>&1 </dev/null &
    TRACKERS+=("$name $!")
  done
}

# They get five seconds to write the rest; before a requeue one, for the time may be up.
# shellcheck disable=SC2329 # the trap calls it, too
end_trackers() {
  local name pid code tenths=50
  if [[ "${VERDICT:-}" == requeue ]]; then tenths=10; fi
  for name in ${TRACKERS[@]+"${TRACKERS[@]}"}; do
    if is_running "${name#* }"; then kill -TERM "${name#* }" || true; fi
  done
  for name in ${TRACKERS[@]+"${TRACKERS[@]}"}; do
    pid="${name#* }" name="${name% *}" code=0
    while is_running "$pid" && ((tenths-- > 0)); do sleep 0.1; done
    # With what it started: wandb-core has a session of its own.
    # shellcheck disable=SC2046 # several processes are several words
    if is_running "$pid"; then
      kill -KILL "$pid" $(cat "/proc/$pid"/task/*/children 2>/dev/null) || true
    fi
    wait "$pid" 2>/dev/null || code=$?
    ((code == 0)) || log "$name did not get all of the run (code $code, see" \
      "logs/$JOB.$name.log); the run is not touched; to send it: bash monitor.sh" \
      "${RUN_DIR##*/} --sync"
  done
}

# Whether a process that this shell started runs; its number may be another one's by now.
# shellcheck disable=SC2329 # the trap calls it, too
is_running() { jobs -pr | grep -qx "$1"; }

# A page about the run, if log.report_to has html. Nothing depends on it, so nothing waits for it
# long. (page.py's LEDGER_SECONDS are fewer.)
# shellcheck disable=SC2329 # the trap calls it, too
write_report() {
  local said code=0
  said="$(timeout --kill-after=1 10 "$PYTHON" -m trainstack report "$RUN_DIR" --if-asked 2>&1)" ||
    code=$?
  if ((code)); then
    log "no report was written (${said:+${said##*$'\n'}, }code $code); to write it:" \
      "bash monitor.sh ${RUN_DIR##*/} --report"
  elif [[ -n "$said" ]]; then
    log "report: $said"
  fi
}

# Right after a requeue Slurm still ends this shell, and takes the nodes to leave out.
requeue() {
  scontrol requeue "$JOB" || return
  [[ -n "${AVOID:-}" ]] || return 0
  # The signal that ends this shell may end the command, too.
  scontrol update "JobId=$JOB" "ExcNodeList=$AVOID" ||
    scontrol update "JobId=$JOB" "ExcNodeList=$AVOID" || true
}

# shellcheck disable=SC2329 # the trap calls it, too
remove_scratch() {
  rm -rf "$SCRATCH" || true # something may still write there
  if [[ -z "${TRAINSTACK_LOCAL:-}" ]] && ((${NODES:-1} > 1)); then
    timeout 30 srun "${ONE_A_NODE[@]}" --cpus-per-task=1 --overlap --chdir=/ \
      rm -rf "$SCRATCH" || true
  fi
}

# Slurm starts the next job of this name whatever the code; 0 tells a person not to look.
leave_to_chain() {
  local waiting
  waiting="$(ask squeue --noheader --states=PENDING --name="$SLURM_JOB_NAME" --format='job|%A')" ||
    waiting=""
  waiting="$(sed -n 's/^job|//p' <<<"$waiting")"
  if [[ -n "$waiting" ]]; then
    if [[ -n "${AVOID:-}" ]]; then # they would begin on the same idle nodes
      ask scontrol update "JobId=${waiting//$'\n'/,}" "ExcNodeList=$AVOID" || true
    fi
    log "the next job of the chain resumes${AVOID:+, on other nodes than $AVOID};" \
      "to end all of them: scancel --name=$SLURM_JOB_NAME"
    exit 0
  fi
  log "this was the last job of the chain; to resume: bash submit.sh --chain N" \
    "--resume ${RUN_DIR##*/}"
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
  log "error: job.sh is a part of train.slurm, which submit.sh starts; write: bash submit.sh"
  exit 2
fi
