#!/usr/bin/env bash
#
# Make the shared folders and the Python environment, and prove that it works.
#
# Usage: bash setup.sh [--check | --is-ready | --beside FILE]
#
#   --check         only tell what is here, in ten lines, and what to do next: exit 0 if ready, or 1
#   --is-ready      the same exit codes without the lines, for scripts
#   --beside FILE   install the requirements in FILE beside the environment, which stays as it is,
#                   and print their folder, for PYTHONPATH; tests and benchmarks use it
#
# Makes SHARED_DIR/PROJECT_NAME with venv, models, datasets, tokens and runs, installs the pins of
# requirements.txt, and writes env.sh beside this file, which the other scripts read. Run again, it
# changes nothing. If an install fails or is killed, the environment that was there stays in use.

[ "${BASH##*/}" = bash ] || exec bash "$0" "$@" # called as: sh setup.sh
set -euo pipefail

# --- Edit; each can also be set in the environment, of which the first two and MODULES then stay.
PROJECT_NAME="${PROJECT_NAME:-trainstack}"       # folder below SHARED_DIR
SHARED_DIR="${SHARED_DIR:-${HOME:-/tmp}/shared}" # on a file system that every node sees
ENV_TOOL="${ENV_TOOL:-venv}"                     # venv, uv or conda
MODULES="${MODULES:-}"                           # modules that jobs load too: "python/3.12"
MIN_FREE_GB="${MIN_FREE_GB:-10}"                 # environment: 1.5 GB, with CUDA 7; its cache: 3
WHEELS="${WHEELS:-}"                             # a folder of wheels, for a site without internet
TRACKERS="${TRACKERS:-}"                         # to install beside it: "wandb trackio"
# ------------------------------------------------------------------------------------------------

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
MIN_PYTHON="3.11" # transformers 5.23 needs it

usage() { sed -n '3,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" || true; } # nobody may read it
log() { printf 'setup.sh: %s\n' "$*" >&2; }
die() {
  log "error: $1"
  exit "${2:-1}"
}

main() {
  case "${1:-}" in
    -h | --help) usage && return ;;
    --check | --is-ready | "") ;;
    --beside)
      [[ -f "${2:-}" ]] || die "--beside needs a requirements file" 2
      check_settings
      is_ready || die "no environment yet; run: bash setup.sh"
      install_beside "$2"
      return
      ;;
    *) die "$1 is not an option; see bash setup.sh --help" 2 ;;
  esac
  check_settings
  case "${1:-}" in
    --check)
      tell_what_is_here || exit 1
      return
      ;;
    --is-ready)
      is_ready || exit 1
      # A SHARED_DIR that was set for one command stays with that command.
      [[ -f "$HERE/env.sh" ]] || write_env_file
      is_as_edited || die "setup.sh was edited since it ran last; run: bash setup.sh" 3
      return
      ;;
  esac
  load_modules
  if ! is_ready || ! have_trackers; then
    make_folders
    take_lock
    if ! is_ready; then # another setup.sh may have installed it meanwhile
      check_space
      install
    fi
    have_trackers install
  fi
  write_env_file
  log "ready: $(<"$VENV/.summary"), in $PROJECT_DIR"
}

# Whether all TRACKERS are installed; with "install", those that are missing are.
have_trackers() {
  local name
  for name in $TRACKERS; do
    if [[ "${1:-}" == install ]]; then
      install_beside "$HERE/requirements-$name.txt" >/dev/null
    else
      is_beside "$(beside "$HERE/requirements-$name.txt")" || return
    fi
  done
}

# The folder of the packages that a file names.
beside() {
  local sum
  sum="$(sha256sum <"$1")"
  printf '%s' "$PROJECT_DIR/cache/beside-${sum:0:12}"
}

# Whether they are there, for the Python of the environment.
is_beside() { [[ -f "$1/.ready" && "$(<"$1/.ready")" == "$("$VENV/bin/python" -V)" ]]; }

# Without dependencies: the environment of the runs has them, or the file names them.
install_beside() {
  local folder
  folder="$(beside "$1")"
  if ! is_beside "$folder"; then
    log "installing $1 into $folder"
    rm -rf "$folder" && mkdir -p "$folder"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
      ${WHEELS:+--no-index --find-links "$WHEELS"} --target "$folder" --requirement "$1" >&2 ||
      die "$1 could not be installed, the lines above say why; ${WHEELS:+look into WHEELS, or }run \
it where there is internet (a login node)"
    "$VENV/bin/python" -V >"$folder/.ready"
  fi
  printf '%s\n' "$folder"
}

# What the environment told an earlier setup.sh stays, until the edit block above says otherwise.
# A script that has read env.sh has them already, and need not load the modules twice.
# Sets: SHARED_DIR PROJECT_NAME MODULES
recall_settings() {
  local values=() exported
  [[ -z "${TRAINSTACK_HOME:-}" && -f "$HERE/env.sh" ]] && is_as_edited || return 0
  exported=" $(compgen -e | tr '\n' ' ')"
  mapfile -t values < <(tell_settings)
  ((${#values[@]} == 3)) || return 0
  [[ "$exported" == *" SHARED_DIR "* ]] || SHARED_DIR="${values[0]}"
  [[ "$exported" == *" PROJECT_NAME "* ]] || PROJECT_NAME="${values[1]}"
  [[ "$exported" == *" MODULES "* ]] || MODULES="${values[2]}"
}

# Those of env.sh, a line for each; in a shell of its own.
# Sets: SHARED_DIR PROJECT_NAME MODULES
tell_settings() {
  SHARED_DIR="" PROJECT_NAME="" MODULES=""
  # shellcheck source=/dev/null
  source "$HERE/env.sh"
  printf '%s\n' "$SHARED_DIR" "$PROJECT_NAME" "$MODULES"
}

# Sets: PROJECT_DIR VENV PINS
check_settings() {
  local sum
  recall_settings
  [[ "$SHARED_DIR" == /* && "$SHARED_DIR" != *$'\n'* ]] ||
    die "SHARED_DIR=$SHARED_DIR is not an absolute path; write one that starts with /" 2
  [[ "$PROJECT_NAME" =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] ||
    die "PROJECT_NAME=$PROJECT_NAME is not a plain folder name; use letters, digits, . _ -" 2
  [[ "$ENV_TOOL" =~ ^(venv|uv|conda)$ ]] ||
    die "ENV_TOOL=$ENV_TOOL is not known; write venv, uv or conda" 2
  [[ -z "$WHEELS" || -d "$WHEELS" ]] || die "WHEELS=$WHEELS is no folder; name one with wheels" 2
  [[ "$MIN_FREE_GB" =~ ^[0-9]+$ ]] ||
    die "MIN_FREE_GB=$MIN_FREE_GB is not a whole number; write for example 8" 2
  [[ " $TRACKERS " =~ ^(\ +(wandb|trackio))*\ +$ ]] ||
    die "TRACKERS=$TRACKERS is not known; write wandb, trackio, or both with a blank between" 2
  PROJECT_DIR="$SHARED_DIR/$PROJECT_NAME"
  VENV="$PROJECT_DIR/venv"
  sum="$(sha256sum <"$HERE/requirements.txt")"
  PINS="${sum:0:12}"
  # What installers keep is GBs, too much for the quota of many a home.
  export PIP_CACHE_DIR="${PIP_CACHE_DIR:-$PROJECT_DIR/cache/pip}"
  export UV_CACHE_DIR="${UV_CACHE_DIR:-$PROJECT_DIR/cache/uv}"
  export CONDA_PKGS_DIRS="${CONDA_PKGS_DIRS:-$PROJECT_DIR/cache/conda}"
  # Nothing of a person's own Python and pip gets in.
  unset PYTHONHOME PYTHONPATH PYTHONSTARTUP PYTHONUSERBASE PIP_TARGET PIP_PREFIX
  export PYTHONNOUSERSITE=1 PIP_USER=0
}

# Ready is what the last successful install wrote, as long as its Python still starts.
is_ready() {
  [[ -f "$VENV/.pins" && "$(<"$VENV/.pins")" == "$PINS" && -x "$VENV/bin/python" ]]
}

# The values of the edit block of this file, in twelve digits.
block_hash() {
  local sum
  sum="$(sed -n '/^# --- Edit/,/^# -\{20\}/s/^\([A-Z_]*=[^#]*\).*/\1/p' "$HERE/setup.sh" |
    tr -d ' ' | sha256sum)"
  printf '%s' "${sum:0:12}"
}

# Whether env.sh was written from the edit block as it is now; one from before has no mark.
is_as_edited() {
  local mark
  mark="$(sed -n 's/^# of the edit block //p' "$HERE/env.sh")"
  [[ -z "$mark" || "$mark" == "$(block_hash)" ]]
}

# Ten lines about this machine and this project; fails if the environment is not ready.
tell_what_is_here() {
  local ready="not there yet" next="bash setup.sh" submit="bash submit.sh" slurm=none name counts=""
  if is_ready; then
    ready="$(<"$VENV/.summary")"
  elif [[ -d "$PROJECT_DIR/.setup.lock" ]]; then
    ready="being installed by setup.sh ($(cat "$PROJECT_DIR/.setup.lock/owner"))"
  fi
  if command -v sinfo >/dev/null; then
    submit="bash download_data_model.sh, then bash submit.sh"
    unset SINFO_FORMAT SINFO_PARTITION
    slurm="$(timeout 10 sinfo --noheader --format='%P %D nodes, %c CPUs, %G each;' 2>&1 |
      tr '\n' ' ')" ||
      slurm="sinfo does not answer" submit="bash submit.sh --local"
  else
    submit+=" --local"
  fi
  for name in models datasets tokens; do
    counts+=", $(find "$PROJECT_DIR/$name" -maxdepth 4 -name manifest.json 2>/dev/null |
      wc -l) $name"
  done
  if is_ready; then next="$submit (the demo), or doc/bring-your-own.md"; fi
  if [[ -f "$HERE/env.sh" ]] && ! is_as_edited; then next="bash setup.sh (it was edited)"; fi
  printf '%-12s %s\n' project "$PROJECT_DIR" environment "$ready" \
    python "$(find_python || printf 'none >= %s; load one, or install uv' "$MIN_PYTHON")" \
    "GPUs here" "$(gpus_here)" slurm "$slurm" cores "$(env -u OMP_NUM_THREADS nproc)" \
    "space free" "$(free_gb) GB" holds "${counts#, }" next "$next"
  is_ready
}

gpus_here() {
  local said
  said="$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null |
    sort | uniq -c)"
  printf '%s' "${said:-none (login nodes often have none)}" | tr -s ' \n' ' '
}

# Of the disk on which the project lies or will.
free_gb() {
  local path="$PROJECT_DIR"
  while [[ ! -e "$path" ]]; do path="$(dirname "$path")"; done
  df -Pk "$path" | awk 'NR == 2 { printf "%d", $4 / 1000000 }'
}

load_modules() {
  [[ -n "$MODULES" ]] || return 0
  type module >/dev/null 2>&1 ||
    die "MODULES=$MODULES is set, but there is no module command here; clear it"
  # shellcheck disable=SC2086 # several modules are several words
  module load $MODULES || die "module load $MODULES failed; see module avail"
}

make_folders() {
  local name
  mkdir -p "$PROJECT_DIR" 2>/dev/null && [[ -w "$PROJECT_DIR" ]] ||
    die "SHARED_DIR=$SHARED_DIR cannot be written; choose another in setup.sh, or ask its owner"
  for name in "" cache models datasets tokens runs; do
    mkdir -p "$PROJECT_DIR/$name" || die "$PROJECT_DIR/$name cannot be made; look at its owner"
    # New files get the folder's group. Some file systems refuse the bit; nothing depends on it.
    if [[ -O "$PROJECT_DIR/$name" ]]; then
      chmod g+rwxs "$PROJECT_DIR/$name" 2>/dev/null || log "no setgid on $PROJECT_DIR/$name here"
    fi
  done
}

# One installer at a time. A folder: on some shared file systems flock does nothing.
# Sets: LOCK HEARTBEAT
take_lock() {
  LOCK="$PROJECT_DIR/.setup.lock"
  local me is_told=""
  me="$(uname -n) $$"
  until mkdir "$LOCK" 2>/dev/null; do
    if is_lock_stale; then
      mv "$LOCK" "$LOCK.stale.$$" 2>/dev/null && rm -rf "$LOCK.stale.$$"
      continue
    fi
    [[ -n "$is_told" ]] || log "waiting for another setup.sh ($(cat "$LOCK/owner" 2>/dev/null))"
    is_told=yes
    sleep 1
  done
  printf '%s\n' "$me" >"$LOCK/owner"
  trap 'kill "${HEARTBEAT:-}" 2>/dev/null || true; rm -rf "$LOCK"' EXIT
  trap 'log "stopped before the environment was ready; run it again"; exit 130' INT TERM
  local self=$$ report="$PROJECT_DIR/cache/setup.log" beat
  (
    trap - EXIT INT TERM
    for ((beat = 1; ; beat++)); do
      kill -0 "$self" 2>/dev/null && touch -c "$LOCK" 2>/dev/null || exit 0
      if ((beat % 5 == 0)); then
        log "$((beat * 5)) s so far: $(tail -n 1 "$report" 2>/dev/null | cut -c 1-60)"
      fi
      sleep 5 2>/dev/null
    done
  ) </dev/null >/dev/null &
  HEARTBEAT=$!
}

# Its owner died on this host, or another host has not touched it for two minutes.
is_lock_stale() {
  local host="" pid="" age
  read -r host pid 2>/dev/null <"$LOCK/owner" || true
  if [[ "$host" == "$(uname -n)" && -n "$pid" ]]; then
    if kill -0 "$pid" 2>/dev/null; then return 1; fi
    return 0
  fi
  age=$(($(date +%s) - $(stat -c %Y "$LOCK" 2>/dev/null || date +%s)))
  ((age > 120))
}

check_space() {
  local free need="needs $MIN_FREE_GB GB; free some, or choose another SHARED_DIR"
  free="$(free_gb)"
  ((free >= MIN_FREE_GB)) || die "$PROJECT_DIR has $free GB free, the environment $need"
}

# Build beside the environment in use, prove it, then replace the link: a rename, never half done.
install() {
  local new="$PROJECT_DIR/venv-$PINS-$$" report="$PROJECT_DIR/cache/setup.log"
  remove_leftovers
  log "no environment yet; installing into $VENV (about 2 minutes, 1.5 GB, more with CUDA)"
  : >"$report"
  create_environment "$new" "$report"
  install_pins "$new" "$report" || explain_failure "$report"
  prove "$new/bin/python" >"$new/.summary" 2>>"$report" ||
    die "the new environment does not import; see $report"
  printf '%s\n' "$PINS" >"$new/.pins"
  ln -s "${new##*/}" "$PROJECT_DIR/.venv.$$"
  mv -T "$PROJECT_DIR/.venv.$$" "$VENV"
}

# Imports what a run needs, and prints a summary.
prove() {
  "$1" - <<'EOF'
import platform
import torch, transformers, datasets
if torch.cuda.is_available():
    device = f"CUDA {torch.version.cuda}, {torch.cuda.device_count()} GPUs"
elif torch.version.cuda:
    device = f"CUDA {torch.version.cuda}, no GPU on this machine"
else:
    device = "CPU build"
print(f"Python {platform.python_version()}, torch {torch.__version__}, "
      f"transformers {transformers.__version__}, {device}")
EOF
}

# Unfinished environments of earlier installs, and finished ones but the newest: it may be in use.
remove_leftovers() {
  local path current
  current="$(readlink "$VENV" || true)"
  for path in "$PROJECT_DIR"/venv-*; do
    [[ -d "$path" && "${path##*/}" != "$current" ]] || continue
    rm -rf "$path"
  done
}

create_environment() {
  local new="$1" report="$2" python="" found
  python="$(find_python)" || true
  case "$ENV_TOOL" in
    venv)
      if [[ -n "$python" ]]; then
        "$python" -m venv "$new" >>"$report" 2>&1 ||
          die "$python -m venv failed (see $report); install python3-venv, or set ENV_TOOL=uv"
      elif command -v uv >/dev/null; then
        with_uv "$new" "$report"
      elif find_conda >/dev/null; then
        with_conda "$new" "$report"
      else
        found="no Python >= $MIN_PYTHON here (python3 is $(python_version python3))"
        die "$found; load one (module load python), put it in MODULES, or install uv"
      fi
      ;;
    uv)
      command -v uv >/dev/null ||
        die "ENV_TOOL=uv, but uv is not on the PATH; install it, or set ENV_TOOL=venv"
      with_uv "$new" "$report"
      ;;
    conda)
      find_conda >/dev/null ||
        die "ENV_TOOL=conda, but neither conda nor mamba is on the PATH; load its module"
      with_conda "$new" "$report"
      ;;
  esac
}

find_python() {
  local candidate
  for candidate in python3 python3.13 python3.12 python3.11 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  return 1
}

python_version() {
  "$1" -c 'import platform; print(platform.python_version())' 2>/dev/null || printf 'not there'
}

find_conda() { command -v mamba || command -v conda || command -v micromamba; }

with_uv() {
  log "taking Python from uv"
  uv venv --seed --python ">=$MIN_PYTHON,<3.14" "$1" >>"$2" 2>&1 || explain_failure "$2"
}

with_conda() {
  local conda
  conda="$(find_conda)"
  log "taking Python from ${conda##*/}"
  "$conda" create --yes --prefix "$1" "python>=$MIN_PYTHON,<3.14" pip >>"$2" 2>&1 ||
    explain_failure "$2"
}

install_pins() {
  local pip=("$1/bin/python" -m pip install --disable-pip-version-check --no-input)
  if [[ "$ENV_TOOL" == uv ]]; then
    # Else a thousand ranks would compile; a busy disk is no error.
    export UV_COMPILE_BYTECODE_TIMEOUT="${UV_COMPILE_BYTECODE_TIMEOUT:-0}"
    pip=(uv pip install --compile-bytecode --python "$1/bin/python")
  fi
  "${pip[@]}" ${WHEELS:+--no-index --find-links "$WHEELS"} \
    --requirement "$HERE/requirements.txt" >>"$2" 2>&1
}

explain_failure() {
  local fix="run setup.sh where there is internet (a login node)"
  local no_network='name resolution|connection (refused|reset|error)|network is unreachable'
  no_network+='|max retries|ProxyError|timed out|dns error'
  tail -n 5 "$1" | sed 's/^/    /' >&2
  if grep -qiE "$no_network" "$1"; then
    fix+=", or set PIP_INDEX_URL to your site's mirror, or WHEELS to a folder filled elsewhere by:"
    die "the package index cannot be reached; $fix pip download -r requirements.txt -d FOLDER"
  elif grep -qi 'quota exceeded' "$1"; then
    die "a quota is used up; free some space, or move PIP_CACHE_DIR=$PIP_CACHE_DIR or TMPDIR"
  elif grep -qi 'no space left' "$1"; then
    die "the disk of $PROJECT_DIR is full; free some space and run setup.sh again"
  fi
  die "installing failed, its last lines are above, all of it is in $1; fix that, then run setup.sh"
}

# The environment wins over env.sh, so that SHARED_DIR=/elsewhere bash submit.sh works.
write_env_file() {
  local text temporary="$HERE/.env.sh.$$"
  text="# Written by setup.sh; sourced by the other scripts.
# of the edit block $(block_hash)
[ -n \"\${SHARED_DIR:-}\" ] || SHARED_DIR=$(printf '%q' "$SHARED_DIR")
[ -n \"\${PROJECT_NAME:-}\" ] || PROJECT_NAME=$(printf '%q' "$PROJECT_NAME")
[ -n \"\${MODULES:-}\" ] || MODULES=$(printf '%q' "$MODULES")
export SHARED_DIR PROJECT_NAME MODULES
export TRAINSTACK_HOME=\"\$SHARED_DIR/\$PROJECT_NAME\"
export TRAINSTACK_PYTHON=\"\$TRAINSTACK_HOME/venv/bin/python\"
unset PYTHONHOME PYTHONSTARTUP PYTHONUSERBASE
export PYTHONNOUSERSITE=1
if [ -n \"\$MODULES\" ]; then
  type module >/dev/null 2>&1 || {
    echo \"env.sh: error: MODULES=\$MODULES, and no module here; run: MODULES= bash setup.sh\" >&2
    return 1
  }
  module load \$MODULES
fi"
  [[ ! -f "$HERE/env.sh" || "$(<"$HERE/env.sh")" != "$text" ]] || return 0
  printf '%s\n' "$text" 2>/dev/null >"$temporary" || {
    [[ -f "$HERE/env.sh" ]] && return 0 # a read-only checkout that was set up before
    die "$HERE cannot be written; env.sh belongs there"
  }
  if [[ -f "$HERE/env.sh" ]]; then log "from now on all scripts use $PROJECT_DIR"; fi
  mv "$temporary" "$HERE/env.sh"
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then main "$@"; fi
