#!/usr/bin/env bash
# Write the report of a run, RUN/report.html, and say how the run went.
#
#   sbatch slurm/report.sh runs/mine
#   sbatch slurm/report.sh runs/mine runs/before -- --out both.html    # what follows -- goes to ufo report
#
#SBATCH --job-name=ufo-report
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail

home=${UFO_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
# shellcheck source=slurm/begin.sh
source "$home/slurm/begin.sh" || { echo "error: no slurm/begin.sh in $home: submit from the repository, or set UFO_HOME" >&2; exit 2; }

split "$@"
((${#arguments[@]})) || fail "give RUN..."
${container[@]+"${container[@]}"} ufo report "${arguments[@]}" ${options[@]+"${options[@]}"}
${container[@]+"${container[@]}"} ufo status "${arguments[0]}"
