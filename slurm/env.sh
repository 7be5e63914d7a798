# Sourced by train.sbatch on the first node, whose environment the others get. Edit for your cluster.
export MARIONETTE_VENV="${MARIONETTE_VENV:-$PWD/.venv}"
source "$MARIONETTE_VENV/bin/activate"

# Snapshots of the code go to $OUTPUTS/snapshots; what a run writes goes to its output_dir.
export OUTPUTS="${OUTPUTS:-$PWD/outputs}"

# The launcher's rendezvous: first host of the allocation, a port derived from the job so that two jobs can share a host.
export MASTER_ADDR="${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}"
export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}" # seconds to write a checkpoint; 30 otherwise
export TOKENIZERS_PARALLELISM=false
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
# export NCCL_SOCKET_IFNAME=ib0 # the network interface between nodes, where NCCL picks the wrong one
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" # compute nodes seldom reach a hub: fetch weights on the login node
