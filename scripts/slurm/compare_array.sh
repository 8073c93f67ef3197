#!/usr/bin/env bash
# The same task with several algorithms and seeds, one run an array task on one node (it trains and serves):
# `sbatch scripts/slurm/compare_array.sh [section.key=value ...]`. Runs are named CONFIG-seedN. See gsm8k_mapo.sh.
# Afterwards `megatron-mapo compare --runs runs/gsm8k_grpo-seed* runs/gsm8k_mapo-seed*` (docs/compare.md).
#SBATCH --job-name=compare
#SBATCH --array=0-5               # number of configurations x number of seeds, from 0
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%A_%a.out

CONFIGS=(${MAPO_CONFIGS:-configs/gsm8k_mapo.yaml configs/gsm8k_grpo.yaml})
SEEDS=(${MAPO_SEEDS:-0 1 2})

MAPO_REPO=${MAPO_REPO:-}
MAPO_LAYOUT=colocated
MAPO_TRAINERS_PER_NODE=${MAPO_TRAINERS_PER_NODE:-4}
MAPO_RESTARTS=${MAPO_RESTARTS:-2}
MAPO_CONTAINER=${MAPO_CONTAINER:-}

# Slurm runs a copy of this file from a folder of its own; the job's record knows where it came from.
if [ -z "$MAPO_REPO" ]; then
  MAPO_REPO=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\)/scripts/slurm/.*|\1|p;T;q')
fi
source "$MAPO_REPO/megatron_mapo/launch/slurm_job.sh" || { echo "error: set MAPO_REPO to the checkout" >&2; exit 2; }

[ "$SLURM_ARRAY_TASK_ID" -lt $((${#CONFIGS[@]} * ${#SEEDS[@]})) ] ||
  mapo_fail 2 "--array goes beyond ${#CONFIGS[@]} configurations x ${#SEEDS[@]} seeds"
MAPO_CONFIG=${CONFIGS[SLURM_ARRAY_TASK_ID / ${#SEEDS[@]}]}
SEED=${SEEDS[SLURM_ARRAY_TASK_ID % ${#SEEDS[@]}]}
mapo_run "run.name=$(basename "$MAPO_CONFIG" .yaml)-seed$SEED" "run.seed=$SEED" "$@"
