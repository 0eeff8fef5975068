#!/usr/bin/env bash
# Submit everything at once: train, then cut every task out, evaluate what was cut out, and write the report.
#
#   slurm/pipeline.sh --recipe mine.yaml --run_dir runs/mine
#   slurm/pipeline.sh --nodes=4 --gpus-per-node=8 --cpus-per-gpu=8 --time=24:00:00 -- --recipe mine.yaml --run_dir runs/mine
#
# What stands before -- goes to sbatch for the training alone; what follows it to train.py. UFO_HELPERS holds options of
# sbatch for the other jobs, such as "--gpus=1 --time=1:00:00". Where a job fails, those that wait for it are cancelled;
# submitted again, training goes on where it was.
set -euo pipefail

UFO_HOME=${UFO_HOME:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
export UFO_HOME
# shellcheck source=slurm/begin.sh
source "$UFO_HOME/slurm/begin.sh"

sbatch_options=()
if [[ " $* " == *" -- "* ]]; then
    split "$@"
    sbatch_options=(${arguments[@]+"${arguments[@]}"})
    set -- ${options[@]+"${options[@]}"}
fi
training "$@"
read -r -a of_helpers <<< "${UFO_HELPERS:-}"

# A wrong recipe is refused here, before anything is submitted.
found=$(${container[@]+"${container[@]}"} ufo train --list_tasks "${arguments[@]}") || exit 2
mapfile -t tasks <<< "$found"
models=("${tasks[@]/#/$run_dir/extracted/}")
for model in "${models[@]}"; do
    [[ ! -e $model ]] || fail "$model exists, from an extraction before: delete it, and submit again"
done

submit() {
    sbatch --parsable --kill-on-invalid-dep=yes "$@"
}
array=0-$((${#tasks[@]} - 1))
train=$(submit ${sbatch_options[@]+"${sbatch_options[@]}"} "$UFO_HOME/slurm/train.sh" "${arguments[@]}")
trap 'scancel "$train"; fail "not all could be submitted (see above): job $train is cancelled"' ERR
extract=$(submit ${of_helpers[@]+"${of_helpers[@]}"} --dependency="afterok:$train" --array="$array" --output=%x-%A_%a.out \
    "$UFO_HOME/slurm/extract.sh" "$run_dir" "${tasks[@]}" -- --verify)
evaluate=$(submit ${of_helpers[@]+"${of_helpers[@]}"} --dependency="aftercorr:$extract" --array="$array" --output=%x-%A_%a.out \
    "$UFO_HOME/slurm/evaluate.sh" "${models[@]}")
report=$(submit ${of_helpers[@]+"${of_helpers[@]}"} --dependency="afterok:$evaluate" "$UFO_HOME/slurm/report.sh" "$run_dir")

cat << END
train     $train    ufo-train-$train.out; ufo status $(printf %q "$run_dir")
extract   $extract    ufo-extract-${extract}_*.out; models in $run_dir/extracted: ${tasks[*]}
evaluate  $evaluate    ufo-evaluate-${evaluate}_*.out
report    $report    $run_dir/report.html
all of them: squeue --jobs=$train,$extract,$evaluate,$report; to stop: scancel $train (the others then go too)
END
