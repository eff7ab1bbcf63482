"""What a checkpoint can do, one command each, run from the repository root: `python -m eval.<name> RUN [RUN ...]`.

    effective_rank.py   the effective rank of the recurrent states; over states.py, singular_values.py, transitions.py
    state_tracking.py   accuracy on group words and formal languages far beyond the training length
    generate.py         prompts in, text out, while it is made; over decoding.py, sampling.py, text_stream.py
    lm_harness.py       the tasks of lm-eval, by its own command line; over harness_model.py, scoring.py
    options.py          how models are named and loaded; vocabulary.py: their tokenizer
"""
