#!/bin/bash
# Train a hypernetwork on several nodes: sbatch examples/slurm.sh FOLDER, where FOLDER/job.json describes the training
# (python -m ghnlib.pipeline.run job@VARIANT-SEED writes it) and all nodes see FOLDER. Submitted again, it resumes from the
# last checkpoint.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue

set -euo pipefail
folder=${1:?the folder of the training}
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# SIGTERM comes five minutes before the end: each step ends, a checkpoint is written, the status is not 0.
export OMP_NUM_THREADS=1
srun torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="$SLURM_GPUS_ON_NODE" \
    --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$host:29500" \
    -m ghnlib.training.jobs "$folder/job.json"
