#!/usr/bin/env bash
#
# Measure trainstack, each benchmark beside its peer in the same run.
#
# Usage: bash benchmarks/run.sh [NAME ...]
#
# Without a name: all benchmarks, one after the other. Nothing else should run meanwhile. The last
# line of each is "NAME: target T, measured M, holds" or "... falls short". Exit: 0 if all hold, 2
# if there is no such benchmark, else 1.
#
# RESULTS=FILE keeps what loops took, as JSON; doc/speed_bars.py FILE SVG draws it.

[ "${BASH##*/}" = bash ] || exec bash "$0" "$@" # called as: sh benchmarks/run.sh
set -euo pipefail

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
ROOT="$(dirname "$HERE")"

log() { printf 'benchmarks/run.sh: %s\n' "$*" >&2; }

main() {
  local name names=() path peers code=0
  case "${1:-}" in
    -h | --help)
      sed -n '3,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
      return
      ;;
  esac
  for path in "$HERE"/*.py; do names+=("$(basename "$path" .py)"); done
  if (($#)); then
    for name in "$@"; do
      [[ -f "$HERE/$name.py" ]] || {
        log "error: no benchmark $name; there are: ${names[*]}"
        exit 2
      }
    done
    names=("$@")
  fi
  bash "$ROOT/setup.sh" --is-ready || bash "$ROOT/setup.sh"
  # shellcheck source=/dev/null
  source "$ROOT/env.sh"
  peers="$(bash "$ROOT/setup.sh" --beside "$HERE/requirements.txt")"
  for name in "${names[@]}"; do
    PYTHONPATH="$ROOT:$peers" "$TRAINSTACK_PYTHON" "$HERE/$name.py" || code=1
  done
  exit "$code"
}

main "$@"
