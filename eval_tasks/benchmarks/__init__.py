"""Measurements of speed and quality, each with both sides in one run and a result file."""

# The command, the module that adds it to a parser, and what it measures.
BENCHMARKS = {
    "quickstart": ("quickstart", "gather a finished quickstart"),
    "snips": ("snips", "commands to JSON, beside the same decoder token by token"),
    "decode": ("decoding", "latency and throughput of one pass, against token by token"),
    "drafts": ("drafts", "how often drafts are right, place by place"),
    "verified": ("verified", "verified answers against greedy ones: equal tokens, and time"),
    "fit": ("fitting", "fitting against the paper's loop, and its memory"),
    "fit-memory": ("fitting", "the memory of one number of slots"),
    "fit-kill": ("fitting", "kill a fit at random moments and look what is lost"),
    "training-speed": ("training_speed", "tokens a second of a training step, and where its time goes"),
    "length": ("length", "how well a trained model predicts lengths"),
    "controlled-world": ("controlled_world", "one-step against the decoder's own answers"),
    "faults": ("faults", "kill runs, fill disks, damage files, and count what is lost"),
    "parity": ("parity", "lm-eval's own model of the decoder against verified ProtoGen"),
    "serve": ("serve", "a server under load, one-step answers beside greedy ones"),
}
