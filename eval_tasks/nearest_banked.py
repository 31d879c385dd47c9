"""The banked text whose proto-tokens are the nearest to the predicted ones."""

import torch

from modeling_protogen import ProtoGenForConditionalGeneration
from modeling_protogen.proto_tokens import flatten_proto_tokens
from trainers.fit_bank import check_same_vectors
from trainers.proto_bank import ProtoTokenBank

from .retrieval import nearest_rows


class NearestBanked:
    """For each input the banked `e` and `m` nearest to the predicted ones, by cosine, and their texts' lengths."""

    def __init__(self, model: ProtoGenForConditionalGeneration, bank: ProtoTokenBank):
        check_same_vectors(model.config, bank.info)
        bank.verify()
        self.model = model
        entries = [bank[id] for id in bank.ids]

        def stacked(vectors):
            missing = [model.config.max_chunks - len(v) for v in vectors]
            return torch.stack(
                [torch.cat([v, v.new_zeros(n, *v.shape[1:])]) for v, n in zip(vectors, missing, strict=True)]
            )

        self.e, self.m = stacked([entry.e for entry in entries]), stacked([entry.m for entry in entries])
        self.lengths = torch.tensor([len(entry.token_ids) for entry in entries])

    @torch.no_grad()
    def __call__(self, inputs) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.LongTensor]:
        prediction = self.model.predict(**inputs)
        predicted = flatten_proto_tokens(prediction.e, prediction.m).cpu().numpy()
        nearest = nearest_rows(predicted, flatten_proto_tokens(self.e, self.m).numpy())[0][:, 0]
        vectors = self.e[nearest].to(prediction.e), self.m[nearest].to(prediction.m)
        return vectors, self.lengths[nearest].to(prediction.e.device)
