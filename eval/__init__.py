"""What a checkpoint can do, one command each, run from the repository root: `python -m eval.<name> RUN [RUN ...]`.

    models.py           the one way to name and load a model
    effective_rank.py   the effective rank of the recurrent states along long sequences, beta, and the transitions
    state_tracking.py   accuracy on group words and formal languages far beyond the training length
"""
