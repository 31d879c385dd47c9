"""What the scripts share: one clear line for an error instead of a traceback, and recipes."""

import argparse
import dataclasses
import difflib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import yaml
from transformers import HfArgumentParser
from transformers.utils import logging

# evaluate.py here has the name of a library that lm-eval imports: this folder comes last.
FOLDER = str(Path(__file__).parent)
sys.path = [*(path for path in sys.path if path != FOLDER), FOLDER]


def run(main: Callable[[list[str]], None]) -> None:
    """Calls `main(arguments)`. Expected errors end in one line and status 1; `--debug` shows the traceback."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        main(arguments)
    except KeyboardInterrupt:
        sys.exit("interrupted; run the same command again to go on")
    except (ValueError, OSError, KeyError, RuntimeError, ImportError) as error:
        if debug:
            raise
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        sys.exit(f"error: {message}\n(--debug shows where)")


RECIPES = Path(__file__).parent / "recipes"


class RecipeParser(HfArgumentParser):
    """
    Reads arguments from a recipe (`--config`: a YAML file, or the name of one of `scripts/recipes`) and then from the
    command line, which wins.
    """

    def __init__(self, *dataclass_types):
        super().__init__(dataclass_types, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        self.add_argument("--config", help="Recipe: a YAML file, or its name in scripts/recipes.")

    def error(self, message: str):
        raise ValueError(message)

    def parse(self, arguments: list[str]) -> tuple:
        """
        Returns one object for each dataclass.

        Raises:
            FileNotFoundError: if the recipe is missing.
            ValueError: if a key or a value is not understood; the message suggests the nearest key.
        """
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--config")
        path = first.parse_known_args(arguments)[0].config
        recipe = self._recipe_arguments(path) if path else []
        *parsed, _, unknown = self.parse_args_into_dataclasses(
            recipe + arguments, return_remaining_strings=True, look_for_args_file=False
        )
        if unknown:
            self._reject(unknown[0].removeprefix("--").split("=")[0], "on the command line")
        return tuple(parsed)

    def _recipe_arguments(self, name: str) -> list[str]:
        path = Path(name) if name.endswith(".yaml") else RECIPES / f"{name}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml"))) or "none"
            raise FileNotFoundError(f"recipe {path} does not exist; recipes there: {known}.")
        recipe = yaml.safe_load(path.read_text())
        if not isinstance(recipe, dict):
            raise ValueError(f"recipe {path} must be a YAML mapping of arguments.")
        arguments = []
        for key, value in recipe.items():
            if key not in self._keys():
                self._reject(key, f"in recipe {path}")
            if isinstance(value, list):
                arguments += [f"--{key}", *map(str, value)]
            elif value is not None:
                arguments.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
        return arguments

    def _keys(self) -> set[str]:
        return {field.name for type in self.dataclass_types for field in dataclasses.fields(type) if field.init}

    def _reject(self, key: str, where: str):
        nearest = difflib.get_close_matches(key, self._keys(), n=1)
        raise ValueError(f"unknown key {key!r} {where}" + (f"; did you mean {nearest[0]!r}?" if nearest else "."))
