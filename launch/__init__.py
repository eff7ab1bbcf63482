"""Starting runs: the quick start; one machine (local.sh), several (multinode.sh), or SLURM; many runs, and claims.

node      checks a TOML and becomes torchrun; ssh does so on every host; torchrun is torch's, and lets ranks save
slurm     submits a training job and keeps what ran; site is what the cluster wants to hear
sbatch    the files that SLURM is handed: of a training job, and of an array of commands
grid      settings x seeds from one TOML, here or as an array; summary is their table
reproduce runs the claims of train_configs/claims, which `claims` reads and judges
requeue   whether a job that ended goes back into the queue
"""

import torchtitan_deltaproduct  # noqa: F401  (for `begin_command`)
