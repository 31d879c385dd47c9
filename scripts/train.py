"""
`protogen train`, and other commands that learn by their name, for `accelerate launch`:

    accelerate launch scripts/train.py --config embedded --stage fit
    accelerate launch scripts/train.py --config embedded --max_steps 1000
"""

import argparse
import sys

import torch.distributed

from eval_tasks.command_line import main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--stage", default="train", choices=["fit", "teacher", "train", "finetune", "study", "world"])
    chosen, arguments = parser.parse_known_args(sys.argv[1:])
    main([chosen.stage, *arguments])
    # A process that ends before the first one would now and then abort in a thread of the group.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
