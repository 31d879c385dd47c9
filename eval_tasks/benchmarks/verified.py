"""Whether verified answers are the decoder's greedy ones, token for token, and how much faster they come."""

from collections.abc import Callable
from functools import partial
from itertools import chain, islice
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from tqdm import tqdm

from eval_tasks import report
from eval_tasks.baselines.autoregressive import assisted, autoregressive, prompt_lookup
from eval_tasks.baselines.one_pass import protogen
from eval_tasks.baselines.writing import Writer
from eval_tasks.latency import interleaved_seconds, ratio_with_interval
from eval_tasks.statistics import mean_with_interval
from modeling_protogen import ProtoGenForConditionalGeneration, ProtoGenProcessor, verified_decoding
from trainers.data import DataArguments, Example, held_out_of, load_examples
from trainers.decoders import load_decoder
from trainers.devices import best_device
from trainers.files import append_lines, read_lines

WRONG = "always_wrong"


def add_commands(commands) -> None:
    command = commands.add_parser("verified")
    command.add_argument("--model", required=True, help="folder or Hub id of a trained model")
    command.add_argument("--beside", nargs="*", default=[], help="other trained models, their drafts timed too")
    command.add_argument("--assistant", help="decoder of assisted decoding, as embedded:smollm2-135m@first:10")
    command.add_argument("--dolly", default="scripts/data/dolly_sample.jsonl")
    command.add_argument("--gsm8k", help=".jsonl file of its test split")
    command.add_argument("--prompts", type=int, default=500, help="compared token by token")
    command.add_argument("--tokens", type=int, default=32, help="of the answers that are compared")
    command.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16])
    command.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    command.add_argument("--timed-prompts", type=int, default=20, help="of each data set, in bfloat16; 0 times nothing")
    command.add_argument("--timed-tokens", type=int, nargs="+", default=[64, 256])
    command.add_argument("--block-size", type=int, help="tokens of a draft at most; each model's own by default")
    command.add_argument("--run", default="runs/verified", help="folder; an interrupted run goes on from it")
    command.set_defaults(run_command=verified)


def verified(arguments) -> None:
    run = Path(arguments.run)
    sources = sources_of(arguments)
    device = best_device()
    torch.manual_seed(0)
    trained = ProtoGenForConditionalGeneration.from_pretrained(arguments.model, dtype=torch.float32).to(device)
    # The same model with fresh heads.
    random = ProtoGenForConditionalGeneration._from_config(
        trained.config, encoder=trained.encoder, decoder=trained.decoder
    )
    models = {"random": random.to(device).eval(), "trained": trained}
    processor = ProtoGenProcessor.from_pretrained(arguments.model)
    metrics = {}
    if "float32" in arguments.dtypes:
        metrics |= compare_with_greedy(arguments, "float32", models, processor, sources)
    for model in models.values():
        model.to(torch.bfloat16)
    if "bfloat16" in arguments.dtypes:
        metrics |= compare_with_greedy(arguments, "bfloat16", {"trained": trained}, processor, sources)
    drafters = {"trained": (trained, processor)}
    for folder in arguments.beside:
        other = ProtoGenForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).to(device)
        drafters[Path(folder).parent.name] = other, ProtoGenProcessor.from_pretrained(folder)
    if arguments.timed_prompts:
        for model in [*models.values(), *(model for model, _ in drafters.values())]:
            model.to(torch.bfloat16)
            model.measure_pass_costs()
        costs = trained.generation_config
        metrics |= {"position_cost": costs.position_cost, "slots_cost": costs.slots_cost}
        for number, tokens in enumerate(arguments.timed_tokens):
            timed = time_verified(arguments, models, drafters, sources, tokens)
            # Names of those for other lengths than the first have the length.
            metrics |= {f"{name}_{tokens}" if number else name: value for name, value in timed.items()}
    # Its folder would say where it lies on this machine.
    decoder = Path(trained.config.decoder_name_or_path).name
    content = report.result(
        command=arguments.command_line,
        model=f"{decoder}, compared in {' and '.join(arguments.dtypes)}; drafts of "
        f"{', '.join([arguments.model, *arguments.beside])}"
        + ("; timed in bfloat16" if arguments.timed_prompts else "")
        + (f", {arguments.assistant} assists" if arguments.timed_prompts and arguments.assistant else ""),
        revision=trained.config.decoder_revision,
        data=", ".join(filter(None, (arguments.dolly, arguments.gsm8k))),
        seed=0,
        metrics=metrics,
    )
    report.write_result(run / "verified.json", content)


def sources_of(arguments) -> dict[str, list[Example]]:
    """The prompts of each data set."""
    sources = {"dolly": load_examples(DataArguments(data=arguments.dolly))}
    if arguments.gsm8k:
        fields = {"instruction_field": "question", "context_field": None, "answer_field": "answer"}
        sources["gsm8k"] = load_examples(DataArguments(data=arguments.gsm8k, **fields))
    return sources


def changed(write: Writer, **others: Callable | int) -> Writer:
    """Answers that are written with others in place of some functions and constants of verified decoding."""

    def write_changed(*args):
        with mock.patch.multiple(verified_decoding, **others):
            return write(*args)

    return write_changed


def drafting_wrongly(write: Writer) -> Writer:
    """Verified answers whose drafts are all of the unknown token, which the decoder does not write."""
    drafted = verified_decoding.drafted_by_slots

    def wrong(*args):
        draft, first_tokens = drafted(*args)
        return draft._replace(tokens=torch.zeros_like(draft.tokens)), first_tokens

    return changed(write, drafted_by_slots=wrong)


def ablations(write: Writer) -> dict[str, Writer]:
    """Verified answers without drafts from the text, without trees, and by passes that draft or verify in turns."""
    return {
        "without_lookup": changed(write, continuation=lambda ids, longest: []),
        "without_trees": changed(write, NUM_CANDIDATES=1),
        "in_turns": changed(write, longest_pair_masked=lambda decoder: 0),
    }


def verified_writers(models: dict, processor: ProtoGenProcessor, block_size: int | None) -> dict[str, Writer]:
    writers = {name: protogen(model, processor, "verified", block_size=block_size) for name, model in models.items()}
    wrong = {WRONG: drafting_wrongly(writers["random"])} if "random" in writers else {}
    return writers | wrong


def compare_with_greedy(
    arguments, dtype: str, models: dict, processor: ProtoGenProcessor, sources: dict
) -> dict[str, int]:
    """
    Verified answers that are not the greedy ones, of models in this dtype; what was compared is kept in the run's
    folder. Names of metrics have the dtype where it is not float32.
    """
    path = Path(arguments.run) / f"compared-{dtype}.jsonl"
    done = {(row["method"], row["batch"], row["id"]): row["token_ids"] for row in read_lines(path)}
    mixed = chain.from_iterable(zip(*sources.values(), strict=False))
    chosen = list(islice((e for e in mixed if processor.fits(e.instruction)), arguments.prompts))
    # Of like lengths together; the order is the same in every run.
    chosen.sort(key=lambda example: example.num_characters)
    writers = {("greedy", 1): autoregressive(models["trained"].decoder, processor)}
    for name, write in verified_writers(models, processor, arguments.block_size).items():
        writers |= {(name, batch): write for batch in arguments.batch_sizes}
    for (name, batch), write in writers.items():
        parts = [chosen[at : at + batch] for at in range(0, len(chosen), batch)]
        parts = [part for part in parts if any((name, batch, e.id) not in done for e in part)]
        for part in tqdm(parts, desc=f"{dtype}, {name}, {batch} at a time"):
            written = write([e.instruction for e in part], [e.context for e in part], arguments.tokens)
            rows = [
                {"method": name, "batch": batch, "id": e.id, "token_ids": ids}
                for e, ids in zip(part, written.token_ids, strict=True)
            ]
            append_lines(path, rows)
            done |= {(name, batch, row["id"]): row["token_ids"] for row in rows}
    prefix = "mismatches" if dtype == "float32" else f"mismatches_{dtype}"
    mismatches = {
        f"{prefix}_{name}_batch_{batch}": sum(done[name, batch, e.id] != done["greedy", 1, e.id] for e in chosen)
        for name, batch in writers
        if name != "greedy"
    }
    return {"prompts": len(chosen), prefix: sum(mismatches.values()), **mismatches}


def time_verified(
    arguments, models: dict, drafters: dict, sources: dict, tokens: int
) -> dict[str, float | list[float]]:
    """Time of greedy answers over that of verified ones, in bfloat16, one prompt at a time, all methods in turn."""
    (trained, processor), metrics = drafters["trained"], {}
    writers = {
        "greedy": autoregressive(trained.decoder, processor),
        **verified_writers(models, processor, arguments.block_size),
        **{name: protogen(*pair, "verified", block_size=arguments.block_size) for name, pair in drafters.items()},
        "prompt_lookup": prompt_lookup(trained.decoder, processor),
    }
    writers |= ablations(writers["trained"])
    if arguments.assistant:
        _, assistant = load_decoder(arguments.assistant, None, "bfloat16", trained.device)
        writers["assisted"] = assisted(trained.decoder, processor, assistant)
    for source, examples in sources.items():
        unknown = held_out_of(examples, trained.config.validation_share)
        chosen = [e for e in unknown if processor.fits(e.instruction)][: arguments.timed_prompts]

        def call(write, number, chosen=chosen):
            example = chosen[number % len(chosen)]
            return write([example.instruction], [example.context], tokens)

        calls = {name: partial(call, write) for name, write in writers.items()}
        seconds = interleaved_seconds(calls, rounds=len(chosen))
        for name in calls.keys() - {"greedy"}:
            metrics[f"speedup_{name}_{source}"] = ratio_with_interval(seconds["greedy"], seconds[name], np.sum)
        metrics[f"speedup_{source}"] = metrics.pop(f"speedup_trained_{source}")
        for name, (model, own_processor) in drafters.items():
            written = [
                model.generate(
                    **own_processor(e.instruction, e.context).to(model.device),
                    mode="verified",
                    max_new_tokens=tokens,
                    block_size=arguments.block_size,
                    return_dict_in_generate=True,
                )
                for e in chosen
            ]
            accepted = [output.accepted_lengths.item() for output in written]
            metrics[f"accepted_length_{name}_{source}"] = mean_with_interval(accepted)
            speeds = [output.lengths.item() / output.num_passes for output in written]
            metrics[f"tokens_a_pass_{name}_{source}"] = mean_with_interval(speeds)
        for name in ("accepted_length", "tokens_a_pass"):
            metrics[f"{name}_{source}"] = metrics.pop(f"{name}_trained_{source}")
    metrics["speedup_all_wrong"] = metrics[f"speedup_{WRONG}_dolly"]
    return metrics
