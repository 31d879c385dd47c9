"""Banks as data sets: out, into anyone's hands, and back."""

from dataclasses import replace

import pytest
import torch
import yaml
from datasets import load_dataset
from test_proto_bank import INFO, entry, filled, same
from transformers import AutoTokenizer

from trainers import bank_dataset
from trainers.bank_dataset import export_bank, import_bank
from trainers.proto_bank import ProtoTokenBank

ENTRIES = [entry("a", 3), entry("b", 9, accuracy=0.5), entry("c", 5)]


@pytest.fixture
def bank(tmp_path):
    return filled(tmp_path / "bank", ENTRIES)


def test_there_and_back(bank, tmp_path, monkeypatch):
    monkeypatch.setattr(bank_dataset, "FILE_TEXTS", 2)
    folder = export_bank(bank, tmp_path / "exported", license="cc-by-sa-3.0")
    assert len(list((folder / "data").glob("*.parquet"))) == 2
    back = import_bank(folder, tmp_path / "back")
    assert back.info == INFO
    assert sorted(back.ids) == ["a", "b", "c"]
    assert all(same(back[one.id], one) for one in ENTRIES)
    # Again, into the same bank: nothing twice.
    assert len(import_bank(folder, tmp_path / "back")) == 3


def test_anyone_can_load_it(bank, tmp_path, llama_dir):
    tokenizer = AutoTokenizer.from_pretrained(llama_dir)
    folder = export_bank(bank, tmp_path / "exported", tokenizer)
    rows = load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["id"] == ["a", "b", "c"]
    for row, one in zip(rows, ENTRIES, strict=True):
        assert row["token_ids"] == one.token_ids
        assert row["text"] == tokenizer.decode(one.token_ids)
        assert torch.equal(torch.tensor(row["e"]), one.e)
        assert torch.equal(torch.tensor(row["m"]), one.m)
    assert rows["accuracy"] == [1.0, 0.5, 1.0]


def test_the_card_says_what_the_bank_is(bank, tmp_path):
    card = (export_bank(bank, tmp_path / "exported", repo_id="org/birds", license="mit") / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "mit"
    assert "protogen" in header["tags"]
    assert header["configs"][0]["data_files"][0]["path"] == "data/*.parquet"
    for said in ("# birds", "`org/decoder` at `abc`", "| 3, 2 |", "0.8333", "`e_mN`, `bos`, `per_example`", "5.7, 9"):
        assert said in card


def test_a_shared_m_travels_with_its_bank(tmp_path):
    bank = filled(tmp_path / "bank", ENTRIES, info=replace(INFO, m_scope="shared"))
    bank.write_shared_m({"": torch.arange(6.0)[None]})
    back = import_bank(export_bank(bank, tmp_path / "exported"), tmp_path / "back")
    assert torch.equal(back.shared_m()[""], torch.arange(6.0)[None])


def test_bad_requests_are_refused(bank, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    with pytest.raises(FileExistsError, match="is not empty"):
        export_bank(bank, tmp_path / "full")
    with pytest.raises(ValueError, match="is empty"):
        export_bank(ProtoTokenBank(tmp_path / "empty", INFO), tmp_path / "exported")
    with pytest.raises(FileNotFoundError, match="holds no exported bank"):
        import_bank(tmp_path / "full", tmp_path / "back")
    assert not (tmp_path / "exported").exists()


def test_an_interrupted_export_leaves_nothing(bank, tmp_path, monkeypatch):
    monkeypatch.setattr(bank_dataset, "bank_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_bank(bank, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
    monkeypatch.undo()
    export_bank(bank, tmp_path / "exported")
