"""
A controlled world: a small language in which every instruction has one right answer, and a decoder that speaks it. What
is left between one-step answers and the decoder's own is then the machinery's, not the data's.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    DataCollatorForSeq2Seq,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedTokenizerFast,
    TrainingArguments,
    set_seed,
)

from trainers.data import Example
from trainers.files import written_aside
from trainers.protogen_trainer import ExampleTrainer
from trainers.resuming import last_complete_checkpoint

NUMBERS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen""".split()
THINGS = """apple bell book chair cloud cup door drum fish flag flower fork gate glass hat horse house key lamp
leaf letter moon mouse pear pen plate ring river rose ship shoe spoon star stone table tower train tree wheel
window""".split()
KINDS = ("say", "reverse", "first", "last", "count", "twice", "without", "plus", "after")
MAX_THINGS = 6
CHAT_TEMPLATE = (
    "{{ '<start>' }}{% for message in messages %}{{ ' <user> ' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' <answer>' }}{% endif %}"
)
MAX_PROMPT = 32


def question(kind: str, rng: random.Random) -> tuple[str, str]:
    """An instruction of a kind and its only right answer, at most `MAX_THINGS` words."""
    things = rng.sample(THINGS, rng.randint(2, MAX_THINGS))
    number, more = rng.randrange(10), rng.randint(1, 5)
    match kind:
        case "say":
            return f"say {' '.join(things)}", " ".join(things)
        case "reverse":
            return f"reverse {' '.join(things)}", " ".join(reversed(things))
        case "first":
            return f"first of {' '.join(things)}", things[0]
        case "last":
            return f"last of {' '.join(things)}", things[-1]
        case "count":
            return f"count {' '.join(things)}", NUMBERS[len(things)]
        case "twice":
            return f"twice {' '.join(things[:3])}", " ".join(thing for thing in things[:3] for _ in range(2))
        case "without":
            return f"without {things[-1]} say {' '.join(things)}", " ".join(things[:-1])
        case "plus":
            other = rng.randrange(9)
            return f"{NUMBERS[number]} plus {NUMBERS[other]}", NUMBERS[number + other]
        case "after":
            return f"{NUMBERS[more]} after {NUMBERS[number]}", " ".join(NUMBERS[number + 1 : number + 1 + more])


@dataclass
class WorldArguments:
    """The size of the controlled world (`protogen world`)."""

    world_rows: int = field(default=20_000, metadata={"help": "Different instructions."})
    world_width: int = field(default=128, metadata={"help": "Width of decoder and encoder; a multiple of 32."})
    world_layers: int = field(default=4, metadata={"help": "Layers of decoder and encoder."})
    world_steps: int = field(default=1500, metadata={"help": "Steps in which the decoder learns the language."})


def world_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Rows of a data file, `count` different instructions."""
    rng, rows = random.Random(seed), {}
    while len(rows) < count:
        kind = rng.choice(KINDS)
        instruction, answer = question(kind, rng)
        rows[instruction] = {"instruction": instruction, "context": "", "response": answer, "category": kind}
    return list(rows.values())


def world_tokenizer(special: list[str], **kwargs) -> PreTrainedTokenizerFast:
    """A token for each word of the language."""
    words = sorted({*NUMBERS, *THINGS, *KINDS, "of"})
    tokenizer = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate([*special, *words])}, unk_token=special[0])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=special[0], **kwargs)


def save_encoder(folder: Path, args: WorldArguments, seed: int) -> None:
    """Writes an untrained BERT for the language's instructions."""
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = world_tokenizer(["[UNK]", *special.values()], **special, model_max_length=MAX_PROMPT)
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=ids
    )
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.world_width,
        num_hidden_layers=args.world_layers,
        num_attention_heads=args.world_width // 32,
        intermediate_size=4 * args.world_width,
        max_position_embeddings=MAX_PROMPT,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(), written_aside(folder) as aside:
        torch.manual_seed(seed)
        BertModel(config).save_pretrained(aside)
        tokenizer.save_pretrained(aside)


def pretrain_decoder(folder: Path, examples: list[Example], args: WorldArguments, seed: int) -> None:
    """
    Trains a GPTNeoX to answer, token by token: cross-entropy of the answers after their prompts. Writes it when it is
    done, and goes on from its last checkpoint after an interruption.
    """
    special = {"bos_token": "<start>", "eos_token": "<end>", "pad_token": "<end>"}
    names = ["<unknown>", "<start>", "<end>", "<user>", "<answer>"]
    tokenizer = world_tokenizer(names, **special, chat_template=CHAT_TEMPLATE)
    pad = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)

    def row(example):
        message = [{"role": "user", "content": example.instruction}]
        prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        before, answer = (tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, example.answer))
        ids = [*before, *answer, tokenizer.eos_token_id]
        return {"input_ids": ids, "labels": [-100] * len(before) + ids[len(before) :]}

    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.world_width,
        num_hidden_layers=args.world_layers,
        num_attention_heads=args.world_width // 32,
        intermediate_size=4 * args.world_width,
        max_position_embeddings=2 * MAX_PROMPT,
        rotary_pct=1.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    arguments = TrainingArguments(
        output_dir=str(folder.with_name("decoder_training")),
        max_steps=args.world_steps,
        per_device_train_batch_size=64,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=args.world_steps // 20,
        save_steps=250,
        save_total_limit=1,
        logging_steps=100,
        report_to="none",
        dataloader_pin_memory=torch.accelerator.is_available(),
        seed=seed,
    )
    set_seed(seed)
    trainer = ExampleTrainer(
        GPTNeoXForCausalLM(config),
        arguments,
        train_dataset=examples,
        data_collator=lambda batch: pad(list(map(row, batch))),
    )
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(arguments.output_dir))
    with written_aside(folder) as aside:
        trainer.model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
