"""
The bank: fitted proto-tokens on disk, by example id.

    bank/bank.json                     what the proto-tokens were fitted for (`BankInfo`)
    bank/m.safetensors                 the `m` of each group, where texts share one
    bank/shard-000-00000.safetensors   `e` and `m` of a shard's texts, chunk after chunk; rank 0, shard 0
    bank/shard-000-00000.parquet       a row for each text; its metadata hold the tensor file's size and SHA-256

A shard exists once its parquet file does: that is written last, aside, and renamed, and never written again. A run
appends a small shard whenever texts have ended, so that a kill costs no finished text; many small shards are gathered
into one that names those it replaces, so that they count no more from the moment it exists.
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from .files import file_sha256, locked, write_atomically

INFO_NAME = "bank.json"
SHARED_M_NAME = "m.safetensors"
# Shards with fewer texts are gathered into a larger one when there are this many texts, or this many shards, of them.
SHARD_TEXTS = 256
MAX_SMALL_SHARDS = 64


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


def stack_entries(entries: list[BankEntry]) -> tuple[torch.Tensor, torch.Tensor]:
    """`e` `(texts, chunks, num_e_tokens, dim)` and `m` `(texts, chunks, dim)` of texts with one number of chunks."""
    return torch.stack([entry.e for entry in entries]), torch.stack([entry.m for entry in entries])


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
            raise FileNotFoundError(f"no bank in {self.folder}: {INFO_NAME} is missing. Fit one first (protogen fit).")
        else:
            self.info = info
            self.folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(dataclasses.asdict(info), indent=2)
            write_atomically(path, lambda temporary: temporary.write_text(text))
        self._rank = None
        self.reload()

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

    def reload(self) -> None:
        """Reads the index again: also what other processes have written since."""
        while True:
            paths = sorted(self.folder.glob("shard-*.parquet"))
            try:
                indexes = {path: read_index(path) for path in paths}
            except FileNotFoundError:
                continue
            # Otherwise another process has put small shards into a larger one meanwhile.
            if paths == sorted(self.folder.glob("shard-*.parquet")):
                break
        replaced = {name for index in indexes.values() for name in replaced_by(index)}
        self._rows: dict[str, tuple[Path, dict]] = {}
        self._shards: dict[Path, pa.Table] = {}
        for path, index in indexes.items():
            if path.stem not in replaced:
                self._add(path, index)

    def _add(self, path: Path, index: pa.Table) -> None:
        for row in index.to_pylist():
            if row["id"] in self._rows:
                raise ValueError(f"text {row['id']} is both in {self._rows[row['id']][0]} and in {path}; delete one.")
            self._rows[row["id"]] = (path, row)
        self._shards[path] = index

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, id: str) -> bool:
        return id in self._rows

    @property
    def ids(self) -> list[str]:
        """Example ids, shard after shard."""
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
        path, row = self._rows[id]
        path = path.with_suffix(".safetensors")
        chunks = slice(row["first_chunk"], row["first_chunk"] + row["num_chunks"])
        try:
            with safe_open(path, framework="pt") as file:
                e, m = file.get_slice("e")[chunks], file.get_slice("m")[chunks]
        except (SafetensorError, FileNotFoundError) as error:
            raise ValueError(f"shard {path} is damaged, or has been gathered into another since: {error}") from error
        entry = BankEntry(id, row["token_ids"], e, m, row["accuracy"], row["steps"])
        check_finite(entry, f"the bank in {self.folder}")
        return entry

    def verify(self) -> None:
        """Reads every shard; raises a ValueError that names those whose SHA-256 is not the recorded one."""
        damaged = [str(path.with_suffix(".safetensors")) for path in self._shards if not has_recorded_sha256(path)]
        if damaged:
            raise ValueError(
                f"shards with a wrong checksum: {', '.join(damaged)}. Fit their texts again with --refit_damaged true."
            )

    def shared_m(self) -> dict[str, torch.Tensor] | None:
        """The `m` `(1, dim)` of each group, or None where it has not been written."""
        path = self.folder / SHARED_M_NAME
        if not path.is_file():
            return None
        return {name.removeprefix("m/"): vector for name, vector in load_file(path).items()}

    def write_shared_m(self, m: dict[str, torch.Tensor]) -> None:
        tensors = {f"m/{group}": vector.float().cpu().contiguous() for group, vector in m.items()}
        write_atomically(self.folder / SHARED_M_NAME, lambda temporary: save_file(tensors, temporary))

    @contextmanager
    def writing(self, rank: int = 0) -> Iterator[None]:
        """
        Holds the bank for [`append`]. The processes of one run each write as another rank; two runs cannot, since
        both have a rank 0. Leaves one shard where there were many small ones.

        Raises:
            ValueError: if another process writes as this rank.
        """
        with locked(self.folder / f".lock-{rank:03d}"):
            self._rank = rank
            self.reload()
            self._remove_leftovers()
            try:
                yield
                self._gather()
            finally:
                self._rank = None

    def append(self, entries: list[BankEntry]) -> None:
        """
        Writes one shard; call it inside [`writing`]. When it returns, the entries are on the disk.

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
        self._add(*self._write_shard(entries, replaces=[]))
        small = self._small_shards()
        if len(small) >= MAX_SMALL_SHARDS or sum(len(self._shards[path]) for path in small) >= SHARD_TEXTS:
            self._gather()

    def _write_shard(self, entries: list[BankEntry], replaces: list[Path]) -> tuple[Path, pa.Table]:
        if self._rank is None:
            raise RuntimeError("a bank is written inside `with bank.writing():`.")
        prefix = f"shard-{self._rank:03d}-"
        number = 1 + max((int(path.stem.rsplit("-")[-1]) for path in self.folder.glob(f"{prefix}*")), default=-1)
        path = self.folder / f"{prefix}{number:05d}.parquet"
        tensors = {
            "e": torch.cat([entry.e for entry in entries]).float().contiguous(),
            "m": torch.cat([entry.m for entry in entries]).float().contiguous(),
        }
        tensor_path = path.with_suffix(".safetensors")
        write_atomically(tensor_path, lambda temporary: save_file(tensors, temporary))

        rows, first_chunk = [], 0
        for entry in entries:
            row = {"id": entry.id, "first_chunk": first_chunk, "num_chunks": len(entry.m)}
            rows.append(row | {"accuracy": entry.accuracy, "steps": entry.steps, "token_ids": list(entry.token_ids)})
            first_chunk += len(entry.m)
        metadata = {
            "bytes": str(tensor_path.stat().st_size),
            "sha256": file_sha256(tensor_path),
            "replaces": json.dumps([old.stem for old in replaces]),
        }
        index = pa.Table.from_pylist(rows).replace_schema_metadata(metadata)
        write_atomically(path, lambda temporary: pq.write_table(index, temporary))
        return path, index

    def _small_shards(self) -> list[Path]:
        mine = f"shard-{self._rank:03d}-"
        return [p for p, index in self._shards.items() if p.name.startswith(mine) and len(index) < SHARD_TEXTS]

    def _gather(self) -> None:
        """Puts this rank's small shards into one."""
        small = self._small_shards()
        if len(small) < 2:
            return
        entries = [self[id] for path in small for id in self._shards[path]["id"].to_pylist()]
        path, index = self._write_shard(entries, replaces=small)
        for old in small:
            for id in self._shards.pop(old)["id"].to_pylist():
                del self._rows[id]
            remove_shard(old)
        self._add(path, index)

    def _remove_leftovers(self) -> None:
        """What a killed run of this rank left: half-written files, tensors without an index, shards replaced since."""
        prefix = f"shard-{self._rank:03d}-"
        for path in self.folder.glob(f".{prefix}*.tmp"):
            path.unlink()
        for path in [*self.folder.glob(f"{prefix}*.parquet"), *self.folder.glob(f"{prefix}*.safetensors")]:
            if path.with_suffix(".parquet") not in self._shards:
                path.unlink(missing_ok=True)


def read_index(path: Path) -> pa.Table:
    """
    The index of a shard.

    Raises:
        FileNotFoundError: if another process has removed it meanwhile.
        ValueError: if it or its tensor file is not what was written.
    """
    advice = "Fit its texts again with --refit_damaged true."
    try:
        index = pq.read_table(path)
        recorded = int(index.schema.metadata[b"bytes"])
    except (pa.ArrowInvalid, KeyError, TypeError) as error:
        raise ValueError(f"shard {path} is damaged: its index cannot be read. {advice}") from error
    tensors = path.with_suffix(".safetensors")
    found = tensors.stat().st_size if tensors.is_file() else 0
    if found != recorded:
        if not path.exists():
            raise FileNotFoundError(path)
        raise ValueError(f"shard {tensors} is damaged: {found} bytes where {recorded} were written. {advice}")
    return index


def replaced_by(index: pa.Table) -> list[str]:
    """Names of the shards whose texts a shard has taken over."""
    return json.loads(index.schema.metadata.get(b"replaces", b"[]"))


def has_recorded_sha256(path: Path) -> bool:
    return file_sha256(path.with_suffix(".safetensors")) == pq.read_schema(path).metadata[b"sha256"].decode()


def remove_shard(path: Path) -> None:
    path.unlink()
    path.with_suffix(".safetensors").unlink(missing_ok=True)


def remove_damaged_shards(folder: str | Path) -> list[Path]:
    """
    Removes the shards that cannot be read or have a wrong checksum, so that their texts can be fitted again.

    Returns:
        The index files of the removed shards.
    """
    removed = []
    folder = Path(folder)
    with locked(folder / ".lock-000"):
        for path in sorted(folder.glob("shard-*.parquet")):
            try:
                read_index(path)
                whole = has_recorded_sha256(path)
            except ValueError:
                whole = False
            if not whole:
                remove_shard(path)
                removed.append(path)
    return removed


def merge_banks(folders: list[str | Path], into: str | Path) -> ProtoTokenBank:
    """
    Puts the entries of several banks into one, new or existing; what is there already stays, and of an id in several
    banks the first one's entry is taken.

    Raises:
        ValueError: if the banks were fitted for different decoders or arrangements, or with different shared `m`.
    """
    banks = [ProtoTokenBank(folder) for folder in folders]
    merged = ProtoTokenBank(into, banks[0].info)
    with merged.writing():
        for bank in banks:
            merged.check(bank.info)
            bank.verify()
            shared, own = bank.shared_m(), merged.shared_m()
            if shared is not None and own is None and len(merged) == 0:
                merged.write_shared_m(shared)
            elif not same_vectors(shared, own):
                raise ValueError(f"the bank in {bank.folder} was fitted with another shared m than {banks[0].folder}.")
            new = [id for id in bank.ids if id not in merged]
            for start in range(0, len(new), SHARD_TEXTS):
                merged.append([bank[id] for id in new[start : start + SHARD_TEXTS]])
    return merged


def same_vectors(a: dict[str, torch.Tensor] | None, b: dict[str, torch.Tensor] | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.keys() == b.keys() and all(torch.equal(a[group], b[group]) for group in a)


def check_finite(entry: BankEntry, where: str) -> None:
    """Raises a ValueError if an entry holds NaN or infinity."""
    if not (entry.e.isfinite().all() and entry.m.isfinite().all() and math.isfinite(entry.accuracy)):
        raise ValueError(f"text {entry.id} of {where} has NaN or infinite proto-tokens; fit it again.")
