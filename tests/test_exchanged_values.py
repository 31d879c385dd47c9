"""Copies of extraction examples with other values: what is exchanged, and what is left alone."""

import json

from trainers.data import Example
from trainers.exchanged_values import with_exchanged_values


def example(instruction: str, **fields: str) -> Example:
    return Example(instruction, instruction, "", json.dumps(fields))


PLAY = example("play Blue by Ada, not Bluebird", intent="Play", track="Blue", artist="Ada")
MORE = example("play Red by Ada Lovelace", intent="Play", track="Red", artist="Ada Lovelace")
WEATHER = example("weather in Rome and Rome", intent="Weather", city="Rome")
TALK = Example("talk", "say hello", "", "hello")


def test_values_are_exchanged_in_instruction_and_answer():
    examples = [PLAY, MORE]
    found = with_exchanged_values(examples, copies=20)
    assert found[:2] == examples
    assert len(found) == 2 + 40
    assert len({e.id for e in found}) == len(found)
    seen = set()
    for copy in found[2:]:
        fields = json.loads(copy.answer)
        assert list(fields) == ["intent", "track", "artist"]
        assert fields["intent"] == "Play", "which is not in the instruction"
        ending = ", not Bluebird" if copy.instruction.endswith("Bluebird") else ""
        assert copy.instruction == f"play {fields['track']} by {fields['artist']}{ending}"
        seen.add((fields["track"], fields["artist"]))
    assert seen == {(track, artist) for track in ("Blue", "Red") for artist in ("Ada", "Ada Lovelace")}


def test_what_cannot_be_exchanged_has_no_copies():
    assert with_exchanged_values([WEATHER, TALK], copies=3) == [WEATHER, TALK], "twice in the instruction; no JSON"
    nested = Example("n", "a b", "", '{"x": {"y": "a"}}')
    assert with_exchanged_values([nested], copies=1) == [nested]
    assert with_exchanged_values([PLAY], copies=0) == [PLAY]


def test_numbered_keys_are_one_kind_and_draws_repeat():
    trip = example("from Rome to Oslo", city="Rome", city_2="Oslo")
    copies = with_exchanged_values([trip], copies=30)[1:]
    assert {tuple(json.loads(e.answer).values()) for e in copies} == {
        (a, b) for a in ("Rome", "Oslo") for b in ("Rome", "Oslo")
    }
    assert with_exchanged_values([trip], copies=30)[1:] == copies
    assert with_exchanged_values([trip], copies=30, seed=1)[1:] != copies
