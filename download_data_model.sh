#!/usr/bin/env bash
#
# Fetch a model and a data set once, tokenise, and prove that a job can load it all offline.
#
# Usage: bash download_data_model.sh [CONFIG_FILE] [section.key=value ...]
#
#   CONFIG_FILE       names the model and the data set (default: config.yaml); or --config FILE
#   FORCE_REFRESH=1   fetch again what is here; the old copy is used until the new one is complete
#   HF_TOKEN=...      for gated and private repositories; or once: hf auth login
#
# Run it where there is internet, such as a login node: jobs touch no network. Run again, it skips
# what is here, without a request. Only safetensors are fetched, and no code of others is run.

[ "${BASH##*/}" = bash ] || exec bash "$0" "$@" # called as: sh download_data_model.sh
set -euo pipefail

# --- Edit; each can also be set in the environment. Empty: what the config file says. -----------
MODEL_NAME="${MODEL_NAME:-}"             # org/name on the Hugging Face Hub, ./folder here, or demo
MODEL_REVISION="${MODEL_REVISION:-}"     # branch, tag or commit
DATASET_NAME="${DATASET_NAME:-}"         # org/name on the Hub, ./file or ./folder here, or demo
DATASET_REVISION="${DATASET_REVISION:-}" # branch, tag or commit
DATASET_SUBSET="${DATASET_SUBSET:-}"     # configuration of the data set
DATASET_SPLIT="${DATASET_SPLIT:-}"       # split that is trained on
FORCE_REFRESH="${FORCE_REFRESH:-0}"      # 1: fetch again what is here
PROCESSES="${PROCESSES:-}"               # processes that tokenise; empty: one per core, at most 16
# ------------------------------------------------------------------------------------------------

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" >/dev/null && pwd)"

usage() { sed -n '3,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" || true; } # nobody may read it
log() { printf 'download_data_model.sh: %s\n' "$*" >&2; }
die() {
  log "error: $1"
  exit "${2:-1}"
}

main() {
  local what
  add_edited_values
  read_arguments "$@"
  load_environment
  what=(--home "$TRAINSTACK_HOME" --config "$CONFIG")
  # Bash before 4.4 takes the expansion of an empty array for an unset variable.
  if ((${#OVERRIDES[@]})); then what+=("${OVERRIDES[@]}"); fi
  run hub ${IS_FORCED:+--force} "${what[@]}"
  export HF_HUB_OFFLINE=1 # as in a job: what follows loads what a job loads
  run prove "${what[@]}"  # before tokens are made for nothing
  log "tokens: reading what there is"
  run prepare ${IS_FORCED:+--force} ${PROCESSES:+--processes "$PROCESSES"} "${what[@]}"
  tell_next_step
}

# Before the command line's, so that those win.
# Sets: OVERRIDES IS_FORCED
add_edited_values() {
  OVERRIDES=() IS_FORCED=""
  add_override model.name "$MODEL_NAME"
  add_override model.revision "$MODEL_REVISION"
  add_override data.name "$DATASET_NAME"
  add_override data.revision "$DATASET_REVISION"
  add_override data.subset "$DATASET_SUBSET"
  add_override data.split "$DATASET_SPLIT"
  case "$FORCE_REFRESH" in
    1 | true | yes) IS_FORCED=yes ;;
    "" | 0 | false | no) ;;
    *) die "FORCE_REFRESH=$FORCE_REFRESH is neither 1 nor 0; write one of the two" 2 ;;
  esac
}

# In YAML's single quotes, so that a revision 1e3 stays a text and a path may hold a #.
# Sets: OVERRIDES
add_override() {
  local value="$2" quote="'"
  case "$value" in
    "") return ;;
    ./* | ../*) value="$PWD/$value" ;; # the next step may be typed elsewhere
  esac
  OVERRIDES+=("$1='${value//$quote/$quote$quote}'")
}

# Sets: CONFIG OVERRIDES
read_arguments() {
  CONFIG="$HERE/config.yaml"
  while (($#)); do
    case "$1" in
      -h | --help) usage && exit 0 ;;
      --config=*) CONFIG="${1#--config=}" ;;
      --config)
        (($# > 1)) || die "--config needs a file" 2
        CONFIG="$2" && shift
        ;;
      --*.*=*) die "$1 is a setting, not an option; write ${1#--}" 2 ;;
      -*) die "$1 is not an option; see bash download_data_model.sh --help" 2 ;;
      *=*) OVERRIDES+=("$1") ;;
      *) CONFIG="$1" ;;
    esac
    shift
  done
  [[ ! -d "$CONFIG" ]] || die "$CONFIG is a folder; if it is your data, write data.name=$CONFIG" 2
  [[ -f "$CONFIG" ]] || die "$CONFIG: no such config file; name one, such as config.yaml" 2
}

# Sets: TRAINSTACK_HOME TRAINSTACK_PYTHON
load_environment() {
  local code=0
  # shellcheck source=/dev/null
  if [[ -f "$HERE/env.sh" ]]; then source "$HERE/env.sh"; fi
  bash "$HERE/setup.sh" --is-ready || code=$?
  if ((code == 3)); then exit 1; fi # it was edited, and has said so
  ((code == 0)) || die "the environment is not ready; run: bash setup.sh"
  # shellcheck source=/dev/null
  source "$HERE/env.sh" # which the check may just have written
}

# A command of the package, see python -m trainstack.
run() {
  PYTHONPATH="$HERE" PYTHONSAFEPATH=1 \
    "$TRAINSTACK_PYTHON" -m trainstack "$@"
}

# A job reads the config file, so values that were only given here must be given to it as well.
tell_next_step() {
  local submit given
  submit="bash $(printf '%q' "${0%"${0##*/}"}submit.sh")" # called as this one was
  command -v sbatch >/dev/null || submit+=" --local"      # as on a machine of one's own
  if [[ "$CONFIG" != "$HERE/config.yaml" ]]; then submit+=" --config $(printf '%q' "$CONFIG")"; fi
  if ((${#OVERRIDES[@]} == 0)) || [[ "$(resolved)" == "$(resolved "${OVERRIDES[@]}")" ]]; then
    log "ready; next: $submit"
    return
  fi
  given="$(printf ' %q' "${OVERRIDES[@]}")"
  log "ready; the job reads $CONFIG: put these values there, or type next: $submit$given"
}

resolved() { run config --config "$CONFIG" "$@"; }

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then main "$@"; fi
