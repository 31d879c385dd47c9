"""The page, in Gradio. It keeps nothing between two answers, and one answer is written at a time."""

import os
import time
import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import Path

# Read when it is imported: nobody is told that the page is used.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
from jinja2 import TemplateError

from modeling_protogen import ProtoGenForConditionalGeneration, ProtoGenProcessor
from modeling_protogen.generation_protogen import MODES, ProtoGenGenerationConfig

from .racing import Question, answer_at_once, answer_token_by_token
from .showing import DECODER_TITLE, TITLES, answer_html, refused_html, waiting_html, written_html

# Fonts of the machine: those of themes come from a server elsewhere.
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
# How `launch` shows it, without what Gradio adds: links, a tunnel, a copy of requests.
LOOKS = {
    "css_paths": Path(__file__).parent / "style.css",
    "footer_links": [],
    "share": False,
    "ssr_mode": False,
    "quiet": True,
}
# Seconds between two pictures of the decoder's text: drawing each token would hold it up.
PICTURE_SECONDS = 0.05
MAX_WAITING = 64
NEVER = "never"


def race(
    model: ProtoGenForConditionalGeneration,
    processor: ProtoGenProcessor,
    instruction: str,
    context: str,
    mode: str,
    threshold: float | str,
    category: str | None = None,
) -> Iterator[tuple]:
    """What both sides show, each time that it changes; of errors what a person reads."""
    prompt = Question(instruction, context, category)
    threshold = None if threshold == NEVER else threshold
    options = {"mode": mode} | ({} if threshold is None else {"abstain_above": threshold})
    yield waiting_html(TITLES[mode], "writing …"), waiting_html(DECODER_TITLE, "begins afterwards")
    try:
        answer = answer_at_once(model, processor, prompt, **options)
    except Exception as error:
        yield refused_html(reason(error)), ""
        return
    yield answer_html(answer, mode, threshold), waiting_html(DECODER_TITLE, "reading …")
    try:
        shown = 0.0
        for written in answer_token_by_token(model, processor, prompt):
            if written.is_whole or time.perf_counter() - shown > PICTURE_SECONDS:
                yield gr.skip(), written_html(written, answer)
                shown = time.perf_counter()
    except Exception as error:
        yield gr.skip(), refused_html(reason(error))


def demo(
    model: ProtoGenForConditionalGeneration, processor: ProtoGenProcessor, name: str, examples: list[Question]
) -> gr.Blocks:
    """The page; [`launch`] serves it."""
    # A loaded model has a plain one.
    own = ProtoGenGenerationConfig.from_dict(model.generation_config.to_diff_dict())
    with gr.Blocks(title=f"ProtoGen: {name}", analytics_enabled=False) as blocks:
        gr.Markdown(
            f"# ProtoGen\n\n{escaped(name)} writes the whole answer in one pass of a frozen decoder. Then the same "
            "decoder writes its own answer, token by token: after it, so that neither slows down the other."
        )
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                instruction = gr.Textbox(label="Instruction", lines=2, max_lines=8, elem_id="instruction")
                context = gr.Textbox(label="Context, if any", lines=1, max_lines=8, elem_id="context")
            with gr.Column(scale=2, min_width=320):
                mode = gr.Radio(list(MODES), value=own.mode, label="Mode", elem_id="mode")
                threshold = gr.Dropdown(
                    thresholds(model.config.abstention_thresholds),
                    label="Give no answer",
                    elem_id="threshold",
                )
                inputs = [instruction, context, mode, threshold]
                if model.config.categories:
                    inputs.append(gr.Dropdown(model.config.categories, label="Category", elem_id="category"))
                button = gr.Button("Answer", variant="primary", elem_id="go")
        if examples:
            gr.Examples(
                [[example.instruction, example.context] for example in examples],
                [instruction, context],
                elem_id="examples",
                example_labels=[example.instruction for example in examples],
            )
        with gr.Row():
            with gr.Column(min_width=320):
                left = gr.HTML(elem_id="one-pass")
            with gr.Column(min_width=320):
                right = gr.HTML(elem_id="token-by-token")
        gr.on(
            [button.click, instruction.submit],
            partial(race, model, processor),
            inputs,
            [left, right],
            show_progress="minimal",
            api_visibility="private",
        )
    # One at a time: the model has one device, and times are to be its own.
    return blocks.queue(max_size=MAX_WAITING, default_concurrency_limit=1)


def launch(blocks: gr.Blocks, **options) -> str:
    """Serves the page, and returns its address; `options` as in `Blocks.launch`."""
    _, address, _ = blocks.launch(theme=gr.themes.Soft(**FONTS), prevent_thread_lock=True, **LOOKS, **options)
    return address


def thresholds(calibrated: dict[str, float] | None) -> list[str | tuple[str, float]]:
    """
    Choices of the uncertainty to abstain above, the strictest last.

    Args:
        calibrated (`dict[str, float]`, *optional*): `config.abstention_thresholds`; tenths if there are none.
    """
    if not calibrated:
        return [NEVER, *((f"above uncertainty {n / 10:.1f}", n / 10) for n in range(9, 0, -1))]
    shares = {value: share for share, value in sorted(calibrated.items(), key=lambda item: float(item[0]))}
    return [
        NEVER,
        *(
            (f"above uncertainty {value:.3f}: {100 * float(share):g} % of tokens right", value)
            for value, share in shares.items()
        ),
    ]


def reason(error: Exception) -> str:
    """What a person reads; mistakes of ours go to the log."""
    if isinstance(error, (ValueError, TemplateError)):
        return str(error)
    traceback.print_exception(error)
    return f"The model failed ({type(error).__name__}); the server's log says where."


def escaped(name: str) -> str:
    """A name as code in Markdown."""
    return f"`{name.replace('`', '')}`"
