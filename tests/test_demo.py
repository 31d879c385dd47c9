"""The demo: what it computes and shows, and the page in headless Chromium."""

import importlib.util
import json
import shutil
from statistics import NormalDist

import pytest
import torch
from conftest import INSTRUCTIONS

from eval_tasks import command_line
from eval_tasks.demo.racing import Answer, Question, Written, answer_at_once, answer_token_by_token, token_texts
from eval_tasks.demo.showing import answer_html, facts_of, length_interval, refused_html, written_html

HOSTILE = "<img src=x onerror=alert(1)>${alert(1)}{{ 7 * 7 }} & \"'"
MEASURES = {"tokens": 2, "predicted_length": 3.0, "length_sigma": 0.5, "confidence": 0.9, "uncertainty": 0.25}
SECONDS = {"encoder": 0.0, "predictor": 0.1, "decoder": 0.3, "text": 0.05, "other": 0.05}
has_gradio = importlib.util.find_spec("gradio") is not None
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_gradio = pytest.mark.skipif(not has_gradio, reason="needs the extra demo")


@pytest.fixture(scope="module")
def parts(build, llama_dir):
    return build(llama_dir, decoder_sees_prompt=True)


def written_by(parts, instruction, **options):
    """What `generate` itself writes."""
    model, processor = parts
    return processor.decode(model.generate(**processor(instruction), **options)[0])


@pytest.mark.parametrize("mode", ["one_step", "refine", "adaptive", "verified"])
def test_an_answer_is_what_generate_writes(parts, mode):
    answer = answer_at_once(*parts, Question(INSTRUCTIONS[0]), mode=mode)
    assert answer.text == "".join(text for text, _ in answer.tokens) == written_by(parts, INSTRUCTIONS[0], mode=mode)
    assert len(answer.tokens) == answer.measures["tokens"]
    assert all(seconds > 0 for seconds in answer.seconds.values())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in parts[0].modules())


def test_token_by_token_is_greedy_decoding_of_the_decoder_itself(parts):
    model, processor = parts
    *_, last = answer_token_by_token(*parts, Question(INSTRUCTIONS[1]))
    inputs = processor(INSTRUCTIONS[1])
    prompt = {"input_ids": inputs["decoder_prompt_ids"], "attention_mask": inputs["decoder_prompt_mask"]}
    longest = model.config.max_answer_length
    greedy = model.decoder.generate(**prompt, do_sample=False, max_new_tokens=longest)[
        0, prompt["input_ids"].shape[1] :
    ]
    assert last.is_whole
    assert last.num_tokens == len(greedy)
    assert last.text == processor.decoder_tokenizer.decode(greedy, skip_special_tokens=True)


def test_a_character_of_several_tokens_comes_with_the_last():
    ids = list("a☕é".encode())
    texts = token_texts(lambda ids: bytes(ids).decode(errors="replace"), ids)
    assert texts == ["a", "", "", "☕", "", "é"]
    assert token_texts(lambda ids: bytes(ids).decode(errors="replace"), ids[:3]) == ["a", "", "\ufffd"]


def test_the_length_interval_has_95_percent_of_a_log_normal():
    log_length = NormalDist(torch.tensor(20.0).log().item(), 0.3)
    low, high = length_interval(20.0, 20.0 * 0.3)
    assert low == pytest.approx(torch.tensor(log_length.inv_cdf(0.025)).exp().item(), rel=1e-3)
    assert high == pytest.approx(torch.tensor(log_length.inv_cdf(0.975)).exp().item(), rel=1e-3)


def test_every_text_is_escaped_and_doubt_is_shaded():
    answer = Answer("{}", [(HOSTILE, 0.25), ("b", 1.0)], MEASURES, SECONDS)
    page = answer_html(answer, "one_step", None) + refused_html(HOSTILE)
    page += written_html(Written(HOSTILE, 4, 1.0, True), answer)
    assert "<img" not in page
    assert page.count("&lt;img") == 3
    assert 'pg-unsure" style="--doubt:0.750"' in page
    assert 'pg-token" style="--doubt:0.000"' in page
    assert "width:60.00%" in page  # the decoder's share of the time
    assert "pg-part-encoder" not in page  # it has none
    assert "2.0 times" not in page
    assert "ProtoGen wrote 1.0 times as many tokens a second." in page


def test_an_answer_that_was_abstained_from_is_not_shown():
    answer = Answer("", [], MEASURES | {"tokens": 0, "abstained": 1.0}, SECONDS)
    page = answer_html(answer, "one_step", 0.2)
    assert "No answer: its uncertainty 0.250 is above the\nthreshold." in page
    assert "ProtoGen wrote" not in written_html(Written("a", 4, 1.0, True), answer)
    assert "written" not in dict(facts_of(answer.measures, 0.2))


@needs_gradio
def test_examples_are_of_the_file_or_the_card_or_what_was_held_out(tmp_path):
    from eval_tasks.commands.demo import examples_of

    model = tmp_path / "model"
    model.mkdir()
    assert examples_of(str(model), None) == []
    (tmp_path / "validation.json").write_text(json.dumps([{"instruction": str(n), "context": "c"} for n in range(60)]))
    assert examples_of(str(model), None) == [Question(str(n), "c") for n in range(0, 60, 10)]
    (model / "README.md").write_text("---\nwidget:\n- text: Play some jazz\n---\n")
    assert examples_of(str(model), None) == [Question("Play some jazz")]
    (tmp_path / "mine.jsonl").write_text('{"instruction": "mine"}\n')
    assert examples_of(str(model), str(tmp_path / "mine.jsonl")) == [Question("mine")]
    (tmp_path / "mine.jsonl").write_text('{"question": "mine"}\n')
    with pytest.raises(ValueError, match="mine.jsonl, line 1: instruction is missing or empty."):
        examples_of(str(model), str(tmp_path / "mine.jsonl"))
    with pytest.raises(FileNotFoundError, match="none.jsonl does not exist"):
        examples_of(str(model), "none.jsonl")


@needs_gradio
def test_thresholds_are_those_of_the_calibration():
    from eval_tasks.demo.page import thresholds

    found = thresholds({"0.5": 0.6, "0.9": 0.6, "0.95": 0.25})
    assert found == [
        "never",
        ("above uncertainty 0.600: 90 % of tokens right", 0.6),
        ("above uncertainty 0.250: 95 % of tokens right", 0.25),
    ]
    assert thresholds(None)[1] == ("above uncertainty 0.9", 0.9)


@needs_gradio
def test_the_command_serves_a_folder(parts, tmp_path, monkeypatch, capsys):
    from eval_tasks.commands import demo

    for part in parts:
        part.save_pretrained(tmp_path)
    served = {}

    def launch(page, **options):
        served.update(options)
        monkeypatch.setattr(page, "block_thread", lambda: None)
        return "http://here"

    monkeypatch.setattr(demo, "launch", launch)
    command_line.main(["demo", str(tmp_path), "--port", "7000"])
    assert capsys.readouterr().out == "http://here\n"
    assert served == {"server_name": None, "server_port": 7000}
    with pytest.raises(SystemExit, match="error: there is no model folder none"):
        command_line.main(["demo", "none"])


@needs_gradio
def test_a_mistake_of_ours_goes_to_the_log(parts, monkeypatch, capsys):
    from eval_tasks.demo.page import race

    monkeypatch.setattr(parts[0], "generate", lambda **_: None)
    *_, (left, right) = race(*parts, "who", "", "one_step", "never")
    assert "The model failed (AttributeError)" in left
    assert right == ""
    assert "Traceback" in capsys.readouterr().err


browser_tests = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not has_gradio or CHROMIUM is None or importlib.util.find_spec("playwright") is None,
        reason="needs the extra demo, playwright and Chromium",
    ),
]


@pytest.fixture(scope="module")
def site(parts):
    """The page's address; its examples are two instructions."""
    from eval_tasks.demo import page

    blocks = page.demo(*parts, "tiny", [Question(instruction) for instruction in INSTRUCTIONS[:2]])
    yield page.launch(blocks)
    blocks.close()


@pytest.fixture(scope="module")
def people(site):
    """Two pages in one browser: loading one takes seconds."""
    from playwright.sync_api import sync_playwright

    problems = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context()
        context.set_default_timeout(60_000)
        context.on("weberror", lambda error: problems.append(str(error.error)))
        context.on("request", lambda r: None if r.url.startswith((site, "data:", "blob:")) else problems.append(r.url))
        pages = [context.new_page() for _ in range(2)]
        for page in pages:
            page.goto(site)
        yield pages
        browser.close()
    assert not problems  # neither errors of scripts nor requests to anywhere else


def ask(page, instruction, mode="one_step"):
    page.fill("#instruction textarea", instruction)
    page.get_by_label(mode).check()
    page.evaluate("document.querySelectorAll('.pg-card').forEach(card => card.dataset.old = true)")
    page.click("#go")


def answer_on(page):
    page.wait_for_selector("#token-by-token .pg-card:not([data-old]) .pg-whole")
    return page.text_content("#one-pass .pg-card:not([data-old]) .pg-answer")


def refusal_on(page):
    return page.wait_for_selector("#one-pass [role=alert]:not([data-old])").text_content()


class TestInTheBrowser:
    pytestmark = browser_tests

    def test_type_click_and_read_both_answers(self, people, parts):
        page = people[0]
        ask(page, INSTRUCTIONS[0])
        assert answer_on(page) == written_by(parts, INSTRUCTIONS[0])
        *_, last = answer_token_by_token(*parts, Question(INSTRUCTIONS[0]))
        assert page.text_content("#token-by-token .pg-written") == last.text.lstrip()
        assert page.locator("#one-pass .pg-token").count() > 0
        assert page.locator("#one-pass .pg-parts li").count() == len(SECONDS)

    def test_click_an_example_and_switch_the_mode(self, people, parts):
        page = people[0]
        page.get_by_role("button", name=INSTRUCTIONS[1]).click()
        page.wait_for_function(
            "text => document.querySelector('#instruction textarea').value == text", arg=INSTRUCTIONS[1]
        )
        ask(page, page.input_value("#instruction textarea"), "verified")
        assert answer_on(page) == written_by(parts, INSTRUCTIONS[1], mode="verified")
        assert "verified" in page.text_content("#one-pass h3")

    @pytest.mark.parametrize(
        ("text", "message"), [(" ", "is empty; give some text."), ("the " * 5000, "the encoder reads 32")]
    )
    def test_what_cannot_be_answered_is_said_and_the_page_lives(self, people, parts, text, message):
        page = people[0]
        ask(page, text)
        assert message in refusal_on(page)
        ask(page, INSTRUCTIONS[2])
        assert answer_on(page) == written_by(parts, INSTRUCTIONS[2])
        assert page.locator("[role=alert]").count() == 0

    def test_abstention_and_a_mode_without_it(self, people):
        page = people[0]
        page.click("#threshold input")
        page.get_by_role("option", name="above uncertainty 0.1").click()
        ask(page, INSTRUCTIONS[0], "adaptive")
        assert "abstain_above is not for mode=adaptive" in refusal_on(page)
        ask(page, INSTRUCTIONS[0])
        assert answer_on(page).startswith("No answer: its uncertainty")
        page.click("#threshold input")
        page.get_by_role("option", name="never").click()

    def test_two_people_at_once_get_their_own_answers(self, people, parts):
        expected = [written_by(parts, instruction) for instruction in INSTRUCTIONS[:2]]
        assert expected[0] != expected[1]
        for _ in range(2):
            for page, instruction in zip(people, INSTRUCTIONS, strict=False):
                ask(page, instruction)
            assert [answer_on(page) for page in people] == expected

    @pytest.mark.parametrize("width", [390, 1400])
    def test_nothing_is_wider_than_the_window(self, people, width):
        page = people[0]
        page.set_viewport_size({"width": width, "height": 900})
        ask(page, INSTRUCTIONS[0])
        answer_on(page)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        for card in page.locator(".pg-card").all():
            assert card.bounding_box()["width"] > 300
