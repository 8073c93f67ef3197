#!/usr/bin/env bash
# MAPO on GSM8K as a heterogeneous job: `sbatch scripts/slurm/gsm8k_mapo_hetjob.sh [section.key=value ...]`. Component 0
# trains, component 1 serves; they may be in different partitions, with different GPUs. See gsm8k_mapo.sh.
#SBATCH --job-name=gsm8k_mapo_hetjob
##SBATCH --partition=train        # the trainers'; remove one #, or sbatch --partition=train : --partition=serve ...
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
#SBATCH hetjob
##SBATCH --partition=serve        # the servers'
#SBATCH --nodes=1
#SBATCH --gpus-per-node=4
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive

MAPO_REPO=${MAPO_REPO:-}
MAPO_CONFIG=${MAPO_CONFIG:-configs/gsm8k_mapo.yaml}
MAPO_TRAINERS_PER_NODE=${MAPO_TRAINERS_PER_NODE:-}
MAPO_RESTARTS=${MAPO_RESTARTS:-2}
MAPO_CONTAINER=${MAPO_CONTAINER:-}

# Slurm runs a copy of this file from a folder of its own; the job's record knows where it came from.
if [ -z "$MAPO_REPO" ]; then
  MAPO_REPO=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\)/scripts/slurm/.*|\1|p;T;q')
fi
source "$MAPO_REPO/megatron_mapo/launch/slurm_job.sh" || { echo "error: set MAPO_REPO to the checkout" >&2; exit 2; }
mapo_run "$@"
