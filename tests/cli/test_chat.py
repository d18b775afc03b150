"""``mw chat``: kept conversations, memories, adapters, as somebody who types meets them."""

import io

import torch

from modelwright.cli.main import main
from modelwright.models.weights import load_model
from modelwright.nn.lora import add_lora, lora_parameters
from modelwright.train.adapter import save_adapter

TALK = ["What is a heap?", "And then?", "More?"]


def say(monkeypatch, capsys, model, lines, *options):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    fixed = ("--max-tokens", 8, "--temperature", 1, "--seed", 5)
    code = main(["chat", str(model), *map(str, (*fixed, *options))])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_a_kept_conversation_is_listed_and_opened_again(toy, tmp_path, monkeypatch, capsys):
    store = ("--store", tmp_path / "chats.sqlite")
    _, first, _ = say(monkeypatch, capsys, toy.model, TALK[:2], *store)
    code, again, _ = say(monkeypatch, capsys, toy.model, ["/list", "/open 1", TALK[2]], *store)
    _, straight, _ = say(monkeypatch, capsys, toy.model, TALK)
    assert code == 0 and "What is a heap?  (2 exchanges)" in again
    assert "you> And then?" in again and straight.startswith(first)
    assert again.endswith(straight[len(first) :])  # it goes on as if it had never ended
    _, out, error = say(monkeypatch, capsys, toy.model, ["/open 99", "/help"], *store)
    assert "no conversation 99" in error and "/system TEXT" in out


def test_memories_show_less_and_wrong_ones_are_named(toy, monkeypatch, capsys):
    _, whole, _ = say(monkeypatch, capsys, toy.model, TALK, "--memory", "all")
    _, last, _ = say(monkeypatch, capsys, toy.model, TALK, "--memory", "window", "--remember", 1)
    _, alone, _ = say(monkeypatch, capsys, toy.model, TALK[2:])
    assert last.endswith(alone) and not whole.endswith(alone)
    code, _, error = say(monkeypatch, capsys, toy.model, TALK, "--memory", "elephant")
    assert code == 1 and "known: all, window, tokens, summary" in error


def test_an_adapter_answers_when_it_is_named(toy, tmp_path, monkeypatch, capsys):
    model = load_model(toy.model)
    add_lora(model, ("q", "v", "o", "up", "down"), rank=4, alpha=64)
    for i, parameter in enumerate(lora_parameters(model)):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    save_adapter(model, tmp_path / "law")
    law = ("--adapter", f"law={tmp_path / 'law'}")

    def answer(*commands):
        code, out, _ = say(monkeypatch, capsys, toy.model, [*commands, TALK[0]], *law)
        assert code == 0
        return out.rpartition("from now on\n")[2]

    assert answer() == answer("/adapter law", "/adapter") != answer("/adapter law")
    code, out, error = say(monkeypatch, capsys, toy.model, ["/adapter nobody", TALK[0]], *law)
    assert code == 0 and "no adapter 'nobody'. Loaded: law." in error
    assert out == answer()  # the one that answered before goes on
    assert "/adapter NAME" in say(monkeypatch, capsys, toy.model, ["/help"])[1].replace("\n", " ")
    assert "expected NAME=DIR" in say(monkeypatch, capsys, toy.model, ["x"], "--adapter", "law")[2]
