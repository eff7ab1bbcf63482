"""The model card of an exported model: what it is, how it was trained, what it scored, how to open it.

    (folder / "README.md").write_text(model_card(loaded, "DP2", "float32"))

Everything in it comes from the run: its settings, its metrics.jsonl, its formulas. Nothing is guessed.
"""

from ..history import read_metrics
from ..models import counts
from .load import LoadedModel

PAPER = "https://arxiv.org/abs/2502.10297"


def model_card(loaded: LoadedModel, name: str, dtype: str, license: str = "") -> str:
    """Markdown with the front matter the Hugging Face hub reads; `license` is an identifier of the hub's list."""
    args = loaded.model.args
    kind = "Gated DeltaProduct" if args.use_forget_gate else "DeltaProduct"
    eigenvalues = "[-1, 1]" if args.allow_neg_eigval else "[0, 1]"
    lines = [
        "---",
        "library_name: fla",
        "pipeline_tag: text-generation",
        "tags: [deltaproduct, linear-rnn, torchtitan-deltaproduct]",
        *([f"license: {license}"] if license else []),
        "---",
        f"# {name}",
        "",
        f"A {kind} language model ([arXiv 2502.10297]({PAPER})): a linear RNN whose state transition is, per token, a "
        f"product of {args.num_householder} generalized Householder matrices with eigenvalues in {eigenvalues}.",
        "",
        *_table("Model", _model_rows(loaded, dtype)),
        *_table("Training", _training_rows(loaded)),
        *_table("Held-out results at this step", _results(loaded)),
        "## Use",
        "",
        "```python",
        "import fla  # registers the architecture",
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained("PATH_OF_THIS_FOLDER")   # fla needs a CUDA device to run it',
        "```",
        "",
        "```python",
        "from torchtitan_deltaproduct.checkpoint import load_model",
        "",
        'model = load_model("PATH_OF_THIS_FOLDER").model                       # runs on CPU too',
        "```",
        "",
        "Documents begin and end with the separator (`bos` and `eos` are the same token).",
        "",
    ]
    return "\n".join(lines)


def _table(title: str, rows: dict[str, str]) -> list[str]:
    if not rows:
        return []
    return [f"## {title}", "", "| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows.items()), ""]


def _model_rows(loaded: LoadedModel, dtype: str) -> dict[str, str]:
    args = loaded.model.args
    parts = {"forget gate": args.use_forget_gate, "output gate": args.use_output_gate,
             f"short convolution of {args.conv_size}": args.use_short_conv}  # fmt: skip
    return {
        "parameters": f"{counts.total_parameters(args):,}",
        "layers, width, MLP": f"{args.num_hidden_layers}, {args.hidden_size:,}, {args.mlp_size:,}",
        "heads, keys, values": f"{args.num_heads}, {args.head_dim}, {args.head_v_dim}",
        "n_h": str(args.num_householder),
        "with": ", ".join(name for name, there in parts.items() if there) or "neither gates nor convolution",
        "vocabulary": f"{args.vocab_size:,}{', tied' if args.tie_word_embeddings else ''}",
        "decoding state": f"{counts.state_bytes(args):,} bytes a sequence, whatever its length",
        "weights": dtype,
    }


def _training_rows(loaded: LoadedModel) -> dict[str, str]:
    """What is known of the training that made the weights: of imported ones, that of their origin."""
    config, origin = loaded.config, loaded.origin
    rows = {"imported from": origin["folder"]} if "folder" in origin else {}
    step = origin.get("step") if origin else loaded.step
    if step is None or "steps" not in config.get("training", {}):
        return rows
    training, data, optimizer = config["training"], config.get("data", {}), config.get("optimizer", {})
    schedule = config.get("lr_scheduler", {})
    rows["step"] = f"{step:,} of {training['steps']:,}"
    samples = training["global_batch_size"]
    if samples > 0:
        tokens = samples * training["seq_len"]
        rows["tokens"] = f"{step * tokens:,} ({samples:,} sequences of {training['seq_len']:,} a step)"
    names = data.get("paths") or [data.get("dataset") or data.get("group") or data.get("language")]
    rows["data"] = f"{data.get('kind')}: {', '.join(map(str, names))}"
    rows["optimizer"] = (
        f"{optimizer.get('name')}, lr {optimizer.get('lr')}, betas {optimizer.get('beta1')} and "
        f"{optimizer.get('beta2')}, weight decay {optimizer.get('weight_decay')}, clip {training.get('max_norm')}"
    )
    rows["schedule"] = f"{schedule.get('warmup_steps')} steps of warm-up, {schedule.get('decay_type')} decay"
    rows["made with"] = "torchtitan-deltaproduct"
    return rows


def _results(loaded: LoadedModel) -> dict[str, str]:
    """The validation record of this very step in the run's metrics.jsonl, and of what it is; {} if there is none."""
    validation, training = (loaded.config.get(name, {}) for name in ("validation", "training"))
    length = validation.get("seq_len") or training.get("seq_len")
    for record in read_metrics(loaded.run):
        if loaded.step is not None and record.get("step") == loaded.step and "validation_loss" in record:
            conditions = {
                "of": ", ".join(map(str, validation.get("paths") or [])),
                "sequences of": f"{length:,} tokens, nats a token" if length else "",
            }
            return {name: text for name, text in conditions.items() if text} | {
                name.removeprefix("validation_").replace("_", " "): f"{value:,.4g}"
                for name, value in record.items()
                if name.startswith("validation_") and isinstance(value, int | float) and "seconds" not in name
            }
    return {}
