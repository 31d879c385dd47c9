"""
`protogen COMMAND ...`. A command is imported when it is called: `generate` needs nothing but torch and transformers.
"""

import importlib
import os
import sys
from importlib.metadata import version

# Of each command, in the module of `eval_tasks.commands` that has its name.
COMMANDS = {
    "generate": "answer instructions with a trained model",
    "serve": "answer over HTTP, as OpenAI's API does",
    "demo": "show a model in the browser, beside its own decoder",
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
    "push": "publish a trained model on the Hub, with its card",
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
    if argv is None:
        argv = sys.argv[1:]
        sys.argv[0] = " ".join(["protogen", *argv[:1]])  # What parsers call themselves.
    command, *arguments = [argument for argument in argv if argument != "--debug"] or ["--help"]
    if command == "--version":
        return print(f"protogen {version('protogen')}")
    if command not in (*COMMANDS, "-h", "--help"):
        sys.exit(f"error: there is no command {command!r}.\n\n{usage()}")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    try:
        if command in COMMANDS:
            run(command, arguments)
        else:
            print(usage())
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit("interrupted; run the same command again to go on")
    except BrokenPipeError:  # Who reads has seen enough, as `head` has.
        drop_output()
        sys.exit(1)
    except Exception as error:
        if "--debug" in argv or not isinstance(error, expected_errors()):
            raise
        if is_full(error):
            drop_output()
        sys.exit(f"error: {message([command, *arguments], error)}\n(--debug shows where)")


def expected_errors() -> tuple[type[Exception], ...]:
    """
    What input, files or the machine can cause, whoever notices it: ours are ValueError, FileNotFoundError and
    RuntimeError, and libraries have more. Mistakes in the code (TypeError, AttributeError, IndexError, ...) stay
    tracebacks. Imported when there is an error: importing takes seconds.
    """
    import pickle  # For the name of its error: nothing is unpickled.

    from jinja2 import TemplateError
    from safetensors import SafetensorError

    return (
        ValueError,
        OSError,
        KeyError,  # a name that is in no file or table
        RuntimeError,  # torch: memory, devices, files of other shapes or cut off
        ImportError,  # an extra that is not installed
        SafetensorError,  # weights cut off or not written whole
        TemplateError,  # a chat template that is none, or refuses a chat
        pickle.UnpicklingError,  # a checkpoint's file that is none
        EOFError,  # ... or is empty
    )


def is_full(error: Exception) -> bool:
    from trainers.files import says_full  # Here, as above.

    return says_full(error)


def message(words: list[str], error: Exception) -> str:
    if is_full(error):
        where = error.filename if isinstance(error, OSError) and error.filename else "what it was writing"
        return f"no space left on the disk for {where}; make room and run the same command again"
    if isinstance(error, ModuleNotFoundError):
        extras = ",".join(["train", "eval", *(name for name in ("serve", "demo") if name in words[:2])])
        return f"{error}; `protogen {words[0]}` needs more: in a clone of ProtoGen, pip install -e '.[{extras}]'"
    if isinstance(error, KeyError):  # a name, or a sentence
        text = str(error.args[0]) if error.args else ""
        return text if " " in text else f"there is no {text!r}"
    if isinstance(error, (ValueError, OSError, RuntimeError)) and str(error):
        return str(error)
    return f"{type(error).__name__}: {error}"


def drop_output() -> None:
    """What standard output still holds has nowhere to go."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(command: str, arguments: list[str]) -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    importlib.import_module(f"eval_tasks.commands.{command}").main(arguments)


if __name__ == "__main__":
    main()
