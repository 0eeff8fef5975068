#!/usr/bin/env bash
# Train a recipe on any number of nodes, through preemptions, time limits and nodes that fail.
#
#   sbatch slurm/train.sh --recipe mine.yaml --run_dir runs/mine
#   sbatch --nodes=4 --gpus-per-node=8 --cpus-per-gpu=8 --time=24:00:00 slurm/train.sh --recipe mine.yaml
#   sbatch --nodes=1-4 ...                 # goes on with as many of these nodes as there are
#   sbatch --nodes=2 --ntasks-per-node=2 ...     # without GPUs; with them there is a task for each
#
# From the repository, or with UFO_HOME set to it. The arguments are those of train.py; UFO_RECIPE, UFO_DEEPSPEED and
# UFO_RUN_DIR are for where none are given. Status 0: trained; 2: wrong input, one line says which; 1: given up.
#
#SBATCH --job-name=ufo-train
#SBATCH --nodes=1
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail

home=${UFO_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
# shellcheck source=slurm/begin.sh
source "$home/slurm/begin.sh" || { echo "error: no slurm/begin.sh in $home: submit from the repository, or set UFO_HOME" >&2; exit 2; }

[[ -n ${SLURM_JOB_ID:-} ]] || fail "not started by Slurm: sbatch $0 $*"
training "$@"
warned=0 step=
warn() {
    warned=1
    [[ -z $step ]] || pass_on
}
trap warn "$warning_signal"

# The step of the newest checkpoint; a pattern comes sorted.
saved() {
    local path step=0
    for path in "$run_dir"/checkpoints/step-*/index.json; do
        [[ -e $path ]] || continue
        path=${path%/index.json}
        step=$((10#${path##*/step-}))
    done
    echo "$step"
}

# From which step each restart of this job went on.
restarts=$run_dir/.restarts-$SLURM_JOB_ID
in_vain() {
    tac "$restarts" 2> /dev/null | awk -v step="$(saved)" '$1 != step { exit } { count++ } END { print count + 0 }'
}
if ((${SLURM_RESTART_COUNT:-0} > 0)); then
    mkdir -p "$run_dir"
    saved >> "$restarts"
    echo "restart $SLURM_RESTART_COUNT of job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, from step $(saved)"
    if (($(in_vain) > max_restarts)); then
        echo "error: $max_restarts restarts without a checkpoint after step $(saved): given up; see above for the cause" >&2
        exit 1
    fi
fi

# Where the ranks meet: rank 0 is on the first node, at the address that Slurm itself uses.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(patiently scontrol show node "$first" --oneliner | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000)) # below the ports that systems hand out
export MASTER_ADDR MASTER_PORT

tasks=${SLURM_NTASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}} # of a node
ranks=$((SLURM_JOB_NUM_NODES * tasks))
((${SLURM_NTASKS:-$ranks} == ranks)) ||
    fail "--ntasks=$SLURM_NTASKS on $SLURM_JOB_NUM_NODES nodes: say how many on each, as --ntasks-per-node=N"
((SLURM_CPUS_ON_NODE >= tasks)) ||
    fail "CPUs of a node: $SLURM_CPUS_ON_NODE, for $tasks ranks: add --cpus-per-gpu=N to sbatch's options"
threads=${SLURM_CPUS_PER_TASK:-}
[[ -z $threads ]] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads} SRUN_CPUS_PER_TASK=$threads

# srun ends with the largest status of its ranks, also of those that it ended itself: the first one's says what it was.
# Its shell waits for it through the signals, which all processes of a step get.
status_of_first=$(mktemp)
trap 'rm -f "$status_of_first"' EXIT
# shellcheck disable=SC2016
rank='trap : TERM "$2"; file=$1; shift 2; status=0; "$@" || status=$?
[[ $SLURM_PROCID != 0 ]] || echo "$status" > "$file"; exit "$status"'

# Again and again: srun may not have started them all yet.
pass_on() {
    echo "warned: $warning_signal goes to all ranks"
    while kill -0 "$step" 2> /dev/null; do
        scancel --signal="$warning_signal" "$SLURM_JOB_ID.0" 2> /dev/null || true
        sleep 10
    done &
}

srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$ranks" --ntasks-per-node="$tasks" \
    --kill-on-bad-exit=1 \
    bash -c "$rank" rank "$status_of_first" "$warning_signal" \
    ${container[@]+"${container[@]}"} python "$UFO_HOME/ufo_ds/train.py" "${arguments[@]}" \
    --warning_signal "$warning_signal" &
step=$!
((warned == 0)) || pass_on
# Of a node that died and was soon back srun never hears that its ranks are gone.
(
    while [[ ! -s $status_of_first ]]; do sleep 5; done
    for _ in {1..18}; do sleep 5; done
    echo "srun waits for ranks that are gone: ended, 90 s after the first rank has left"
    kill -KILL "$step"
) &
watch=$!
status=0
wait "$step" 2> /dev/null || status=$?
while kill -0 "$step" 2> /dev/null; do # the wait was over because the signal came
    status=0
    wait "$step" 2> /dev/null || status=$?
done
kill "$watch" 2> /dev/null || true
[[ ! -s $status_of_first ]] || status=$(cat "$status_of_first")

case $status in
    0)
        rm -f "$restarts"
        exit 0
        ;;
    2) exit 2 ;;
    75) echo "job $SLURM_JOB_ID: saved step $(saved), in the queue again" ;;
    *)
        if (($(in_vain) >= max_restarts)); then
            echo "error: status $status, after $max_restarts restarts without a checkpoint after step $(saved): given up" >&2
            exit 1
        fi
        reason="status $status"
        ((warned == 0)) || reason="warned before it could save"
        echo "job $SLURM_JOB_ID: $reason, in the queue again; the last checkpoint is of step $(saved)"
        ;;
esac
patiently scontrol requeue "$SLURM_JOB_ID"
