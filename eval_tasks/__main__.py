"""`python -m eval_tasks ...`: `lm_eval ...` with the model `protogen`, also where no start-up hook is installed."""

from lm_eval.__main__ import cli_evaluate

from . import lm_eval_hook

if __name__ == "__main__":
    lm_eval_hook.register()
    cli_evaluate()
