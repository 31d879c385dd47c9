"""
Serves a trained model over HTTP, as OpenAI's API has it.

    protogen serve runs/embedded/model --name mine
    PROTOGEN_API_KEY=secret protogen serve org/name --host 0.0.0.0 --port 80

Requests that come at the same time share a pass of the decoder. docs/serving.md has what may be asked.
"""

import argparse
import math
import os
from dataclasses import fields

import uvicorn

from eval_tasks.serving.api import Limits, create_app
from trainers.decoders import add_loading_options, load_trained

KEY = "PROTOGEN_API_KEY"
# In bfloat16 oneDNN compiles a product, a megabyte at times, for each number of rows and keeps 1,024; a server meets
# hundreds of them.
NUM_PRODUCTS = "32"


def parsed(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="protogen serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder or Hub id of a ProtoGen model")
    parser.add_argument("--name", help="what requests call the model; as it is given here by default")
    parser.add_argument("--host", default="127.0.0.1", help=f"beyond this machine set {KEY} (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    # In bfloat16 passes of different shapes round differently, so answers would depend on who shares them.
    add_loading_options(parser, "float32")
    for field in fields(Limits):
        option, text = f"--{field.name.replace('_', '-')}", f"{field.metadata['help']} (default: {field.default})"
        parser.add_argument(option, type=field.type, default=field.default, help=text)
    parser.add_argument("--cors-origin", nargs="*", default=[], help="origins whose pages may ask from a browser")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    arguments = parsed(argv)
    key = os.environ.get(KEY)
    if key == "":
        raise ValueError(f"{KEY} is empty: give it a key, or unset it to serve without one.")
    limits = Limits(**{field.name: getattr(arguments, field.name) for field in fields(Limits)})
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", NUM_PRODUCTS)
    model, processor = load_trained(arguments.model, arguments.dtype, arguments.decoder, arguments.fuse_adapters)
    app = create_app(model, processor, arguments.name or arguments.model, limits, key, arguments.cors_origin)
    # What was taken is answered before the server ends.
    uvicorn.run(app, host=arguments.host, port=arguments.port, timeout_graceful_shutdown=math.ceil(limits.seconds) + 1)
