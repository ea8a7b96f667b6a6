#!/usr/bin/env bash
#
# How the scripts ask Slurm. submit.sh, monitor.sh and job.sh read this file; nothing here is run by
# hand.
#
# Sites put banners around what Slurm's commands print, so every line that is asked for has a mark.

# squeue of a busy site takes some; where the controller is down, a minute and a half.
ANSWER_SECONDS="${ANSWER_SECONDS:-10}"

# What an outer job or a profile says to Slurm's commands: SQUEUE_STATES hides jobs, and
# SLURM_MEM_PER_CPU goes into a job and ends its srun. Only which Slurm it is stays.
forget_outer_slurm() {
  local name
  while read -r name; do
    case "$name" in
      SLURM_CONF | SLURM_CONF_SERVER | SLURM_CLUSTERS | SLURM_JWT) ;;
      SLURM_* | SBATCH_* | SALLOC_* | SRUN_* | SQUEUE_* | SINFO_* | SCONTROL_* | SCANCEL_*)
        unset "$name"
        ;;
    esac
  done < <(compgen -e)
}

# A command of Slurm, for not longer than it may take; where it fails, stdout says why.
ask() {
  local said code=0
  said="$(timeout --kill-after=1 "$ANSWER_SECONDS" "$@" 2>&1)" || code=$?
  case "$code" in
    0) printf '%s\n' "$said" ;;
    124 | 137) printf '%s\n' "$1 gave no answer in $ANSWER_SECONDS s${said:+: ${said##*$'\n'}}" ;;
    *) grep . <<<"$said" | tail -n 3 | tr '\n' ' ' | sed 's/ $//' ;; # a site's banners come first
  esac
  return "$code"
}

# Whether Slurm is worth asking: where no run was ever submitted, it knows of none.
has_jobs() {
  command -v squeue >/dev/null && grep -qs '"submitted"' "$TRAINSTACK_HOME"/runs/*/events.jsonl
}

# All jobs that Slurm shows and those that ended minutes ago, a line for each; see run/queue.py.
list_jobs() {
  local said
  said="$(ask squeue --noheader --states=all --format='job|%A|%T|%L|%r|%N|%l|%S')" || {
    printf '%s\n' "$said"
    return 1
  }
  grep '^job|' <<<"$said" || true
}

# A job that squeue has forgotten, as accounting knows it, in the same form; nothing without that.
recall_job() {
  local said id state code reason nodes
  command -v sacct >/dev/null || return 0
  said="$(ask sacct --allocations --noheader --parsable2 --jobs="$1" \
    --format=JobID,State,ExitCode,Reason,NodeList)" || return 0
  while IFS='|' read -r id state code reason nodes; do
    if [[ "$id" == "$1" ]]; then
      reason="${reason/#None/}"
      printf 'job|%s||%s|%s\n' "$id|${state%% *}" "${reason:+$reason, }exit code $code" "$nodes"
    fi
  done <<<"$said"
}

# What the nodes of each partition have, a line for each kind of node; see job/resources.py.
list_nodes() {
  local said
  said="$(ask sinfo --noheader --all --exact --format='node|%R|%P|%D|%c|%m|%G|%l|%s|%a|%t')" ||
    return 0 # sbatch says what is wrong
  grep '^node|' <<<"$said" || true
}
