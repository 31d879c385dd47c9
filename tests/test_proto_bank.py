import contextlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

import pyarrow.parquet as pq
import pytest
import torch
from conftest import save_decoder
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from modeling_protogen.frozen_decoder import decoder_fingerprint
from trainers import proto_bank
from trainers.proto_bank import (
    BankEntry,
    BankInfo,
    ProtoTokenBank,
    merge_banks,
    remove_damaged,
)

INFO = BankInfo(
    decoder="org/decoder",
    decoder_revision="abc",
    decoder_fingerprint="123",
    arrangement="e_mN",
    chunk_size=4,
    num_e_tokens=2,
    m_scope="per_example",
    sink="bos",
    dim=6,
)


def entry(id, tokens, accuracy=1.0):
    chunks = -(-tokens // 4)
    generator = torch.Generator().manual_seed(tokens)
    e, m = torch.randn(chunks, 2, 6, generator=generator), torch.randn(chunks, 6, generator=generator)
    return BankEntry(id, list(range(tokens)), e, m, accuracy, steps=7)


def same(a, b):
    return (a.id, a.token_ids, a.accuracy, a.steps) == (b.id, b.token_ids, b.accuracy, b.steps) and all(
        torch.equal(x, y) for x, y in ((a.e, b.e), (a.m, b.m))
    )


@pytest.fixture
def bank(tmp_path):
    return filled(tmp_path / "bank", [entry("a", 3), entry("b", 9, accuracy=0.5)], [entry("c", 5)])


def filled(folder, *shards, rank=0, info=INFO):
    """A bank with these shards, as a run leaves it that was killed before it gathered them."""
    bank = ProtoTokenBank(folder, info)
    with contextlib.suppress(KeyboardInterrupt), bank.writing(rank):
        for entries in shards:
            bank.append(entries)
        raise KeyboardInterrupt
    return bank


def test_entries_come_back_as_written_from_a_fresh_reader(bank):
    again = ProtoTokenBank(bank.folder)
    assert again.info == INFO
    assert again.ids == ["a", "b", "c"]
    assert len(again) == 3
    assert "b" in again
    assert "z" not in again
    assert [again.row(id)["accuracy"] for id in "abc"] == [1.0, 0.5, 1.0]
    for expected in (entry("a", 3), entry("b", 9, accuracy=0.5), entry("c", 5)):
        assert same(again[expected.id], expected)
    again.verify()


def test_files_are_only_safetensors_parquet_and_json(bank):
    names = sorted(path.name for path in bank.folder.iterdir())
    shards = [f"shard-000-0000{n}.{end}" for n in range(2) for end in ("parquet", "safetensors")]
    assert names == [".lock-000", "bank.json", *shards]


@pytest.mark.parametrize(
    "change",
    [{"arrangement": "e_m"}, {"chunk_size": 8}, {"decoder_fingerprint": "9"}, {"dim": 5}, {"sink": "none"}],
    ids=str,
)
def test_a_bank_for_another_decoder_or_arrangement_is_refused(bank, change):
    (name,) = change
    with pytest.raises(ValueError, match=f"another decoder or arrangement .*{name}: there .* wanted"):
        ProtoTokenBank(bank.folder, replace(INFO, **change))


def test_the_same_weights_under_another_name_are_welcome(bank):
    ProtoTokenBank(bank.folder, replace(INFO, decoder="/local/copy", decoder_revision=None))


def test_a_missing_bank_is_said_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no bank in .*Fit one first"):
        ProtoTokenBank(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("damage", ["cut tensors", "no tensors", "cut index", "flipped bit"])
def test_a_damaged_shard_is_named_and_fitted_again_on_request(bank, damage):
    index = bank.folder / "shard-000-00000.parquet"
    tensors = index.with_suffix(".safetensors")
    if damage == "cut tensors":
        tensors.write_bytes(tensors.read_bytes()[:-10])
    elif damage == "no tensors":
        tensors.unlink()
    elif damage == "cut index":
        index.write_bytes(index.read_bytes()[:-10])
    else:
        tensors.write_bytes(tensors.read_bytes()[:-1] + bytes([tensors.read_bytes()[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"shard-000-00000.* --refit_damaged true"):
        ProtoTokenBank(bank.folder).verify()
    assert remove_damaged(bank.folder, INFO) == [index]
    assert remove_damaged(bank.folder, INFO) == []
    again = ProtoTokenBank(bank.folder)
    assert again.ids == ["c"]
    with again.writing():
        again.append([entry("a", 3)])
    assert same(ProtoTokenBank(bank.folder)["c"], entry("c", 5))
    assert same(ProtoTokenBank(bank.folder)["a"], entry("a", 3))


def contents(bank):
    entries = [bank[id] for id in bank.ids]
    return {one.id: (one.token_ids, one.accuracy, one.steps, one.e.tolist(), one.m.tolist()) for one in entries}


@pytest.mark.parametrize("name", ["shard-000-00000.parquet", "bank.json", "m.safetensors"])
def test_a_flipped_bit_is_harmless_or_named_and_mended(tmp_path, name):
    """Whatever file it is in: an index without a checksum would have other ids or tokens in a fifth of the cases."""
    info, entries = replace(INFO, m_scope="shared"), {one.id: one for one in (entry("a", 3), entry("b", 9, 0.5))}
    bank = filled(tmp_path, list(entries.values()), info=info)
    bank.write_shared_m({"": torch.ones(1, 6)}, {"a": entries["a"].e})
    expected, path = contents(bank), tmp_path / name
    whole, refused = path.read_bytes(), 0
    for at in range(0, len(whole), 1 + len(whole) // 150):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        try:
            bank = ProtoTokenBank(tmp_path, info)
            bank.verify()
            assert contents(bank) == expected
            assert torch.equal(bank.shared_m()[""], torch.ones(1, 6))
            assert torch.equal(bank.shared_m_starts()["a"], entries["a"].e)
        except ValueError as error:
            refused += 1
            assert str(path) in str(error)  # noqa: PT017
            assert "--refit_damaged true" in str(error)  # noqa: PT017
            if refused % 20 == 1:
                assert path in remove_damaged(tmp_path, info)
                bank = ProtoTokenBank(tmp_path, info)
                bank.write_shared_m({"": torch.ones(1, 6)}, {"a": entries["a"].e})
                with bank.writing():
                    bank.append([one for id, one in entries.items() if id not in bank])
                assert contents(ProtoTokenBank(tmp_path, info)) == expected
                for shard in tmp_path.glob("shard*"):
                    shard.rename(tmp_path / f"shard-000-00000{shard.suffix}")
                whole = path.read_bytes()
    assert refused > 20


def without_checksums(folder):
    """A bank as it was written before its index and `bank.json` had checksums."""
    for path in folder.glob("*.parquet"):
        index = pq.read_table(path)
        kept = {name: index.schema.metadata[name] for name in (b"bytes", b"sha256", b"replaces")}
        pq.write_table(index.replace_schema_metadata(kept), path)
    (folder / "bank.json").write_text(json.dumps(asdict(ProtoTokenBank(folder).info)))


def test_banks_of_before_are_opened_and_mended(bank):
    expected = contents(bank)
    without_checksums(bank.folder)
    again = ProtoTokenBank(bank.folder, INFO)
    again.verify()
    assert contents(again) == expected
    assert remove_damaged(bank.folder, INFO) == []
    with again.writing():
        again.append([entry("d", 2)])
    assert contents(ProtoTokenBank(bank.folder)).items() > expected.items()


def test_an_index_that_replaces_itself_loses_nothing(bank):
    """Nor one that says it replaces a shard whose texts it has not."""
    expected = contents(bank)
    without_checksums(bank.folder)
    path = bank.folder / "shard-000-00001.parquet"
    index = pq.read_table(path)
    replaces = json.dumps(["shard-000-00001", "shard-000-00000"])
    pq.write_table(index.replace_schema_metadata(index.schema.metadata | {b"replaces": replaces.encode()}), path)
    again = ProtoTokenBank(bank.folder)
    with again.writing():
        pass
    assert contents(ProtoTokenBank(bank.folder)) == contents(again) == expected


@pytest.mark.parametrize("end", ["parquet", "safetensors"])
def test_a_link_to_nothing_is_named_and_mended(bank, end):
    index = bank.folder / "shard-000-00000.parquet"
    path = index.with_suffix(f".{end}")
    path.unlink()
    path.symlink_to("gone")
    with pytest.raises(ValueError, match=rf"shard-000-00000\.{end} is damaged.* --refit_damaged true"):
        ProtoTokenBank(bank.folder)
    assert remove_damaged(bank.folder, INFO) == [index]
    assert ProtoTokenBank(bank.folder).ids == ["c"]


def test_nan_with_a_right_checksum_is_named_and_mended(bank, monkeypatch):
    bad = entry("d", 3)
    bad.e[0, 0, 0] = float("inf")
    monkeypatch.setattr(proto_bank, "check_finite", lambda *_: None)
    filled(bank.folder, [bad])
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"text d in shard .* has NaN or infinite .* --refit_damaged true"):
        ProtoTokenBank(bank.folder).verify()
    assert len(remove_damaged(bank.folder, INFO)) == 1
    ProtoTokenBank(bank.folder).verify()


@pytest.mark.parametrize(
    "content", [None, b"", b"[1]", b'{"dim": 6}', b"\xff"], ids=["missing", "empty", "list", "short", "bytes"]
)
def test_a_lost_bank_json_is_named_and_written_again(bank, content):
    expected, path = contents(bank), bank.folder / "bank.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    for info in (None, INFO):
        with pytest.raises(ValueError, match=r"bank\.json is .*--refit_damaged true"):
            ProtoTokenBank(bank.folder, info)
    with pytest.raises(ValueError, match=r"bank\.json is lost, and its shards were fitted for something else"):
        remove_damaged(bank.folder, replace(INFO, chunk_size=8))
    assert remove_damaged(bank.folder, INFO) == [path]
    assert contents(ProtoTokenBank(bank.folder, INFO)) == expected


def test_a_lost_shared_m_takes_its_texts_with_it(tmp_path):
    info = replace(INFO, m_scope="shared")
    bank = filled(tmp_path, [entry("a", 3)], info=info)
    with pytest.raises(ValueError, match=r"m\.safetensors is missing\. Fit its texts again"):
        bank.verify()
    assert remove_damaged(tmp_path, info) == [tmp_path / "shard-000-00000.parquet"]
    assert len(ProtoTokenBank(tmp_path)) == 0


def test_damage_is_not_gathered_under_a_new_checksum(bank):
    path = bank.folder / "shard-000-00000.safetensors"
    content = path.read_bytes()
    with pytest.raises(ValueError, match=r"shard-000-00000\.safetensors has a wrong checksum"), bank.writing():
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_file_modes_follow_the_umask(tmp_path):
    umask = os.umask(0o027)
    try:
        filled(tmp_path, [entry("a", 3)])
    finally:
        os.umask(umask)
    files = [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}


def test_nan_is_refused_on_the_way_in_and_out(bank):
    bad = entry("d", 3)
    bad.m[0, 0] = float("nan")
    with bank.writing(), pytest.raises(ValueError, match="text d of the fit has NaN"):
        bank.append([bad])
    assert len(ProtoTokenBank(bank.folder)) == 3

    shard = filled(bank.folder, [entry("e", 2)]).folder / "shard-000-00003.safetensors"
    tensors = load_file(shard)
    tensors["e"][0, 0, 0] = float("nan")
    save_file(tensors, shard)
    with pytest.raises(ValueError, match=r"text e of the bank in .* has NaN"):
        ProtoTokenBank(bank.folder)["e"]


def test_repeated_ids_and_wrong_shapes_are_refused(bank):
    wrong = entry("d", 3)
    wrong.e = wrong.e[:, :1]
    with bank.writing():
        with pytest.raises(ValueError, match="text a is already in the bank"):
            bank.append([entry("a", 3)])
        with pytest.raises(ValueError, match=r"text d: e \(1, 1, 6\)"):
            bank.append([wrong])
    with pytest.raises(RuntimeError, match="inside `with bank.writing"):
        bank.append([entry("d", 3)])


def test_a_shard_without_its_index_does_not_exist(bank):
    """What a run leaves that is killed between the two files; the next run of that rank clears it away."""
    leftovers = [bank.folder / "shard-000-00002.safetensors", bank.folder / ".shard-000-00002.parquet.1.tmp"]
    for path in leftovers:
        path.write_bytes(b"half a shard")
    again = ProtoTokenBank(bank.folder)
    assert again.ids == ["a", "b", "c"]
    with again.writing():
        assert not any(path.exists() for path in leftovers)
        again.append([entry("d", 2)])
    assert same(ProtoTokenBank(bank.folder)["d"], entry("d", 2))


def test_small_shards_are_gathered_and_nothing_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(proto_bank, "MAX_SMALL_SHARDS", 4)
    monkeypatch.setattr(proto_bank, "SHARD_TEXTS", 10)
    entries = [entry(f"t{i}", 1 + i % 9) for i in range(37)]
    bank = ProtoTokenBank(tmp_path, INFO)
    with bank.writing():
        for one in entries:
            bank.append([one])
            shards = list(tmp_path.glob("*.parquet"))
            assert len(shards) < 12
            fresh = ProtoTokenBank(tmp_path)
            assert sorted(fresh.ids) == sorted(bank.ids)
            assert same(fresh[one.id], one)
    assert sorted(bank.ids) == sorted(one.id for one in entries)
    again = ProtoTokenBank(tmp_path)
    again.verify()
    assert all(same(again[one.id], one) and same(bank[one.id], one) for one in entries)
    assert len(list(tmp_path.glob("*.parquet"))) <= 37 // 10 + 1


@pytest.mark.parametrize("removed", range(5))
def test_killed_while_gathering_every_text_is_there_once(tmp_path, monkeypatch, removed):
    """The larger shard is there, and only some of those it replaces are gone."""
    bank = filled(tmp_path, *([entry(f"t{i}", i + 1)] for i in range(4)))
    remove, calls = proto_bank.remove_shard, []

    def killed(path):
        calls.append(path)
        if len(calls) > removed:
            raise KeyboardInterrupt
        remove(path)

    monkeypatch.setattr(proto_bank, "remove_shard", killed)
    with contextlib.suppress(KeyboardInterrupt), bank.writing():
        pass
    monkeypatch.setattr(proto_bank, "remove_shard", remove)
    again = ProtoTokenBank(tmp_path)
    assert sorted(again.ids) == ["t0", "t1", "t2", "t3"]
    with again.writing():
        again.append([entry("t4", 5)])
    assert len(list(tmp_path.glob("shard-*"))) == 2
    assert all(same(ProtoTokenBank(tmp_path)[f"t{i}"], entry(f"t{i}", i + 1)) for i in range(5))


def test_ranks_write_side_by_side_and_runs_do_not(bank):
    other = ProtoTokenBank(bank.folder)
    with bank.writing(), other.writing(rank=1):
        bank.append([entry("d", 2)])
        other.append([entry("e", 3)])
        with (
            pytest.raises(ValueError, match="another process is at work in"),
            ProtoTokenBank(bank.folder).writing(),
        ):
            pass
    assert sorted(ProtoTokenBank(bank.folder).ids) == ["a", "b", "c", "d", "e"]
    with other.writing(rank=1):
        assert len(list(bank.folder.glob("shard-000-*"))) == 2, "another rank's shards stay"


def test_a_text_in_two_shards_is_said_so(bank, tmp_path):
    for path in filled(tmp_path / "other", [entry("a", 3)]).folder.glob("shard*"):
        path.rename(bank.folder / path.name.replace("shard-000", "shard-001"))
    with pytest.raises(ValueError, match=r"text a is both in .*shard-000-00000.* and in .*shard-001-00000"):
        ProtoTokenBank(bank.folder)


def test_merging_banks(bank, tmp_path):
    second = filled(tmp_path / "second", [entry("c", 1), entry("d", 4)], rank=3)
    merged = merge_banks([bank.folder, second.folder], tmp_path / "merged")
    assert sorted(merged.ids) == ["a", "b", "c", "d"]
    assert same(merged["c"], entry("c", 5))
    assert same(merged["d"], entry("d", 4))
    assert sorted(merge_banks([second.folder], tmp_path / "merged").ids) == ["a", "b", "c", "d"]
    filled(tmp_path / "e_m", [entry("z", 3)], info=replace(INFO, arrangement="e_m"))
    with pytest.raises(ValueError, match="another decoder or arrangement"):
        merge_banks([tmp_path / "e_m"], tmp_path / "merged")

    shared = replace(INFO, m_scope="shared")
    for name, value in (("x", 1.0), ("y", 2.0)):
        filled(tmp_path / name, [entry(name, 3)], info=shared).write_shared_m({"": torch.full((1, 6), value)})
    merged = merge_banks([tmp_path / "x"], tmp_path / "xy")
    assert torch.equal(merged.shared_m()[""], torch.ones(1, 6))
    with pytest.raises(ValueError, match="fitted with another shared m"):
        merge_banks([tmp_path / "y"], tmp_path / "xy")
    assert ProtoTokenBank(tmp_path / "xy").ids == ["x"]


def test_killed_while_writing_loses_nothing_that_was_written(bank):
    """A process that dies inside `append`, before the rename of the index."""
    code = (
        "import os, sys, torch\n"
        "from trainers import proto_bank\n"
        "bank = proto_bank.ProtoTokenBank(sys.argv[1])\n"
        "proto_bank.pq.write_table = lambda *_: os._exit(9)\n"
        "with bank.writing():\n"
        "    bank.append([proto_bank.BankEntry('d', [1], torch.zeros(1, 2, 6), torch.zeros(1, 6), 1.0, 1)])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(bank.folder)], capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    assert ProtoTokenBank(bank.folder).ids == ["a", "b", "c"]


def test_bank_info_is_readable_json(bank):
    assert json.loads((bank.folder / "bank.json").read_text())["arrangement"] == "e_mN"


def test_fingerprint_knows_weights_not_names_or_dtypes(llama_dir, tmp_path):
    decoder = AutoModelForCausalLM.from_pretrained(llama_dir)
    half = AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.bfloat16)
    assert decoder_fingerprint(decoder) == decoder_fingerprint(half)
    other = AutoModelForCausalLM.from_pretrained(save_decoder(tmp_path / "neox", "neox"))
    assert decoder_fingerprint(other) != decoder_fingerprint(decoder)
    with torch.no_grad():
        decoder.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    assert decoder_fingerprint(decoder) != decoder_fingerprint(half)
