"""The model that hears and sees: an ear, an eye, and a text model that reads what they give.

The ear learns which word is heard in each frame, from the times that the synthesiser tells. The text model learns to write down
words from such frames that are made up, which takes no audio. Then both learn together. The eye learns what is on a picture, and
its projector is fitted to the embeddings of some tokens that no text has, which the text model has learnt to put into words.
"""

import random

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import corpus, models, pictures, speech, tokenizer
from .models import CHUNK, EAR, EYE, OF_CHUNK
from .texts import TOGETHER, filled_up
from .training import load, save, train

# Seconds of a chunk, and from one of its embeddings to the next.
CHUNK_SECONDS, STEP_SECONDS = 1.0, 0.08
# The longest recording trained on, in chunks.
LONGEST = 6
# How much the ear and the text model learn of each other at a time, in recordings.
ROWS = 32


class Vocabulary:
    """The tokens that stand for what is heard and seen."""

    def __init__(self, tokens):
        self.tokens = tokens
        self.blank = tokens.token_to_id("<|blank|>")
        words = sorted({word for known in corpus.spoken_words().values() for word in known})
        self.of_word = {word: tokens.encode(" " + word).ids for word in words}
        # What a frame may be, by the number that the ear knows it by.
        self.heard = np.array(sorted({self.blank, *(token for ids in self.of_word.values() for token in ids)}))
        self.number = {token: number for number, token in enumerate(self.heard.tolist())}
        # The same for whole arrays of tokens; -1 where there is none, which no label may be.
        self.numbers = np.full(tokens.get_vocab_size(), -1)
        self.numbers[self.heard] = np.arange(len(self.heard))
        # Bytes that no text has, as byte-level BPE writes them: for colours, shapes and sizes.
        things = len(corpus.COLOURS["en"]) + len(corpus.SHAPES["en"]) + len(corpus.SIZES["en"])
        self.seen = np.array([tokens.token_to_id(chr(256 + byte)) for byte in range(1, 32) if byte not in (9, 10, 13)][:things])
        ids = lambda text: tokens.encode(text).ids
        self.before_audio = ids("<|im_start|>user\n<|audio_start|>")
        self.before_image = ids("<|im_start|>user\n")

    def after_audio(self, asked):
        return self.tokens.encode(f"<|audio_end|>{asked}<|im_end|>\n<|im_start|>assistant\n").ids

    def after_image(self, asked):
        return self.tokens.encode(f"{asked}<|im_end|>\n<|im_start|>assistant\n").ids

    def said(self, text):
        return self.tokens.encode(text + tokenizer.END).ids


def things_of(picture):
    """What each of the eye's embeddings stands for: a quarter each for colour, shape, background and size."""
    colour, shape, ground, size = picture
    shapes = len(corpus.COLOURS["en"])
    sizes = shapes + len(corpus.SHAPES["en"])
    return np.repeat([colour, shapes + shape, ground, sizes + size], EYE.patches // 4)


# The ear.


def frame_labels(one, vocabulary, chunks):
    """Which token is heard in each of a recording's embeddings."""
    labels = np.full(chunks * OF_CHUNK, vocabulary.blank)
    at = (np.arange(chunks)[:, None] * CHUNK_SECONDS + np.arange(OF_CHUNK) * STEP_SECONDS).reshape(-1)
    for word, begin, end in zip(one.text.split(), one.times, one.times[1:]):
        ids = vocabulary.of_word[word]
        edges = np.linspace(begin, end, len(ids) + 1)
        for token, start, stop in zip(ids, edges, edges[1:]):
            labels[(at >= start + 0.02) & (at < stop + 0.02)] = token
    return labels


def distorted(frames, noise):
    """A spectrum as another voice might give it: louder, the frequencies stretched, some of them and a moment missing."""
    frames = frames.astype(np.float32) + noise.normal() * 0.05
    mels = frames.shape[1]
    if noise.random() < 0.6:
        places = np.clip(np.arange(mels) * noise.uniform(0.9, 1.12), 0, mels - 1.001)
        below = places.astype(int)
        part = (places - below).astype(np.float32)
        frames = frames[:, below] * (1 - part) + frames[:, below + 1] * part
    wide, long = noise.integers(0, 7), noise.integers(0, 6)
    low, start = noise.integers(0, mels - wide), noise.integers(0, max(1, len(frames) - long))
    mean = frames.mean()
    frames[:, low : low + wide] = mean
    frames[start : start + long] = mean
    return frames


class Recordings:
    """Batches of recordings of as many chunks each."""

    def __init__(self, path, vocabulary, rows):
        self.vocabulary, self.rows = vocabulary, rows
        self.all = speech.recordings(path)
        self.by_chunks = {}
        for number, one in enumerate(self.all):
            self.by_chunks.setdefault(-(-len(one.frames) // CHUNK), []).append(number)
        self.by_chunks = {chunks: of for chunks, of in self.by_chunks.items() if chunks <= LONGEST and len(of) >= rows}
        self.labels = {number: frame_labels(self.all[number], vocabulary, chunks)
                       for chunks, of in self.by_chunks.items() for number in of}

    def draw(self, chance):
        """Spectra [rows, chunks * 100, mels], labels [rows, chunks * 13], the recordings."""
        lengths = sorted(self.by_chunks)
        chunks = chance.choices(lengths, [len(self.by_chunks[length]) for length in lengths])[0]
        chosen = chance.sample(self.by_chunks[chunks], self.rows)
        noise = np.random.default_rng(chance.randrange(1 << 30))
        spectra = np.zeros((self.rows, chunks * CHUNK, EAR.mels), np.float32)
        for row, number in enumerate(chosen):
            frames = distorted(self.all[number].frames, noise)
            spectra[row, : len(frames)] = frames
        labels = np.stack([self.labels[number] for number in chosen])
        return spectra, labels, [self.all[number] for number in chosen]


def frame_loss(weights, heard, labels):
    """`labels` are the ear's own numbers."""
    return optax.softmax_cross_entropy_with_integer_labels(heard @ weights["words"], labels).mean()


def start_ear(vocabulary):
    weights = models.ear_weights(4)
    return weights | {"words": weights["words"][:, : len(vocabulary.heard)]}


def train_ear(folder, tokens, steps=4600):
    vocabulary = Vocabulary(tokens)
    recordings = []

    def batch(chance, _):
        if not recordings:
            recordings.append(Recordings(folder / "speech.npz", vocabulary, ROWS))
        spectra, labels, _ = recordings[0].draw(chance)
        return spectra, vocabulary.numbers[labels]

    def loss(weights, spectra, labels):
        of_frames = frame_loss(weights, models.hear(weights, spectra), labels)
        return of_frames, {"frames": of_frames}

    return train("ear", folder / "ear.npz", lambda: start_ear(vocabulary), loss, batch, steps, rate=2e-3, decay=0.01)


# The text model, on frames that are made up.


def made_up_frames(text, vocabulary, chance):
    """Tokens as an ear might hear a text: each for some frames, pauses between, mistakes; and a second guess of each frame."""
    heard = sorted(vocabulary.number)
    frames = [vocabulary.blank] * chance.randint(0, 5)
    for word in text.split():
        ids = vocabulary.tokens.encode(" " + word).ids
        # A letter takes some 60 ms.
        for token in ids:
            token = chance.choice(heard) if chance.random() < 0.03 else token
            frames += [token] * max(1, round((0.1 + 0.06 * len(word)) / len(ids) / STEP_SECONDS * chance.uniform(0.6, 1.3)))
        if chance.random() < 0.1:
            frames += [vocabulary.blank] * chance.randint(1, 2)
    frames += [vocabulary.blank] * chance.randint(2, 6)
    frames = [chance.choice(heard) if chance.random() < 0.04 else token for token in frames]
    guesses = [chance.choice(frames) if chance.random() < 0.5 else chance.choice(heard) for _ in frames]
    doubts = [chance.uniform(0, 0.6) if chance.random() < 0.25 else 0.0 for _ in frames]
    return frames, guesses, doubts


def something_said(chance):
    """A question, often as it is, or words in no order."""
    return corpus.allowed(lambda: something_said_once(chance))


def something_said_once(chance):
    language = "en" if chance.random() < 0.7 else "es"
    if chance.random() < 0.75:
        intent = chance.choice([one for one in corpus.intents() if one.language == language])
        text = chance.choice(intent.spoken if chance.random() < 0.7 else intent.questions)
        return chance.choice(corpus.LEAD_INS[language]) + " " + text if chance.random() < 0.12 else text
    known = corpus.spoken_words()[language]
    return " ".join(chance.choice(known) for _ in range(chance.randint(2, 7)))


ONLY = {"en": "I write down what is said and say what is on a picture.", "es": "Escribo lo que se dice y digo qué hay en una imagen."}


def to_write_down(vocabulary, chance):
    """(tokens before, frames, guesses, doubts, tokens after, answer): speech, a picture, or neither."""
    kind = chance.random()
    if kind < 0.74:
        text = something_said(chance)
        after = vocabulary.after_audio(chance.choice(corpus.TO_TRANSCRIBE))
        return vocabulary.before_audio, *made_up_frames(text, vocabulary, chance), after, vocabulary.said(text)
    language = "en" if chance.random() < 0.66 else "es"
    if kind < 0.97:
        picture = corpus.any_picture(chance)
        seen = vocabulary.seen[things_of(picture)].tolist()
        noise = chance.choice((0, 0, 0.05, 0.15))
        seen = [chance.choice(vocabulary.seen.tolist()) if chance.random() < noise else token for token in seen]
        after = vocabulary.after_image(chance.choice(corpus.TO_DESCRIBE[language]))
        answer = vocabulary.said(corpus.caption(picture, language))
        return vocabulary.before_image, seen, seen, [0.0] * len(seen), after, answer
    intent = chance.choice([one for one in corpus.intents() if one.language == language])
    question = vocabulary.tokens.encode(chance.choice(intent.questions)).ids
    return vocabulary.before_image, [], [], [], question + vocabulary.after_image(""), vocabulary.said(ONLY[language])


class MadeUp:
    """Batches of what is to be written down, those of like lengths together; all of one length where that is given."""

    def __init__(self, name, vocabulary, rows, length=None):
        self.name, self.vocabulary, self.rows, self.length = name, vocabulary, rows, length
        self.group, self.batches = None, []

    def __call__(self, at):
        group, which = divmod(at, TOGETHER)
        if group != self.group:
            chance = random.Random(f"{self.name} examples {group}")
            examples = [self.as_rows(to_write_down(self.vocabulary, chance)) for _ in range(self.rows * TOGETHER)]
            examples.sort(key=lambda example: len(example[0]))
            self.batches = [examples[i : i + self.rows] for i in range(0, len(examples), self.rows)]
            chance.shuffle(self.batches)
            self.group = group
        cut = [tuple(row[: self.length] for row in example) for example in self.batches[which]]
        ids, guesses, doubts, noises, importance = zip(*cut)
        length = filled_up(ids, self.length).shape[1]
        numbers = lambda rows: np.stack([np.pad(np.asarray(row, np.float32), (0, length - len(row))) for row in rows])
        seed = np.asarray(random.Random(f"{self.name} noise {at}").randrange(1 << 30), np.uint32)
        return filled_up(ids, length), filled_up(guesses, length), numbers(doubts), numbers(noises), numbers(importance), seed

    @staticmethod
    def as_rows(example):
        """Tokens, second guesses, their parts, where there is noise, and what is learnt."""
        before, frames, guesses, doubts, after, answer = example
        around = lambda middle: [*before, *middle, *after, *answer]
        flags = lambda middle, of_answer: [0.0] * len(before) + middle + [0.0] * len(after) + [of_answer] * len(answer)
        return around(frames), around(guesses), flags(list(doubts), 0.0), flags([1.0] * len(frames), 0.0), flags([0.0] * len(frames), 1.0)


# How far from a token's embedding what is heard may be, in the embeddings' root mean square.
BLUR = 0.35


def made_up_loss(weights, ids, guesses, doubts, noisy, importance, seed):
    embedding = weights["embedding"]
    x = embedding[ids] * (1 - doubts[..., None]) + embedding[guesses] * doubts[..., None]
    size = jax.lax.stop_gradient(jnp.sqrt((embedding**2).mean()))
    x = x + noisy[..., None] * BLUR * size * jax.random.normal(jax.random.PRNGKey(seed), x.shape)
    states = models.text(weights, x[:, :-1])
    return models.token_loss(weights, states, ids[:, 1:], importance[:, 1:])


def train_listener(folder, tokens, steps=1800, rows=36):
    batches = MadeUp("listener", Vocabulary(tokens), rows)

    def loss(weights, *inputs):
        value = made_up_loss(weights, *inputs)
        return value, {"loss": value}

    return train("listener", folder / "listener.npz", lambda: models.text_weights(5), loss, lambda _, at: batches(at), steps, rate=2e-3)


# Both together.


def fit_projector(folder, tokens, ear, text, steps=1500, rows=2048):
    """The ear's projector, so that a frame becomes the embedding of its token."""
    if (folder / "projector.npz").exists():
        return ear | load(folder / "projector.npz")
    vocabulary, heard, labels = Vocabulary(tokens), [], []
    recordings = Recordings(folder / "speech.npz", vocabulary, ROWS)
    hear, chance = jax.jit(models.hear), random.Random("projector")
    for _ in range(60):
        spectra, of_frames, _ = recordings.draw(chance)
        heard.append(np.asarray(hear(ear, spectra)).reshape(-1, EAR.width))
        labels.append(of_frames.reshape(-1))
    heard, labels, embedding = np.concatenate(heard), np.concatenate(labels), np.asarray(text["embedding"])
    size = float((embedding**2).mean())

    def batch(chance, _):
        rows_of = np.random.default_rng(chance.randrange(1 << 30)).integers(0, len(heard), rows)
        return heard[rows_of], embedding[labels[rows_of]]

    def loss(weights, heard, wanted):
        value = ((models.projected(weights, heard, approximate=False) - wanted) ** 2).mean() / size
        return value, {"error": value}

    start = lambda: models.projector_weights(models.Draw(6), EAR.width, EAR.projector)
    return ear | train("projector", folder / "projector.npz", start, loss, batch, steps, rate=3e-3, decay=0.0)


def train_together(folder, tokens, steps=1500, made_up_rows=10):
    path = folder / "together.npz"
    if path.exists():
        return load(path)
    vocabulary = Vocabulary(tokens)
    text, ear = load(folder / "listener.npz"), load(folder / "ear.npz")
    recordings = Recordings(folder / "speech.npz", vocabulary, ROWS)
    # One length, so that there is one shape for each number of chunks, and as few programs to compile.
    made_up = MadeUp("together", vocabulary, made_up_rows, length=112)
    before = np.asarray(vocabulary.before_audio)

    def batch(chance, at):
        spectra, labels, spoken = recordings.draw(chance)
        after = [vocabulary.after_audio(chance.choice(corpus.TO_TRANSCRIBE)) for _ in spoken]
        answers = [vocabulary.said(one.text) for one in spoken]
        rows = filled_up([[*of, *answer] for of, answer in zip(after, answers)], 48)
        importance = np.zeros(rows.shape, np.float32)
        for row, (of, answer) in enumerate(zip(after, answers)):
            importance[row, len(of) : len(of) + len(answer)] = 1
        return spectra, labels, vocabulary.numbers[labels], rows, importance, made_up(at)

    def loss(weights, spectra, tokens_of, labels, rows, importance, others):
        text, ear = weights["text"], weights["ear"]
        embedding = text["embedding"]
        heard = models.hear(ear, spectra)
        of_frames = frame_loss(ear, heard, labels)
        given = models.projected(ear, heard, approximate=False)
        wanted = jax.lax.stop_gradient(embedding[tokens_of])
        far = ((given - wanted) ** 2).mean() / jax.lax.stop_gradient((embedding**2).mean())
        first = jnp.broadcast_to(embedding[before], (len(rows), len(before), models.TEXT.width))
        x = jnp.concatenate([first, given, embedding[rows[:, :-1]]], 1)
        states = models.text(text, x)[:, -(rows.shape[1] - 1) :]
        words = models.token_loss(text, states, rows[:, 1:], importance[:, 1:])
        made = made_up_loss(text, *others)
        return words + 0.5 * of_frames + 0.2 * far + 0.5 * made, {"words": words, "frames": of_frames, "far": far, "made_up": made}

    start = lambda: {"text": text, "ear": fit_projector(folder, tokens, ear, text)}
    return train("together", path, start, loss, batch, steps, rate=7e-4, decay=0.01)


# The eye.


def train_eye(folder, tokens, steps=11000, rows=32):
    things = len(Vocabulary(tokens).seen)

    def batch(chance, _):
        drawn = [corpus.any_picture(chance) for _ in range(rows)]
        images = np.stack([pictures.as_seen(pictures.draw(picture, chance)) for picture in drawn])
        return images, np.stack([things_of(picture) for picture in drawn])

    def loss(weights, images, labels):
        value = optax.softmax_cross_entropy_with_integer_labels(models.see(weights, images) @ weights["things"], labels).mean()
        return value, {"loss": value}

    start = lambda: models.eye_weights(7, things)
    return train("eye", folder / "eye.npz", start, loss, batch, steps, rate=1.5e-3, decay=0.01)


def fit_eye(folder, tokens, rows=64, batches=60):
    """The eye with a projector that gives the embeddings of what is seen: the least squares, in closed form."""
    path = folder / "seeing.npz"
    if path.exists():
        return load(path)
    eye, text = load(folder / "eye.npz"), load(folder / "together.npz")["text"]
    embedding = np.asarray(text["embedding"])[Vocabulary(tokens).seen]
    see, chance = jax.jit(models.see), random.Random("seeing")
    inner, outer = 0.0, 0.0
    for _ in range(batches):
        drawn = [corpus.any_picture(chance) for _ in range(rows)]
        images = np.stack([pictures.as_seen(pictures.draw(picture, chance)) for picture in drawn])
        seen = np.asarray(see(eye, images), np.float64).reshape(-1, EYE.projector)
        seen = np.concatenate([seen, np.ones((len(seen), 1))], 1)
        wanted = embedding[np.stack([things_of(picture) for picture in drawn]).reshape(-1)]
        inner, outer = inner + seen.T @ seen, outer + seen.T @ wanted
    found = np.linalg.solve(inner + 1e-3 * np.eye(len(inner)), outer).astype(np.float32)
    eye = eye | {"projector2": jnp.asarray(found[:-1]), "projector2_bias": jnp.asarray(found[-1])}
    save(path, eye)
    return eye

