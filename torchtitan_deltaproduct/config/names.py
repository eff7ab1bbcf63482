"""What did the user mean? The nearest option for a key that does not exist.

First the names that other tools use for the same thing, then the same key in another table, then spelling:

    >>> suggest_key("training", "batch_size")
    ['training.local_batch_size']
"""

from .fields import schema, tables
from .problems import quoted
from .unsupported import supported_keys
from .values import nearest

ALIASES = {
    key: names.split()
    for key, names in {
        "training.local_batch_size": "batch_size micro_batch_size microbatch_size per_device_batch_size mbs "
        "per_device_train_batch_size device_batch_size train_batch_size",
        "training.global_batch_size": "total_batch_size gbs batch_size_global",
        "training.steps": "max_steps num_steps train_steps total_train_steps n_steps iterations max_iters",
        "training.seq_len": "sequence_length context_length block_size max_seq_len max_length ctx_len seqlen",
        "training.max_norm": "grad_clip clip max_grad_norm gradient_clipping grad_norm "
        "clip_grad clip_grad_norm",
        "training.mixed_precision_param": "precision bf16 amp mixed_precision param_dtype torch_dtype",
        "optimizer.lr": "learning_rate max_lr peak_lr base_lr",
        "optimizer.beta1": "betas b1 adam_beta1",
        "optimizer.beta2": "b2 adam_beta2",
        "optimizer.eps": "epsilon adam_eps adam_epsilon",
        "optimizer.weight_decay": "wd decay",
        "lr_scheduler.warmup_steps": "warmup warmup_iters num_warmup_steps lr_warmup_steps",
        "lr_scheduler.decay_type": "lr_scheduler_type schedule scheduler lr_decay_style",
        "lr_scheduler.min_lr_factor": "min_lr lr_min min_lr_ratio min_ratio",
        "model.num_hidden_layers": "n_layers num_layers n_layer layers depth",
        "model.hidden_size": "d_model dim n_embd hidden_dim model_dim width embed_dim",
        "model.num_heads": "n_heads n_head heads num_attention_heads",
        "model.head_dim": "head_size d_head qk_dim head_k_dim",
        "model.expand_v": "expand_value v_expand",
        "model.intermediate_size": "ffn_dim mlp_dim d_ff mlp_size ffn_hidden_size",
        "model.num_householder": "n_h nh num_householders n_householder householder "
        "num_householder_reflections",
        "model.allow_neg_eigval": "neg_eigval negative_eigenvalues use_neg_eigval",
        "model.use_output_gate": "use_gate output_gate gate",
        "model.use_forget_gate": "forget_gate use_decay decay_gate gated",
        "model.use_short_conv": "short_conv use_conv conv",
        "model.conv_size": "conv_width d_conv conv_kernel_size kernel_size",
        "model.tie_word_embeddings": "tie_embeddings tied_embeddings weight_tying share_embeddings",
        "model.norm_eps": "rms_norm_eps layer_norm_eps",
        "model.hf_assets_path": "tokenizer tokenizer_name",
        "model.op_backend": "backend attn_mode kernel",
        "data.paths": "path data_path data_dir train_data train_path paths_train",
        "data.dataset": "dataset_name dataset_path hf_dataset",
        "data.num_workers": "workers n_workers dataloader_num_workers",
        "checkpoint.interval": "save_interval save_steps save_every checkpoint_interval ckpt_interval",
        "checkpoint.enable": "enable_checkpoint save_checkpoints",
        "checkpoint.keep_latest_k": "keep_last keep_last_k save_total_limit max_to_keep keep",
        "checkpoint.initial_load_path": "resume resume_from init_from load_path pretrained",
        "checkpoint.folder": "checkpoint_dir ckpt_dir save_dir",
        "job.dump_folder": "output_dir out_dir output_folder run_dir dump_dir",
        "metrics.log_freq": "log_interval logging_steps log_every",
        "metrics.enable_wandb": "wandb use_wandb",
        "metrics.enable_tensorboard": "tensorboard use_tensorboard",
        "validation.freq": "eval_interval eval_steps val_interval eval_every",
        "activation_checkpoint.mode": "gradient_checkpointing activation_checkpointing "
        "recompute use_checkpoint",
        "parallelism.data_parallel_shard_degree": "dp_shard fsdp fsdp_degree data_parallel_degree",
        "parallelism.data_parallel_replicate_degree": "dp_replicate ddp_degree",
        "parallelism.context_parallel_degree": "cp cp_degree context_parallel_size sequence_parallel_degree",
        "compile.enable": "torch_compile use_compile compile",
        "debug.seed": "random_seed manual_seed",
        "model.vocab_size": "n_vocab padded_vocab_size",
    }.items()
}  # fmt: skip
"""Option -> what other trainers and model configs call it."""

_BY_ALIAS = {alias: key for key, names in ALIASES.items() for alias in names}


def suggest_key(table: str, name: str) -> list[str]:
    """The options somebody who wrote `[table] name` may have meant: none, one, or a few of equal standing."""
    name = name.lower().replace("-", "_")
    supported = supported_keys()
    here = {field: f"{table}.{field}" for field in tables().get(table, ()) if f"{table}.{field}" in supported}
    if name in here:
        return [here[name]]
    if name in _BY_ALIAS:
        guess = _BY_ALIAS[name]
        return [here.get(schema()[guess].name, guess)]
    elsewhere = [key for key in supported if schema()[key].name == name]
    if 0 < len(elsewhere) <= 3:
        return elsewhere
    if guess := nearest(name, here, cutoff=0.6):
        return [here[guess]]
    by_name = {schema()[key].name: key for key in reversed(supported)}
    if guess := nearest(name, [*by_name, *_BY_ALIAS], cutoff=0.75):
        return [by_name.get(guess) or _BY_ALIAS[guess]]
    return []


def describe_key(table: str, name: str) -> str:
    """`nearest: 'steps' (How many train steps to run)`, or what the table holds."""
    guesses = suggest_key(table, name)
    if not guesses:
        known = [field for field in tables().get(table, ()) if f"{table}.{field}" in supported_keys()]
        return f"[{table}] has: {', '.join(known)}" if known else "see --help"
    spelled = []
    for guess in guesses:
        field = schema()[guess]
        spelled.append(f"'{field.name}'" + ("" if field.table == table else f" in [{field.table}]"))
    return f"nearest: {' or '.join(spelled)}{quoted(schema()[guesses[0]].summary)}"


def describe_table(name: str) -> str:
    """`nearest: [training]`, or the tables there are."""
    above = name.rpartition(".")[0]
    if above not in tables():
        above = ""
    siblings = [table for table in tables() if table.rpartition(".")[0] == above]
    if guess := nearest(name.lower(), siblings, cutoff=0.6):
        return f"nearest: [{guess}]"
    if not siblings:
        return f"[{above}] holds no tables"
    return "tables are: " + ", ".join(siblings)


def describe_option(option: str) -> str:
    """For the command line: `nearest: --training.steps (How many train steps to run)`."""
    table, _, name = option.rpartition(".")
    guesses = suggest_key(table, name)
    if not guesses and (guess := nearest(option, supported_keys(), cutoff=0.6)):
        guesses = [guess]
    if not guesses:
        return "see --help"
    spelled = " or ".join(f"--{guess}" for guess in guesses)
    return f"nearest: {spelled}{quoted(schema()[guesses[0]].summary)}"
