"""Every objective: any split of a batch gives one gradient, a task is learned, and without its signal it is not."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from modelwright.base.errors import ConfigError, DataError
from modelwright.data.denoise import SPAN_CORRUPTION, denoise
from modelwright.data.examples import (
    ExampleLoader,
    GroupBatch,
    PairBatch,
    SeriesBatch,
    TextBatch,
    length_mask,
    pad,
    random_of,
    shift_right,
)
from modelwright.data.infill import prefix_batch
from modelwright.data.load import Batch
from modelwright.data.masking import MaskingConfig, mask_tokens
from modelwright.data.pack import IGNORED, Rows, pack_rows
from modelwright.models.bert import ARCHITECTURES, BertConfig
from modelwright.models.heads import Labels
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.models.multi_token import MultiTokenDecoder, load_heads, save_heads
from modelwright.models.sentence import SentenceEncoder
from modelwright.models.series import SeriesConfig, SeriesRegressor
from modelwright.models.t5 import T5, T5Config
from modelwright.nn.init import init_weights
from modelwright.optim.build import AdamWConfig, OptimizerConfig
from modelwright.optim.schedule import ScheduleConfig
from modelwright.train.checkpoint import CheckpointConfig
from modelwright.train.contrastive import Contrastive, text_names
from modelwright.train.distill import (
    Distillation,
    DistillConfig,
    cache_teacher,
    divergence,
    taught_batches,
    teacher_of,
)
from modelwright.train.dropout import dropout
from modelwright.train.heads import (
    AnswerSpans,
    MultiLabelClassification,
    PassageRanking,
    SequenceClassification,
    SeriesRegression,
    TextRegression,
    TokenClassification,
)
from modelwright.train.loop import LoopConfig, Run, train
from modelwright.train.masked import MaskedLanguageModeling, PrefixLanguageModeling, Writing
from modelwright.train.multi_token import MultiTokenPrediction, later_labels
from modelwright.train.objective import CausalLanguageModeling

VOCAB, PAD, MASK, NUM = 40, 0, 3, 8
BERT = BertConfig(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2, max_seq_len=32, num_token_types=2
)
LLAMA = LlamaConfig(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2, max_seq_len=32, head_dim=16
)


def stirred(model, seed=0):
    init_weights(model, seed)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


def encoder(task, num_labels=2):
    return stirred(ARCHITECTURES[f"Bert{task}"](replace(BERT, labels=Labels.numbered(num_labels))))


def texts(num=NUM, seed=0, lowest=10, fixed_len=None):
    random = np.random.default_rng(seed)
    return [random.integers(lowest, VOCAB - 2, fixed_len or int(random.integers(5, 12))) for _ in range(num)]


def text_batch(rows, labels):
    return TextBatch(pad(rows, PAD), torch.as_tensor(labels), length_mask(rows))


def masked_collate(rows):
    config = MaskingConfig(0.3)

    def collate(numbers, epoch):
        pairs = [
            mask_tokens(rows[i], range(len(rows[i])), MASK, np.arange(10, 30), config, random_of(0, epoch, i))
            for i in numbers
        ]
        return TextBatch(
            pad([p[0] for p in pairs], PAD), pad([p[1] for p in pairs], IGNORED), length_mask(rows_of(rows, numbers))
        )

    return collate


def rows_of(rows, numbers):
    return [rows[i] for i in numbers]


def labelled_collate(rows, labels, dtype=torch.int64):
    return lambda numbers, _: text_batch(
        rows_of(rows, numbers), torch.as_tensor(np.array(labels)[numbers], dtype=dtype)
    )


def writing_collate(rows):
    sentinels = [VOCAB - 1, VOCAB - 2]

    def collate(numbers, epoch):
        pairs = [denoise(rows[i], SPAN_CORRUPTION[0], sentinels, 1, [], random_of(0, epoch, i)) for i in numbers]
        labels = pad([p[1] for p in pairs], IGNORED)
        seen = [p[0] for p in pairs]
        return PairBatch(pad(seen, PAD), labels, length_mask(seen), shift_right(labels, 0, PAD))

    return collate


def group_collate(rows):
    def collate(numbers, epoch):
        flat = [text for i in numbers for text in (rows[i], rows[i][::-1], rows[(i + 1) % len(rows)][:4])]
        ids, mask = pad(flat, PAD), length_mask(flat)
        return GroupBatch(ids.view(len(numbers), 3, -1), mask.view(len(numbers), 3, -1))

    return collate


def row_collate(make_batch):
    rows = np.stack(texts(fixed_len=17))
    return lambda numbers, _: make_batch(rows[numbers])


def causal(rows):
    return Batch(torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy()))


def prefixed(rows):
    # one draw a row, so that a row has the same prefix in every split
    parts = [
        prefix_batch(Rows(r[None, :-1].copy(), r[None, 1:].copy()), np.random.default_rng(int(r[0]))) for r in rows
    ]
    return Batch(
        torch.cat([p.input_ids for p in parts]),
        torch.cat([p.labels for p in parts]),
        None,
        torch.cat([p.mask for p in parts]),
    )


def windows(numbers, _):
    series = np.sin(np.arange(60) * 0.7).astype(np.float32)
    rows = torch.from_numpy(np.stack([series[i : i + 11] for i in numbers]))
    return SeriesBatch(rows[:, :-1].contiguous(), rows[:, -1].contiguous())


def case(name):
    rows = texts()
    spans = [[i % 3, i % 3 + 1] for i in range(NUM)]
    classes = [i % 3 for i in range(NUM)]
    tags = lambda numbers, _: TextBatch(  # noqa: E731
        pad(rows_of(rows, numbers), PAD),
        pad([np.where(rows[i] > 20, rows[i] % 3, IGNORED) for i in numbers], IGNORED),
        length_mask(rows_of(rows, numbers)),
    )
    values = np.linspace(-1, 1, 2 * NUM).reshape(NUM, 2)
    table = {
        "masked": (lambda: encoder("ForMaskedLM"), MaskedLanguageModeling(), masked_collate(rows)),
        "writing": (lambda: stirred(T5(T5_SHAPE)), Writing(0.1), writing_collate(rows)),
        "prefix": (lambda: stirred(Llama(LLAMA)), PrefixLanguageModeling(max_logits=200), row_collate(prefixed)),
        "multi_token": (
            lambda: stirred(MultiTokenDecoder(Llama(LLAMA), 2)),
            MultiTokenPrediction((0.5, 0.25)),
            row_collate(causal),
        ),
        "classes": (
            lambda: encoder("ForSequenceClassification", 3),
            SequenceClassification(smoothing=0.1),
            labelled_collate(rows, classes),
        ),
        "weighted classes": (
            lambda: encoder("ForSequenceClassification", 3),
            SequenceClassification(torch.tensor([1.0, 2.0, 0.5])),
            labelled_collate(rows, classes),
        ),
        "many labels": (
            lambda: encoder("ForSequenceClassification", 2),
            MultiLabelClassification(),
            labelled_collate(rows, (values > 0).astype(float), torch.float32),
        ),
        "values": (
            lambda: encoder("ForSequenceClassification", 2),
            TextRegression(),
            labelled_collate(rows, values, torch.float32),
        ),
        "tokens": (lambda: encoder("ForTokenClassification", 3), TokenClassification(), tags),
        "spans": (lambda: encoder("ForQuestionAnswering"), AnswerSpans(), labelled_collate(rows, spans)),
        "ranking": (lambda: encoder("ForSequenceClassification", 1), PassageRanking(), group_collate(rows)),
        "contrastive": (
            lambda: SentenceEncoder(stirred(ARCHITECTURES["BertModel"](BERT))),
            Contrastive(sizes=(8,), is_symmetric=True),
            group_collate(rows),
        ),
        "series": (lambda: stirred(SeriesRegressor(SeriesConfig(10, hidden_size=8))), SeriesRegression(), windows),
        "distillation": (
            lambda: stirred(Llama(LLAMA)),
            Distillation(teacher_of(stirred(Llama(LLAMA), 5)), DistillConfig("reverse", 2.0)),
            row_collate(causal),
        ),
    }
    return table[name]


T5_SHAPE = T5Config(vocab_size=VOCAB, hidden_size=32, head_dim=8, intermediate_size=48, num_layers=2, num_heads=4)
NAMES = [
    "masked", "writing", "prefix", "multi_token", "classes", "weighted classes", "many labels", "values", "tokens",
    "spans", "ranking", "contrastive", "series", "distillation",
]  # fmt: skip


def loop_of(**changes):
    optimizer = OptimizerConfig(name="adamw", adamw=AdamWConfig(learning_rate=3e-3, weight_decay=0.0))
    plain = {"num_steps": 4, "micro_batch_size": 4, "precision": "fp32", "compile": False, "optimizer": optimizer}
    return LoopConfig(**{**plain, "schedule": ScheduleConfig("constant", 0), **changes})


def gradients(make_model, objective, collate, micro, accum):
    loop = loop_of(micro_batch_size=micro, grad_accum_steps=accum, max_grad_norm=None)
    model = make_model()
    run = Run(model, objective, ExampleLoader(NUM, collate, micro, seed=0), loop)
    seen = {}
    run.optimizer.step = lambda: seen.update(
        {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    )
    seen["loss"] = torch.tensor(run.do_step().loss)
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_accumulated_micro_batches_give_the_gradient_of_one_batch(name):
    whole = gradients(*case(name), NUM, 1)
    split = gradients(*case(name), 1, NUM)
    assert whole.keys() == split.keys() and len(whole) > 5
    assert max(float(g.abs().max()) for g in whole.values()) > 1e-4
    for key, expected in whole.items():
        torch.testing.assert_close(split[key], expected, rtol=2e-4, atol=2e-5, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", ["masked", "writing", "contrastive", "spans"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(name, tmp_path):
    make_model, objective, collate = case(name)
    loop = loop_of(num_steps=5, micro_batch_size=3)

    def run_to_the_end(folder, checkpoint, hooks=()):
        loader = ExampleLoader(NUM, collate, 3, seed=0)
        return train(make_model(), objective, loader, replace(loop, checkpoint=checkpoint), folder=folder, hooks=hooks)

    def stop(run, report):
        if report.step == 3:
            raise InterruptedError

    whole = run_to_the_end(None, CheckpointConfig())
    with pytest.raises(InterruptedError):
        run_to_the_end(tmp_path, CheckpointConfig(every=1), [stop])
    resumed = run_to_the_end(tmp_path, CheckpointConfig(every=1))
    assert resumed.losses == whole.losses
    for key, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], value), key


# -- learning, each beside a control that cannot be learned


def mean_loss(name, num_steps=60, make_collate=None, seed=0):
    make_model, objective, collate = case(name)
    collate = make_collate or collate
    run = train(make_model(), objective, ExampleLoader(NUM, collate, NUM, seed=seed), loop_of(num_steps=num_steps))
    losses = [loss for _, loss in run.losses]
    return losses[0], float(np.mean(losses[-5:])), run.model


def test_masked_tokens_are_learned_where_they_follow_from_the_others():
    rows = [np.full(10, 10 + i) for i in range(NUM)]  # each text repeats one token
    noise = texts(200, fixed_len=10)
    first, last, _ = mean_loss("masked", 80, masked_collate(rows))
    control = mean_loss(
        "masked", 80, lambda n, epoch: masked_collate(noise)([(i + epoch * NUM) % 200 for i in n], epoch)
    )
    assert last < 0.3 * first
    assert control[1] > 0.7 * control[0]


def test_classes_are_learned_and_shuffled_ones_are_not():
    rows = texts(400, fixed_len=8)
    labels = np.array([int(r[2] > 24) for r in rows])
    wrong = np.random.default_rng(0).permutation(labels)

    def accuracy(known):
        collate = labelled_collate(rows[:300], known[:300])
        loader = ExampleLoader(300, collate, 30, seed=0)
        model = train(
            encoder("ForSequenceClassification"), SequenceClassification(), loader, loop_of(num_steps=120)
        ).model
        with torch.no_grad():
            batch = text_batch(rows[300:], labels[300:])
            found = model(batch.input_ids, **batch.inputs()).logits.argmax(-1)
        return float((found == batch.labels).float().mean())

    assert accuracy(labels) > 0.85
    assert accuracy(wrong) < 0.7


def test_the_right_passage_is_learned():
    first, last, _ = mean_loss("ranking", 60)
    assert last < 0.3 * first


def test_positives_come_near_and_copies_are_no_negatives():
    first, last, model = mean_loss("contrastive", 60)
    assert last < 0.5 * first
    # Two groups with one positive text: without the rule each would push the other's away.
    vectors = torch.randn(2, 2, 8, generator=torch.Generator().manual_seed(0))
    vectors[1, 1] = vectors[0, 1]
    objective = Contrastive()
    assert float(objective.contrast(vectors, [["a", "p"], ["b", "p"]])) == pytest.approx(0.0, abs=1e-6)
    assert float(objective.contrast(vectors, [["a", "p"], ["b", "q"]])) > 1.0


def test_contrastive_loss_is_the_formula():
    vectors = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(0))
    names = [[f"{i}{k}" for k in range(3)] for i in range(4)]
    unit = vectors / vectors.norm(dim=-1, keepdim=True)
    expected = 0.0
    for i in range(4):
        scores = [float(unit[i, 0] @ unit[j, k]) / 0.05 for k in (1, 2) for j in range(4)]
        expected += float(torch.tensor(scores).logsumexp(0)) - scores[i]
    assert float(Contrastive().contrast(vectors, names)) == pytest.approx(expected, rel=1e-5)


def test_texts_of_one_class_are_no_negatives():
    torch.manual_seed(0)
    vectors = torch.randn(3, 3, 8)
    batch = GroupBatch(torch.arange(9).view(3, 3, 1), torch.ones(3, 3, 1, dtype=torch.int64))
    kinds = torch.tensor([[0, 0, 1], [0, 0, 1], [1, 1, 0]])
    moved = vectors.clone()
    moved[1, 1] += 5  # the positive of another anchor of class 0
    named = [text_names(one) for one in (batch, replace(batch, classes=kinds))]

    def loss_of_first(given, names):
        one = given.clone().requires_grad_()
        Contrastive().contrast(one, names).backward()
        return one.grad[0, 0]  # anchor 0 is no candidate of others

    assert torch.allclose(loss_of_first(vectors, named[1]), loss_of_first(moved, named[1]))
    assert not torch.allclose(loss_of_first(vectors, named[0]), loss_of_first(moved, named[0]))


def test_matryoshka_trains_the_first_numbers():
    rows = texts(64, fixed_len=6)

    def short_score(sizes):
        def collate(numbers, epoch):
            flat = [t for i in numbers for t in (rows[i], rows[i][::-1])]
            return GroupBatch(pad(flat, PAD).view(len(numbers), 2, -1), length_mask(flat).view(len(numbers), 2, -1))

        model = SentenceEncoder(stirred(ARCHITECTURES["BertModel"](BERT)))
        objective = Contrastive(sizes=sizes)
        train(model, objective, ExampleLoader(64, collate, 32, seed=0), loop_of(num_steps=40))
        with torch.no_grad():
            vectors = objective.embed(model, collate(range(64), 0))[..., :2]
        return float(Contrastive().contrast(vectors, [[f"{i}a", f"{i}b"] for i in range(64)])) / 64

    assert short_score((2,)) < short_score(())


def test_dropout_makes_two_of_one_text_and_goes_away_again():
    model = SentenceEncoder(encoder("Model").train())
    ids = pad(texts(), PAD)
    with torch.no_grad():
        plain = model(ids).embeddings
        with dropout(model, 0.1) as num_places:
            first, second = model(ids).embeddings, model(ids).embeddings
            model.eval()
            quiet = model(ids).embeddings
        assert num_places == 1 + 2 * BERT.num_layers
        assert not torch.equal(first, second)
        assert torch.equal(quiet, plain) and torch.equal(model.train()(ids).embeddings, plain)
    with pytest.raises(ConfigError, match="dropout is 1"), dropout(model, 1.0):
        pass
    with pytest.raises(ConfigError, match="no blocks in which dropout"), dropout(nn.Linear(2, 2), 0.1):
        pass


def test_accumulation_puts_dropout_back():
    """The second pass over a micro-batch drops the same numbers as the first, else the gradient is of another loss."""
    make_model, objective, collate = case("contrastive")
    model = make_model().train()
    run = Run(model, objective, ExampleLoader(NUM, collate, 4, seed=0), loop_of(grad_accum_steps=2))
    batches = [run.loader.next_batch() for _ in range(2)]
    seen = []
    plain = objective.embed

    def spying(model, batch):
        seen.append(plain(model, batch))
        return seen[-1]

    objective.embed = spying
    with dropout(model, 0.3):
        objective.step(run, batches)
    torch.testing.assert_close(seen[2], seen[0])
    torch.testing.assert_close(seen[3], seen[1])
    assert not torch.equal(seen[0], seen[1])


# -- decoders that see more, or predict more


def test_a_prefix_sees_ahead_and_what_follows_does_not():
    model = stirred(Llama(LLAMA)).eval()
    rows = np.stack(texts(1, fixed_len=17))
    batch = prefixed(rows)
    first = int((batch.labels[0] != IGNORED).nonzero()[0])
    assert first > 0
    objective = PrefixLanguageModeling()
    changed = batch.input_ids.clone()
    changed[0, first] = 11 if int(changed[0, first]) != 11 else 12

    def hidden(ids):
        from modelwright.train.masked import see_as_masked

        with torch.no_grad(), see_as_masked(model):
            return model(ids, mask=batch.mask, hidden_only=True).hidden[0]

    before, after = hidden(batch.input_ids), hidden(changed)
    assert (before[0] - after[0]).abs().max() > 1e-4  # the first token sees the last one of the prefix
    with torch.no_grad():
        causal_before, causal_after = (model(ids, hidden_only=True).hidden[0] for ids in (batch.input_ids, changed))
    assert torch.equal(causal_before[0], causal_after[0])  # and no longer does
    assert float(objective.loss(model, batch)) > 0
    with pytest.raises(ConfigError, match="has no mask"):
        objective.loss(model, causal(rows))


def test_extra_heads_begin_as_the_next_token_and_weight_nothing_at_zero(tmp_path):
    model = MultiTokenDecoder(init_weights(Llama(LLAMA), 0), 2)
    batch = causal(np.stack(texts(fixed_len=17)))
    plain = CausalLanguageModeling().loss(model.decoder, batch)
    assert float(MultiTokenPrediction((0.0, 0.0)).loss(model, batch)) == pytest.approx(float(plain), rel=1e-6)
    with torch.no_grad():
        assert torch.equal(model(batch.input_ids).logits, model.decoder(batch.input_ids).logits)
        guesses = model.guess(batch.input_ids)
    assert guesses.shape == (NUM, 3) and torch.equal(guesses[:, 0], guesses[:, 1])
    stirred(model)
    save_heads(model, tmp_path)
    again = load_heads(model.decoder, tmp_path)
    with torch.no_grad():
        assert torch.equal(again.guess(batch.input_ids), model.guess(batch.input_ids))
    with pytest.raises(ConfigError, match="3 weights were given.*2 heads"):
        MultiTokenPrediction((1.0, 1.0, 1.0)).loss(model, batch)


def test_later_heads_learn_what_comes_later():
    rows = np.stack([(np.arange(17) + i) % 20 + 10 for i in range(NUM)])
    collate = lambda numbers, _: causal(rows[numbers])  # noqa: E731
    model = MultiTokenDecoder(init_weights(Llama(LLAMA), 0), 2)
    train(model, MultiTokenPrediction((1.0, 1.0)), ExampleLoader(NUM, collate, NUM), loop_of(num_steps=120))
    guesses = model.guess(torch.from_numpy(rows[:, :10].copy()))
    assert (guesses.numpy() == rows[:, 10:13]).mean() > 0.9


def test_later_labels_stay_within_their_document():
    rows = pack_rows([([5, 6, 7, 8], [True] * 4), ([9, 10, 11], [True] * 3)], 8, 0)
    from modelwright.data.load import make_batch

    assert later_labels(make_batch(rows), 1)[0].tolist() == [7, 8, -100, 11, -100, -100, -100, -100]


# -- teachers


def test_a_teacher_of_itself_has_nothing_to_teach_and_another_has():
    student, batch = stirred(Llama(LLAMA)), causal(np.stack(texts(fixed_len=17)))
    for direction in ("forward", "reverse"):
        config = DistillConfig(direction, 2.0, teacher_fraction=1.0)
        same = Distillation(lambda b: student(b.input_ids).logits.detach(), config).loss(student, batch)
        other = Distillation(teacher_of(stirred(Llama(LLAMA), 7)), config).loss(student, batch)
        assert abs(float(same)) < 1e-3 < float(other)


def test_forward_and_reverse_are_the_formulas():
    p, q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.2, 0.3, 0.5]])
    forward = float((p * (p / q).log()).sum())
    reverse = float((q * (q / p).log()).sum())
    assert float(divergence(q.log(), p.log(), "forward")) == pytest.approx(forward, rel=1e-5)
    assert float(divergence(q.log(), p.log(), "reverse")) == pytest.approx(reverse, rel=1e-5)


def test_cached_logits_give_the_loss_of_the_teacher_itself(tmp_path):
    ids = np.stack(texts(fixed_len=17))
    rows = Rows(ids[:, :-1].copy(), ids[:, 1:].copy())
    student, teacher = stirred(Llama(LLAMA)), teacher_of(stirred(Llama(LLAMA), 7))
    config = DistillConfig("forward", 2.0, 0.7)
    losses = {}
    for top_k in (4, VOCAB):
        cache_teacher(teacher, rows, tmp_path / f"{top_k}.safetensors", top_k=top_k, temperature=2.0)
        batch = taught_batches(rows, tmp_path / f"{top_k}.safetensors")(range(NUM), 0)
        losses[top_k] = float(Distillation(None, config).loss(student, batch))
    live = float(Distillation(teacher, config).loss(student, causal(ids)))
    assert losses[VOCAB] == pytest.approx(live, rel=2e-3)  # log-probabilities are kept in half precision
    assert losses[4] < live
    with pytest.raises(DataError, match=r"rows of shape \(8, 16\); the rows have \(3, 16\)"):
        taught_batches(Rows(rows.input_ids[:3], rows.labels[:3]), tmp_path / "4.safetensors")


def test_a_student_comes_near_its_teacher():
    teacher_model = stirred(Llama(LLAMA), 7)
    rows = np.stack(texts(64, fixed_len=17))
    collate = lambda numbers, _: causal(rows[numbers])  # noqa: E731
    objective = Distillation(teacher_of(teacher_model), DistillConfig(teacher_fraction=1.0))
    run = train(stirred(Llama(LLAMA)), objective, ExampleLoader(64, collate, 16), loop_of(num_steps=80))
    losses = [loss for _, loss in run.losses]
    assert np.mean(losses[-5:]) < 0.5 * losses[0]


# -- refusals


def test_models_without_the_head_are_refused():
    batch = text_batch(texts(), [0] * NUM)
    for objective, task in (
        (SequenceClassification(), "sequence_classification"),
        (TokenClassification(), "token_classification"),
        (AnswerSpans(), "question_answering"),
    ):
        with pytest.raises(ConfigError, match=task):
            objective.loss(encoder("ForMaskedLM"), batch)
    with pytest.raises(ConfigError, match="predicts no masked tokens"):
        MaskedLanguageModeling().loss(encoder("ForSequenceClassification"), batch)
    with pytest.raises(ConfigError, match="makes no vectors"):
        Contrastive().loss(encoder("Model"), group_collate(texts())(range(2), 0))
    with pytest.raises(ConfigError, match="2 labels; a reranker has one"):
        PassageRanking().loss(encoder("ForSequenceClassification"), group_collate(texts())(range(2), 0))


def test_a_batch_without_a_trained_token_changes_nothing():
    make_model, objective, _ = case("masked")
    rows = texts()
    collate = lambda n, _: text_batch(rows_of(rows, n), np.full((len(n), max(map(len, rows_of(rows, n)))), IGNORED))  # noqa: E731
    model = make_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run = Run(model, objective, ExampleLoader(NUM, collate, 4), loop_of())
    assert run.do_step().is_skipped
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_examples_come_once_an_epoch_over_the_ranks():
    loaders = [ExampleLoader(10, lambda n, e: (n, e), 2, seed=1, rank=r, num_ranks=2) for r in range(2)]
    seen = [i for _ in range(3) for loader in loaders for i in loader.next_batch()[0]]
    assert set(seen) == set(range(10)) and len(seen) in (10, 11)
    assert loaders[0].next_batch()[1] == 1
