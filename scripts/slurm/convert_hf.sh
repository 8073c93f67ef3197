#!/usr/bin/env bash
# A Hugging Face folder from a checkpoint: `sbatch scripts/slurm/convert_hf.sh RUN OUT [--step N]`.
# Relative paths start at the checkout. See gsm8k_mapo.sh.
#SBATCH --job-name=convert_hf
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out

MAPO_REPO=${MAPO_REPO:-}
MAPO_CONTAINER=${MAPO_CONTAINER:-}

# Slurm runs a copy of this file from a folder of its own; the job's record knows where it came from.
if [ -z "$MAPO_REPO" ]; then
  MAPO_REPO=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\)/scripts/slurm/.*|\1|p;T;q')
fi
source "$MAPO_REPO/megatron_mapo/launch/slurm_job.sh" || { echo "error: set MAPO_REPO to the checkout" >&2; exit 2; }
mapo_command export "$@"
