#!/usr/bin/env bash
#
# What my runs are doing, and why one stopped.
#
# Usage: bash monitor.sh [RUN] [--follow | --json]
#        bash monitor.sh RUN --why | --report | --goodput | --ledger | --sync
#        bash monitor.sh --compare RUN RUN ...
#
#   RUN        one screen about this run; without it a table of all runs
#   --follow   look again every five seconds, until the run ends or Ctrl-C
#   --json     the same for scripts
#   --why      what happened, why, what was lost, and what to do
#   --report   write all that is known into one HTML file, and print its path
#   --compare  the same of several runs, with what differs between their settings
#   --goodput  where the run's time went: training, saving, starting, waiting in the queue
#   --ledger   recompute whether every sample was used exactly once; exit 1 if not, 2 if unknown
#   --sync     send what is new to Weights & Biases or trackio: see doc/trackers.md
#
# Reads the run folders, squeue, for --ledger and --report the tokens; writes the report alone, and
# --sync the id of the run there. Also works without Slurm, and while a job runs.

[ "${BASH##*/}" = bash ] || exec bash "$0" "$@" # called as: sh monitor.sh
set -euo pipefail

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
LOOK_SECONDS=5          # between two looks of --follow
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
      run_module trainstack "${QUESTION#--}" --home "$TRAINSTACK_HOME" -- "${RUNS[@]}"
      ;;
    --sync) run_module trainstack track --home "$TRAINSTACK_HOME" -- "${RUNS[@]}" ;;
    --follow) follow ;;
    *) show ;;
  esac
}

# Sets: RUNS QUESTION
parse() {
  RUNS=() QUESTION=""
  while (($#)); do
    case "$1" in
      -h | --help) usage && exit 0 ;;
      --follow | --json | --why | --report | --compare | --goodput | --ledger | --sync)
        [[ -z "$QUESTION" || "$QUESTION" == "$1" ]] ||
          die "one question at a time, got $QUESTION and $1" 2
        QUESTION="$1"
        ;;
      -*) die "$1 is not an option; see bash monitor.sh --help" 2 ;;
      *) RUNS+=("$1") ;;
    esac
    shift
  done
  case "$QUESTION:${#RUNS[@]}" in
    --compare:[01])
      die "--compare is about several runs; write: bash monitor.sh --compare RUN RUN" 2
      ;;
    --compare:* | *:1) ;;
    *:0)
      [[ "$QUESTION" =~ ^(--follow|--json)?$ ]] ||
        die "$QUESTION is about one run; write: bash monitor.sh RUN $QUESTION" 2
      ;;
    *) die "one run at a time, got ${RUNS[0]} and ${RUNS[1]}" 2 ;;
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
  local code=0
  ask_screen --follow < <(tell_jobs_forever 2>/dev/null) || code=$?
  kill "${!:-}" 2>/dev/null || true # else it would end at its next line
  return "$code"
}

# Each time that there is something to look at, for screen.py: the jobs, then what Slurm said.
tell_jobs_forever() {
  local said
  while :; do
    if ! has_jobs; then
      printf 'look|none|\n'
    elif said="$(list_jobs)"; then
      printf '%s\nlook|heard|\n' "$said"
    else
      printf 'look|silent|%s\n' "$said"
    fi
    sleep "$LOOK_SECONDS"
  done
}

show() {
  local queue="" is_heard=""
  if has_jobs; then
    if queue="$(list_jobs)"; then
      is_heard=--queue
      if ((${#RUNS[@]})); then queue+="$(forgotten_job "$queue")"; fi
    else
      log "Slurm does not answer: $queue; states are as the runs wrote them"
    fi
  fi
  case "$QUESTION" in
    --report | --compare) write_report ${is_heard:+"$is_heard"} <<<"$queue" ;;
    *) ask_screen ${QUESTION:+"$QUESTION"} ${is_heard:+"$is_heard"} <<<"$queue" ;;
  esac
}

write_report() {
  run_module trainstack report --home "$TRAINSTACK_HOME" "$@" -- "${RUNS[@]}"
}

# A line for the last job of the run, if squeue no longer shows it and it did not tell its own end.
forgotten_job() {
  local folder="$TRAINSTACK_HOME/runs/${RUNS[0]}" job
  job="$(sed -nE 's/.*"job": "([0-9]+)".*/\1/p' "$folder/status.json" 2>/dev/null)"
  if [[ -z "$job" ]]; then # it has not begun
    job="$(sed -nE 's/.*"submitted".*"job": "([0-9]+)".*/\1/p' "$folder/events.jsonl" 2>/dev/null |
      tail -n 1)"
  fi
  if [[ -z "$job" || "$1" == *"job|$job|"* ]] ||
    grep -qs '"exit_code": [0-9]' "$folder/status.json"; then
    return
  fi
  printf '\n' && recall_job "$job"
}

ask_screen() {
  run_module trainstack.monitor.screen --home "$TRAINSTACK_HOME" "$@" -- ${RUNS[@]+"${RUNS[@]}"}
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then main "$@"; fi
