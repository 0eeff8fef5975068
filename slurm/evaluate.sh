#!/usr/bin/env bash
# Run benchmarks; as an array one subject in each of its tasks.
#
#   sbatch --array=0-1 slurm/evaluate.sh runs/mine/extracted/digits runs/mine/extracted/glyphs    # models, or runs
#   sbatch --array=0-9%4 slurm/evaluate.sh --run runs/mine small-{0..9}.json    # subnets of a run; or names of its tasks
#   sbatch slurm/evaluate.sh runs/mine -- --pixels                              # what follows -- goes to ufo evaluate
#
#SBATCH --job-name=ufo-evaluate
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
run=
if [[ ${arguments[0]:-} == --run ]]; then
    run=${arguments[1]:-}
    arguments=("${arguments[@]:2}")
fi
((${#arguments[@]})) || fail "${*:-nothing}: give MODEL..., or --run RUN and TASK... or SPEC.json..."
mine "${arguments[@]}"
for item in "${items[@]}"; do
    case $run:$item in
        :*) subject=("$item") ;;
        *.json) subject=("$run" --spec "$item") ;;
        *) subject=("$run" --task "$item") ;;
    esac
    ${container[@]+"${container[@]}"} ufo evaluate "${subject[@]}" ${options[@]+"${options[@]}"}
done
