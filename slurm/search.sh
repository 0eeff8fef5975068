#!/usr/bin/env bash
# Search subnets of an elastic run, of each task into RUN/search/TASK; as an array one task in each of its tasks.
#
#   sbatch --array=0-1 --time=4:00:00 slurm/search.sh runs/mine digits glyphs -- --limit parameters=4e6
#
# What follows -- goes to ufo search. Warned of its time limit a job stops and is in the queue again, to go on behind the
# subnets that it has evaluated.
#
#SBATCH --job-name=ufo-search
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail

home=${UFO_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
# shellcheck source=slurm/begin.sh
source "$home/slurm/begin.sh" || { echo "error: no slurm/begin.sh in $home: submit from the repository, or set UFO_HOME" >&2; exit 2; }

split "$@"
((${#arguments[@]} > 1)) || fail "${*:-nothing}: give RUN TASK..."
run=${arguments[0]}
mine "${arguments[@]:1}"

evaluated() {
    local task
    for task in "${items[@]}"; do
        cat "$run/search/$task/evaluations.jsonl" 2> /dev/null || true
    done | wc -l
}
before=$(evaluated)
warn() {
    kill "$search" 2> /dev/null || true
    wait "$search" || true
    (($(evaluated) > before)) || fail "warned before one subnet was evaluated: give the job more time"
    echo "job $SLURM_JOB_ID: $(evaluated) subnets evaluated so far, in the queue again"
    patiently scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
for task in "${items[@]}"; do
    mkdir -p "$run/search"
    ${container[@]+"${container[@]}"} ufo search "$run" --task "$task" --out "$run/search/$task" \
        ${options[@]+"${options[@]}"} &
    search=$!
    trap warn "$warning_signal"
    wait "$search"
done
