"""Every arrangement, slot by slot, against layouts written by hand."""

import pytest
import torch

from modeling_protogen.proto_tokens import (
    ARRANGEMENTS,
    build_layout,
    fill_slots,
    longest_answer,
    position_ids,
    predicting_positions,
)

DIM = 4


def spell(lengths, arrangement, chunk_size, num_chunks, num_e_tokens=1):
    """The slots of each text as words: `e1.1>0` is the first e of chunk 1, predicting answer token 0."""
    lengths = torch.tensor(lengths)
    layout = build_layout(lengths, arrangement, chunk_size, num_chunks, num_e_tokens)
    names = [f"e{c}.{k}" for c in range(1, num_chunks + 1) for k in range(1, num_e_tokens + 1)]
    names += [f"m{c}" for c in range(1, num_chunks + 1)]
    rows = []
    for source, mask, predicts in zip(layout.source, layout.mask, layout.predicts, strict=True):
        token, words = 0, []
        for index, used, predicting in zip(source.tolist(), mask.tolist(), predicts.tolist(), strict=True):
            if not used:
                words.append("-")
                assert not predicting
            elif predicting:
                words.append(f"{names[index]}>{token}")
                token += 1
            else:
                words.append(names[index])
        rows.append(" ".join(words))
    return rows


@pytest.mark.parametrize(
    ("arrangement", "expected"),
    [
        ("e_m", ["e1.1>0 m1>1 m1>2 m1>3", "e1.1>0 m1>1 - -", "e1.1>0 - - -"]),
        ("e_mN", ["e1.1 m1>0 m1>1 m1>2 m1>3", "e1.1 m1>0 m1>1 - -", "e1.1 m1>0 - - -"]),
        ("interleaved", ["e1.1>0 m1>1 e1.1>2 m1>3", "e1.1>0 m1>1 - -", "e1.1>0 - - -"]),
        ("halves", ["e1.1>0 e1.1>1 m1>2 m1>3", "e1.1>0 m1>1 - -", "e1.1>0 - - -"]),
        ("e_only", ["e1.1>0 e1.1>1 e1.1>2 e1.1>3", "e1.1>0 e1.1>1 - -", "e1.1>0 - - -"]),
    ],
)
def test_one_chunk(arrangement, expected):
    assert spell([4, 2, 1], arrangement, chunk_size=4, num_chunks=1) == expected


@pytest.mark.parametrize(
    ("arrangement", "expected"),
    [
        ("e_m", ["e1.1>0 m1>1 m1>2 e2.1>3 m2>4", "e1.1>0 m1>1 m1>2 - -"]),
        ("e_mN", ["e1.1 m1>0 m1>1 m1>2 e2.1 m2>3 m2>4", "e1.1 m1>0 m1>1 m1>2 - - -"]),
        ("interleaved", ["e1.1>0 m1>1 e1.1>2 e2.1>3 m2>4", "e1.1>0 m1>1 e1.1>2 - -"]),
        ("halves", ["e1.1>0 e1.1>1 m1>2 e2.1>3 m2>4", "e1.1>0 e1.1>1 m1>2 - -"]),
        ("e_only", ["e1.1>0 e1.1>1 e1.1>2 e2.1>3 e2.1>4", "e1.1>0 e1.1>1 e1.1>2 - -"]),
    ],
)
def test_chunks_are_laid_end_to_end(arrangement, expected):
    assert spell([5, 3], arrangement, chunk_size=3, num_chunks=2) == expected


@pytest.mark.parametrize(
    ("arrangement", "expected"),
    [("e_m", "e1.1 e1.2>0 m1>1 e2.1 e2.2>2"), ("e_mN", "e1.1 e1.2 m1>0 m1>1 e2.1 e2.2 m2>2")],
)
def test_several_e_tokens(arrangement, expected):
    assert spell([3], arrangement, chunk_size=2, num_chunks=2, num_e_tokens=2) == [expected]


@pytest.mark.parametrize("arrangement", [a for a in ARRANGEMENTS if a != "halves"])
def test_a_longer_layout_holds_every_shorter_one(arrangement):
    longest = spell([7], arrangement, 3, 3)[0].split()
    for length in range(1, 7):
        shorter = spell([length], arrangement, 3, 3)[0].split()
        assert longest[: len(shorter)] == shorter


def test_fill_slots_puts_vectors_where_the_layout_says():
    e, m = torch.randn(2, 2, 2, DIM), torch.randn(2, 2, DIM)
    layout = build_layout(torch.tensor([3, 1]), "e_mN", chunk_size=2, num_chunks=2, num_e_tokens=2)
    slots = fill_slots(layout, e, m)
    by_hand = [e[0, 0, 0], e[0, 0, 1], m[0, 0], m[0, 0], e[0, 1, 0], e[0, 1, 1], m[0, 1]]
    assert torch.equal(slots[0], torch.stack(by_hand))
    assert torch.equal(slots[1, :3], torch.stack([e[1, 0, 0], e[1, 0, 1], m[1, 0]]))


@pytest.mark.parametrize(("own", "expected"), [(0, "--|-01-23"), (1, "-0|--1-23"), (2, "01|----23")])
def test_the_prefix_predicts_the_first_tokens_and_no_slot_does(own, expected):
    """Two positions of the prefix, then the slots of two chunks of two tokens."""
    layout = build_layout(torch.tensor([4, 1]), "e_mN", chunk_size=2, num_chunks=2)
    rows = predicting_positions(layout, own)
    assert rows.shape == (2, own + 6)
    places = rows[0].nonzero()[:, 0] - own + 2
    spelled = ["-"] * 8
    for token, place in enumerate(places.tolist()):
        spelled[place] = str(token)
    assert "".join(spelled[:2]) + "|" + "".join(spelled[2:]) == expected
    # An answer shorter than what the prefix may predict.
    assert rows[1].sum() == 1
    assert rows[1].nonzero().item() == (1 if own == 0 else 0)


def test_gradients_count_how_often_a_vector_stands():
    e = torch.randn(1, 2, 1, DIM, requires_grad=True)
    m = torch.randn(1, 2, DIM, requires_grad=True)
    layout = build_layout(torch.tensor([5]), "e_m", chunk_size=3, num_chunks=2)
    (fill_slots(layout, e, m) * layout.mask[..., None]).sum().backward()
    assert e.grad[0, :, 0, 0].tolist() == [1, 1]
    assert m.grad[0, :, 0].tolist() == [2, 1]


@pytest.mark.parametrize("lengths", [[0, 2], [3, 7]])
def test_impossible_lengths_are_refused(lengths):
    with pytest.raises(ValueError, match=r"answer lengths must lie in 1\.\.6 tokens"):
        build_layout(torch.tensor(lengths), "e_m", chunk_size=3, num_chunks=2)


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize(("chunk_size", "num_e_tokens"), [(4, 1), (3, 2)])
def test_the_longest_answer_is_that_of_as_many_slots(arrangement, chunk_size, num_e_tokens):
    lengths = torch.arange(1, 3 * chunk_size + 1)
    needed = build_layout(lengths, arrangement, chunk_size, 3, num_e_tokens).mask.sum(1)
    for number in range(1, needed.max() + 1):
        longest = longest_answer(torch.tensor(number), arrangement, chunk_size, num_e_tokens)
        assert longest == (needed <= number).sum()
    assert longest_answer(torch.tensor([0, -1, -9]), arrangement, chunk_size, num_e_tokens).max() <= 0


def test_positions_skip_left_padding():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    assert position_ids(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 3]]
