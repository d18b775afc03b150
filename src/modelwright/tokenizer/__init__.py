"""Text to token ids and back: training, files of the ecosystem, chat templates, streaming decoding."""

ALGORITHMS = {
    "bpe": "modelwright.tokenizer.train:train_bpe",
    "unigram": "modelwright.tokenizer.subwords:train_unigram",
    "wordpiece": "modelwright.tokenizer.subwords:train_wordpiece",
}
