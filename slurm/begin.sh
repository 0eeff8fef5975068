# shellcheck shell=bash disable=SC2034
# Read by every job script: finds the repository (sbatch runs a copy of the script, from somewhere else), then the site.
UFO_HOME=${UFO_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
export UFO_HOME

fail() {
    echo "error: $*" >&2
    exit 2
}

# shellcheck source=slurm/site.sh
source "${UFO_SITE:-$UFO_HOME/slurm/site.sh}"

# patiently COMMAND...: again where it fails. A controller that has much to do drops a connection now and then.
patiently() {
    local _
    for _ in {1..5}; do
        "$@" && return
        sleep 10
    done
    fail "$*: refused five times, see above"
}

# mine ITEM...: into ${items[@]}, the one of this task of an array, or all where the job is none
mine() {
    items=("$@")
    if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
        ((SLURM_ARRAY_TASK_ID < $#)) || fail "--array $SLURM_ARRAY_TASK_ID: there are $# to do, numbered from 0"
        items=("${items[SLURM_ARRAY_TASK_ID]}")
    fi
}

# split ARGUMENT... [-- OPTION...]: into ${arguments[@]} and ${options[@]}.
split() {
    arguments=() options=()
    while (($#)) && [[ $1 != -- ]]; do
        arguments+=("$1")
        shift
    done
    (($# == 0)) || options=("${@:2}")
}

# option --NAME DEFAULT ARGUMENT...: the last value of an option among arguments
option() {
    local name=$1 value=$2
    shift 2
    while (($#)); do
        case $1 in
            "$name") value=${2:-} ;;
            "$name"=*) value=${1#*=} ;;
        esac
        shift
    done
    echo "$value"
}

# What is trained, how it is spread and where: ${arguments[@]}, those of train.py with what they leave to the environment,
# and the run's directory.
training() {
    local recipe name
    recipe=$(option --recipe "${UFO_RECIPE:-demo}" "$@")
    name=${recipe##*/}
    run_dir=$(option --run_dir "${UFO_RUN_DIR:-runs/${name%.y*ml}}" "$@")
    arguments=("$@" --recipe "$recipe" --run_dir "$run_dir")
    [[ " $*" == *" --deepspeed"* ]] || arguments+=(--deepspeed "${UFO_DEEPSPEED:-$UFO_HOME/ds_configs/moe.json}")
}
