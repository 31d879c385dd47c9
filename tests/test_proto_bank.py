import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import save_decoder
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from trainers.proto_bank import BankEntry, BankInfo, ProtoTokenBank, decoder_fingerprint

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
    bank = ProtoTokenBank(tmp_path / "bank", INFO)
    bank.append([entry("a", 3), entry("b", 9, accuracy=0.5)])
    bank.append([entry("c", 5)])
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
    shards = [f"shard-0000{n}.{end}" for n in range(2) for end in ("parquet", "safetensors")]
    assert names == ["bank.json", *shards]


@pytest.mark.parametrize(
    "change",
    [{"arrangement": "e_m"}, {"chunk_size": 8}, {"decoder_fingerprint": "9"}, {"dim": 5}, {"sink": "none"}],
    ids=str,
)
def test_a_bank_for_another_decoder_or_arrangement_is_refused(bank, change):
    (name,) = change
    with pytest.raises(ValueError, match=f"another decoder or arrangement .*{name}: bank .* wanted"):
        ProtoTokenBank(bank.folder, replace(INFO, **change))


def test_the_same_weights_under_another_name_are_welcome(bank):
    ProtoTokenBank(bank.folder, replace(INFO, decoder="/local/copy", decoder_revision=None))


def test_a_missing_bank_is_said_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no bank in .*Fit one first"):
        ProtoTokenBank(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_a_truncated_shard_is_named_and_can_be_fitted_again(bank):
    shard = bank.folder / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"shard-00000\.safetensors is damaged.*fits its 2 texts anew"):
        ProtoTokenBank(bank.folder)
    shard.unlink()
    shard.with_suffix(".parquet").unlink()
    again = ProtoTokenBank(bank.folder)
    assert again.ids == ["c"]
    again.append([entry("a", 3)])
    assert same(ProtoTokenBank(bank.folder)["c"], entry("c", 5))
    assert same(ProtoTokenBank(bank.folder)["a"], entry("a", 3))


def test_verify_finds_a_flipped_bit(bank):
    shard = bank.folder / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"wrong checksum: .*shard-00001"):
        ProtoTokenBank(bank.folder).verify()


def test_nan_is_refused_on_the_way_in_and_out(bank):
    bad = entry("d", 3)
    bad.m[0, 0] = float("nan")
    with pytest.raises(ValueError, match="text d of the fit has NaN"):
        bank.append([bad])
    assert len(ProtoTokenBank(bank.folder)) == 3

    shard = bank.folder / "shard-00001.safetensors"
    tensors = load_file(shard)
    tensors["e"][0, 0, 0] = float("nan")
    save_file(tensors, shard)
    with pytest.raises(ValueError, match=r"text c of the bank in .* has NaN"):
        ProtoTokenBank(bank.folder)["c"]


def test_repeated_ids_and_wrong_shapes_are_refused(bank):
    with pytest.raises(ValueError, match="text a is already in the bank"):
        bank.append([entry("a", 3)])
    wrong = entry("d", 3)
    wrong.e = wrong.e[:, :1]
    with pytest.raises(ValueError, match=r"text d: e \(1, 1, 6\)"):
        bank.append([wrong])


def test_a_shard_without_its_index_does_not_exist(bank):
    """What a run leaves that is killed between the two files."""
    (bank.folder / "shard-00002.safetensors").write_bytes(b"half a shard")
    (bank.folder / ".shard-00002.parquet.1.tmp").write_bytes(b"")
    again = ProtoTokenBank(bank.folder)
    assert again.ids == ["a", "b", "c"]
    again.append([entry("d", 2)])
    assert same(ProtoTokenBank(bank.folder)["d"], entry("d", 2))


def test_killed_while_writing_loses_nothing_that_was_written(bank):
    """A process that dies inside `append`, before the rename of the index."""
    code = (
        "import os, sys, torch\n"
        "from trainers import proto_bank\n"
        "bank = proto_bank.ProtoTokenBank(sys.argv[1])\n"
        "proto_bank.pq.write_table = lambda *_: os._exit(9)\n"
        "bank.append([proto_bank.BankEntry('d', [1], torch.zeros(1, 2, 6), torch.zeros(1, 6), 1.0, 1)])\n"
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
