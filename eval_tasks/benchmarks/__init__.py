"""Measurements of speed and quality, each with both sides in one run and a result file."""

# The command and the module that adds it to a parser.
BENCHMARKS = {
    "quickstart": "quickstart",
    "snips": "snips",
    "decode": "decoding",
    "verified": "verified",
    "fit": "fitting",
    "fit-memory": "fitting",
    "fit-kill": "fitting",
    "training-speed": "training_speed",
    "length": "length",
    "controlled-world": "controlled_world",
    "parity": "parity",
}
