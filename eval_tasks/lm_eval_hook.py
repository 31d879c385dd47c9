"""
Lets lm-eval find models by the entry points of the group `lm_eval.models`, which its later versions do by themselves.

Installed beside the packages as `protogen_lm_eval_hook`, and started by a `.pth` file: standard library only, nothing
is imported that is not, and nothing is raised.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder


class ModelsFinder(MetaPathFinder):
    """Once `lm_eval.models` has been imported, tells its registry of the entry points that it does not know."""

    def find_spec(self, name, path=None, target=None):
        if name != "lm_eval.models":
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module):
                execute(module)
                register()

            spec.loader.exec_module = execute_and_register
        return spec


def register() -> None:
    try:
        from importlib.metadata import entry_points

        from lm_eval.api.registry import model_registry

        for entry in entry_points(group="lm_eval.models"):
            if entry.name not in model_registry:
                model_registry.register(entry.name, target=entry.value)
    except Exception as error:
        print(f"protogen: lm-eval's models cannot be extended: {error}", file=sys.stderr)


sys.meta_path.insert(0, ModelsFinder())
