"""What a checkpoint can do. As commands, from the repository root: `python -m eval.<name> MODEL [MODEL ...]`.

    length_extrapolation/     loss, perplexity and accuracy by position, far beyond the training length
    effective_rank/           the effective rank of the recurrent states, beta, the spectrum of transitions
    state_tracking/           accuracy on group words and formal languages, far beyond the training length
    lm_harness/               the tasks of lm-eval, by its own command line
    generate/                 prompts in, text out, while it is made
    sweep/                    models x datasets x evals from one TOML: runs what is missing, collects it

A new evaluation touches two files: a folder here with `main` and, to be swept, a `SWEPT` (`swept.py`); and its entry
file in `eval/`. One that reads long sequences is a `LongEvaluation` (`long.py`): its texts, ranks, resuming, `--from`,
JSON and CSV are there already.

    options, ranks, files, figures      command line, processes, results on disk, pictures
    texts, sample                       which sequences are read, from prepared folders or text
    long, pieces                        the frame of evaluations over long sequences, and what it has measured

MODEL is a run folder (its newest complete checkpoint, or `--step`), one `checkpoint/step-N`, or a Hugging Face folder;
DATA a prepared folder, a file or folder of text, or a dataset NAME[:CONFIGURATION]. What was stopped goes on with the
same command. Importing this package imports nothing.
"""
