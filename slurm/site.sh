# shellcheck shell=bash disable=SC2034
# The one place for what differs between clusters: every script of this directory reads it. Or leave it as it is, and
# name a file of your own: export UFO_SITE=~/my_site.sh

# Where jobs go. sbatch itself reads these variables, so source this file before `sbatch` by hand (pipeline.sh does).
# export SBATCH_PARTITION=gpu SBATCH_ACCOUNT=vision SBATCH_QOS=normal

# What a node needs before Python runs.
# module load cuda/12.8

# What goes before every command, for an environment in a container.
container=()
# container=(apptainer exec --nv --bind /data "$HOME/ufo_ds.sif")

# The environment with ufo_ds; the one of `make install`, where it is there.
if [[ -d $UFO_HOME/.venv/bin ]]; then
    PATH=$UFO_HOME/.venv/bin:$PATH
fi

# How often a job may start again from the same checkpoint, having saved nothing new, before it gives up.
max_restarts=${UFO_MAX_RESTARTS:-3}

# The signal that warns a training; the same as in sbatch's --signal, which train.sh sets to B:USR1@180.
warning_signal=${UFO_WARNING_SIGNAL:-USR1}
