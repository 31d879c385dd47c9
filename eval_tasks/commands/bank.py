"""
Looks after banks of fitted proto-tokens.

    protogen bank show runs/embedded/bank
    protogen bank merge runs/all/bank runs/first/bank runs/second/bank
    protogen bank export runs/embedded/bank exported --license cc-by-sa-3.0
    protogen bank push runs/embedded/bank org/name --license cc-by-sa-3.0
    protogen bank import org/name runs/my/bank
"""

import argparse

from modeling_protogen.loading import load_tokenizer
from trainers.bank_dataset import describe, export_bank, import_bank, push_bank
from trainers.embedded import resolve
from trainers.proto_bank import ProtoTokenBank, merge_banks


def decoder_tokenizer(bank: ProtoTokenBank, arguments):
    if arguments.no_text:
        return None
    name = arguments.decoder or bank.info.decoder
    return load_tokenizer(resolve(name), revision=bank.info.decoder_revision)


def show(arguments) -> None:
    bank = ProtoTokenBank(arguments.bank)
    bank.verify()
    print(describe(bank))


def merge(arguments) -> None:
    bank = merge_banks(arguments.banks, arguments.into)
    print(f"{len(bank)} texts in {arguments.into}")


def export(arguments) -> None:
    bank = ProtoTokenBank(arguments.bank)
    export_bank(bank, arguments.folder, decoder_tokenizer(bank, arguments), arguments.name, arguments.license)
    print(f'{len(bank)} texts in {arguments.folder}; load them with datasets.load_dataset("{arguments.folder}")')


def push(arguments) -> None:
    bank = ProtoTokenBank(arguments.bank)
    tokenizer = decoder_tokenizer(bank, arguments)
    print(push_bank(bank, arguments.repo_id, arguments.private, tokenizer=tokenizer, license=arguments.license))


def import_(arguments) -> None:
    bank = import_bank(arguments.source, arguments.bank, arguments.revision)
    print(f"{len(bank)} texts in {arguments.bank}")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("show", help="what a bank is for and how good it is; checks every shard")
    command.add_argument("bank")
    command.set_defaults(run_command=show)

    command = commands.add_parser("merge", help="put several banks into one")
    command.add_argument("into")
    command.add_argument("banks", nargs="+")
    command.set_defaults(run_command=merge)

    exporting = argparse.ArgumentParser(add_help=False)
    exporting.add_argument("bank")
    exporting.add_argument("--license", help="licence of the texts, as the Hub spells it")
    exporting.add_argument("--decoder", help="where the decoder's tokenizer is; the bank's decoder by default")
    exporting.add_argument("--no-text", action="store_true", help="leave out the texts themselves")
    command = commands.add_parser("export", parents=[exporting], help="write a bank as a data set folder")
    command.add_argument("folder")
    command.add_argument("--name", default="org/name", help="Hub id for the card")
    command.set_defaults(run_command=export)
    command = commands.add_parser("push", parents=[exporting], help="upload a bank to the Hub as a data set")
    command.add_argument("repo_id")
    command.add_argument("--private", action="store_true")
    command.set_defaults(run_command=push)

    command = commands.add_parser("import", help="make a bank of an exported data set, local or on the Hub")
    command.add_argument("source")
    command.add_argument("bank")
    command.add_argument("--revision")
    command.set_defaults(run_command=import_)

    arguments = parser.parse_args(argv)
    arguments.run_command(arguments)
