#!/usr/bin/env bash
#
# What my runs are doing, and why one stopped.
#
# Usage: bash monitor.sh [--follow] [RUN]
#
#   RUN        one screen about this run; without it a table of all runs
#   --follow   look again every five seconds, until Ctrl-C
#
# Reads the run folders and squeue alone; also works without Slurm, and while a job runs.

set -euo pipefail

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
export PYTHONSAFEPATH=1 # a json.py in the user's current folder is not Python's

usage() { sed -n '3,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
die() {
  printf 'monitor.sh: error: %s\n' "$1" >&2
  exit "${2:-1}"
}

main() {
  local run="" is_following="" text
  while (($#)); do
    case "$1" in
      -h | --help) usage && return ;;
      --follow) is_following=yes ;;
      -*) die "$1 is no option; see bash monitor.sh --help" 2 ;;
      *)
        [[ -z "$run" ]] || die "one run at a time, got $run and $1" 2
        run="$1"
        ;;
    esac
    shift
  done
  # shellcheck source=/dev/null
  if [[ -f "$HERE/env.sh" ]]; then source "$HERE/env.sh"; fi
  if [[ ! -x "${TRAINSTACK_PYTHON:-}" ]]; then # SHARED_DIR may come from the environment alone
    bash "$HERE/setup.sh" --check || die "the environment is not ready; run: bash setup.sh"
    # shellcheck source=/dev/null
    source "$HERE/env.sh"
  fi
  if [[ -z "$is_following" ]]; then
    show "$run"
    return
  fi
  while :; do
    text="$(show "$run" 2>&1)" || die "${text#monitor.sh: error: }"
    printf '\033[H\033[2J%s\n' "$text"
    sleep 5
  done
}

show() {
  local command=("$TRAINSTACK_PYTHON" -m trainstack.monitor.screen --home "$TRAINSTACK_HOME") queue=""
  # Without an answer from Slurm the states of jobs are shown as unknown, not as gone.
  if command -v squeue >/dev/null && queue="$(squeue --noheader --format='%A|%T|%L|%r' 2>/dev/null)"; then
    command+=(--queue)
  fi
  if [[ -n "$1" ]]; then command+=(-- "$1"); fi
  PYTHONPATH="$HERE" "${command[@]}" <<<"$queue"
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then main "$@"; fi
