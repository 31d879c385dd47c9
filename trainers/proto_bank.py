"""
The bank: fitted proto-tokens on disk, by example id.

    bank/bank.json                     what the proto-tokens were fitted for (`BankInfo`)
    bank/m.safetensors                 the `m` of each group, where texts share one, and the `e` it was learned with
    bank/shard-000-00000.safetensors   `e` and `m` of a shard's texts, chunk after chunk; rank 0, shard 0
    bank/shard-000-00000.parquet       a row for each text; its metadata hold the tensor file's size and SHA-256

Each file has a checksum of what it says. Files written before there was one have none, and are taken as they are.

A shard exists once its parquet file does: that is written last, aside, and renamed, and never written again. A run
appends a small shard whenever texts have ended, so that a kill costs no finished text; many small shards are gathered
into one that names those it replaces, so that they count no more from the moment it exists.
"""

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from .files import (
    CheckedTensors,
    differences,
    file_sha256,
    json_sha256,
    locked,
    read_run_json,
    save_tensors,
    write_atomically,
    write_json,
)

INFO_NAME = "bank.json"
SHARED_M_NAME = "m.safetensors"
# Shards with fewer texts are gathered into a larger one when there are this many texts, or this many shards, of them.
SHARD_TEXTS = 256
MAX_SMALL_SHARDS = 64
ADVICE = "Fit its texts again with --refit_damaged true."


@dataclass
class BankInfo:
    """
    What a bank's proto-tokens were fitted for; a model can use a bank only if these agree.

    Args:
        decoder (`str`): its name, as it was given.
        decoder_revision (`str`, *optional*): on the Hub.
        decoder_fingerprint (`str`): [`decoder_fingerprint`] of its weights.
        arrangement (`str`), chunk_size (`int`), num_e_tokens (`int`), m_scope (`str`), sink (`str`): as in
            [`ProtoGenConfig`].
        dim (`int`): width of the decoder's input embeddings.
    """

    decoder: str
    decoder_revision: str | None
    decoder_fingerprint: str
    arrangement: str
    chunk_size: int
    num_e_tokens: int
    m_scope: str
    sink: str
    dim: int

    @property
    def wanted(self) -> dict:
        """What must agree. The fingerprint identifies the decoder; the same weights may have another name."""
        return {name: value for name, value in asdict(self).items() if name not in ("decoder", "decoder_revision")}


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
            self.info = read_info(path)
            if info is not None:
                self.check(info)
        elif any(self.folder.glob("shard-*.parquet")):
            raise ValueError(f"{path} is missing beside the bank's shards. Restore it, or set --refit_damaged true.")
        elif info is None:
            raise FileNotFoundError(f"no bank in {self.folder}: {INFO_NAME} is missing. Fit one first (protogen fit).")
        else:
            self.info = info
            self.folder.mkdir(parents=True, exist_ok=True)
            write_info(path, info)
        self._rank = None
        self.reload()

    def check(self, info: BankInfo) -> None:
        """
        Args:
            info (`BankInfo`): what the bank is to be for.

        Raises:
            ValueError: if it is for something else; names every field in which they differ.
        """
        differing = differences(self.info.wanted, info.wanted)
        if differing:
            raise ValueError(
                f"the bank in {self.folder} was fitted for another decoder or arrangement "
                f"(its decoder is {self.info.decoder}): {differing}. Use another bank folder, or the settings it was "
                "fitted with."
            )

    def reload(self) -> None:
        """Reads the index again: also what other processes have written since."""
        while True:
            paths = sorted(self.folder.glob("shard-*.parquet"))
            try:
                shards = {path: read_shard(path) for path in paths}
            except FileNotFoundError:
                continue
            # Otherwise another process has put small shards into a larger one meanwhile.
            if paths == sorted(self.folder.glob("shard-*.parquet")):
                break
        self._rows: dict[str, tuple[Path, dict]] = {}
        self._shards: dict[Path, Shard] = {}
        replaced = {old for path in shards for old in replaced_by(path, shards)}
        for path, shard in shards.items():
            if shard.info_sha256 not in (None, json_sha256(self.info.wanted)):
                raise ValueError(f"shard {path} was fitted for something else than {INFO_NAME} says. {ADVICE}")
            if path not in replaced:
                self._add(path, shard)

    def _add(self, path: Path, shard: "Shard") -> None:
        for row in shard.rows:
            if row["id"] in self._rows:
                raise ValueError(f"text {row['id']} is both in {self._rows[row['id']][0]} and in {path}; delete one.")
            self._rows[row["id"]] = (path, row)
        self._shards[path] = shard

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, id: str) -> bool:
        return id in self._rows

    @property
    def ids(self) -> list[str]:
        """Example ids, shard after shard."""
        return list(self._rows)

    def row(self, id: str) -> dict:
        """
        What is recorded of a text beside its vectors: `accuracy`, `steps`, `token_ids` and where the vectors are.

        Args:
            id (`str`): example id.

        Raises:
            KeyError: if the id is not in the bank.
        """
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
        """
        Reads the whole bank.

        Raises:
            ValueError: if a checksum is not the recorded one, or something is NaN or infinite; names all such shards.
        """
        if len(self) and self.info.m_scope != "per_example" and self.shared_m() is None:
            raise ValueError(f"{self.folder / SHARED_M_NAME} is missing. {ADVICE}")
        faults = [fault for fault in map(fault_of, self._shards, self._shards.values()) if fault]
        if faults:
            raise ValueError(f"{'; '.join(faults)}. {ADVICE}")

    def shared_m(self) -> dict[str, torch.Tensor] | None:
        """The `m` `(1, dim)` of each group, or None where it has not been written."""
        return with_prefix("m/", read_shared_m(self.folder)) or None

    def shared_m_starts(self) -> dict[str, torch.Tensor]:
        """The `e` `(chunks, num_e_tokens, dim)` of the texts that the shared `m` was learned with, by example id."""
        return with_prefix("e/", read_shared_m(self.folder))

    def write_shared_m(self, m: dict[str, torch.Tensor], e: dict[str, torch.Tensor] | None = None) -> None:
        """
        Writes what [`shared_m`] and [`shared_m_starts`] return.

        Args:
            m (`dict[str, torch.Tensor]` of shape `(1, dim)`): of each group.
            e (`dict[str, torch.Tensor]` of shape `(chunks, num_e_tokens, dim)`, *optional*): by example id.
        """
        tensors = {f"m/{group}": vector for group, vector in m.items()}
        tensors |= {f"e/{id}": vectors for id, vectors in (e or {}).items()}
        tensors = {name: tensor.float().cpu().contiguous() for name, tensor in tensors.items()}
        save_tensors(self.folder / SHARED_M_NAME, tensors)

    @contextmanager
    def writing(self, rank: int = 0) -> Iterator[None]:
        """
        Holds the bank for [`append`]. The processes of one run each write as another rank; two runs cannot, since
        both have a rank 0. Leaves one shard where there were many small ones.

        Args:
            rank (`int`, defaults to 0): of this process.

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

        Args:
            entries (`list[BankEntry]`): not in the bank yet.

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
        if len(small) >= MAX_SMALL_SHARDS or sum(len(self._shards[path].rows) for path in small) >= SHARD_TEXTS:
            self._gather()

    def _write_shard(self, entries: list[BankEntry], replaces: list[Path]) -> tuple[Path, "Shard"]:
        if self._rank is None:
            raise RuntimeError("a bank is written inside `with bank.writing():`.")
        prefix = f"shard-{self._rank:03d}-"
        number = 1 + max(map(number_of, self.folder.glob(f"{prefix}*")), default=-1)
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
            "info_sha256": json_sha256(self.info.wanted),
        }
        index = pa.Table.from_pylist(rows)
        metadata["index_sha256"] = json_sha256([index.to_pylist(), metadata])
        index = index.replace_schema_metadata(metadata)
        write_atomically(path, lambda temporary: pq.write_table(index, temporary))
        return path, shard_of(index)

    def _small_shards(self) -> list[Path]:
        mine = f"shard-{self._rank:03d}-"
        return [p for p, shard in self._shards.items() if p.name.startswith(mine) and len(shard.rows) < SHARD_TEXTS]

    def _gather(self) -> None:
        """Puts this rank's small shards into one."""
        small = self._small_shards()
        if len(small) < 2:
            return
        for path in small:
            # A new checksum must not make damage look whole.
            if fault := fault_of(path, self._shards[path]):
                raise ValueError(f"{fault}. {ADVICE}")
        entries = [self[id] for path in small for id in self._shards[path].ids]
        path, shard = self._write_shard(entries, replaces=small)
        for old in small:
            for id in self._shards.pop(old).ids:
                del self._rows[id]
            remove_shard(old)
        self._add(path, shard)

    def _remove_leftovers(self) -> None:
        """What a killed run of this rank left: half-written files, tensors without an index, shards replaced since."""
        prefix = f"shard-{self._rank:03d}-"
        for path in self.folder.glob(f".{prefix}*.tmp"):
            path.unlink()
        for path in [*self.folder.glob(f"{prefix}*.parquet"), *self.folder.glob(f"{prefix}*.safetensors")]:
            if path.with_suffix(".parquet") not in self._shards:
                path.unlink(missing_ok=True)


@dataclass
class Shard:
    """
    The index of a shard.

    Args:
        rows (`list[dict]`): of each text `id`, `first_chunk`, `num_chunks`, `accuracy`, `steps` and `token_ids`.
        bytes (`int`), sha256 (`str`): what the tensor file must have.
        replaces (`list[str]`): names of the shards whose texts it has taken over.
        info_sha256 (`str`, *optional*): checksum of `BankInfo.wanted`.
    """

    rows: list[dict]
    bytes: int
    sha256: str
    replaces: list[str]
    info_sha256: str | None

    @property
    def ids(self) -> list[str]:
        return [row["id"] for row in self.rows]


def shard_of(index: pa.Table) -> Shard:
    """
    Raises:
        ValueError: if the index has another checksum than the recorded one.
        KeyError, TypeError: if it lacks something.
    """
    metadata = {name.decode(): value.decode() for name, value in index.schema.metadata.items()}
    rows = index.to_pylist()
    recorded = metadata.pop("index_sha256", None)
    if recorded not in (None, json_sha256([rows, metadata])):
        raise ValueError("wrong checksum")
    columns = ("id", "first_chunk", "num_chunks", "accuracy", "steps", "token_ids")
    return Shard(
        [{name: row[name] for name in columns} for row in rows],
        int(metadata["bytes"]),
        metadata["sha256"],
        json.loads(metadata.get("replaces", "[]")),
        metadata.get("info_sha256"),
    )


def read_shard(path: Path) -> Shard:
    """
    Reads the index of a shard.

    Raises:
        FileNotFoundError: if another process has removed it meanwhile.
        ValueError: if it or its tensor file is not what was written.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        if os.path.lexists(path):
            raise ValueError(f"shard {path} is damaged: its index is a link to nothing. {ADVICE}") from error
        raise
    try:
        shard = shard_of(pq.read_table(pa.BufferReader(content)))
    except Exception as error:  # What a reader of parquet says of flipped bits is of many kinds.
        reason = " ".join(str(error).split())
        raise ValueError(f"shard {path} is damaged: its index cannot be read ({reason}). {ADVICE}") from error
    tensors = path.with_suffix(".safetensors")
    found = tensors.stat().st_size if tensors.is_file() else 0
    if found != shard.bytes:
        if not os.path.lexists(path):
            raise FileNotFoundError(path)
        raise ValueError(f"shard {tensors} is damaged: {found} bytes where {shard.bytes} were written. {ADVICE}")
    return shard


def number_of(path: Path) -> int:
    """A shard's number among those of its rank."""
    return int(path.stem.rpartition("-")[2])


def replaced_by(path: Path, shards: dict[Path, Shard]) -> list[Path]:
    """The earlier shards that a shard has taken over, if it says so and holds all of their texts."""
    named = [path.with_name(f"{name}.parquet") for name in shards[path].replaces]
    ids = {*shards[path].ids}
    return [old for old in named if old in shards and number_of(old) < number_of(path) and ids >= {*shards[old].ids}]


def fault_of(path: Path, shard: Shard) -> str | None:
    """What is wrong with a shard whose index is whole; None if nothing is."""
    tensor_path = path.with_suffix(".safetensors")
    if file_sha256(tensor_path) != shard.sha256:
        return f"shard {tensor_path} has a wrong checksum"
    tensors = load_file(tensor_path)
    for row in shard.rows:
        chunks = slice(row["first_chunk"], row["first_chunk"] + row["num_chunks"])
        if not is_finite(tensors["e"][chunks], tensors["m"][chunks], row["accuracy"]):
            return f"text {row['id']} in shard {tensor_path} has NaN or infinite proto-tokens"
    return None


def read_info(path: Path) -> BankInfo:
    """
    Reads a `bank.json`.

    Raises:
        ValueError: if it is damaged.
    """
    advice = "Restore it, or set --refit_damaged true."
    content = read_run_json(path, advice)
    recorded = content.pop("sha256", None)
    try:
        info = BankInfo(**content)
    except TypeError as error:
        raise ValueError(f"{path} is damaged: {error}. {advice}") from error
    if recorded not in (None, json_sha256(content)):
        raise ValueError(f"{path} is damaged: it has a wrong checksum. {advice}")
    return info


def write_info(path: Path, info: BankInfo) -> None:
    write_json(path, asdict(info) | {"sha256": json_sha256(asdict(info))})


def remove_shard(path: Path) -> None:
    path.unlink()
    path.with_suffix(".safetensors").unlink(missing_ok=True)


def read_shared_m(folder: Path) -> dict[str, torch.Tensor]:
    """
    What an `m.safetensors` holds; empty if there is none.

    Raises:
        ValueError: if it is damaged, or something in it is NaN or infinite.
    """
    path = folder / SHARED_M_NAME
    if not os.path.lexists(path):
        return {}
    tensors = CheckedTensors(path, ADVICE)
    found = {name: tensors[name] for name in tensors.names}
    for name, tensor in found.items():
        if not tensor.isfinite().all():
            raise tensors.damaged(f"{name} has NaN or infinite numbers")
    return found


def with_prefix(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def undamaged(read: Callable, path: Path):
    """What `read(path)` returns; None if that is damaged or missing."""
    try:
        return read(path)
    except (ValueError, FileNotFoundError):
        return None


def remove_damaged(folder: str | Path, info: BankInfo) -> list[Path]:
    """
    Removes what is damaged of a bank, so that its texts can be fitted again. Where the `m` that texts share is lost,
    these are all of them. A lost `bank.json` is written again, and the shards stay that are known to be for `info`.

    Returns:
        The files that were removed or written again.

    Raises:
        ValueError: if `bank.json` is lost and the shards are for something else.
    """
    folder, removed = Path(folder), []
    info_path, m_path = folder / INFO_NAME, folder / SHARED_M_NAME
    with locked(folder / ".lock-000"):
        shards = {path: undamaged(read_shard, path) for path in sorted(folder.glob("shard-*.parquet"))}
        there = undamaged(read_info, info_path)
        # A shard of before does not say what it is for: `bank.json` has to.
        known = {json_sha256((there or info).wanted)} | ({None} if there else set())
        if there is None and (shards or os.path.lexists(info_path)):
            if any(shard and shard.info_sha256 not in (*known, None) for shard in shards.values()):
                raise ValueError(
                    f"{info_path} is lost, and its shards were fitted for something else than these settings say: set "
                    "those that it was fitted with."
                )
            write_info(info_path, info)
            removed.append(info_path)
        m_is_lost = (there or info).m_scope != "per_example" and not undamaged(read_shared_m, folder)
        if m_is_lost and os.path.lexists(m_path):
            m_path.unlink()
            removed.append(m_path)
        for path, shard in shards.items():
            if m_is_lost or shard is None or shard.info_sha256 not in known or fault_of(path, shard):
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
                merged.write_shared_m(shared, bank.shared_m_starts())
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
    if not is_finite(entry.e, entry.m, entry.accuracy):
        raise ValueError(f"text {entry.id} of {where} has NaN or infinite proto-tokens; fit it again.")


def is_finite(e: torch.Tensor, m: torch.Tensor, accuracy: float) -> bool:
    return bool(e.isfinite().all() and m.isfinite().all()) and math.isfinite(accuracy)
