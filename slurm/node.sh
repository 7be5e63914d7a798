#!/usr/bin/env bash
# What train.sbatch runs on each node: the launcher, and USR1 or TERM handed on to the training processes that are its
# children. USR1 would kill the launcher, and TERM makes it stop them after TORCH_ELASTIC_SHUTDOWN_TIMEOUT (env.sh).
set -uo pipefail
# It ignores USR1: some set-ups signal every process of a step. The trainer sets handlers of its own.
(
  trap '' USR1
  exec accelerate launch --config_file "$SNAPSHOT/conf/launch/$LAUNCH.yaml" \
    --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" \
    --num_processes "$((SLURM_NNODES * SLURM_GPUS_ON_NODE))" \
    --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" \
    -m train "$@"
) &
LAUNCHER=$!
trap 'pkill -USR1 -P "$LAUNCHER"' USR1 TERM
wait "$LAUNCHER"
CODE=$?
while kill -0 "$LAUNCHER" 2>/dev/null; do # the signal ended the waiting, not the launcher
  wait "$LAUNCHER"
  CODE=$?
done
exit "$CODE"
