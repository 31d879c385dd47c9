"""Trees of drafts: the likeliest tokens, read in one pass as each branch is read alone."""

from itertools import product

import pytest
import torch
from conftest import CONTEXTS, FREE, INSTRUCTIONS, stir_slot_adapters

from modeling_protogen import verified_decoding
from modeling_protogen.autoregressive import DecoderState
from modeling_protogen.block_decoding import Drafter, GenerationBuffer
from modeling_protogen.draft_tree import ancestors, chain, grow, walk

# Two branches behind the first drafted token, one of which ends; another one beside it.
PARENTS = [0, 0, 1, 1, 2, 4]


def branch(parents: list[int], token: int) -> list[int]:
    return [*branch(parents, parents[token - 1]), token] if token else [0]


def ranks(tree, token: int) -> tuple[int, ...]:
    return tuple(tree[number - 1].rank for number in branch([node.parent for node in tree], token)[1:])


def test_which_tokens_each_follows_from():
    follows = ancestors(PARENTS)
    assert [row.nonzero()[:, 0].tolist() for row in follows] == [branch(PARENTS, token) for token in range(7)]
    assert ancestors(chain(3)).equal(torch.ones(4, 4).tril().bool())
    assert ancestors([]).tolist() == [[True]]


@pytest.mark.parametrize("prices", [(0.0, 0.0), (0.02, 0.02), (0.01, 0.1), (0.0, float("inf")), (0.3, 0.3)], ids=str)
@pytest.mark.parametrize("largest", [1, 5, 100])
def test_a_tree_has_the_likeliest_tokens(prices, largest):
    """Against all tokens that there are, of three texts one of which has no draft."""
    random = torch.Generator().manual_seed(largest)
    for _ in range(10):
        logits = 2 * torch.randn(2, 3, 4, generator=random, dtype=torch.double)
        probabilities = logits.sort(descending=True).values.softmax(-1)
        chances = {
            path: sum(
                torch.stack([row[depth, rank] for depth, rank in enumerate(path)]).prod() for row in probabilities
            )
            for depth in (1, 2, 3)
            for path in product(range(4), repeat=depth)
        }
        worth = {path: p.item() / 3 for path, p in chances.items() if p / 3 > prices[any(path)]}
        expected = dict(sorted(worth.items(), key=lambda item: -item[1])[:largest])
        tree = grow(probabilities, 3, *prices, largest)
        assert [node.depth for node in tree] == [len(ranks(tree, token)) - 1 for token in range(1, len(tree) + 1)]
        assert {ranks(tree, token): node.chance for token, node in enumerate(tree, 1)} == pytest.approx(expected)


def test_walks_go_as_far_as_tokens_are_the_decoders_own():
    tokens = torch.tensor([[5, 6, 7, 8, 5, 9]]).repeat(5, 1)
    own = torch.tensor(
        [
            [5, 8, 0, 0, 9, 0, 1],  # 1, 4, 6
            [6, 0, 5, 0, 0, 4, 0],  # 2, 5
            [5, 6, 0, 0, 0, 0, 0],  # 1, behind which there is no 6
            [4, 7, 5, 0, 9, 0, 0],  # none
            [5, 7, 0, 0, 9, 0, 0],  # 1, 3
        ]
    )
    branches, kept = walk(tokens, PARENTS, own)
    assert kept.tolist() == [3, 2, 1, 0, 2]
    assert branches.tolist() == [[0, 1, 4, 6], [0, 2, 5, 5], [0, 1, 1, 1], [0, 0, 0, 0], [0, 1, 3, 3]]
    branches, kept = walk(tokens[:, :0], [], own[:, :1])
    assert branches.tolist() == [[0]] * 5
    assert kept.tolist() == [0] * 5


@torch.no_grad()
def test_a_tree_is_read_as_each_of_its_branches_is(build, decoder_dir):
    fields = {"latent_source": "none", "first_tokens": "drafts", "slot_adapter_rank": 2, "chunk_size": 4}
    model, processor = build(decoder_dir, decoder_sees_prompt=True, **fields)
    stir_slot_adapters(model)
    inputs = processor(INSTRUCTIONS[:2], CONTEXTS[:2])
    prompt = inputs["decoder_prompt_ids"], inputs["decoder_prompt_mask"]
    assert not prompt[1].all()
    drafter, tokens = Drafter(model, model.predict(*[None] * 2, *prompt)), torch.tensor([[3, 5, 6, 7, 8, 5, 9]] * 2)
    tokens[1] += 2

    def read(numbers, rows=slice(None)):
        """One branch, with slots behind its end."""
        text = DecoderState(model.decoder, len(prompt[0][rows]))
        text.read(prompt[0][rows], prompt[1][rows])
        part = tokens[rows][:, numbers]
        states, behind = text.read(part, torch.ones_like(part), 1, drafter.slots(3)[rows])
        return text, states[:, 0], behind[:, 0]

    for ends in ([1, 2, 6], [0], None):
        text = DecoderState(model.decoder, 2)
        text.read(*prompt)
        slots = None if ends is None else drafter.slots(3)
        states, behind = text.read(tokens, torch.ones_like(tokens), 7, slots, ends or [-1], PARENTS)
        for token in range(7):
            _, state, of_slots = read(branch(PARENTS, token))
            torch.testing.assert_close(states[:, token], state, atol=1e-4, rtol=1e-4)
            if ends and token in ends:
                torch.testing.assert_close(behind[:, ends.index(token)], of_slots, atol=1e-4, rtol=1e-4)

    # One text goes on behind token 6, the other behind token 2.
    kept, branches = torch.tensor([3, 1]), torch.tensor([[0, 1, 4, 6], [0, 2, 2, 2]])
    text.follow(branches, 7)
    text.forget(6 - kept, [False, False])
    following = torch.tensor([[4], [4]])
    states, _ = text.read(following, torch.ones_like(following))
    for row, token in enumerate((6, 2)):
        alone, _, _ = read(branch(PARENTS, token), slice(row, row + 1))
        state, _ = alone.read(following[:1], torch.ones_like(following[:1]))
        torch.testing.assert_close(states[row], state[0], atol=1e-4, rtol=1e-4)
        assert text.ids[row][-len(alone.ids[0]) :].tolist()[-kept[row] - 2 :] == alone.ids[0, -kept[row] - 2 :].tolist()


@pytest.mark.parametrize("rows", [1, 3])
def test_second_candidates_save_passes(build, decoder_dir, monkeypatch, rows):
    """The most likely token of each place is wrong, and the next one right."""
    model, processor = build(decoder_dir, decoder_sees_prompt=True)
    model.config.decoder_config.eos_token_id = model.decoder.generation_config.eos_token_id = None
    inputs = processor(INSTRUCTIONS[:rows], CONTEXTS[:rows])
    options = {"mode": "verified", "max_new_tokens": 24, "return_dict_in_generate": True} | FREE
    expected = model.generate(**inputs, block_size=1, **options).sequences
    monkeypatch.setattr(verified_decoding, "continuation", lambda ids, longest: [])
    start, draft, buffers = GenerationBuffer.__init__, Drafter.draft, []

    def begin(self, *args):
        start(self, *args)
        buffers.append(self)

    def planned(self, *args):
        _, logits = draft(self, *args)
        logits = torch.full_like(logits, -50.0)
        for row, answer in enumerate(buffers[-1].tokens):
            for place in range(logits.shape[1]):
                right = expected[row, min(len(answer) + place, 23)]
                logits[row, place, right] = -0.5
                logits[row, place, (right + 1) % logits.shape[2]] = 0.0
        return logits.argmax(-1), logits

    monkeypatch.setattr(GenerationBuffer, "__init__", begin)
    monkeypatch.setattr(Drafter, "draft", planned)
    found = model.generate(**inputs, block_size=4, **options)
    assert found.sequences.equal(expected)
    # Three drafted tokens and the decoder's in each pass but the first.
    assert found.num_passes <= 2 + 24 / 4
    # Where a position costs as much as a pass, there is nothing beside the most likely draft.
    dear = model.generate(**inputs, block_size=4, **options | {"position_cost": 0.3})
    assert dear.sequences.equal(expected)
    assert dear.accepted_lengths.tolist() == [0] * rows
