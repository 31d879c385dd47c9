"""
The data of the tasks here: from the Hub, or with `--metadata '{"data_dir": "FOLDER"}'` from JSONL files in a folder,
with the Hub's fields: `mmlu_test.jsonl` and `mmlu_dev.jsonl`, `mmlu_pro_test.jsonl` and `mmlu_pro_validation.jsonl`,
`gsm8k_test.jsonl` and `gsm8k_train.jsonl`, `triviaqa_validation.jsonl` and `triviaqa_train.jsonl`, `dolly.jsonl`,
`dolly_german.jsonl`. `snips_test.jsonl` is always read from a folder: `scripts/data` in the repository.
"""

from functools import lru_cache
from pathlib import Path

import datasets

from trainers.data import is_held_out
from trainers.text_files import read_json_rows

# What models have to have held out at least.
DOLLY_HELD_OUT = 0.1


@lru_cache
def local_rows(data_dir: str, name: str) -> list[dict]:
    path = Path(data_dir) / f"{name}.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; data_dir is the folder with the tasks' .jsonl files.")
    return [row for _, row in read_json_rows(path)]


def local_splits(data_dir: str, name: str, *splits: str) -> datasets.DatasetDict:
    return datasets.DatasetDict(
        {split: datasets.Dataset.from_list(local_rows(data_dir, f"{name}_{split}")) for split in splits}
    )


def mmlu(subject: str, data_dir: str | None = None, **_) -> datasets.DatasetDict:
    if data_dir is None:
        return datasets.load_dataset("cais/mmlu", subject)
    rows = {split: local_rows(data_dir, f"mmlu_{split}") for split in ("test", "dev")}
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_list([row for row in all_rows if row["subject"] == subject])
            for split, all_rows in rows.items()
        }
    )


def mmlu_pro(data_dir: str | None = None, **_) -> datasets.DatasetDict:
    if data_dir is None:
        return datasets.load_dataset("TIGER-Lab/MMLU-Pro")
    return local_splits(data_dir, "mmlu_pro", "test", "validation")


def gsm8k(data_dir: str | None = None, **_) -> datasets.DatasetDict:
    if data_dir is None:
        return datasets.load_dataset("openai/gsm8k", "main")
    return local_splits(data_dir, "gsm8k", "test", "train")


def triviaqa(data_dir: str | None = None, **_) -> datasets.DatasetDict:
    if data_dir is None:
        return datasets.load_dataset("mandarjoshi/trivia_qa", "rc.nocontext")
    return local_splits(data_dir, "triviaqa", "validation", "train")


def snips(data_dir: str | None = None, **_) -> datasets.DatasetDict:
    """Commands and their JSON, which are read from a folder only."""
    if data_dir is None:
        raise FileNotFoundError(
            "snips_test.jsonl is not part of the package: give its folder as data_dir, in the repository scripts/data."
        )
    return local_splits(data_dir, "snips", "test")


def dolly(data_dir: str | None = None, **_) -> datasets.DatasetDict:
    """The instructions that training holds out."""
    return held_out(data_dir, "dolly", ("databricks/databricks-dolly-15k", "train"), "instruction")


def dolly_german(data_dir: str | None = None, **_) -> datasets.DatasetDict:
    """The same instructions in German, translated by machine."""
    hub = ("argilla/databricks-dolly-15k-curated-multilingual", "de")
    return held_out(data_dir, "dolly_german", hub, "instruction_original_en")


def held_out(data_dir: str | None, name: str, hub: tuple[str, str], instruction_field: str) -> datasets.DatasetDict:
    """The rows that training holds out of a file in `data_dir`, or of a data set on the Hub and its split."""
    if data_dir is None:
        hub_id, split = hub
        rows = datasets.load_dataset(hub_id, split=split).to_list()
    else:
        rows = local_rows(data_dir, name)
    rows = [row for row in rows if is_held_out(row[instruction_field], DOLLY_HELD_OUT)]
    return datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})
