"""
`protogen COMMAND ...`. A command is imported when it is called: `generate` needs nothing but torch and transformers.
"""

import importlib
import os
import sys

# Of each command, in the module of `eval_tasks.commands` that has its name.
COMMANDS = {
    "generate": "answer instructions with a trained model",
    "fit": "fit proto-tokens to texts, into a bank",
    "teacher": "let the frozen decoder write answers to learn from",
    "train": "train the encoder that predicts proto-tokens",
    "finetune": "fine-tune the decoder itself, as the rival of one step",
    "bank": "look into, merge, export and push banks",
    "evaluate": "compare methods on tasks of the Language Model Evaluation Harness",
    "study": "study what proto-tokens carry and how much",
    "world": "make the controlled world: data, an encoder, a decoder",
    "sweep": "train the runs of a sweep and compare them",
    "bench": "measure speed and quality against rivals",
    "report": "fill the tables of the pages from result files",
    "pack": "pack a trained run to go with the repository",
}


def table(helps: dict[str, str]) -> str:
    """A line for each name and what it does."""
    width = max(map(len, helps))
    return "\n".join(f"  {name:<{width}}  {help}" for name, help in helps.items())


def usage() -> str:
    return f"usage: protogen COMMAND [options]    (--help after a command shows its options)\n\n{table(COMMANDS)}"


def main(argv: list[str] | None = None) -> None:
    """
    Runs a command. Expected errors end in one line and status 1; `--debug` shows the traceback.

    Args:
        argv (`list[str]`, *optional*): command and arguments; those of the process by default.
    """
    argv = sys.argv[1:] if argv is None else argv
    command, *arguments = [argument for argument in argv if argument != "--debug"] or ["--help"]
    if command not in (*COMMANDS, "-h", "--help"):
        sys.exit(f"error: there is no command {command!r}.\n\n{usage()}")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    try:
        if command in COMMANDS:
            run(command, arguments)
        else:
            print(usage())
    except KeyboardInterrupt:
        sys.exit("interrupted; run the same command again to go on")
    except BrokenPipeError:  # Who reads has seen enough, as `head` has.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, KeyError, RuntimeError, ImportError) as error:
        if "--debug" in argv:
            raise
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        if isinstance(error, ModuleNotFoundError):
            message = f"{error}; `protogen {command}` needs more: pip install 'protogen[train,eval]'"
        sys.exit(f"error: {message}\n(--debug shows where)")


def run(command: str, arguments: list[str]) -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    importlib.import_module(f"eval_tasks.commands.{command}").main(arguments)


if __name__ == "__main__":
    main()
