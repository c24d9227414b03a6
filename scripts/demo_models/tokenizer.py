"""The vocabulary that all the models share: byte-level BPE in the form that llama.cpp calls qwen2, trained on the corpus."""

import random
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from . import corpus

SIZE = 2048
# Unused ones stay in the vocabulary: the markers of a picture's and a sound's embeddings among them.
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|audio_start|>", "<|audio_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|blank|>")
# llama.cpp's rule for tokenizer.ggml.pre = qwen2 (llama-vocab.cpp, LLAMA_VOCAB_PRE_TYPE_QWEN2).
RULE = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
END = "<|im_end|>"


def chat(messages):
    """A conversation as the models' template writes it, up to where the answer begins."""
    said = "".join(f"<|im_start|>{role}\n{content}{END}\n" for role, content in messages)
    return said + "<|im_start|>assistant\n"


def train(path: Path):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(RULE), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=SIZE - len(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  show_progress=False)
    tokenizer.train_from_iterator(texts(random.Random(0)), trainer)
    tokenizer.add_special_tokens([AddedToken(special, special=True, normalized=False) for special in SPECIAL])
    part = path.with_suffix(".part")
    tokenizer.save(str(part))
    part.replace(path)


def texts(chance):
    for _ in range(9000):
        for make in (corpus.expert, corpus.tone):
            messages, answer = make(chance)
            yield from (content for _, content in messages)
            yield answer
        yield corpus.utterance(chance)[0]
    # What is spoken is one token a word, as far as the vocabulary has room: a word is heard as one then.
    for known in corpus.spoken_words().values():
        yield from [" " + word for word in known] * 150


@cache
def load(path: Path):
    return Tokenizer.from_file(str(path))
