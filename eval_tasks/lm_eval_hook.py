"""
Lets lm-eval find models by the entry points of the group `lm_eval.models`, which its later versions do by themselves.

Installed beside the packages as `protogen_lm_eval_hook`, and started by a `.pth` file each time that Python starts:
nothing is imported before `lm_eval` is, and nothing is raised.
"""

import sys


class ModelsFinder:
    """
    Once `lm_eval.models` has been imported, tells its registry of the entry points that it does not know. Without
    `importlib.abc.MetaPathFinder` as its base, which takes longer to import than Python to start.
    """

    def find_spec(self, name, path=None, target=None):
        if name != "lm_eval.models":
            return None
        from importlib.machinery import PathFinder

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
