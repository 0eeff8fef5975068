#!/usr/bin/env bash
# A real Slurm of two virtual nodes on this machine, for trying the scripts of this directory and for `make test-slurm`.
#
#   slurm/local_cluster.sh start [--install]    # --install: Debian's packages of Slurm and munge, where they are missing
#   eval "$(slurm/local_cluster.sh env)"        # what makes sbatch, squeue and scontrol of this shell talk to it
#   slurm/local_cluster.sh status
#   slurm/local_cluster.sh stop
#   slurm/local_cluster.sh node stop n2         # as if that machine died: its daemon and all its tasks
#   slurm/local_cluster.sh node start n2
#
# To be run as root. It lives in $UFO_CLUSTER (default: /tmp/ufo-slurm-UID), listens on ports $UFO_CLUSTER_PORT (17000)
# to +2, and has a munge of its own: nothing of this machine's configuration is touched.
set -euo pipefail

directory=${UFO_CLUSTER:-/tmp/ufo-slurm-$(id -u)}
port=${UFO_CLUSTER_PORT:-17000}
nodes=(n1 n2)
export SLURM_CONF=$directory/slurm.conf
PATH=$PATH:/usr/sbin:/sbin

fail() {
    echo "error: $*" >&2
    exit 2
}

need_programs() {
    local missing=() program
    for program in munged munge slurmctld slurmd sbatch srun; do
        command -v "$program" > /dev/null || missing+=("$program")
    done
    ((${#missing[@]})) || return 0
    [[ $1 == --install ]] || fail "${missing[*]} not found: install Slurm, or let this script: $0 start --install (Debian)"
    apt-get update -qq
    # Installing starts no daemon: the cluster is the one configured here alone.
    local no_start=/usr/sbin/policy-rc.d made=0
    [[ -e $no_start ]] || { printf '#!/bin/sh\nexit 101\n' > $no_start && chmod +x $no_start && made=1; }
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge
    ((made == 0)) || rm $no_start
}

configure() {
    mkdir -p "$directory/state"
    chmod 755 "$directory"
    [[ -e $directory/munge.key ]] || (umask 077 && head -c 1024 /dev/urandom > "$directory/munge.key")
    local host
    host=$(hostname)
    cat > "$SLURM_CONF" << END
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until what the nodes were told of its last start has expired: 120 s elsewhere.
AuthInfo=socket=$directory/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
JobRequeue=1
ReturnToService=2
SlurmdTimeout=10
KillWait=20
MinJobAge=3600
StateSaveLocation=$directory/state
SlurmdSpoolDir=$directory/spool-%n
SlurmctldPidFile=$directory/slurmctld.pid
SlurmdPidFile=$directory/slurmd-%n.pid
SlurmctldLogFile=$directory/slurmctld.log
SlurmdLogFile=$directory/slurmd-%n.log
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=16 Gres=gpu:2 RealMemory=64000 State=UNKNOWN
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=16 Gres=gpu:2 RealMemory=64000 State=UNKNOWN
PartitionName=virtual Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
END
    # GPUs by name alone, for what jobs ask for: any two devices will do.
    printf 'NodeName=n[1-2] Name=gpu File=%s\n' /dev/null /dev/zero > "$directory/gres.conf"
}

# Of a daemon's pid file: the process it names, where that one runs and is this program.
process_of() {
    local pid
    pid=$(cat "$directory/$1.pid" 2> /dev/null) || return 1
    [[ $(readlink "/proc/$pid/exe") == */"${1%%-*}"* ]] && echo "$pid" # a zombie has no such link
}

end() {
    local pid
    pid=$(process_of "$1") || return 0
    kill "$pid" 2> /dev/null || return 0
    for _ in {1..50}; do
        process_of "$1" > /dev/null || return 0
        sleep 0.1
    done
    kill -9 "$pid" 2> /dev/null || true
}

start_node() {
    process_of "slurmd-$1" > /dev/null || slurmd -N "$1"
}

# The daemon and every step daemon of the node with all below them, at once and without a farewell.
kill_node() {
    local pid
    for pid in $(process_of "slurmd-$1") $(steps_of "$1"); do
        kill_tree "$pid"
    done
}

steps_of() {
    local entry
    for entry in /proc/[0-9]*; do
        [[ $(cat "$entry/comm" 2> /dev/null) == slurmstepd ]] || continue
        # It writes into the log of its node's daemon.
        readlink "$entry"/fd/* 2> /dev/null | grep -qx "$directory/slurmd-$1.log" || continue
        echo "${entry#/proc/}"
    done
}

kill_tree() {
    local child children
    kill -STOP "$1" 2> /dev/null || return 0
    read -r -a children <<< "$(cat "/proc/$1/task/"*/children 2> /dev/null)"
    for child in "${children[@]}"; do
        kill_tree "$child"
    done
    kill -KILL "$1" 2> /dev/null || true
}

wait_until_idle() {
    local node
    for _ in {1..100}; do
        local idle=0
        for node in "${nodes[@]}"; do
            [[ $(sinfo -h -N -n "$node" -o %T 2> /dev/null) == idle ]] && idle=$((idle + 1))
        done
        ((idle < ${#nodes[@]})) || return 0
        sleep 0.1
    done
    fail "the nodes did not come up within 10 s: see $directory/slurmctld.log and slurmd-n1.log"
}

start() {
    need_programs "${1:-}"
    [[ $(id -u) == 0 ]] || fail "started by $(id -un): Slurm's daemons start tasks as root here: run as root (sudo $0 start)"
    if process_of slurmctld > /dev/null; then
        fail "a cluster runs in $directory already: stop it first, or use another UFO_CLUSTER and UFO_CLUSTER_PORT"
    fi
    configure
    # Before Slurm: a slurmd started without it hangs. --force: directories that others may read do for a test.
    process_of munged > /dev/null || munged --force --key-file="$directory/munge.key" \
        --socket="$directory/munge.socket" --pid-file="$directory/munged.pid" --log-file="$directory/munged.log" \
        --seed-file="$directory/munged.seed" 2> /dev/null
    slurmctld -c
    for node in "${nodes[@]}"; do start_node "$node"; done
    wait_until_idle
    echo "two nodes, n1 and n2, in $directory: in your shell   eval \"\$($0 env)\"   then sbatch, squeue, sinfo"
}

stop() {
    if process_of slurmctld > /dev/null; then
        local jobs
        mapfile -t jobs < <(squeue -h -o %A | sort -u)
        ((${#jobs[@]} == 0)) || scancel --signal=KILL --full "${jobs[@]}" 2> /dev/null || true
        ((${#jobs[@]} == 0)) || scancel "${jobs[@]}" 2> /dev/null || true
        for _ in {1..100}; do
            [[ -n $(squeue -h 2> /dev/null) ]] || break
            sleep 0.1
        done
    fi
    for node in "${nodes[@]}"; do kill_node "$node"; done
    end slurmctld
    end munged
    rm -rf "$directory"
    echo "stopped"
}

case ${1:-} in
    start) start "${2:-}" ;;
    stop) stop ;;
    status)
        process_of slurmctld > /dev/null || fail "no cluster runs in $directory: start one with $0 start"
        sinfo -N -o '%N %T'
        squeue
        ;;
    env) printf 'export SLURM_CONF=%q\n' "$SLURM_CONF" ;;
    node)
        [[ " ${nodes[*]} " == *" ${3:-} "* ]] || fail "node ${3:-}: use one of ${nodes[*]}"
        case ${2:-} in
            start) start_node "$3" ;;
            stop) kill_node "$3" ;;
            *) fail "node ${2:-}: use start or stop" ;;
        esac
        ;;
    *) fail "${1:-nothing}: use $0 start [--install] | stop | status | env | node start|stop NAME" ;;
esac
