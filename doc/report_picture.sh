#!/usr/bin/env bash
#
# Take a picture of the report of a run, for README.md.
#
# Usage: bash doc/report_picture.sh RUN PICTURE.png
#
# Needs chromium-headless-shell, which tests/run.sh installs.

[ "${BASH##*/}" = bash ] || exec bash "$0" "$@" # called as: sh report_picture.sh
set -euo pipefail

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

main() {
  local page
  if (($# != 2)); then
    sed -n '3,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 2
  fi
  page="$(bash "$HERE/../monitor.sh" "$1" --report)"
  chromium-headless-shell --no-sandbox --hide-scrollbars --window-size=1200,860 \
    --screenshot="$2" "file://$page" 2>&1 | tail -n 1 >&2
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then main "$@"; fi
