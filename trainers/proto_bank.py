"""
The bank: fitted proto-tokens on disk, by example id.

    bank/bank.json                 what the proto-tokens were fitted for (`BankInfo`)
    bank/shard-00000.safetensors   `e` and `m` of the shard's texts, chunk after chunk
    bank/shard-00000.parquet       a row for each text; its metadata hold the tensor file's size and SHA-256

A shard exists once its parquet file does: that is written last, aside, and renamed. Nothing is ever rewritten, so a
killed run leaves every earlier shard whole.
"""

import dataclasses
import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

INFO_NAME = "bank.json"


@dataclass
class BankInfo:
    """What a bank's proto-tokens were fitted for; a model can use a bank only if these agree."""

    # Name of the decoder as the user gave it, its Hub revision, and `decoder_fingerprint` of its weights.
    decoder: str
    decoder_revision: str | None
    decoder_fingerprint: str
    # As in `ProtoGenConfig`.
    arrangement: str
    chunk_size: int
    num_e_tokens: int
    m_scope: str
    sink: str
    # Width of the decoder's input embeddings.
    dim: int


@dataclass
class BankEntry:
    """
    The proto-tokens of one text.

    Args:
        id (`str`): example id.
        token_ids (`list[int]`): the text, in the decoder's vocabulary.
        e (`torch.FloatTensor` of shape `(chunks, num_e_tokens, dim)`)
        m (`torch.FloatTensor` of shape `(chunks, dim)`)
        accuracy (`float`): share of tokens that the one-step argmax got right with exactly these vectors.
        steps (`int`): optimisation steps until then, over all attempts.
    """

    id: str
    token_ids: list[int]
    e: torch.Tensor
    m: torch.Tensor
    accuracy: float
    steps: int


def decoder_fingerprint(decoder: PreTrainedModel) -> str:
    """
    Identifies a decoder by its weights, wherever they were loaded from: SHA-256 of at most 1,024 evenly spaced
    elements of each parameter, as bfloat16, so that float32 and bfloat16 copies agree.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(decoder.named_parameters()):
        values = parameter.detach().flatten()
        sample = values[:: max(1, len(values) // 1024)][:1024].to("cpu", torch.bfloat16)
        digest.update(name.encode())
        digest.update(sample.contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def write_atomically(path: Path, write) -> None:
    """Calls `write(temporary_path)`, forces the file to disk and renames it to `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


class ProtoTokenBank:
    """
    Reads entries by id without loading the bank, and appends shards.

    Args:
        folder (`str` or `Path`): an existing bank, or a place for a new one.
        info (`BankInfo`, *optional*): what the bank is for; needed to create one, checked against an existing one.

    Raises:
        FileNotFoundError: if there is no bank and no `info` to create one.
        ValueError: if the bank was fitted for something else, or a shard is damaged.
    """

    def __init__(self, folder: str | Path, info: BankInfo | None = None):
        self.folder = Path(folder)
        path = self.folder / INFO_NAME
        if path.is_file():
            self.info = BankInfo(**json.loads(path.read_text()))
            if info is not None:
                self.check(info)
        elif info is None:
            raise FileNotFoundError(f"no bank in {self.folder}: {INFO_NAME} is missing. Fit one first (--stage fit).")
        else:
            self.info = info
            self.folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(dataclasses.asdict(info), indent=2)
            write_atomically(path, lambda temporary: temporary.write_text(text))
        self._shards: list[Path] = []
        self._rows: dict[str, tuple[int, dict]] = {}
        for index_path in sorted(self.folder.glob("shard-*.parquet")):
            self._read_index(index_path)

    def check(self, info: BankInfo) -> None:
        """Raises a ValueError that names every field in which the bank and `info` differ."""
        names = [field.name for field in dataclasses.fields(BankInfo)]
        # The fingerprint identifies the decoder; the same weights may have been loaded under another name.
        differing = [
            f"{name}: bank {getattr(self.info, name)!r}, wanted {getattr(info, name)!r}"
            for name in names
            if name not in ("decoder", "decoder_revision") and getattr(self.info, name) != getattr(info, name)
        ]
        if differing:
            raise ValueError(
                f"the bank in {self.folder} was fitted for another decoder or arrangement "
                f"(its decoder is {self.info.decoder}): {'; '.join(differing)}. Use another bank folder, or the "
                "settings it was fitted with."
            )

    def _read_index(self, index_path: Path) -> None:
        table = pq.read_table(index_path)
        metadata = table.schema.metadata
        tensors = index_path.with_suffix(".safetensors")
        recorded = int(metadata[b"bytes"])
        found = tensors.stat().st_size if tensors.is_file() else 0
        if found != recorded:
            raise ValueError(
                f"shard {tensors} is damaged: {found} bytes where {recorded} were written. Delete it and "
                f"{index_path.name}; fitting again then fits its {len(table)} texts anew."
            )
        for row in table.to_pylist():
            self._rows[row["id"]] = (len(self._shards), row)
        self._shards.append(tensors)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, id: str) -> bool:
        return id in self._rows

    @property
    def ids(self) -> list[str]:
        """Example ids in the order in which they were written."""
        return list(self._rows)

    def row(self, id: str) -> dict:
        """What is recorded of a text without its vectors: `accuracy`, `steps`, `token_ids` and where they stand."""
        return self._rows[id][1]

    def __getitem__(self, id: str) -> BankEntry:
        """
        Raises:
            KeyError: if the id is not in the bank.
            ValueError: if its shard cannot be read or holds NaN.
        """
        shard, row = self._rows[id]
        chunks = slice(row["first_chunk"], row["first_chunk"] + row["num_chunks"])
        try:
            with safe_open(self._shards[shard], framework="pt") as file:
                e, m = file.get_slice("e")[chunks], file.get_slice("m")[chunks]
        except SafetensorError as error:
            raise ValueError(f"shard {self._shards[shard]} is damaged: {error}") from error
        entry = BankEntry(id, row["token_ids"], e, m, row["accuracy"], row["steps"])
        check_finite(entry, f"the bank in {self.folder}")
        return entry

    def verify(self) -> None:
        """Reads every shard; raises a ValueError that names those whose SHA-256 is not the recorded one."""
        damaged = [
            str(path)
            for path in self._shards
            if file_sha256(path) != pq.read_schema(path.with_suffix(".parquet")).metadata[b"sha256"].decode()
        ]
        if damaged:
            raise ValueError(f"shards with a wrong checksum: {', '.join(damaged)}.")

    def append(self, entries: list[BankEntry]) -> None:
        """
        Writes one shard.

        Raises:
            ValueError: if an entry is not finite, of the wrong shape, or already there.
        """
        for entry in entries:
            check_finite(entry, "the fit")
            if entry.id in self:
                raise ValueError(f"text {entry.id} is already in the bank in {self.folder}.")
            expected = (len(entry.m), self.info.num_e_tokens, self.info.dim)
            if entry.e.shape != expected or entry.m.shape[1:] != (self.info.dim,):
                raise ValueError(
                    f"text {entry.id}: e {tuple(entry.e.shape)} and m {tuple(entry.m.shape)} do not fit the bank, "
                    f"which wants e {expected}."
                )
        if not entries:
            return
        number = 1 + max((int(path.stem.removeprefix("shard-")) for path in self._shards), default=-1)
        path = self.folder / f"shard-{number:05d}.safetensors"
        tensors = {
            "e": torch.cat([entry.e for entry in entries]).float().contiguous(),
            "m": torch.cat([entry.m for entry in entries]).float().contiguous(),
        }
        write_atomically(path, lambda temporary: save_file(tensors, temporary))

        rows, first_chunk = [], 0
        for entry in entries:
            row = {"id": entry.id, "first_chunk": first_chunk, "num_chunks": len(entry.m)}
            rows.append(row | {"accuracy": entry.accuracy, "steps": entry.steps, "token_ids": list(entry.token_ids)})
            first_chunk += len(entry.m)
        metadata = {"bytes": str(path.stat().st_size), "sha256": file_sha256(path)}
        table = pa.Table.from_pylist(rows).replace_schema_metadata(metadata)
        index_path = path.with_suffix(".parquet")
        write_atomically(index_path, lambda temporary: pq.write_table(table, temporary))
        self._read_index(index_path)


def check_finite(entry: BankEntry, where: str) -> None:
    """Raises a ValueError if an entry holds NaN or infinity."""
    if not (entry.e.isfinite().all() and entry.m.isfinite().all() and math.isfinite(entry.accuracy)):
        raise ValueError(f"text {entry.id} of {where} has NaN or infinite proto-tokens; fit it again.")
