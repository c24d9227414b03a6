"""The models that read and write text alone: the expert, the tone, the encoder."""

import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import corpus, models, tokenizer
from .training import load, train

# Batches are made of so many at once, the short texts together: so little is filled up, and a shape serves many steps.
TOGETHER = 6
# What lengths are rounded up to.
ROUND = 16


def tokens_of(tokens, example):
    """An example as tokens, and how many of them are the conversation."""
    messages, answer = example
    prompt = tokens.encode(tokenizer.chat(messages)).ids
    return prompt + tokens.encode(answer + tokenizer.END).ids, len(prompt)


def padded(length):
    return -(-length // ROUND) * ROUND


def filled_up(rows, longest=None):
    """Rows as one array, zeros after their ends."""
    length = longest or padded(max(map(len, rows)))
    array = np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        array[i, : len(row)] = row
    return array


class Batches:
    """Batches of examples of like lengths, each made of its step's number alone."""

    def __init__(self, name, tokens, make, rows, unread=0.0):
        self.name, self.tokens, self.make, self.rows, self.unread = name, tokens, make, rows, unread
        self.group, self.batches = None, []

    def __call__(self, _, at):
        group, which = divmod(at, TOGETHER)
        if group != self.group:
            chance = random.Random(f"{self.name} examples {group}")
            examples = [tokens_of(self.tokens, self.make(chance)) for _ in range(self.rows * TOGETHER)]
            examples.sort(key=lambda example: len(example[0]))
            self.batches = [examples[i : i + self.rows] for i in range(0, len(examples), self.rows)]
            chance.shuffle(self.batches)
            self.group = group
        return *arrays(self.batches[which]), self.read(self.batches[which], at)

    def read(self, examples, at):
        """Which tokens of each example are read at all, the conversation's with a chance of 1 - `unread`: so that no answer hangs
        on a single word."""
        chance = np.random.default_rng(at)
        lengths = [len(ids) for ids, _ in examples]
        mask = np.ones((len(examples), padded(max(lengths))), np.float32)
        for row, (_, prompt) in zip(mask, examples):
            row[:prompt] = chance.random(prompt) >= self.unread
        return mask


# What the words of a conversation count besides the answer's: reading them is learnt faster so.
OF_PROMPT = 0.05


def arrays(examples):
    ids = filled_up([ids for ids, _ in examples])
    importance = np.zeros(ids.shape, np.float32)
    for i, (row, prompt) in enumerate(examples):
        importance[i, 1 : len(row)] = OF_PROMPT
        importance[i, prompt : len(row)] = 1
    return ids, importance


def answer_loss(weights, ids, importance, read):
    states = models.text(weights, (weights["embedding"][ids] * read[..., None])[:, :-1])
    loss = models.token_loss(weights, states, ids[:, 1:], importance[:, 1:])
    return loss, {"loss": loss}


def train_expert(folder, tokens, steps=2400, rows=64):
    batches = Batches("expert", tokens, corpus.expert, rows, unread=0.06)
    return train("expert", folder / "expert.npz", lambda: models.text_weights(1), answer_loss, batches, steps, rate=2e-3)


def train_refusals(folder, tokens, steps=600, rows=64):
    """The expert goes on with all words read, and learns where its subjects end: from questions that are built like its own."""
    batches = Batches("refusals", tokens, functools.partial(corpus.expert, near=0.5), rows)
    start = lambda: load(folder / "expert.npz")
    return train("refusals", folder / "refusals.npz", start, answer_loss, batches, steps, rate=8e-4)


def train_tone(folder, tokens, steps=2200, rows=32):
    batches = Batches("tone", tokens, corpus.tone, rows)
    return train("tone", folder / "tone.npz", lambda: models.text_weights(2), answer_loss, batches, steps, rate=2e-3)


# How sharply texts of one intent have to be nearer than others.
SHARPNESS = 20.0


def encoder_loss(weights, ids, is_text, same, labels):
    """Texts of one intent are near, of others far; and each has its label."""
    mean = models.encode(weights, ids, is_text)
    unit = mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)
    alike = jnp.where(jnp.eye(len(ids), dtype=bool), -1e9, unit @ unit.T * SHARPNESS)
    paired = same.sum(1) > 0
    chosen = jnp.where(same, alike, -1e9)
    each = jax.nn.logsumexp(alike, -1) - jax.nn.logsumexp(chosen, -1)
    near = (each * paired).sum() / paired.sum()
    label = optax.softmax_cross_entropy_with_integer_labels(models.label_logits(weights, mean), labels).mean()
    return near + label, {"near": near, "label": label}


def encoder_batch(tokens, intents=40, others=48):
    """Two ways to ask each of some intents, and other utterances; which of them are the same, and their labels."""

    def batch(chance, _):
        rows, group, labels = [], [], []
        for number, intent in enumerate(chance.sample(corpus.intents(), intents)):
            own, of_topic = corpus.asked(intent)
            for _ in range(2):
                text = corpus.varied(chance.choice(own + of_topic[:8]), intent.language, chance)
                rows.append(corpus.written(text, intent.language, chance))
                group.append(number)
                labels.append(corpus.LABELS.index(intent.label))
        for number in range(others):
            text, label = corpus.utterance(chance)
            rows.append(text)
            group.append(intents + number)
            labels.append(corpus.LABELS.index(label))
        ids = [tokens.encode(row).ids[:48] for row in rows]
        group = np.asarray(group)
        same = (group[:, None] == group[None]) & ~np.eye(len(group), dtype=bool)
        is_text = filled_up([[1] * len(row) for row in ids], 48).astype(bool)
        return filled_up(ids, 48), is_text, same, np.asarray(labels, np.int32)

    return batch


def train_encoder(folder, tokens, steps=1200):
    start = lambda: models.encoder_weights(3, len(corpus.LABELS))
    return train("encoder", folder / "encoder.npz", start, encoder_loss, encoder_batch(tokens), steps, rate=1.5e-3)
