#!/usr/bin/env bash
#
# Prove on one GPU that trainstack is right, safe and fast there; on a CPU, as far as that goes.
#
# Usage: bash tests/gpu.sh [--minutes 10] [--only NAME ...] [--wheels DIR] [--out DIR]
#
# Needs no network and no setup.sh: only a Python with torch 2.11 and transformers 5.17, or newer.
# That is TRAINSTACK_PYTHON, else the one of env.sh, else python3. Each check leaves a line of JSON
# at once, on stdout and in gpu.jsonl; a table comes last. What a CPU cannot prove "needs a GPU".
# Exit: 0 if nothing failed, 1 if something did, 2 if a check or option is unknown.
#
#   --minutes N   for all of it (default 10); checks that no time is left for have not passed
#   --only NAME   only these checks; a pattern such as 'speed_*' will do
#   --wheels DIR  packages that this Python lacks, such as pydantic, as wheels
#   --out DIR     where gpu.jsonl goes (default: $OUT, else a new folder)
#   --device cpu  also where there is a GPU
#   --list        the names of all checks, and what they are

[ "${BASH##*/}" = bash ] || exec bash "$0" "$@" # called as: sh tests/gpu.sh
set -euo pipefail

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
ROOT="$(dirname "$HERE")"

die() {
  printf 'tests/gpu.sh: error: %s\n' "$*" >&2
  exit 2
}

main() {
  local argument wheels="" packages="" python code=0 options=()
  while (($#)); do
    argument="$1"
    shift
    case "$argument" in
      -h | --help)
        sed -n '3,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        return
        ;;
      --wheels) wheels="${1:?}" && shift ;;
      *) options+=("$argument") ;;
    esac
  done
  python="$(find_python)"
  if [[ -n "$wheels" ]]; then
    packages="$(mktemp -d)"
    install_wheels "$python" "$wheels" "$packages"
  fi
  # Nothing is written into the checkout, which may be read-only.
  PYTHONPATH="$ROOT:$HERE${packages:+:$packages}${PYTHONPATH:+:$PYTHONPATH}" \
    PYTHONDONTWRITEBYTECODE=1 "$python" -m gpu.driver "${options[@]}" || code="$?"
  [[ -z "$packages" ]] || rm -rf "$packages"
  exit "$code"
}

find_python() {
  if [[ -z "${TRAINSTACK_PYTHON:-}" && -f "$ROOT/env.sh" ]]; then
    # shellcheck source=/dev/null
    source "$ROOT/env.sh"
  fi
  local python="${TRAINSTACK_PYTHON:-python3}"
  command -v "$python" >/dev/null || die "no Python at $python; set TRAINSTACK_PYTHON"
  printf '%s\n' "$python"
}

install_wheels() {
  local python="$1" wheels="$2" packages="$3" files
  files=("$wheels"/*.whl)
  [[ -f "${files[0]}" ]] || die "--wheels $wheels: there is no .whl file in it"
  "$python" -m pip install --quiet --no-index --no-deps --target "$packages" "${files[@]}" >&2
}

main "$@"
