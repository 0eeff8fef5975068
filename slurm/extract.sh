#!/usr/bin/env bash
# Cut tasks out of a trained run, each into RUN/extracted/TASK; as an array one in each of its tasks.
#
#   sbatch --array=0-1 slurm/extract.sh runs/mine digits glyphs
#   sbatch slurm/extract.sh runs/mine digits -- --verify          # what follows -- goes to ufo extract
#
#SBATCH --job-name=ufo-extract
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
((${#arguments[@]} > 1)) || fail "${*:-nothing}: give RUN TASK..."
run=${arguments[0]}
mine "${arguments[@]:1}"
for task in "${items[@]}"; do
    if ((${SLURM_RESTART_COUNT:-0} > 0)) && [[ -e $run/extracted/$task ]]; then
        continue # done before this job was in the queue again
    fi
    ${container[@]+"${container[@]}"} ufo extract "$run" --task "$task" --out "$run/extracted/$task" \
        ${options[@]+"${options[@]}"}
done
