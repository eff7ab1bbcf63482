"""Starting runs: the quick start, the S3 demonstration; one machine (local.sh), several (multinode.sh), or SLURM.

node      checks a TOML and becomes torchrun; ssh does so on every host; torchrun is torch's, and lets ranks save
slurm     submits a training job and keeps what ran; site is what the cluster wants to hear
sbatch    the files that SLURM is handed: of a training job, and of an array of commands
requeue   whether a job that ended goes back into the queue
"""

import torchtitan_deltaproduct  # noqa: F401  (for `begin_command`)
