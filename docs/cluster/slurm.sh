#!/bin/bash
# Runs RULER on a served model as a Slurm array job. Each array task starts a server on its node and
# runs one shard of the evaluation.
#
#     sbatch --export=ALL,OUT=/shared/results/ruler,MODEL=/shared/models/llama docs/cluster/slurm.sh
#
# If a task is cancelled or its node fails, submit the same job again: it continues where it
# stopped. A task in which samples failed ends with exit code 1 (FAILED in sacct): submit the job
# again too.
#SBATCH --job-name=longctx
#SBATCH --array=1-8
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --requeue
set -euo pipefail

# The command that starts the server with the cache setting to evaluate. If it is empty, no server
# starts and longctx runs the methods of this workspace in its own process.
SERVE=${SERVE-"vllm serve $MODEL --port 8000 --kv-cache-dtype fp8"}
SETTINGS=${SETTINGS:-vllm/fp8}
# The file that defines the settings. If it is empty, SETTINGS must name built-in settings.
FILE=${FILE-settings.toml}
TASKS=${TASKS:-ruler}
LONGCTX=${LONGCTX:-longctx}
SHARD=${SLURM_ARRAY_TASK_ID:?}/${SLURM_ARRAY_TASK_COUNT:?}

if [ -n "$SERVE" ]; then
    $SERVE &
    trap 'kill %1' EXIT
    for _ in $(seq 600); do curl -sf http://127.0.0.1:8000/v1/models > /dev/null && break; sleep 1; done
fi
"$LONGCTX" eval run --out "${OUT:?}" --shard "$SHARD" --settings "$SETTINGS" ${FILE:+--settings-file "$FILE"} --tasks "$TASKS" ${MORE:-}
