"""What the page shows, as HTML in which every text is escaped."""

import math

from jinja2 import Environment

from .racing import Answer, Written

ENVIRONMENT = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
# In the order in which they are drawn.
PARTS = {"encoder": "encoder", "predictor": "predictor", "decoder": "decoder", "text": "text", "other": "all else"}

ANSWER = ENVIRONMENT.from_string("""<section class="pg-card">
<header><h3>{{ title[0] }} <small>{{ title[1] }}</small></h3>
<b class="pg-time">{{ seconds(total) }}</b></header>
{% if measures.abstained %}
<p class="pg-answer pg-abstained">No answer: its uncertainty {{ "%.3f" | format(measures.uncertainty) }} is above the
threshold.</p>
{% else %}
<p class="pg-text{{ "" if has_other_text else " pg-answer" }}">
{%- for text, probability in tokens if text -%}
<span class="pg-token{{ " pg-unsure" if probability < 0.5 }}" style="--doubt:{{ "%.3f" | format(1 - probability) }}"
 title="probability {{ "%.3f" | format(probability) }}">{{ text }}</span>
{%- endfor -%}
</p>
{% if has_other_text %}<pre class="pg-answer">{{ text }}</pre>{% endif %}
<p class="pg-legend">sure <i></i> unsure, dotted below ½</p>
{% endif %}
<dl>
{% for name, value in facts %}<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>{% endfor %}
</dl>
<p class="pg-caption">where the time goes</p>
<div class="pg-bar" role="img" aria-label="times of the parts">
{%- for part, _, time in parts -%}
<i class="pg-part-{{ part }}" style="width:{{ "%.2f" | format(100 * time / total) }}%"></i>
{%- endfor -%}
</div>
<ul class="pg-parts">
{% for part, name, time in parts %}<li><i class="pg-part-{{ part }}"></i>{{ name }} {{ seconds(time) }}</li>{% endfor %}
</ul>
</section>""")

WRITTEN = ENVIRONMENT.from_string("""<section class="pg-card">
<header><h3>{{ title[0] }} <small>{{ title[1] }}</small></h3>
<b class="pg-time">{{ seconds(written.seconds) }}</b></header>
<p class="pg-text pg-written{{ " pg-whole" if written.is_whole }}">{{ written.text.lstrip() }}</p>
<div class="pg-race">
{% for name, time, tokens in racers %}
<p><span>{{ name }}</span><span>{{ tokens }} tokens in {{ seconds(time) }}</span></p>
<div class="pg-bar"><i class="pg-part-decoder" style="width:{{ "%.2f" | format(100 * time / longest) }}%"></i></div>
{% endfor %}
</div>
{% if ratio %}<p class="pg-verdict">{{ ratio }}</p>{% endif %}
</section>""")

WAITING = ENVIRONMENT.from_string("""<section class="pg-card pg-waiting">
<header><h3>{{ title[0] }} <small>{{ title[1] }}</small></h3></header><p class="pg-text">{{ text }}</p></section>""")

REFUSED = ENVIRONMENT.from_string("""<section class="pg-card pg-refused" role="alert">
<header><h3>No answer</h3></header><p>{{ message }}</p></section>""")

TITLES = {
    "one_step": ("ProtoGen", "in one pass"),
    "refine": ("ProtoGen", "in one pass, then refined"),
    "adaptive": ("ProtoGen", "block by block"),
    "verified": ("ProtoGen", "block by block, verified"),
}
DECODER_TITLE = ("The same decoder", "token by token")


def seconds_text(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def length_interval(median: float, sigma: float) -> tuple[float, float]:
    """
    Where 95 % of a predicted log-normal length lie.

    Args:
        median, sigma (`float`): in tokens, as `generate` returns them: sigma is to first order, the median times the
            standard deviation of the log length.
    """
    factor = math.exp(1.96 * sigma / median)
    return median / factor, median * factor


def facts_of(measures: dict[str, float], threshold: float | None) -> list[tuple[str, str]]:
    """Names and values of what is known of an answer besides its text."""
    facts = [] if measures.get("abstained") else [("written", f"{measures['tokens']} tokens")]
    if "predicted_length" in measures:
        low, high = length_interval(measures["predicted_length"], measures["length_sigma"])
        facts.append(("predicted length", f"{measures['predicted_length']:.1f} tokens"))
        facts.append(("its 95 % interval", f"{low:.1f} to {high:.1f}"))
    if "uncertainty" in measures:
        above = "" if threshold is None else f", no answer above {threshold:.3f}"
        facts.append(("uncertainty", f"{measures['uncertainty']:.3f}{above}"))
    facts.append(("confidence a token", f"{measures['confidence']:.3f}"))
    if "accepted_length" in measures:
        facts.append(("kept of a draft", f"{measures['accepted_length']:.1f} tokens"))
    return facts


def answer_html(answer: Answer, mode: str, threshold: float | None) -> str:
    total = sum(answer.seconds.values())
    return ANSWER.render(
        title=TITLES[mode],
        total=total,
        seconds=seconds_text,
        text=answer.text,
        tokens=answer.tokens,
        # Lines are shown as they were written, and as the JSON that they are read as.
        has_other_text="".join(text for text, _ in answer.tokens) != answer.text,
        measures=answer.measures,
        facts=facts_of(answer.measures, threshold),
        parts=[(part, name, answer.seconds[part]) for part, name in PARTS.items() if answer.seconds[part] > 0],
    )


def written_html(written: Written, answer: Answer) -> str:
    """The decoder's text so far, and the race."""
    own, num_own = sum(answer.seconds.values()), int(answer.measures["tokens"])
    ratio = ""
    if written.is_whole and num_own:
        times = written.seconds / written.num_tokens * num_own / own
        ratio = f"ProtoGen wrote {times:.1f} times as many tokens a second."
    return WRITTEN.render(
        title=DECODER_TITLE,
        written=written,
        seconds=seconds_text,
        racers=[("ProtoGen", own, num_own), ("token by token", written.seconds, written.num_tokens)],
        longest=max(own, written.seconds),
        ratio=ratio,
    )


def waiting_html(title: tuple[str, str], text: str) -> str:
    return WAITING.render(title=title, text=text)


def refused_html(message: str) -> str:
    return REFUSED.render(message=message)
