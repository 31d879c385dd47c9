"""Recipes: YAML files of arguments, which the command line overrules."""

import argparse
import dataclasses
import difflib
import json
from pathlib import Path
from typing import get_args, get_type_hints

import yaml
from transformers import HfArgumentParser

from trainers.arguments import (
    BankArguments,
    FitInputArguments,
    ModelArguments,
    TargetArguments,
    TrainInputArguments,
)
from trainers.data import DataArguments
from trainers.fitting import FittingArguments
from trainers.text_files import read_text
from trainers.training_args import REFUSED, ProtoGenTrainingArguments

from .studies.controlled_world import WorldArguments

# In the repository, and in an installed package.
FOLDERS = [Path(__file__).parent.parent / "scripts" / "recipes", Path(__file__).parent / "recipe_files"]
RECIPES = next((folder for folder in FOLDERS if folder.is_dir()), FOLDERS[0])
# One recipe may serve several commands: `fit`, then `train`. Each passes over what is another's.
SHARED = (
    BankArguments,
    FitInputArguments,
    TrainInputArguments,
    ModelArguments,
    TargetArguments,
    DataArguments,
    FittingArguments,
    WorldArguments,
    ProtoGenTrainingArguments,
)


def keys_of(types: tuple[type, ...]) -> set[str]:
    return {field.name for type in types for field in dataclasses.fields(type) if field.init}


def recipe_path(name: str) -> Path:
    """
    The file of a recipe: itself, or the one of this name in the folder of recipes.

    Raises:
        FileNotFoundError: if it is missing.
    """
    path = Path(name) if name.endswith(".yaml") else RECIPES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml"))) or "none"
        raise FileNotFoundError(f"recipe {path} does not exist; recipes there: {known}.")
    return path


class RecipeLoader(yaml.SafeLoader):
    """Refuses keys that come twice and keys that are no text."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            name = self.construct_object(key, deep=True)
            if not isinstance(name, str) or name in seen:
                problem = "is there twice" if isinstance(name, str) else "is no text: quote it"
                raise yaml.MarkedYAMLError(problem=f"the key {name!r} {problem}", problem_mark=key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def read_recipe(name: str) -> dict:
    """
    The keys and values of a recipe.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if it is no YAML mapping of text to values, or has a key twice.
    """
    path = recipe_path(name)
    text = read_text(path)
    try:
        recipe = yaml.load(text, RecipeLoader)
    except yaml.MarkedYAMLError as error:
        raise ValueError(f"recipe {path}, line {error.problem_mark.line + 1}: {error.problem}.") from error
    # Dates and numbers that look right and are not are Python's errors.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"recipe {path} is no YAML that can be read: {' '.join(str(error).split())}.") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"recipe {path} must be a YAML mapping of arguments.")
    return recipe


def options_of(values: dict) -> list[str]:
    """Command-line arguments of a mapping; None is the word `null`, as in YAML."""
    arguments = []
    for key, value in values.items():
        if isinstance(value, list):
            arguments += [f"--{key}", *map(str, value)]
        else:
            arguments.append(f"--{key}={json.dumps(value, default=str) if isinstance(value, dict | None) else value}")
    return arguments


class RecipeParser(HfArgumentParser):
    """
    Reads arguments from a recipe (`--config`: a YAML file, or the name of one of `scripts/recipes`) and then from the
    command line, which wins.

    Args:
        *types: dataclasses of the arguments.
        passed_over (`tuple`): dataclasses whose keys a recipe may have for other commands.
    """

    def __init__(self, *types: type, passed_over: tuple[type, ...] = ()):
        usage = "%(prog)s [--config RECIPE] [--OPTION VALUE ...]"
        formatter = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(types, usage=usage, allow_abbrev=False, formatter_class=formatter)
        for action in self._actions:
            if action.dest in REFUSED:
                action.help = argparse.SUPPRESS
        hints = {name: hint for type in types for name, hint in get_type_hints(type).items()}
        self.may_be_none = {name for name, hint in hints.items() if type(None) in get_args(hint)}
        self.passed_over = keys_of(passed_over)
        self.add_argument("--config", help="Recipe: a YAML file, or its name in scripts/recipes.")

    def error(self, message: str):
        raise ValueError(message)

    def _get_values(self, action: argparse.Action, words: list[str]):
        # Of one value and of a list alike; `type` would be asked for each word of a list.
        if words == ["null"] and action.dest in self.may_be_none:
            return None
        return super()._get_values(action, words)

    def parse(self, arguments: list[str]) -> tuple:
        """
        Returns one object for each dataclass.

        Raises:
            FileNotFoundError: if the recipe is missing.
            ValueError: if a key or a value is not understood; the message suggests the nearest key.
        """
        name = config_of(arguments)
        recipe = self._recipe_arguments(name) if name else []
        *parsed, _, unknown = self.parse_args_into_dataclasses(
            recipe + arguments, return_remaining_strings=True, look_for_args_file=False
        )
        if unknown and not unknown[0].startswith("--"):
            raise ValueError(f"{unknown[0]!r} on the command line is no option and no value of one.")
        if unknown:
            self._reject(unknown[0].removeprefix("--").split("=")[0], "on the command line")
        return tuple(parsed)

    def _recipe_arguments(self, name: str) -> list[str]:
        recipe, own, where = read_recipe(name), keys_of(self.dataclass_types), f"recipe {recipe_path(name)}"
        for key in recipe:
            if key not in own | self.passed_over:
                self._reject(key, f"in {where}")
        recipe = {key: value for key, value in recipe.items() if key in own}
        for key, value in recipe.items():
            if isinstance(value, list) and self._option_string_actions[f"--{key}"].nargs is None:
                raise ValueError(f"{where}: {key} takes one value, not the list {value}.")
            if value is None and key not in self.may_be_none:
                raise ValueError(f"{where}: {key} needs a value; leave the key out for the default.")
        return options_of(recipe)

    def _reject(self, key: str, where: str):
        nearest = difflib.get_close_matches(key, keys_of(self.dataclass_types), n=1)
        raise ValueError(f"unknown key {key!r} {where}" + (f"; did you mean {nearest[0]!r}?" if nearest else "."))


def config_of(arguments: list[str]) -> str | None:
    """The recipe that the command line names."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    return parser.parse_known_args(arguments)[0].config
