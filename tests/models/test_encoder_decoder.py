"""Greedy and beam search: against each other, and against trying every sequence there is."""

from itertools import product

import pytest
import torch

from modelwright.base.errors import RequestError
from modelwright.models.encoder_decoder import Encoded, write_by_beam, write_greedily
from modelwright.models.t5 import T5, T5Config
from modelwright.nn.decode_state import KVState
from modelwright.nn.init import init_weights

END = 1


def random_model(vocab_size: int) -> T5:
    config = T5Config(vocab_size, hidden_size=16, head_dim=8, intermediate_size=24, num_layers=1, num_heads=2)
    model = init_weights(T5(config), seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.5 * torch.randn(p.shape, generator=generator)
    return model.eval()


def test_greedy_search_writes_what_step_by_step_arguments_of_the_maximum_give():
    model = random_model(20)
    ids = torch.randint(2, 20, (3, 7), generator=torch.Generator().manual_seed(0))
    encoded, prefix = model.encode(ids), torch.zeros(3, 1, dtype=torch.long)
    rows = write_greedily(model, encoded, prefix, max_new_tokens=12, eos_token_id=END)
    for row, tokens in enumerate(rows):
        written = [0]
        while len(written) <= 12:
            token = int(model.decode(torch.tensor([written]), encoded.row(row))[0, -1].argmax())
            if token == END:
                break
            written.append(token)
        assert tokens == written[1:]


def test_a_beam_of_one_is_greedy_search():
    model = random_model(20)
    ids = torch.randint(2, 20, (3, 7), generator=torch.Generator().manual_seed(0))
    encoded, prefix = model.encode(ids), torch.zeros(3, 1, dtype=torch.long)
    greedy = write_greedily(model, encoded, prefix, max_new_tokens=8, eos_token_id=END)
    for row, tokens in enumerate(greedy):
        best = write_by_beam(model, encoded, prefix, max_new_tokens=8, eos_token_id=END, num_beams=1)[row][0]
        assert len(best.tokens) <= 8 and (list(best.tokens) == tokens or best.tokens[: len(tokens)] != tuple(tokens))


class Table:
    """Made-up log-probabilities that depend on all tokens so far: worse for a search than any trained model."""

    def __init__(self, vocab_size: int, seed: int):
        self.vocab_size, self.seed = vocab_size, seed

    def row(self, tokens: tuple[int, ...]) -> torch.Tensor:
        number = self.seed + sum((token + 1) * 7**i for i, token in enumerate(tokens))
        return 2.0 * torch.randn(self.vocab_size, generator=torch.Generator().manual_seed(number))

    def decode(self, ids, encoded, *, state=None):
        seen = state.memory(0).setdefault("ids", ids[:, :0])
        state.memory(0)["ids"] = seen = torch.cat([seen, ids], dim=1)
        return torch.stack([self.row(tuple(tokens)) for tokens in seen.tolist()])[:, None]  # (B, 1, V)

    def new_state(self, batch_size, max_seq_len=None):
        return KVState(batch_size=batch_size, max_seq_len=max_seq_len)


def every_score(model: Table, max_len: int, alpha: float) -> dict[tuple[int, ...], float]:
    scores = {}
    for length in range(1, max_len + 1):
        for tokens in product(range(model.vocab_size), repeat=length):
            ends = [i for i, token in enumerate(tokens) if token == END]
            if ends[:1] == [length - 1] or (not ends and length == max_len):
                total = 0.0
                for i, token in enumerate(tokens):
                    total += float(model.row((0, *tokens[:i])).log_softmax(-1)[token])
                scores[tokens if not ends else tokens[:-1], bool(ends)] = total / length**alpha
    return scores


@pytest.mark.parametrize("alpha", [0.0, 1.0, -1.0, 2.5])
@pytest.mark.parametrize("seed", [0, 1000, 2000])
def test_a_wide_beam_finds_the_best_of_all_sequences(alpha, seed):
    model = Table(3, seed)
    best = sorted(every_score(model, 4, alpha).values(), reverse=True)
    nothing, prefix = Encoded(torch.zeros(1, 1, 1)), torch.zeros(1, 1, dtype=torch.long)
    found = write_by_beam(
        model, nothing, prefix, max_new_tokens=4, eos_token_id=END, num_beams=8, length_penalty=alpha
    )[0]
    assert [w.score for w in found[:3]] == pytest.approx(best[:3], abs=1e-5)


def test_a_narrow_beam_is_never_better_and_gets_better_with_its_width():
    nothing, prefix = Encoded(torch.zeros(1, 1, 1)), torch.zeros(1, 1, dtype=torch.long)
    scores = []
    for width in (1, 2, 8):
        found = [
            write_by_beam(Table(6, seed), nothing, prefix, max_new_tokens=6, eos_token_id=END, num_beams=width)[0][0]
            for seed in range(0, 2000000, 100000)
        ]
        scores.append(sum(w.score for w in found))
    assert scores[0] < scores[1] <= scores[2]


def test_a_prefix_of_another_number_of_rows_is_refused():
    encoded = Encoded(torch.zeros(2, 3, 4))
    with pytest.raises(RequestError, match="2 inputs"):
        write_greedily(Table(3, 0), encoded, torch.zeros(1, 1, dtype=torch.long), max_new_tokens=4, eos_token_id=END)
