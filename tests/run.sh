#!/usr/bin/env bash
#
# Set up everything that the tests need, then run them all.
#
# Usage: bash tests/run.sh [PYTEST_OPTION ...]
#
# Installs the project's environment (setup.sh), the test tools beside it, and, as root with apt,
# Slurm and a browser. Tests that cannot run are skipped, and listed; with CI=true a skipped test of
# those is a failure. Examples:  bash tests/run.sh -k config      bash tests/run.sh -m "not slurm"

[ "${BASH##*/}" = bash ] || exec bash "$0" "$@" # called as: sh tests/run.sh
set -euo pipefail

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
ROOT="$(dirname "$HERE")"
# Many tests wait, for Slurm or for a rank that hangs: three files at a time leave two cores less
# idle than two do.
WORKERS="${WORKERS:-3}"

log() { printf 'tests/run.sh: %s\n' "$*" >&2; }

main() {
  local tools
  case "${1:-}" in
    -h | --help)
      sed -n '3,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
      return
      ;;
  esac
  bash "$ROOT/setup.sh" --is-ready || bash "$ROOT/setup.sh"
  # shellcheck source=/dev/null
  source "$ROOT/env.sh"
  tools="$(bash "$ROOT/setup.sh" --beside "$HERE/requirements.txt")"
  TRACKERS="wandb trackio" bash "$ROOT/setup.sh" # 140 MB; their tests run the real ones
  export PATH="$PATH:/usr/sbin:/sbin"            # where Slurm has its daemons
  install Slurm "sbatch slurmctld slurmd munged ip faketime" \
    "slurmctld slurmd slurm-client munge iproute2 faketime"
  install Chromium chromium-headless-shell chromium-headless-shell
  export PATH="$tools/bin:$PATH" PYTHONPATH="$tools" PYTHONDONTWRITEBYTECODE=1
  cd "$ROOT"
  # Runs of the tests live in pytest's own folders; nothing of the user's is touched.
  exec "$TRAINSTACK_PYTHON" -m pytest --numprocesses "$WORKERS" --no-loadscope-reorder "$@"
}

# What tests need beside Python: its name, its programs, and the packages that have them.
install() {
  local what="$1" name log="$TRAINSTACK_HOME/cache/apt.log" missing=()
  for name in $2; do
    command -v "$name" >/dev/null || missing+=("$name")
  done
  ((${#missing[@]})) || return 0
  if ((EUID != 0)) || ! command -v apt-get >/dev/null; then
    log "no ${missing[*]} here, and only root with apt can install it: its tests will be skipped"
    return 0
  fi
  log "installing $what ($3)"
  {
    apt-get update -qq
    # The services must not start: the tests bring their own cluster.
    # shellcheck disable=SC2086 # several packages are several words
    DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y -qq --no-install-recommends $3
  } >"$log" 2>&1 || log "apt-get failed, see $log: the tests of $what will be skipped"
}

main "$@"
