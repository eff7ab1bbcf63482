"""The seam to torchtitan 0.2.2: the only package that imports it (besides its config dataclasses).

device.py         which device to run on
patches.py        all that is changed inside torchtitan
spec.py           the TrainSpec: one model, its arguments, and the builders below
parallelize.py    activation checkpointing, torch.compile, FSDP2 / HSDP / DDP
optimizer.py      the optimizer with decay and no-decay groups, and its schedule
trainer.py        the Trainer subclass: one step, the loop, what is saved
feed.py           global batches on the device, read one step ahead
validator.py      a fixed held-out set, weighted by tokens, in bits per byte
metrics.py        a step: console line, metrics.jsonl, TensorBoard, wandb
records.py        metrics.jsonl and samples.jsonl over the restarts of a run
checkpointer.py   the CheckpointManager subclass: complete or ignored, retried, verified
stopping.py       signals and walltime: when all ranks stop, after the same step
lock.py           one launch at a time in a run folder
watchdog.py       heartbeat, and the stacks of a run that hangs
spikes.py         a loss far above the recent ones
rendezvous.py     a store of its own for every restart of the ranks
describe.py       the lines a run prints before its first step
run.py            from a checked config to a finished run: the function `train.py` calls
"""
