"""`protogen generate`: answers instructions with a trained model."""

import sys

from eval_tasks.command_line import main

if __name__ == "__main__":
    main(["generate", *sys.argv[1:]])
