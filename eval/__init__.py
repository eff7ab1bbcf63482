"""What a checkpoint can do, one command each, run from the repository root: `python -m eval.<name> MODEL [MODEL ...]`.

    length_extrapolation.py   loss, perplexity and accuracy by position, far beyond the training length     positions/
    effective_rank.py         the effective rank of the recurrent states, beta, the spectrum of transitions states/
    state_tracking.py         accuracy on group words and formal languages, far beyond the training length  words/
    lm_harness.py             the tasks of lm-eval, by its own command line                                 text/
    generate.py               prompts in, text out, while it is made                                        text/
    sweep.py                  models x datasets x evals from one TOML: runs what is missing, collects it

MODEL is a run folder (its newest complete checkpoint, or `--step`), one `checkpoint/step-N`, or a Hugging Face folder.
`common/` has what they share: options, the texts they read, files of measurements, ranks under torchrun, the look of
pictures. Importing `eval` imports nothing.
"""

import torchtitan_deltaproduct  # noqa: F401  (for `begin_command`)
