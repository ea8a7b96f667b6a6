#!/usr/bin/env bash
#
# What my runs are doing, and why one stopped.
#
# Usage: bash monitor.sh [--follow] [RUN]
#        bash monitor.sh RUN --why | --ledger | --goodput
#
#   RUN        one screen about this run; without it a table of all runs
#   --follow   look again every five seconds, until Ctrl-C
#   --why      what happened to which rank, what it cost, what was done, and what to do now
#   --ledger   recompute whether every sample was used exactly once; exit 1 if not, 2 if unknown
#   --goodput  where the run's time went: training, saving, starting, waiting in the queue
#
# Only reads: the run folders, squeue, for --ledger the tokens. Also works without Slurm, and while
# a job runs.

[ "${BASH##*/}" = bash ] || exec bash "$0" "$@" # called as: sh monitor.sh
set -euo pipefail

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
export PYTHONSAFEPATH=1 # a json.py in the user's current folder is not Python's

usage() { sed -n '3,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" || true; } # nobody may read it
log() { printf 'monitor.sh: %s\n' "$1" >&2; }
die() {
  log "error: $1"
  exit "${2:-1}"
}

main() {
  parse "$@"
  load_environment
  # shellcheck source=slurm.sh
  source "$HERE/slurm.sh"
  forget_outer_slurm
  case "$QUESTION" in
    --ledger | --goodput)
      run_module trainstack "${QUESTION#--}" --home "$TRAINSTACK_HOME" -- "$RUN"
      ;;
    --follow) follow ;;
    *) show ;;
  esac
}

# Sets: RUN QUESTION
parse() {
  RUN="" QUESTION=""
  while (($#)); do
    case "$1" in
      -h | --help) usage && exit 0 ;;
      --follow | --why | --ledger | --goodput)
        [[ -z "$QUESTION" || "$QUESTION" == "$1" ]] ||
          die "one question at a time, got $QUESTION and $1" 2
        QUESTION="$1"
        ;;
      -*) die "$1 is not an option; see bash monitor.sh --help" 2 ;;
      *)
        [[ -z "$RUN" ]] || die "one run at a time, got $RUN and $1" 2
        RUN="$1"
        ;;
    esac
    shift
  done
  case "$QUESTION" in
    --why | --ledger | --goodput)
      [[ -n "$RUN" ]] || die "$QUESTION is about one run; write: bash monitor.sh RUN $QUESTION" 2
      ;;
  esac
}

# Sets: TRAINSTACK_HOME TRAINSTACK_PYTHON
load_environment() {
  # shellcheck source=/dev/null
  if [[ -f "$HERE/env.sh" ]]; then source "$HERE/env.sh"; fi
  if [[ ! -x "${TRAINSTACK_PYTHON:-}" ]]; then # SHARED_DIR may come from the environment alone
    bash "$HERE/setup.sh" --is-ready || die "the environment is not ready; run: bash setup.sh"
    # shellcheck source=/dev/null
    source "$HERE/env.sh"
  fi
}

run_module() { PYTHONPATH="$HERE" "$TRAINSTACK_PYTHON" -m "$@"; }

follow() {
  local text
  while :; do
    text="$(show 2>&1)" || die "${text#monitor.sh: error: }"
    printf '\033[H\033[2J%s\n' "$text"
    sleep 5
  done
}

show() {
  local command=(run_module trainstack.monitor.screen --home "$TRAINSTACK_HOME") queue=""
  if has_jobs; then
    if queue="$(list_jobs)"; then
      command+=(--queue)
      if [[ -n "$RUN" ]]; then queue+="$(forgotten_job "$queue")"; fi
    else
      log "Slurm does not answer: $queue; states are as the runs wrote them"
    fi
  fi
  if [[ "$QUESTION" == --why ]]; then command+=(--why); fi
  if [[ -n "$RUN" ]]; then command+=(-- "$RUN"); fi
  "${command[@]}" <<<"$queue"
}

# A line for the last job of the run, if squeue no longer shows it and it did not tell its own end.
forgotten_job() {
  local folder="$TRAINSTACK_HOME/runs/$RUN" job
  job="$(sed -nE 's/.*"submitted".*"job": "([0-9]+)".*/\1/p' "$folder/events.jsonl" 2>/dev/null |
    tail -n 1)"
  if [[ -z "$job" || "$1" == *"job|$job|"* ]] ||
    grep -qs '"exit_code": [0-9]' "$folder/status.json"; then
    return
  fi
  printf '\n' && recall_job "$job"
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then main "$@"; fi
