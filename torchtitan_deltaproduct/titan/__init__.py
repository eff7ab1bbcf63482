"""The seam to torchtitan 0.2.2: the only package that imports it (besides its config dataclasses).

    device.py         which device to run on, and torchtitan's five bindings of it
    spec.py           the TrainSpec: one model, its arguments, and the builders below
    parallelize.py    activation checkpointing, torch.compile, FSDP2 / HSDP / DDP
    optimizer.py      AdamW with decay and no-decay groups
    trainer.py        the Trainer subclass: one step, the loop, what is saved
    validator.py      a fixed held-out set, weighted by tokens, in bits per byte
    metrics.py        console line, metrics.jsonl, TensorBoard, wandb
    checkpointer.py   the CheckpointManager subclass: complete or ignored
    describe.py       the lines a run prints before its first step
    run.py            from a checked config to a finished run: the function `train.py` calls
"""
