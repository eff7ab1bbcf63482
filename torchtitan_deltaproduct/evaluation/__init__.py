"""What a checkpoint can do. As commands, from the repository root: `python -m eval.<name> MODEL [MODEL ...]`.

    length_extrapolation/     loss, perplexity and accuracy by position, far beyond the training length
    effective_rank/           the effective rank of the recurrent states, beta, the spectrum of transitions
    state_tracking/           accuracy on group words and formal languages, far beyond the training length
    lm_harness/               the tasks of lm-eval, by its own command line
    generate/                 prompts in, text out, while it is made
    sweep/                    models x datasets x evals from one TOML: runs what is missing, collects it

MODEL is a run folder (its newest complete checkpoint, or `--step`), one `checkpoint/step-N`, or a Hugging Face folder.
Importing this package imports nothing.
"""
