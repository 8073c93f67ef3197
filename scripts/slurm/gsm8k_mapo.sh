#!/usr/bin/env bash
# MAPO on GSM8K: `sbatch scripts/slurm/gsm8k_mapo.sh [section.key=value ...]`. Options of sbatch on the command line win
# over the lines below, variables of the environment over the settings. docs/slurm.md says what happens in which order.
#SBATCH --job-name=gsm8k_mapo
#SBATCH --nodes=2                 # 1 for training, 1 for the servers
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@900       # this long before the limit: one step (or evaluation) and one checkpoint must fit in
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out

MAPO_REPO=${MAPO_REPO:-}                                    # the checkout; empty: where this script is from
MAPO_CONFIG=${MAPO_CONFIG:-configs/gsm8k_mapo.yaml}         # relative to the checkout
MAPO_LAYOUT=${MAPO_LAYOUT:-disaggregated}                   # or colocated: all nodes train and serve
MAPO_SERVER_NODES=${MAPO_SERVER_NODES:-1}                   # of --nodes; each runs rollout.server.count servers
MAPO_TRAINERS_PER_NODE=${MAPO_TRAINERS_PER_NODE:-}          # empty: one a GPU; colocated: that the servers leave
MAPO_RESTARTS=${MAPO_RESTARTS:-2}                           # of crashed trainers, without leaving the queue
MAPO_START_TIMEOUT=${MAPO_START_TIMEOUT:-1800}              # seconds until the servers of all nodes must answer
MAPO_CONTAINER=${MAPO_CONTAINER:-}                          # pyxis:IMAGE or apptainer:IMAGE

# Slurm runs a copy of this file from a folder of its own; the job's record knows where it came from.
if [ -z "$MAPO_REPO" ]; then
  MAPO_REPO=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\)/scripts/slurm/.*|\1|p;T;q')
fi
source "$MAPO_REPO/megatron_mapo/launch/slurm_job.sh" || { echo "error: set MAPO_REPO to the checkout" >&2; exit 2; }
mapo_run "$@"
