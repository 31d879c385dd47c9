"""
How often drafts are right, place by place, behind random places of the decoder's own answers: those of trained models,
and of slots that nobody trained, the mean of the prompt's embeddings (ESP, https://arxiv.org/abs/2603.17942).
"""

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from eval_tasks import report
from eval_tasks.benchmarks.verified import sources_of
from eval_tasks.plots import curves
from eval_tasks.statistics import mean_with_interval
from eval_tasks.text_metrics import share_of_equal
from modeling_protogen import ProtoGenForConditionalGeneration, ProtoGenProcessor
from modeling_protogen.anchors import labels_behind, random_anchors, states_behind
from modeling_protogen.frozen_decoder import logits_of
from modeling_protogen.objectives import IGNORE_INDEX
from trainers.data import Example, held_out_of
from trainers.decoders import load_frozen_decoder, load_protogen
from trainers.devices import best_device
from trainers.teacher import greedy_answers

TOP = 10
UNTRAINED = "mean_of_prompt"


def add_commands(commands) -> None:
    command = commands.add_parser("drafts")
    command.add_argument("--models", nargs="+", required=True, help="NAME=FOLDER of trained models, of one decoder")
    command.add_argument("--dolly", default="scripts/data/dolly_sample.jsonl")
    command.add_argument("--gsm8k", help=".jsonl file of its test split")
    command.add_argument("--prompts", type=int, default=100, help="of each data set")
    command.add_argument("--tokens", type=int, default=128, help="of the decoder's own answers at most")
    command.add_argument("--anchors", type=int, default=32, help="places of each answer")
    command.add_argument("--batch-size", type=int, default=10)
    command.add_argument(
        "--thresholds", type=float, nargs="*", default=[0.5, 0.7, 0.8, 0.9, 0.95], help="of adaptive decoding"
    )
    command.add_argument("--result", default="runs/drafts.json")
    command.set_defaults(run_command=drafts)


@torch.no_grad()
def drafts(arguments) -> None:
    folders = dict(pair.split("=", 1) for pair in arguments.models)
    models = {name: load_protogen(folder).to(best_device()) for name, folder in folders.items()}
    first = next(iter(models.values()))
    reader = ProtoGenProcessor.from_pretrained(next(iter(folders.values())))
    reader.max_answer_length = arguments.tokens
    dtype = str(first.dtype).removeprefix("torch.")
    # Without a model's adapters.
    _, decoder = load_frozen_decoder(first.config.decoder_name_or_path, dtype)
    metrics, adaptive = {}, {}
    for source, examples in sources_of(arguments).items():
        unknown = held_out_of(examples, first.config.validation_share)
        chosen = [e for e in unknown if reader.fits(e.instruction)][: arguments.prompts]
        torch.manual_seed(0)
        ranks, written = [], []
        for at in tqdm(range(0, len(chosen), arguments.batch_size), desc=source):
            part = chosen[at : at + arguments.batch_size]
            answers = greedy_answers(decoder, reader, part, arguments.tokens)
            ranks += ranks_of(models, decoder, reader, part, answers, arguments.anchors)
            written += adaptive_answers(first, reader, part, answers, arguments.thresholds)
        for name in ranks[0]:
            measured = summary([row[name] for row in ranks])
            metrics |= {f"{name}_{key}_{source}": value for key, value in measured.items()}
        adaptive[source] = []
        for column, threshold in enumerate(arguments.thresholds):
            speed, agreement = map(mean_with_interval, zip(*(row[column] for row in written), strict=True))
            metrics[f"adaptive@{threshold}_tokens_a_pass_{source}"] = speed
            metrics[f"adaptive@{threshold}_agreement_{source}"] = agreement
            adaptive[source].append((speed, agreement))
        metrics[f"prompts_{source}"] = len(chosen)
    plot = Path(arguments.result).with_suffix(".png")
    if arguments.thresholds:
        curves(adaptive, ("tokens a pass", "share of the greedy tokens"), "Adaptive decoding", plot)
    content = report.result(
        command=arguments.command_line,
        model=f"{Path(first.config.decoder_name_or_path).name}, {dtype}; "
        + "; ".join(f"{name}: {described(model)}" for name, model in models.items()),
        revision=first.config.decoder_revision,
        data=", ".join(filter(None, (arguments.dolly, arguments.gsm8k))),
        seed=0,
        metrics=metrics,
    )
    report.write_result(arguments.result, content)


def described(model: ProtoGenForConditionalGeneration) -> str:
    config = model.config
    return f"latent_source={config.latent_source}, slot adapters of rank {config.slot_adapter_rank}"


def ranks_of(
    models: dict[str, ProtoGenForConditionalGeneration],
    decoder: PreTrainedModel,
    reader: ProtoGenProcessor,
    examples: list[Example],
    answers: list[list[int]],
    num_anchors: int,
) -> list[dict[str, np.ndarray]]:
    """
    For each example, by method: how many tokens are likelier than the right one at each place of a draft, `(anchors,
    places)`; -1 beyond the end of the answer.
    """
    batch = reader([e.instruction for e in examples], [e.context for e in examples], answers).to(decoder.device)
    anchors = random_anchors(batch["labels"], num_anchors)
    logits = {name: each(**batch, anchors=anchors).answer_logits for name, each in models.items()}
    size = next(iter(models.values())).config.draft_length
    prompt = batch["decoder_prompt_ids"], batch["decoder_prompt_mask"]
    logits[UNTRAINED] = untrained_logits(decoder, *prompt, batch["labels"], anchors, size)
    labels = labels_behind(batch["labels"], anchors, size)
    is_token = labels != IGNORE_INDEX
    found = {}
    for name, table in logits.items():
        ranks = torch.full_like(labels, -1)
        ranks[is_token] = (table > table.gather(1, labels[is_token][:, None])).sum(1)
        found[name] = ranks.view(len(examples), num_anchors, size).cpu().numpy()
    return [{name: ranks[row] for name, ranks in found.items()} for row in range(len(examples))]


def adaptive_answers(
    model: ProtoGenForConditionalGeneration,
    processor: ProtoGenProcessor,
    examples: list[Example],
    answers: list[list[int]],
    thresholds: list[float],
) -> list[list[tuple[float, float]]]:
    """For each example and threshold, how many tokens adaptive decoding writes a pass, and its share of greedy ones."""
    inputs = processor([e.instruction for e in examples], [e.context for e in examples]).to(model.device)
    columns = []
    for threshold in thresholds:
        output = model.generate(
            **inputs,
            mode="adaptive",
            confidence_threshold=threshold,
            max_new_tokens=processor.max_answer_length,
            return_dict_in_generate=True,
        )
        kept = output.accepted_lengths * output.num_drafts
        speeds = output.lengths / (output.lengths - kept)
        rows = zip(output.sequences.tolist(), output.lengths.tolist(), answers, strict=True)
        agreements = [share_of_equal(row[:length], answer) for row, length, answer in rows]
        columns.append(list(zip(speeds.tolist(), agreements, strict=True)))
    return list(map(list, zip(*columns, strict=True)))


def untrained_logits(
    decoder: PreTrainedModel,
    prompt_ids: torch.LongTensor,
    prompt_mask: torch.Tensor,
    labels: torch.LongTensor,
    anchors: torch.LongTensor,
    size: int,
) -> torch.Tensor:
    """As those of a model with anchors, of `size` slots that are the mean of the prompt's embeddings."""
    embeddings = decoder.get_input_embeddings()(prompt_ids) * prompt_mask[..., None]
    mean = embeddings.sum(1, keepdim=True) / prompt_mask.sum(1)[:, None, None]
    states = states_behind(decoder, prompt_ids, prompt_mask, labels, anchors, mean.expand(-1, size, -1))
    return logits_of(decoder, states.flatten(0, 1)[labels_behind(labels, anchors, size) != IGNORE_INDEX])


def summary(rows: list[np.ndarray]) -> dict[str, list[float]]:
    """
    From ranks `(anchors, places)` of each text: `top1_K` and `top10_K`, shares of right tokens at each place, and
    `kept`, the tokens before the first that is wrong; means over texts with intervals.
    """
    metrics = {}
    for place in range(rows[0].shape[1]):
        seen = [row[:, place][row[:, place] >= 0] for row in rows]
        for name, top in (("top1", 1), (f"top{TOP}", TOP)):
            metrics[f"{name}_{place + 1}"] = mean_with_interval([(r < top).mean() for r in seen if len(r)])
    kept = [np.cumprod(row == 0, axis=1).sum(1)[row[:, 0] >= 0] for row in rows]
    metrics["kept"] = mean_with_interval([tokens.mean() for tokens in kept if len(tokens)])
    return metrics
