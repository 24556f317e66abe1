#!/bin/bash
# RULER of a served model as an array job: each task starts a server of its own on its node and answers its shard.
#
#     sbatch --export=ALL,OUT=/shared/results/ruler,MODEL=/shared/models/llama docs/cluster/slurm.sh
#
# A task that is cancelled or whose node fails is taken up again by submitting the same job once more.
#SBATCH --job-name=longctx-eval
#SBATCH --array=1-8
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --requeue
set -euo pipefail

# The command that starts the server, with the cache setting in question; empty: the methods of this workspace, in the process itself.
SERVE=${SERVE-"vllm serve $MODEL --port 8000 --kv-cache-dtype fp8"}
SETTINGS=${SETTINGS:-vllm/fp8}
# The file that defines the settings; empty: those that are known.
FILE=${FILE-settings.toml}
TASKS=${TASKS:-ruler}
EVAL=${EVAL:-longctx-eval}
SHARD=${SLURM_ARRAY_TASK_ID:?}/${SLURM_ARRAY_TASK_COUNT:?}

if [ -n "$SERVE" ]; then
    $SERVE &
    trap 'kill %1' EXIT
    for _ in $(seq 600); do curl -sf http://127.0.0.1:8000/v1/models > /dev/null && break; sleep 1; done
fi
"$EVAL" run --out "${OUT:?}" --shard "$SHARD" --settings "$SETTINGS" ${FILE:+--settings-file "$FILE"} --tasks "$TASKS" ${MORE:-}
