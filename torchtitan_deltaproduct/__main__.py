"""`deltaproduct NAME ...`: every command under one name, the same functions as `python -m MODULE ...`.

    deltaproduct train train_configs/quickstart.toml
    deltaproduct compare outputs/*/run
    deltaproduct completion bash >> ~/.bashrc

A module is imported when its command is called: `--help` and `--version` take no time.
"""

import shlex
import sys
from importlib import import_module

from . import __version__
from .arguments import COMMAND
from .errors import UserError, begin_command, exit_on_user_error, nearest

PACKAGE = "torchtitan_deltaproduct"
COMMANDS: dict[str, tuple[str, str]] = {
    "train": (f"{PACKAGE}.train", "train what a TOML says, here; under torchrun on many ranks"),
    "plan": (f"{PACKAGE}.plan", "what a TOML will do: parameters, memory, data, learning rates"),
    "prepare": (f"{PACKAGE}.data.prepare", "text to token shards"),
    "tokenizer": (f"{PACKAGE}.data.train_tokenizer", "train a tokenizer on text"),
    "data show": (f"{PACKAGE}.data.show", "what a prepared folder holds"),
    "data show-batch": (f"{PACKAGE}.data.show_batch", "the samples that a run trains on at a step"),
    "status": (f"{PACKAGE}.status", "where runs are"),
    "compare": (f"{PACKAGE}.compare", "runs in one table and one picture"),
    "report": (f"{PACKAGE}.report", "a run as one HTML page"),
    "doctor": (f"{PACKAGE}.doctor", "look at this machine as a run will"),
    "checkpoint ls": (f"{PACKAGE}.checkpoint.ls", "the checkpoints of a run, and why each is kept"),
    "checkpoint verify": (f"{PACKAGE}.checkpoint.verify", "read checkpoints back and compare checksums"),
    "to-hf": (f"{PACKAGE}.checkpoint.to_hf", "export a run in the Hugging Face layout, verified"),
    "from-hf": (f"{PACKAGE}.checkpoint.from_hf", "import a Hugging Face folder"),
    "eval length-extrapolation": ("eval.length_extrapolation", "loss by position, beyond the training length"),
    "eval effective-rank": ("eval.effective_rank", "the rank of recurrent states"),
    "eval state-tracking": ("eval.state_tracking", "accuracy on group words and formal languages"),
    "eval lm-harness": ("eval.lm_harness", "the tasks of lm-eval"),
    "eval generate": ("eval.generate", "prompts in, text out"),
    "eval sweep": ("eval.sweep", "models x datasets x evaluations from one TOML"),
    "slurm": ("launch.slurm", "train on a SLURM cluster"),
    "grid": ("launch.grid", "many runs from one TOML: settings x seeds"),
    "reproduce": ("launch.reproduce", "run the claims of this project again"),
    "completion": (f"{PACKAGE}.__main__", "print what makes bash or zsh complete these names"),
}
"""Of each command the module, whose `main` it is, and what it does."""
SHELLS = {"bash": "", "zsh": "autoload -Uz compinit bashcompinit && compinit && bashcompinit\n"}


def main() -> None:
    """The console command; exits with the code of the subcommand."""
    begin_command()
    exit_on_user_error(lambda: run(sys.argv[1:]))


def run(words: list[str]) -> int | None:
    """Runs the subcommand that some words begin with.

    Raises:
        UserError: there is none of that name.
    """
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"{COMMAND} {__version__}")
        return 0
    name, rest = split(words)
    if name == "completion":
        return print_completion(rest)
    try:
        module = import_module(COMMANDS[name][0])
    except ModuleNotFoundError as error:
        if error.name not in ("launch", "eval"):
            raise
        raise UserError(f"the folder {error.name}/ of the repository is not installed; pip install it again") from None
    sys.argv = [f"{COMMAND} {name}", *rest]
    return module.main()


def split(words: list[str]) -> tuple[str, list[str]]:
    """The name of a command, of one word or two, and what follows it.

    Raises:
        UserError: there is no such command; it names the nearest.
    """
    for length in (2, 1):
        if (name := " ".join(words[:length])) in COMMANDS:
            return name, words[length:]
    below = [name for name in COMMANDS if name.startswith(f"{words[0]} ")]
    if below and len(words) > 1 and words[1] not in ("-h", "--help"):
        asked, names = " ".join(words[:2]), below
    elif below:
        raise UserError(f"{COMMAND} {words[0]}: expected one of: " + ", ".join(name.split()[1] for name in below))
    else:
        asked, names = words[0], [*COMMANDS, *(name.split()[-1] for name in COMMANDS if " " in name)]
    near = nearest(asked.replace("_", "-"), names)
    full = next((name for name in COMMANDS if near and (name == near or name.endswith(f" {near}"))), None)
    hint = f"nearest: {COMMAND} {full}" if full else f"{COMMAND} --help lists them all"
    raise UserError(f"{COMMAND} has no command {shlex.quote(asked)}; {hint}")


def overview() -> str:
    """All commands, a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join([
        f"{COMMAND} {__version__}: pretraining and evaluation of DeltaProduct linear RNNs", "",
        f"usage: {COMMAND} COMMAND ... | {COMMAND} COMMAND --help | {COMMAND} --version", "", *lines,
    ])  # fmt: skip


def print_completion(words: list[str]) -> None:
    """Prints a shell's completion: names of commands first, then files.

    Raises:
        UserError: it is for another shell.
    """
    usage = f"{COMMAND} completion bash >> ~/.bashrc, or {COMMAND} completion zsh >> ~/.zshrc"
    if words[:1] in (["-h"], ["--help"]):
        print(f"usage: {usage}\n\n{COMMANDS['completion'][1]}; a new shell knows them")
        return
    if len(words) != 1 or words[0] not in SHELLS:
        raise UserError(f"expected {usage}")
    first = " ".join(dict.fromkeys(name.split()[0] for name in COMMANDS))
    two = dict.fromkeys(name.split()[0] for name in COMMANDS if " " in name)
    cases = "".join(
        f'        2{group}) words="'
        + " ".join(name.split()[1] for name in COMMANDS if name.startswith(f"{group} ")) + '" ;;\n' for group in two
    )  # fmt: skip
    print(f"""{SHELLS[words[0]]}_{COMMAND}() {{
    local words=""
    case "$COMP_CWORD${{COMP_WORDS[1]}}" in
        1*) words="{first}" ;;
{cases}    esac
    COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _{COMMAND} {COMMAND}""")


if __name__ == "__main__":
    main()
