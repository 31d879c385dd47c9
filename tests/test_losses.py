"""Losses against slow formulas, pair by pair."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import multiprocessing

from modeling_protogen import ProtoGenOutput, frozen_decoder
from modeling_protogen.objectives import gaussian_nll
from trainers.distillation import teacher_top_k
from trainers.losses import (
    LOSSES,
    DistanceBasedLogisticLoss,
    DraftLoss,
    DurationLoss,
    InfoNCELoss,
    LengthNLLLoss,
    MeanSquaredErrorLoss,
    OnPolicyLoss,
    ReconstructionLoss,
    SigLIPLoss,
    SoftReconstructionLoss,
    TokenHeadLoss,
    candidates,
    token_head,
)
from trainers.losses.token_head import head_tokens

BANK_LOSSES = [name for name, loss in LOSSES.items() if "bank" in loss.needs]


@pytest.fixture
def pairs():
    torch.manual_seed(0)
    outputs = ProtoGenOutput(e=torch.randn(4, 2, 1, 6), m=torch.randn(4, 2, 6))
    batch = {"bank_e": torch.randn(4, 2, 1, 6), "bank_m": torch.randn(4, 2, 6)}
    for tensor in (outputs.e, outputs.m):
        tensor.requires_grad_()
    return outputs, batch


def unit_vectors(e, m):
    flat = [torch.cat([e[i].flatten(), m[i].flatten()]) for i in range(len(e))]
    return [vector / vector.norm() for vector in flat]


def test_siglip(pairs):
    outputs, batch = pairs
    loss = SigLIPLoss()
    with torch.no_grad():
        loss.bias.fill_(-1.0)
    x, y = unit_vectors(outputs.e, outputs.m), unit_vectors(batch["bank_e"], batch["bank_m"])
    total = 0
    for i in range(4):
        for j in range(4):
            z = 1 if i == j else -1
            total = total + torch.log(1 / (1 + torch.exp(z * (-10 * x[i] @ y[j] + 1))))
    value = loss(outputs, batch)
    torch.testing.assert_close(value, -total / 4)
    value.backward()
    assert loss.log_temperature.grad.abs() > 0
    assert loss.bias.grad.abs() > 0


def test_distance_based_logistic(pairs):
    outputs, batch = pairs
    x, y = unit_vectors(outputs.e, outputs.m), unit_vectors(batch["bank_e"], batch["bank_m"])

    def p(i, j, margin=0.7):
        return (1 + math.exp(-margin)) / (1 + torch.exp((x[i] - y[j]).square().sum() - margin))

    match = sum(-torch.log(p(i, i)) for i in range(4)) / 4
    other = sum(-torch.log(1 - p(i, j)) for i in range(4) for j in range(4) if i != j) / 12
    torch.testing.assert_close(DistanceBasedLogisticLoss(margin=0.7)(outputs, batch), match + other)


def test_info_nce_is_the_cross_entropy_of_the_right_candidate(pairs):
    outputs, batch = pairs
    x = torch.stack(unit_vectors(outputs.e, outputs.m))
    y = torch.stack(unit_vectors(batch["bank_e"], batch["bank_m"]))
    loss = InfoNCELoss()
    expected = F.cross_entropy(x @ y.T / 0.07, torch.arange(4))
    torch.testing.assert_close(loss(outputs, batch), expected)
    with torch.no_grad():
        loss.log_temperature.fill_(20.0)
    torch.testing.assert_close(loss(outputs, batch), F.cross_entropy(x @ y.T * 100, torch.arange(4)))


def test_mean_squared_error(pairs):
    outputs, batch = pairs
    squares = (outputs.e - batch["bank_e"]).square().sum() + (outputs.m - batch["bank_m"]).square().sum()
    torch.testing.assert_close(MeanSquaredErrorLoss()(outputs, batch), squares / (4 * 24))


@pytest.mark.parametrize("name", BANK_LOSSES)
def test_chunks_of_candidates_change_nothing(name, pairs, monkeypatch):
    outputs, batch = pairs
    loss = LOSSES[name]()
    found = []
    for size in (1024, 3):
        monkeypatch.setattr(candidates, "CHUNK", size)
        parameters = [outputs.e, outputs.m, *loss.parameters()]
        value = loss(outputs, batch)
        found.append([value, *torch.autograd.grad(value, parameters)])
    torch.testing.assert_close(found[0], found[1])


def value_and_gradients(name, rows):
    """The loss on some rows of a fixed batch of six, and its gradients to the predictions and to what it learns."""
    generator = torch.Generator().manual_seed(0)
    e, m, bank_e, bank_m = (torch.randn(6, 1, *shape, generator=generator) for shape in ((1, 5), (5,)) * 2)
    e, m = e.requires_grad_(), m.requires_grad_()
    loss = LOSSES[name]()
    batch = {"bank_e": bank_e[rows], "bank_m": bank_m[rows]}
    value = loss(ProtoGenOutput(e=e[rows], m=m[rows]), batch)
    return [value.detach(), *torch.autograd.grad(value, [e, m, *loss.parameters()])]


def as_one_of_two(rank, path, results):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    found = {}
    for name in BANK_LOSSES:
        mine = value_and_gradients(name, slice(3 * rank, 3 * rank + 3))
        for tensor in mine:
            dist.all_reduce(tensor)
        found[name] = [(tensor / 2).tolist() for tensor in mine]
    if rank == 0:
        results.put(found)
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_have_the_value_and_gradients_of_one_with_the_joined_batch(tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    multiprocessing.spawn(as_one_of_two, (tmp_path / "store", results), nprocs=2)
    found = results.get()
    for name in BANK_LOSSES:
        for one, two in zip(value_and_gradients(name, slice(None)), found[name], strict=True):
            torch.testing.assert_close(torch.tensor(two), one, msg=name)


@pytest.mark.parametrize("loss", [SigLIPLoss(), DistanceBasedLogisticLoss(), InfoNCELoss(), MeanSquaredErrorLoss()])
def test_contrastive_losses_are_finite_and_prefer_the_truth(loss, pairs):
    outputs, batch = pairs
    truth = ProtoGenOutput(e=batch["bank_e"].clone().requires_grad_(), m=batch["bank_m"].clone().requires_grad_())
    value = loss(truth, batch)
    assert value < loss(outputs, batch)
    value.backward()
    assert truth.e.grad.isfinite().all()
    one = {name: tensor[:1] for name, tensor in batch.items()}
    assert loss(ProtoGenOutput(e=outputs.e[:1], m=outputs.m[:1]), one).isfinite()


def test_distance_based_logistic_survives_equal_texts(pairs):
    _, batch = pairs
    same = {name: tensor[:1].expand_as(tensor) for name, tensor in batch.items()}
    outputs = ProtoGenOutput(e=same["bank_e"].clone().requires_grad_(), m=same["bank_m"].clone().requires_grad_())
    value = DistanceBasedLogisticLoss()(outputs, same)
    value.backward()
    assert value.isfinite()
    assert outputs.e.grad.isfinite().all()


def test_reconstruction_is_the_mean_over_texts_of_the_mean_over_tokens():
    logits = torch.randn(4, 7)
    labels = torch.tensor([[1, 2, 3], [4, -100, -100]])
    surprise = -logits.log_softmax(-1)
    expected = ((surprise[0, 1] + surprise[1, 2] + surprise[2, 3]) / 3 + surprise[3, 4]) / 2
    torch.testing.assert_close(ReconstructionLoss()(ProtoGenOutput(answer_logits=logits), {"labels": labels}), expected)


def test_later_tokens_of_a_draft_count_less():
    logits = torch.randn(5, 7)
    labels = torch.tensor([[1, 2, 3], [4, 5, -100], [-100, -100, -100]])
    surprise, whole = -logits.log_softmax(-1), 1 + 0.8 + 0.64
    first = (surprise[0, 1] + 0.8 * surprise[1, 2] + 0.64 * surprise[2, 3]) / whole
    second = (surprise[3, 4] + 0.8 * surprise[4, 5]) / whole
    found = DraftLoss()(ProtoGenOutput(answer_logits=logits), {"labels": labels})
    torch.testing.assert_close(found, (first + second) / 3)


def test_length_nll_takes_true_lengths_or_those_of_the_labels():
    outputs = ProtoGenOutput(log_length_mean=torch.tensor([1.0, 2.0]), log_length_variance=torch.tensor([0.5, 2.0]))
    labels = torch.tensor([[1, 2, 3], [4, -100, -100]])

    def direct(lengths):
        terms = zip(lengths, (1.0, 2.0), (0.5, 2.0), strict=True)
        return sum(((math.log(n) - mean) ** 2 / var + math.log(var)) / 2 for n, mean, var in terms) / 2

    loss = LengthNLLLoss()
    assert loss(outputs, {"labels": labels}).item() == pytest.approx(direct([3, 1]), rel=1e-5)
    batch = {"labels": labels, "length_labels": torch.tensor([30, 1])}
    assert loss(outputs, batch).item() == pytest.approx(direct([30, 1]), rel=1e-5)


def test_the_gradient_of_a_sure_prediction_is_no_larger():
    mean = torch.tensor([1.0, 2.0, 0.3], requires_grad=True)
    variance = torch.tensor([0.01, 2.0, 1e-4], requires_grad=True)
    targets = torch.tensor([1.2, 0.5, 0.301])
    gaussian_nll(mean, variance, targets).backward()
    sigma = variance.detach().sqrt()
    error = mean.detach() - targets
    torch.testing.assert_close(mean.grad, error / sigma / 3)
    torch.testing.assert_close(variance.grad, sigma * (1 / sigma**2 - error**2 / sigma**4) / 2 / 3)


@pytest.fixture
def prompts():
    """Two prompts, the shorter padded on the left, and two answers, the shorter padded on the right."""
    ids, mask = torch.tensor([[1, 5, 9, 4], [0, 0, 1, 8]]), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    return ids, mask, torch.tensor([[7, 11, 30], [12, 3, -100]])


@pytest.mark.parametrize("group_tokens", [1024, 4], ids=["one group", "two groups"])
def test_the_teacher_reads_the_prompt_and_the_tokens_before(decoder, prompts, group_tokens, monkeypatch):
    monkeypatch.setattr(frozen_decoder, "GROUP_TOKENS", group_tokens)
    ids, q = teacher_top_k(decoder, *prompts, top_k=5)
    row = 0
    for prompt, mask, answer in zip(*prompts, strict=True):
        read = prompt[mask.bool()].tolist()
        for token in answer[answer >= 0].tolist():
            p = decoder(torch.tensor([read])).logits[0, -1].softmax(-1)
            assert ids[row].tolist() == p.topk(5).indices.tolist()
            torch.testing.assert_close(q[row], p.topk(5).values / p.topk(5).values.sum(), atol=1e-5, rtol=1e-4)
            read, row = [*read, token], row + 1
    assert row == len(ids) == 5
    cache, _ = frozen_decoder.read_prefix(decoder, *prompts[:2], [])
    for _ in range(2):  # What was read after the prompt is forgotten.
        again = teacher_top_k(decoder, *prompts, top_k=5, prompt_cache=cache)
        assert torch.equal(again[0], ids)
        torch.testing.assert_close(again[1], q)


def test_soft_targets_are_the_whole_distribution_or_one_token(decoder, prompts):
    labels, logits = prompts[2], torch.randn(5, 43, requires_grad=True)
    outputs = ProtoGenOutput(answer_logits=logits)
    whole = teacher_top_k(decoder, *prompts, top_k=43)
    q = torch.zeros(5, 43).scatter(1, *whole)
    terms = -(q * logits.log_softmax(-1)).sum(-1)
    value = OnPolicyLoss()(outputs, {"labels": labels, "on_policy_targets": whole})
    torch.testing.assert_close(value, (terms[:3].mean() + terms[3:].mean()) / 2)
    value.backward()
    assert logits.grad.abs().sum() > 0
    one = teacher_top_k(decoder, *prompts, top_k=1)
    chosen = labels.clone()
    chosen[labels >= 0] = one[0][:, 0]
    torch.testing.assert_close(
        SoftReconstructionLoss()(outputs, {"labels": labels, "label_targets": one}),
        ReconstructionLoss()(outputs, {"labels": chosen}),
    )


def test_duration_is_the_mean_over_prompts_of_the_mean_over_their_tokens():
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 6, requires_grad=True)
    batch = {
        "durations": torch.tensor([[0, 0, 5, 1], [-100] * 4, [2, 0, 0, 3]]),
        "decoder_prompt_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]),
    }
    means = []
    for row in (0, 2):
        terms = []
        for place in range(4):
            if batch["decoder_prompt_mask"][row, place]:
                p = logits[row, place].exp() / logits[row, place].exp().sum()
                terms.append(-p[batch["durations"][row, place]].log())
        means.append(sum(terms) / len(terms))
    value = DurationLoss()(ProtoGenOutput(duration_logits=logits), batch)
    torch.testing.assert_close(value, sum(means) / 2)
    value.backward()
    # Nothing is learned from padding, nor from an answer without durations.
    assert (logits.grad[0, :2] == 0).all()
    assert (logits.grad[1] == 0).all()
    assert (logits.grad[2] != 0).all()


def test_a_batch_without_durations_teaches_nothing_and_can_be_summed():
    logits = torch.randn(2, 3, 6, requires_grad=True)
    mask = torch.ones(2, 3, dtype=torch.long)
    batch = {"durations": torch.full((2, 3), -100), "decoder_prompt_mask": mask}
    value = DurationLoss()(ProtoGenOutput(duration_logits=logits), batch)
    assert value.item() == 0
    value.backward()
    assert (logits.grad == 0).all()


@pytest.fixture
def one_vector_a_token():
    """Five chunks of one token; the batch's longest answer has three."""
    torch.manual_seed(0)
    outputs = ProtoGenOutput(e=torch.randn(2, 5, 1, 6).mul(7).requires_grad_())
    labels = torch.tensor([[3, 20, 3], [11, -100, -100]])
    batch = {"labels": labels, "decoder_prompt_ids": torch.tensor([[0, 5], [8, 5]])}
    return outputs, batch | {"output_embeddings": torch.randn(40, 6)}


@pytest.mark.parametrize("num_negatives", [0, 4, 2000])
def test_the_token_head_tells_tokens_apart_from_those_around_them(one_vector_a_token, num_negatives, monkeypatch):
    monkeypatch.setattr(token_head, "NUM_NEGATIVES", num_negatives)
    outputs, batch = one_vector_a_token
    loss = TokenHeadLoss()
    with torch.no_grad():
        loss.log_scale.fill_(math.log(1.5))
    torch.manual_seed(5)
    value = loss(outputs, batch)
    torch.manual_seed(5)
    drawn = torch.randint(40, (num_negatives,)).tolist()
    vocabulary = sorted({3, 20, 11, 0, 5, 8, *drawn})
    assert (len(vocabulary) == 40) == (num_negatives == 2000)
    terms = []
    for row, place, token in ((0, 0, 3), (0, 1, 20), (0, 2, 3), (1, 0, 11)):
        vector = outputs.e[row, place, 0]
        unit = vector / vector.square().mean().sqrt()
        scores = {other: 1.5 * unit @ batch["output_embeddings"][other] for other in vocabulary}
        terms.append(-torch.log(scores[token].exp() / sum(score.exp() for score in scores.values())))
    torch.testing.assert_close(value, (sum(terms[:3]) / 3 + terms[3]) / 2, rtol=1e-4, atol=1e-4)
    value.backward()
    assert loss.log_scale.grad.abs() > 0
    assert (outputs.e.grad.abs().sum((2, 3)) > 0).tolist() == [[True] * 3 + [False] * 2, [True] + [False] * 4]


def test_the_token_head_reads_the_most_likely_tokens(one_vector_a_token):
    outputs, batch = one_vector_a_token
    table = batch["output_embeddings"]
    for row, vectors in enumerate(outputs.e[:, :, 0]):
        expected = [max(range(40), key=lambda token: (vector @ table[token]).item()) for vector in vectors]
        assert head_tokens(outputs.e[:, :, 0], table)[row].tolist() == expected
