"""Instruction data: loading, splitting and collating."""

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from modeling_protogen.configuration_protogen import category_id
from modeling_protogen.objectives import IGNORE_INDEX
from modeling_protogen.processing_protogen import ProtoGenProcessor, text_ids

from .alignment import Joins, durations, joins_of
from .proto_bank import ProtoTokenBank, stack_entries
from .text_files import Row, read_csv_rows, read_json_rows, text_of


@dataclass
class DataArguments:
    """Where the examples come from."""

    data: str = field(
        default="databricks/databricks-dolly-15k",
        metadata={"help": "Hub id, a folder written by datasets, or a .jsonl, .json, .csv or .parquet file."},
    )
    data_revision: str | None = field(default=None, metadata={"help": "Hub revision of the data."})
    data_split: str = field(default="train", metadata={"help": "Split to read; validation is taken from it."})
    instruction_field: str = field(default="instruction", metadata={"help": "Column with the instruction."})
    context_field: str | None = field(
        default="context", metadata={"help": "Column with the context, where there is one of this name."}
    )
    answer_field: str | None = field(
        default="response", metadata={"help": "Column with the answer; none where the teacher gives all of them."}
    )
    category_field: str | None = field(default="category", metadata={"help": "Column with the category."})
    validation_share: float = field(default=0.1, metadata={"help": "Share of instructions kept for validation."})
    max_train_examples: int | None = field(
        default=None, metadata={"help": "Training examples used of the data; all by default."}
    )
    max_validation_examples: int | None = field(default=None, metadata={"help": "Validation examples used."})
    exchanged_copies: int = field(
        default=0,
        metadata={
            "help": "Copies of each training example with other examples' values under the same keys, in instruction "
            "and answer: for answers that are flat JSON of the instruction's words."
        },
    )


@dataclass
class Example:
    """
    One instruction and its answer.

    Args:
        id (`str`): hash of instruction, context and answer: the same wherever the row is.
        instruction, context, answer (`str`): `context` may be empty.
        category (`str`, *optional*)
        answer_ids (`list[int]`, *optional*): the answer's tokens as the teacher wrote them, instead of `answer`.
    """

    id: str
    instruction: str
    context: str
    answer: str
    category: str | None = None
    answer_ids: list[int] | None = None

    @property
    def num_characters(self) -> int:
        """Of instruction and context: what the time of an example depends on."""
        return len(self.instruction) + len(self.context)

    @property
    def target(self) -> str | list[int]:
        """The answer to learn, as text or as the teacher's tokens."""
        return self.answer if self.answer_ids is None else self.answer_ids


def load_examples(args: DataArguments) -> list[Example]:
    """
    Reads the data; rows that repeat another one whole are dropped. Files are read as the text that they hold.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file cannot be read, a column or a split is missing, or a cell is empty or no text.
    """
    path = Path(args.data)
    reader = READERS.get(path.suffix.lower())
    if reader is not None:
        if not path.is_file():
            raise FileNotFoundError(f"data file {path} does not exist.")
        rows = reader(path)
        if not rows:
            raise ValueError(f"data file {path} has no rows.")
    elif path.is_file():
        raise ValueError(f"data file {path} is none of {', '.join(READERS)}: convert or unpack it.")
    else:
        rows = loaded_dataset(args)
    return examples_of(
        rows, args.data, args.instruction_field, args.context_field, args.answer_field, args.category_field
    )


def read_parquet(path: Path) -> Dataset:
    try:
        return Dataset(pq.read_table(path))
    except pa.ArrowException as error:
        raise ValueError(f"{path} is no Parquet file that can be read: {error}") from error


READERS = {".jsonl": read_json_rows, ".json": read_json_rows, ".csv": read_csv_rows, ".parquet": read_parquet}


def loaded_dataset(args: DataArguments) -> Dataset:
    """The split of a folder that datasets has written, or of a data set on the Hub."""
    if not Path(args.data).is_dir():
        try:
            return load_dataset(args.data, revision=args.data_revision, split=args.data_split)
        except DatasetGenerationError as error:
            raise ValueError(f"{args.data} cannot be read: {error.__cause__ or error}") from error
    found = load_from_disk(args.data)
    if not isinstance(found, dict):
        return found
    if args.data_split not in found:
        raise ValueError(f"{args.data} has no split {args.data_split}; it has {', '.join(found)}. Set data_split.")
    return found[args.data_split]


def examples_of(
    rows: Dataset | list[Row],
    name: str = "the dataset",
    instruction_field: str = "instruction",
    context_field: str | None = "context",
    answer_field: str | None = "response",
    category_field: str | None = "category",
) -> list[Example]:
    """
    The examples of a table; rows that repeat another one whole are dropped. The category may be missing, and so
    may a column called `context`. Numbers are taken as text.

    Args:
        rows (`datasets.Dataset` or `list[tuple[str, dict]]`): a table, or rows with what errors call each.
        name (`str`): what errors call the table.
        answer_field (`str`, *optional*): None where a teacher gives all answers.

    Raises:
        ValueError: if a column is missing, an instruction or answer is empty, or a cell is no text.
    """
    if isinstance(rows, Dataset):
        columns = rows.column_names
        rows = ((f"{name}, row {number}", row) for number, row in enumerate(rows, start=1))
    else:
        columns = dict.fromkeys(column for _, row in rows for column in row)
    needed = [column for column in (instruction_field, answer_field) if column]
    missing = sorted({*needed, context_field} - {None, "", "context", *columns})
    if missing:
        raise ValueError(
            f"{name} has no column {', '.join(missing)}; it has {', '.join(columns)}. "
            "Set instruction_field, context_field and answer_field, or rename its columns."
        )
    examples = {}
    for where, row in rows:
        wanted = (instruction_field, context_field, answer_field, category_field)
        cells = [text_of(row.get(column), f"{where}: {column}") for column in wanted]
        instruction, context, answer, category = cells
        for column, cell in zip(wanted, cells, strict=True):
            if column in needed and not cell.strip():
                raise ValueError(f"{where}: {column} is empty; remove the row or fill it.")
        id = stable_hash("\0".join((instruction, context, answer)))[:16]
        examples[id] = Example(id, instruction.strip(), context.strip(), answer.strip(), category or None)
    return list(examples.values())


def categories_of(examples: list[Example]) -> list[str]:
    """
    Their categories, sorted.

    Raises:
        ValueError: if an example has none.
    """
    for example in examples:
        if example.category is None:
            raise ValueError(
                "m_scope=per_category needs a category; the example with the instruction "
                f"{example.instruction[:60]!r} has none."
            )
    return sorted({example.category for example in examples})


def stable_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def place_of(instruction: str) -> float:
    """Where in [0, 1) an instruction lies by a hash of it."""
    return int(stable_hash(instruction.strip())[:8], 16) / 16**8


def is_held_out(instruction: str, share: float) -> bool:
    """Whether training with this `validation_share` holds an instruction out."""
    return place_of(instruction) < share


def share_held_out(examples: list[Example]) -> float:
    """The largest `validation_share` that holds none of these examples out."""
    return min(place_of(example.instruction) for example in examples)


def held_out_of(examples: list[Example], validation_share: float | None) -> list[Example]:
    """
    Those of the examples that a model's training held out.

    Args:
        validation_share (`float`, *optional*): as its configuration has it.

    Raises:
        ValueError: if its configuration has none.
    """
    if validation_share is None:
        raise ValueError(
            "this model does not say what it held out: config.validation_share is missing; train it again."
        )
    return [example for example in examples if is_held_out(example.instruction, validation_share)]


def split_by_instruction(examples: list[Example], validation_share: float) -> tuple[list[Example], list[Example]]:
    """
    Training and validation examples. An instruction falls on one side by its own hash, so that one that repeats is
    never on both, and adding rows moves none.
    """
    train, validation = [], []
    for example in examples:
        (validation if is_held_out(example.instruction, validation_share) else train).append(example)
    return train, validation


def fitting_targets(tokenizer, examples: list[Example], max_length: int) -> dict[str, list[int]]:
    """Token ids of the answers, EOS included, cut at `max_length`, by example id."""
    targets = {}
    for example in examples:
        ids = example.answer_ids
        if ids is None:
            ids = [*text_ids(tokenizer, example.answer), tokenizer.eos_token_id]
        targets[example.id] = ids[:max_length]
    return targets


def with_teacher_answers(examples: list[Example], answers: dict[str, list[int]], targets: str) -> list[Example]:
    """
    The examples with the answers to learn: `human` as they are, `teacher` with the teacher's answers, under ids of
    their own, or `both` of them.

    Raises:
        ValueError: if an instruction has no teacher answer.
    """
    human = examples if targets in ("human", "both") else []
    if targets == "human":
        return human
    missing = [e for e in examples if e.id not in answers]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(examples)} instructions have no teacher answer, the first is "
            f"{missing[0].instruction[:60]!r}: write them (protogen teacher)."
        )
    return human + [replace(e, id=f"{e.id}-teacher", answer_ids=answers[e.id]) for e in examples]


def with_own_texts(examples: list[Example]) -> list[Example]:
    """The examples with their instructions as answers, under ids of their own: texts to be written back."""
    return [replace(e, id=f"{e.id}-self", context="", answer=e.instruction) for e in examples]


class ProtoGenCollator:
    """
    Makes a batch of examples.

    Args:
        processor (`ProtoGenProcessor`)
        categories (`list[str]`, *optional*): names for `category_ids`.
        bank (`ProtoTokenBank`, *optional*): adds `bank_e` `(batch, chunks, num_e_tokens, dim)` and `bank_m`
            `(batch, chunks, dim)`, where it holds all of the examples.
        embeddings (`dict[str, torch.Tensor]`, *optional*): what the answers mean, by example id; adds
            `teacher_embeddings` `(batch, teacher_dim)`, where it has all of the examples.
        finds_durations (`bool`): adds `durations` `(batch, prompt)`, of answers that are whole.

    Raises:
        ValueError: if an example's category is not among `categories`.
    """

    def __init__(
        self,
        processor: ProtoGenProcessor,
        categories: list[str] | None = None,
        bank: ProtoTokenBank | None = None,
        embeddings: dict[str, torch.Tensor] | None = None,
        finds_durations: bool = False,
    ):
        self.processor = processor
        self.joins = joins_of(processor.decoder_tokenizer) if finds_durations else None
        self.embeddings = embeddings
        self.categories = categories
        self.bank = bank

    def __call__(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        batch = dict(
            self.processor(
                [example.instruction for example in examples],
                [example.context for example in examples],
                [example.target for example in examples],
            )
        )
        if self.categories:
            batch["category_ids"] = torch.tensor([category_id(e.category, self.categories) for e in examples])
        if self.bank is not None and all(example.id in self.bank for example in examples):
            batch["bank_e"], batch["bank_m"] = stack_entries([self.bank[example.id] for example in examples])
        if self.embeddings is not None and all(example.id in self.embeddings for example in examples):
            batch["teacher_embeddings"] = torch.stack([self.embeddings[example.id] for example in examples])
        if self.joins is not None:
            batch["durations"] = batch_durations(batch, self.joins)
        return batch


def batch_durations(batch: dict[str, torch.Tensor], joins: Joins) -> torch.LongTensor:
    """
    What each token of the prompts accounts for, `(batch, prompt)`: 0 at padding, -100 in the whole row of an answer
    that was cut; `joins` as in [`durations`].
    """
    rows = torch.full_like(batch["decoder_prompt_ids"], IGNORE_INDEX)
    names = ("decoder_prompt_ids", "decoder_prompt_mask", "labels", "length_labels")
    for row, ids, mask, labels, length in zip(rows, *(batch[name] for name in names), strict=True):
        answer = labels[labels != IGNORE_INDEX].tolist()
        found = durations(ids[mask.bool()].tolist(), answer, joins) if len(answer) == length else None
        if found is not None:
            row[mask.bool()] = torch.tensor(found)
            row[~mask.bool()] = 0
    return rows
