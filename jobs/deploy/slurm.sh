#!/bin/bash
# A job file on Slurm's nodes; run from the repository, on a file system that all nodes share:
#   ray get-auth-token --generate     # once: makes ~/.ray/auth_token, which the nodes read
#   sbatch --nodes=4 jobs/deploy/slurm.sh jobs/recipes/xdecoder.yaml
# An interrupted training goes on when the same line is submitted again; --requeue does so by itself.
#SBATCH --job-name=xdecoder
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --requeue
set -euo pipefail
: "${1:?name a job file}"

export PATH="$PWD/.venv/bin:$PATH"
export XDECODER_STORE="${XDECODER_STORE:-$PWD/store}"
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH="${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}"
test -s "$RAY_AUTH_TOKEN_PATH" || { echo "no token; run once: ray get-auth-token --generate" >&2; exit 1; }
# Nodes that another job's leftovers slow down come late; Ray gives them 30 s.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(getent ahostsv4 "$head" | awk 'NR == 1 {print $1}'):6379

# symmetric-run starts Ray on every node, runs the command on the head's, and stops Ray when that ends.
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --kill-on-bad-exit=1 \
    ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="$SLURM_GPUS_PER_NODE" -- \
    env RAY_ADDRESS="$address" python -m jobs "$@"
