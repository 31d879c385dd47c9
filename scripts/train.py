"""
`protogen train`, and other commands that learn by their name, for `accelerate launch`:

    accelerate launch scripts/train.py --config embedded --stage fit
    accelerate launch scripts/train.py --config embedded --max_steps 1000
"""

import argparse
import os
import sys

import torch.distributed

from eval_tasks.command_line import main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--stage", default="train", choices=["fit", "teacher", "train", "finetune", "study", "world"])
    chosen, arguments = parser.parse_known_args(sys.argv[1:])
    main([chosen.stage, *arguments])
    if torch.distributed.is_initialized():
        is_first = torch.distributed.get_rank() == 0
        torch.distributed.destroy_process_group()
        # Now and then a library's thread aborts a process at its exit. While the first one still writes, that would end
        # the run; the others have written nothing, and leave without exit handlers.
        if not is_first:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
