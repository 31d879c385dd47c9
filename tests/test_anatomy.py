"""What proto-tokens carry: the measures on made vectors, the studies on a tiny decoder."""

import base64
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import weights_hash
from scipy.stats import ortho_group
from sklearn.metrics import balanced_accuracy_score
from test_scripts import call  # noqa: F401  (a fixture)
from transformers import AutoTokenizer

from eval_tasks.report import read_result, result, write_json
from eval_tasks.sentence_encoder import sentence_embeddings
from eval_tasks.statistics import mean_with_interval
from eval_tasks.studies import STUDIES, attention, errors, roles, stability
from eval_tasks.studies.imposing import fit_with_meaning
from eval_tasks.studies.reading import FittedTexts, Reconstructor
from eval_tasks.studies.stability import bezier, fit_bezier_controls
from modeling_protogen.modeling_protogen import ProtoGenOutput
from trainers.fitting import FittingArguments, ProtoTokenFitter, Text
from trainers.losses.anchor import AnchorLoss, random_map
from trainers.losses.relational_distillation import RelationalDistillationLoss
from trainers.proto_bank import BankInfo

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "scripts" / "recipes" / "anatomy"
TEXTS = [[5, 9, 4, 6], [8, 7, 20], [11, 5, 30, 12], [3, 4, 5, 6], [21, 22]]


@pytest.fixture
def fitter(decoder):
    info = BankInfo("", None, "", "e_mN", 4, 1, "per_example", "bos", 24)
    return ProtoTokenFitter(decoder, info, FittingArguments(fit_max_steps=100, fit_attempts=2))


def fitted_texts(entries) -> FittedTexts:
    e, m = (torch.cat([getattr(entry, name) for entry in entries]) for name in ("e", "m"))
    return FittedTexts([entry.token_ids for entry in entries], e, m, [""] * len(e), [""] * len(e))


@pytest.fixture
def entries(fitter):
    found = {e.id: e for ended in fitter.fit([Text(str(n), ids) for n, ids in enumerate(TEXTS)]) for e in ended}
    return [found[str(n)] for n in range(len(TEXTS))]


def random_texts(count=6, dim=24, lengths=None) -> FittedTexts:
    generator = torch.Generator().manual_seed(0)
    lengths = lengths or [4] * count
    ids = [torch.randint(3, 40, (n,), generator=generator).tolist() for n in lengths]
    e, m = torch.randn(count, 1, dim, generator=generator), torch.randn(count, dim, generator=generator)
    return FittedTexts(ids, e, m, [""] * count, [""] * count)


def test_intervals_are_those_of_the_bootstrap():
    values = np.random.default_rng(0).normal(3, 2, size=400)
    mean, low, high = mean_with_interval(values)
    assert mean == values.mean()
    # The normal approximation of the same interval.
    half = 1.96 * values.std(ddof=1) / 20
    assert [low, high] == pytest.approx([mean - half, mean + half], abs=0.04)
    assert mean_with_interval([1.0, 1.0]) == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="at least two texts, got 1"):
        mean_with_interval([0.5])


@pytest.mark.parametrize("sink", ["bos", "none"])
@pytest.mark.parametrize("arrangement", ["e_mN", "e_m", "halves"])
def test_reading_side_by_side_is_reading_alone(decoder, arrangement, sink):
    fitted, reader = random_texts(3, lengths=[4, 2, 3]), Reconstructor(decoder, arrangement, sink)
    joined = list(reader.logits(fitted.e, fitted.m, [4, 2, 3]))
    for number, length in enumerate([4, 2, 3]):
        (alone,) = reader.logits(fitted.e[number : number + 1], fitted.m[number : number + 1], [length])
        torch.testing.assert_close(joined[number], alone, atol=1e-4, rtol=1e-4)


def test_reading_is_what_was_fitted(fitter, entries, decoder):
    fitted = fitted_texts(entries)
    assert Reconstructor(decoder, "e_mN", "bos").accuracies(fitted.e, fitted.m, fitted.token_ids) == [
        entry.accuracy for entry in entries
    ]


def test_swapping_tells_the_donors_apart():
    class OnlyE(Reconstructor):
        """Says what the e-donor says."""

        def __init__(self):
            pass

        def read(self, e, m, lengths):
            place = [next(i for i, own in enumerate(fitted.e) if own.equal(given)) for given in e]
            return [fitted.token_ids[i][:n] for i, n in zip(place, lengths, strict=True)]

    fitted = random_texts()
    rows = roles.swap_rows(OnlyE(), fitted)
    means = rows.groupby("donor")[["same_place", "same_words"]].mean()
    assert means.loc["e"].tolist() == [1, 1]
    assert (means.loc[["m", "neither"]] < 0.5).all(axis=None)
    assert (rows.groupby(["text", "donor"]).size() == 1).all()


def test_shared_words_is_unigram_f1():
    assert roles.shared_words([1, 2, 2, 3], [2, 1, 4]) == pytest.approx(2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3))


def test_probes_find_what_is_there_and_nothing_else():
    rng = np.random.default_rng(0)
    categories = ["a"] * 60 + ["b"] * 30
    noise = rng.normal(size=(90, 10))
    telling = noise + 4 * np.array([c == "a" for c in categories])[:, None]
    assert roles.probe_categories(telling, categories).mean() > 0.95
    assert 0.35 < roles.probe_categories(noise, categories).mean() < 0.65
    values = telling @ rng.normal(size=10)
    assert roles.probe_number(telling, values)[0] > 0.95
    r2, low, high = roles.probe_number(noise, rng.normal(size=90))
    assert low <= r2 <= high
    assert r2 < 0.1


def test_the_mean_of_weighted_hits_is_the_balanced_accuracy(monkeypatch):
    labels, predicted = np.array(list("aaabbc")), np.array(list("aabbac"))
    monkeypatch.setattr(roles, "cross_val_predict", lambda *_, **__: predicted)
    hits = roles.probe_categories(np.zeros((6, 2)), list(labels))
    assert hits.mean() == pytest.approx(balanced_accuracy_score(labels, predicted))


def test_a_rare_category_is_left_out_of_the_probe(decoder, tmp_path):
    fitted = random_texts(14)
    fitted = replace(fitted, categories=["a"] * 6 + ["b"] * 6 + ["rare"] * 2)
    # Tells the common categories apart; a probe that saw the rare one could not be always right about them.
    meaning = np.random.default_rng(0).normal(size=(14, 4)) + 20 * np.array([[1]] * 6 + [[-1]] * 6 + [[1]] * 2)
    metrics = roles.measure(Reconstructor(decoder, "e_mN", "bos"), fitted, meaning, "", tmp_path, seed=0).metrics
    assert metrics["probe_category_balanced_accuracy_chance"][0] == 1 / 2
    assert metrics["probe_category_balanced_accuracy_sentence_encoder"][0] == 1


def test_similarity_of_structure_sees_structure_only():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(30, 8))
    turned = vectors @ ortho_group.rvs(8, random_state=0) * 7
    assert roles.similarity_of_structure(vectors, turned, 100) == pytest.approx([1, 1, 1])
    value, low, high = roles.similarity_of_structure(vectors, rng.normal(size=(30, 5)), 200)
    assert low < 0 < high
    assert abs(value) < 0.2
    # Of four texts draws often repeat one or two, which say nothing of structure.
    assert roles.similarity_of_structure(vectors[:4], turned[:4], 100) == pytest.approx([1, 1, 1])
    assert np.isnan(roles.similarity_of_structure(vectors[:2], turned[:2])).all()


def test_bags_hold_the_tokens_whatever_their_order():
    bags = roles.bags_of_tokens([[5, 9, 5], [9, 5, 5], [7]])
    np.testing.assert_allclose(bags[0], bags[1])
    assert bags[0] @ bags[2] == 0


def test_seed_distances():
    first, second = np.array([[1.0, 0], [0, 1]]), np.array([[1.0, 0], [1, 1]])
    rows = stability.seed_distances([first, second])
    half = 1 - 1 / np.sqrt(2)
    assert rows["within"].tolist() == pytest.approx([0, half])
    assert rows["between"].tolist() == pytest.approx([half, 1])


def test_noise_has_the_asked_for_length(decoder):
    vectors = torch.randn(50, 1, 400, generator=torch.Generator().manual_seed(1)) * 3
    noise = stability.with_noise(vectors, 0.2, torch.Generator().manual_seed(0)) - vectors
    torch.testing.assert_close(noise.norm(dim=-1), 0.2 * vectors.norm(dim=-1), rtol=0.15, atol=0)
    fitted, reader = random_texts(), Reconstructor(decoder, "e_mN", "bos")
    rows = stability.noise_rows(reader, fitted, [0.0, 5.0], ("m",))
    clean = rows[rows["relative_size"] == 0]["accuracy"].tolist()
    assert clean == reader.accuracies(fitted.e, fitted.m, fitted.token_ids)


def test_a_curve_begins_and_ends_at_its_solutions():
    a, b, c = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(bezier(a, c, b, 0.0), a)
    torch.testing.assert_close(bezier(a, c, b, 1.0), b)
    torch.testing.assert_close(bezier(a, (a + b) / 2, b, 0.3), torch.lerp(a, b, 0.3))


def test_a_learned_curve_is_better_than_the_straight_line(fitter, entries, decoder):
    before = weights_hash(decoder)
    texts = [Text(entry.id, entry.token_ids) for entry in entries]
    other = ProtoTokenFitter(decoder, fitter.info, FittingArguments(fit_max_steps=100, fit_attempts=2, fit_seed=1))
    found = {entry.id: entry for ended in other.fit(texts) for entry in ended}
    ends = [found[text.id] for text in texts]
    controls = fit_bezier_controls(fitter, entries, ends, steps=80)
    reader, start, end = Reconstructor(decoder, "e_mN", "bos"), fitted_texts(entries), fitted_texts(ends)

    def loss(control_e, control_m, t):
        e, m = bezier(start.e, control_e, end.e, t), bezier(start.m, control_m, end.m, t)
        logits = reader.logits(e, m, [len(ids) for ids in start.token_ids])
        return sum(
            torch.nn.functional.cross_entropy(part, torch.tensor(ids))
            for part, ids in zip(logits, start.token_ids, strict=True)
        )

    learned = [torch.cat(part) for part in zip(*controls, strict=True)]
    straight = [(start.e + end.e) / 2, (start.m + end.m) / 2]
    times = (0.25, 0.5, 0.75)
    assert sum(loss(*learned, t) for t in times) < 0.7 * sum(loss(*straight, t) for t in times)
    assert weights_hash(decoder) == before


def test_attention_to_e_is_the_decoders(decoder):
    fitted, reader = random_texts(3), Reconstructor(decoder, "e_mN", "bos")
    weights = attention.attention_to_e(reader, fitted)
    assert weights.shape == (3, 2, 4, 4)
    embed = decoder.get_input_embeddings()
    for e, m, found in zip(fitted.e, fitted.m, weights, strict=True):
        inputs = torch.cat([embed(torch.tensor([1])), e, m.expand(4, -1)])[None]
        expected = torch.stack(decoder(inputs_embeds=inputs, output_attentions=True).attentions)[:, 0, :, 2:, 1]
        torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="texts of one length"):
        attention.attention_to_e(reader, random_texts(2, lengths=[4, 3]))


@pytest.mark.parametrize(("arrangement", "expected"), [("e_mN", [1 / 3, 1 / 4, 1 / 5]), ("e_m", [1 / 2, 1 / 3, 1 / 4])])
def test_even_attention_is_one_share_of_what_is_seen(decoder, arrangement, expected, tmp_path):
    reader = Reconstructor(decoder, arrangement, "bos")
    metrics = attention.measure(reader, random_texts(3, lengths=[3] * 3), "", tmp_path).metrics
    thirds = [metrics[f"attention_to_e_{name}_third_if_even"] for name in ("first", "middle", "last")]
    assert thirds == pytest.approx(expected)
    assert metrics["attention_to_e_if_even"] == pytest.approx(sum(expected) / 3)
    mean, low, high = metrics["attention_to_e"]
    assert 0 < low < mean < high < 1


def test_words_and_what_kind_they_are(llama_dir):
    tokenizer = AutoTokenizer.from_pretrained(llama_dir)
    (target,) = tokenizer(["the cat sat on three"], add_special_tokens=False).input_ids
    guess = [*target[:1], target[0], *target[2:]]
    rows = errors.word_rows(tokenizer, [target], [guess], Counter(target * 12))
    assert rows["word"].tolist() == ["the", "cat", "sat", "on", "three"]
    assert rows["kind"].tolist() == ["function", "content", "content", "function", "content"]
    assert rows["correct"].tolist() == [True, False, True, True, True]
    assert rows["rarest"].tolist() == [12] * 5
    assert errors.frequency_rank(0) == errors.frequency_rank(9) == 0
    assert errors.frequency_rank(120) == 2
    text = errors.coloured(tokenizer, target, guess)
    assert text == 'the<span class="wrong" title=" cat"> the</span> sat on three'


def test_a_word_of_several_tokens_is_right_when_all_are():
    class Pieces:
        def decode(self, ids):
            return "".join({0: " recon", 1: "struct", 2: " it", 3: "\n", 4: "now"}[i] for i in ids)

    assert errors.split_words(Pieces(), [0, 1, 2, 3, 4]) == [range(0, 2), range(2, 3), range(3, 4), range(4, 5)]
    rows = errors.word_rows(Pieces(), [[0, 1, 2]], [[0, 2, 2]], Counter({0: 3, 1: 1, 2: 8}))
    assert rows[["correct", "rarest"]].to_numpy().tolist() == [[False, 1], [True, 8]]


def test_the_profile_counts_parts_of_speech():
    profile = errors.profile(["She quickly ate three red apples", "Paris London Rome Berlin"])
    assert profile["pronouns"][0] == pytest.approx(1 / 6)
    assert profile["numbers"][0] == pytest.approx(1 / 6)
    assert profile["nouns"].tolist() == pytest.approx([1 / 6, 1])


def test_sentence_embeddings_do_not_depend_on_the_batch(encoder_dir):
    texts = ["the cat sat", "blue", "cat dog and bird ran under the tree"]
    joined = sentence_embeddings(str(encoder_dir), texts)
    np.testing.assert_allclose(np.linalg.norm(joined, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(joined, sentence_embeddings(str(encoder_dir), texts, batch_size=1), atol=1e-5)


def output(e) -> ProtoGenOutput:
    return ProtoGenOutput(e=e[:, None, None])


@pytest.mark.parametrize(("dim", "teacher_dim"), [(12, 5), (5, 12)])
def test_the_anchor_is_the_mapped_teacher(dim, teacher_dim):
    loss, teacher = AnchorLoss(), torch.randn(4, teacher_dim)
    anchors = teacher @ random_map(dim, teacher_dim, loss.seed).T
    batch = {"teacher_embeddings": teacher}
    assert loss(output(3 * anchors), batch).item() == pytest.approx(0, abs=1e-6)
    assert loss(output(-anchors), batch).item() == pytest.approx(2)
    # A text's other chunks are not pulled, however many the batch has.
    longer = output(anchors)
    longer.e = torch.cat([longer.e, torch.randn(4, 2, 1, dim)], dim=1)
    assert loss(longer, batch).item() == pytest.approx(0, abs=1e-6)
    if dim > teacher_dim:
        torch.testing.assert_close(anchors @ anchors.T, teacher @ teacher.T, atol=1e-5, rtol=1e-4)


def test_relational_distillation_compares_similarities():
    e = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]], requires_grad=True)
    teacher = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 5.0, 0.0]])
    half = 2**-0.5
    expected = 2 * ((half - 0) ** 2 + (0 - 0) ** 2 + (half - 1) ** 2) / 6
    loss = RelationalDistillationLoss()(output(e), {"teacher_embeddings": teacher})
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert e.grad.abs().sum() > 0
    turned = e.detach() @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]]) * 4
    same = RelationalDistillationLoss()(output(turned), {"teacher_embeddings": e.detach()})
    assert same.item() == pytest.approx(0, abs=1e-6)


def test_meaning_is_imposed_by_its_weight(fitter, decoder):
    before, texts = weights_hash(decoder), [Text(str(n), ids) for n, ids in enumerate(TEXTS)]
    teacher = torch.randn(len(TEXTS), 6, generator=torch.Generator().manual_seed(0))
    loss = RelationalDistillationLoss()

    def imposed(weight):
        entries = fit_with_meaning(fitter, texts, loss, teacher, weight, steps=60)
        e = torch.stack([entry.e for entry in entries])
        return entries, loss(ProtoGenOutput(e=e), {"teacher_embeddings": teacher}).item()

    (free, free_loss), (bound, bound_loss) = imposed(0.0), imposed(100.0)
    assert bound_loss < 0.2 * free_loss
    assert np.mean([e.accuracy for e in free]) == 1
    assert all(not a.m.equal(b.m) for a, b in zip(free, bound, strict=True))
    assert weights_hash(decoder) == before


@pytest.mark.filterwarnings("ignore:An input array is constant")
@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_runs(call, tmp_path, path, llama_dir, encoder_dir, monkeypatch):  # noqa: F811
    monkeypatch.chdir(ROOT)
    content = yaml.safe_load(path.read_text())
    arguments = ["--config", f"anatomy/{path.stem}", "--smoke", "--output_dir", tmp_path, "--use_cpu", "true"]
    arguments += ["--decoder", llama_dir, "--decoder_dtype", "float32"]
    if "teacher" in content:
        arguments += ["--sentence_encoder", encoder_dir]
    if "decoders" in content:
        arguments += ["--decoders", *(f"{llama_dir}{variant}" for variant in ("", "@first:1", "@untrained"))]
    assert "written to" in call("study", *arguments)
    assert read_result(tmp_path / "study.json")["metrics"]
    assert (tmp_path / "study.csv").stat().st_size
    pictures = list(tmp_path.glob("*.png"))
    assert pictures
    assert all(picture.stat().st_size > 8000 for picture in pictures)


def test_there_are_recipes_for_every_study():
    contents = [yaml.safe_load(path.read_text()) for path in RECIPES.glob("*.yaml")]
    assert {content["study"] for content in contents} == set(STUDIES)
    assert len(contents) == 11


def test_the_page_holds_everything(call, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(ROOT)
    run = tmp_path / "runs" / "roles"
    run.mkdir(parents=True)
    write_json(run / "study.json", result("protogen <x>", "model", None, "data", 0, {"share_of_e": [0.5, 0.4, 0.61]}))
    (run / "roles.png").write_bytes(b"picture")
    (run / "examples.html").write_text('the <span class="wrong" title="cat">dog</span>')
    readme = tmp_path / "README.md"
    readme.write_text("no tables")
    out = call("report", "--readmes", readme, "--runs", tmp_path / "runs")
    assert "Anatomy of proto-tokens: " in out
    page = (tmp_path / "runs" / "index.html").read_text()
    assert "protogen &lt;x&gt;" in page
    assert '<span class="wrong" title="cat">dog</span>' in page
    assert "0.5 (0.4 to 0.61)" in page
    assert base64.b64encode(b"picture").decode() in page
    assert "m carries more of the text" in page, "the recipe's claim"
    assert "http" not in page.replace("arXiv", "")
