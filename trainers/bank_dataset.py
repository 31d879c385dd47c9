"""A bank as a Hugging Face data set: parquet files that anyone can load, with a card; and back."""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from huggingface_hub import DatasetCard, DatasetCardData, snapshot_download
from transformers import PreTrainedTokenizerBase

from modeling_protogen.publishing import publish

from .files import written_aside
from .proto_bank import (
    INFO_NAME,
    SHARD_TEXTS,
    SHARED_M_NAME,
    BankEntry,
    BankInfo,
    ProtoTokenBank,
    read_info,
    read_shared_m,
    with_prefix,
)

FILE_TEXTS = 2048
# Of an earlier push: rows that the new files have, or no longer have.
BANK_FILES = ("data/*.parquet", SHARED_M_NAME)

CARD = """---
{{ card_data }}
---

# {{ title }}

{{ texts }} texts as *proto-tokens*: fed `{{ arrangement }}` of the two vectors `e` and `m`, the frozen decoder
`{{ decoder }}` writes each text in one forward pass ([Mezentsev & Oseledets, 2025](https://arxiv.org/abs/2505.21189)).

| | |
|---|---|
| decoder | `{{ decoder }}`{{ revision }} |
| fingerprint of its weights | `{{ fingerprint }}` |
| arrangement, sink, scope of `m` | `{{ arrangement }}`, `{{ sink }}`, `{{ m_scope }}` |
| e-tokens a chunk, tokens a chunk, width | {{ num_e_tokens }}, {{ chunk_size }}, {{ dim }} |
| texts, of them perfect | {{ texts }}, {{ perfect }} |
| mean reconstruction accuracy | {{ accuracy }} |
| tokens, mean and longest text | {{ mean_tokens }}, {{ longest }} |

```python
from datasets import load_dataset

row = load_dataset("{{ repo_id }}", split="train")[0]
row["token_ids"], row["accuracy"]  # the text in the decoder's vocabulary, and the share of it that one pass gives back
row["e"], row["m"]                 # (chunks, num_e_tokens, dim) and (chunks, dim)
```

To train with it: `protogen bank import {{ repo_id }} runs/my/bank`.
"""


def export_bank(
    bank: ProtoTokenBank,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    repo_id: str = "org/name",
    license: str | None = None,
) -> Path:
    """
    Writes `data/*.parquet`, `README.md` and what else the bank needs to come back.

    Args:
        bank (`ProtoTokenBank`)
        folder (`str` or `Path`): must not exist, or be empty.
        tokenizer (*optional*): the decoder's; adds a column `text`.
        repo_id (`str`): name of the data set in its card.
        license (`str`, *optional*): that of the texts, in the Hub's spelling.

    Raises:
        FileExistsError: if the folder has something in it.
        ValueError: if the bank is empty or damaged.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; export into a new folder.")
    if not len(bank):
        raise ValueError(f"the bank in {bank.folder} is empty.")
    bank.verify()
    with written_aside(folder) as aside:
        (aside / "data").mkdir()
        write_parquet_files(bank, aside / "data", tokenizer)
        shutil.copy(bank.folder / INFO_NAME, aside)
        if bank.shared_m() is not None:
            shutil.copy(bank.folder / SHARED_M_NAME, aside)
        bank_card(bank, repo_id, license).save(aside / "README.md")
    return folder


def write_parquet_files(bank: ProtoTokenBank, folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Writes a bank's entries, FILE_TEXTS to a file; with a tokenizer also their texts."""
    num_files = -(-len(bank) // FILE_TEXTS)
    for number in range(num_files):
        ids = bank.ids[number * FILE_TEXTS : (number + 1) * FILE_TEXTS]
        table = entries_table([bank[id] for id in ids])
        if tokenizer is not None:
            table = table.append_column("text", [tokenizer.batch_decode(table["token_ids"].to_pylist())])
        path = folder / f"train-{number:05d}-of-{num_files:05d}.parquet"
        pq.write_table(table, path, write_page_checksum=True)


def entries_table(entries: list[BankEntry]) -> pa.Table:
    """A row for each entry; `e` and `m` are nested lists of fixed width."""

    def nested(tensors: list[torch.Tensor]) -> pa.Array:
        values = pa.array(torch.cat(tensors).float().flatten().numpy())
        for size in reversed(tensors[0].shape[1:]):
            values = pa.FixedSizeListArray.from_arrays(values, size)
        offsets = np.cumsum([0, *map(len, tensors)], dtype=np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), values)

    return pa.table(
        {
            "id": [entry.id for entry in entries],
            "token_ids": pa.array([entry.token_ids for entry in entries], pa.list_(pa.int32())),
            "accuracy": [entry.accuracy for entry in entries],
            "steps": [entry.steps for entry in entries],
            "e": nested([entry.e for entry in entries]),
            "m": nested([entry.m for entry in entries]),
        }
    )


def bank_card(bank: ProtoTokenBank, repo_id: str, license: str | None) -> DatasetCard:
    """The data set card; every metric in it is read from the bank."""
    rows, info = [bank.row(id) for id in bank.ids], bank.info
    lengths = [len(row["token_ids"]) for row in rows]
    data = DatasetCardData(
        license=license,
        tags=["protogen", "proto-tokens"],
        task_categories=["text-generation"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}],
    )
    return DatasetCard.from_template(
        data,
        template_str=CARD,
        title=repo_id.split("/")[-1],
        repo_id=repo_id,
        texts=len(rows),
        perfect=sum(row["accuracy"] == 1 for row in rows),
        accuracy=f"{sum(row['accuracy'] for row in rows) / len(rows):.4f}",
        mean_tokens=f"{sum(lengths) / len(lengths):.1f}",
        longest=max(lengths),
        revision=f" at `{info.decoder_revision}`" if info.decoder_revision else "",
        fingerprint=info.decoder_fingerprint[:16],
        **{name: getattr(info, name) for name in ("decoder", "arrangement", "sink", "m_scope")},
        **{name: getattr(info, name) for name in ("num_e_tokens", "chunk_size", "dim")},
    )


def import_bank(source: str | Path, folder: str | Path, revision: str | None = None) -> ProtoTokenBank:
    """
    Makes a bank of an exported data set; what the bank has already stays.

    Args:
        source (`str` or `Path`): a folder written by [`export_bank`], or the Hub id of one.
        folder (`str` or `Path`): the bank.
        revision (`str`, *optional*): Hub revision.

    Raises:
        FileNotFoundError: if a local source holds no exported bank.
        ValueError: if the bank in `folder` is for another decoder or arrangement.
    """
    if not Path(source).is_dir():
        source = snapshot_download(str(source), repo_type="dataset", revision=revision)
    source = Path(source)
    if not (source / INFO_NAME).is_file():
        raise FileNotFoundError(f"{source} holds no exported bank: {INFO_NAME} is missing.")
    bank = ProtoTokenBank(folder, read_info(source / INFO_NAME))
    with bank.writing():
        if bank.shared_m() is None and (shared := read_shared_m(source)):
            bank.write_shared_m(with_prefix("m/", shared), with_prefix("e/", shared))
        for path in sorted((source / "data").glob("*.parquet")):
            for entries in read_entries(path, bank.info):
                bank.append([entry for entry in entries if entry.id not in bank])
    return bank


def read_entries(path: Path, info: BankInfo) -> Iterator[list[BankEntry]]:
    """
    Raises:
        ValueError: if the file is damaged.
    """
    content = pa.BufferReader(path.read_bytes())
    try:
        for batch in pq.ParquetFile(content, page_checksum_verification=True).iter_batches(SHARD_TEXTS):
            yield [entry_of_row(row, info) for row in batch.to_pylist()]
    except Exception as error:  # What a reader of parquet says of flipped bits is of many kinds.
        raise ValueError(f"{path} is damaged: {error}. Export or download it again.") from error


def entry_of_row(row: dict, info: BankInfo) -> BankEntry:
    e = torch.tensor(row["e"]).view(-1, info.num_e_tokens, info.dim)
    m = torch.tensor(row["m"]).view(-1, info.dim)
    return BankEntry(row["id"], row["token_ids"], e, m, row["accuracy"], row["steps"])


def push_bank(bank: ProtoTokenBank, repo_id: str, private: bool = False, **export) -> str:
    """Exports the bank and uploads it; keyword arguments as in [`export_bank`]. Returns the commit's address."""
    return publish(
        lambda folder, repo_id: export_bank(bank, folder, repo_id=repo_id, **export),
        repo_id,
        message=f"{len(bank)} texts as proto-tokens of {bank.info.decoder}",
        repo_type="dataset",
        replaces=BANK_FILES,
        private=private,
    ).commit_url


def describe(bank: ProtoTokenBank) -> str:
    """What a bank is for and how good it is, a line each."""
    rows = [bank.row(id) for id in bank.ids]
    lines = [f"{name}: {value}" for name, value in dataclasses.asdict(bank.info).items()]
    lines.append(f"texts: {len(rows)}, of them perfect {sum(row['accuracy'] == 1 for row in rows)}")
    if rows:
        lines.append(f"mean reconstruction accuracy: {sum(row['accuracy'] for row in rows) / len(rows):.4f}")
        lines.append(f"mean steps to best: {sum(row['steps'] for row in rows) / len(rows):.1f}")
    return "\n".join(lines)
