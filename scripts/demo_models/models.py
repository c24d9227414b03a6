"""The networks, each as llama.cpp computes it: what they are named there is in export.py.

Weights are dictionaries of arrays; a matrix is [in, out]. Shapes: B texts or pictures, T positions, D the width.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from .tokenizer import SIZE

EPSILON = 1e-5
ROPE_BASE = 10000.0


class Draw:
    """Starting weights, drawn one after another from a seed."""

    def __init__(self, seed):
        self.random = np.random.default_rng(seed)

    def matrix(self, rows, columns, gain=1.0):
        return jnp.asarray(self.random.standard_normal((rows, columns)) * gain / np.sqrt(rows), jnp.float32)

    def normal(self, *shape, deviation):
        return jnp.asarray(self.random.standard_normal(shape) * deviation, jnp.float32)


def attention(q, k, v, heads, may_see):
    """Heads side by side: [B, T, heads * size] each; `may_see` is [B, 1 or T, T]."""
    batch, length, width = q.shape
    apart = lambda x: x.reshape(batch, -1, heads, width // heads)
    scores = jnp.einsum("bthd,bshd->bhts", apart(q), apart(k)) / np.sqrt(width // heads)
    weights = jax.nn.softmax(jnp.where(may_see[:, None], scores, -1e9), -1)
    return jnp.einsum("bhts,bshd->bthd", weights, apart(v)).reshape(batch, length, width)


def layer_norm(x, weight, bias):
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + EPSILON) * weight + bias


# The text model: Llama's architecture.


@dataclass(frozen=True)
class TextSize:
    width: int = 192
    layers: int = 4
    heads: int = 6
    hidden: int = 512


TEXT = TextSize()


def text_weights(seed, size=TEXT):
    draw, w = Draw(seed), size.width
    weights = {"embedding": draw.normal(SIZE, w, deviation=0.05), "norm": jnp.ones(w)}
    for i in range(size.layers):
        weights[f"block{i}"] = {
            "attention_norm": jnp.ones(w), "q": draw.matrix(w, w), "k": draw.matrix(w, w), "v": draw.matrix(w, w),
            "output": draw.matrix(w, w, 0.35), "hidden_norm": jnp.ones(w), "gate": draw.matrix(w, size.hidden),
            "up": draw.matrix(w, size.hidden), "down": draw.matrix(size.hidden, w, 0.35),
        }
    return weights


def rms_norm(x, weight):
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + EPSILON) * weight


def rotated(x, heads):
    """Rotary positions on neighbouring pairs, which is Llama's order in llama.cpp; so no weight has to be permuted."""
    batch, length, width = x.shape
    size = width // heads
    angle = jnp.arange(length)[:, None] * ROPE_BASE ** (-jnp.arange(0, size, 2) / size)
    cos, sin = jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]
    x = x.reshape(batch, length, heads, size)
    even, odd = x[..., 0::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(batch, length, width)


def text(weights, x, size=TEXT):
    """From embeddings [B, T, D] to states [B, T, D]; what fills a text up has to come last, where nothing sees it."""
    length = x.shape[1]
    may_see = jnp.tril(jnp.ones((1, length, length), bool))
    for i in range(size.layers):
        block = weights[f"block{i}"]
        h = rms_norm(x, block["attention_norm"])
        q, k = rotated(h @ block["q"], size.heads), rotated(h @ block["k"], size.heads)
        x = x + attention(q, k, h @ block["v"], size.heads, may_see) @ block["output"]
        h = rms_norm(x, block["hidden_norm"])
        x = x + (jax.nn.silu(h @ block["gate"]) * (h @ block["up"])) @ block["down"]
    return rms_norm(x, weights["norm"])


def token_loss(weights, states, targets, importance):
    """The mean loss of the targets [B, T], by their importance; the head is the embedding."""
    logits = states @ weights["embedding"].T
    each = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return (each * importance).sum() / importance.sum()


# The encoder: BERT's architecture.


@dataclass(frozen=True)
class EncoderSize:
    width: int = 128
    layers: int = 2
    heads: int = 4
    hidden: int = 384
    positions: int = 512


ENCODER = EncoderSize()


def encoder_weights(seed, labels, size=ENCODER):
    draw, w = Draw(seed), size.width
    weights = {
        "embedding": draw.normal(SIZE, w, deviation=0.1), "position": draw.normal(size.positions, w, deviation=0.02),
        "norm": jnp.ones(w), "norm_bias": jnp.zeros(w),
        "head": draw.matrix(w, w), "head_bias": jnp.zeros(w), "label": draw.matrix(w, labels), "label_bias": jnp.zeros(labels),
    }
    for i in range(size.layers):
        weights[f"block{i}"] = {
            "q": draw.matrix(w, w), "q_bias": jnp.zeros(w), "k": draw.matrix(w, w), "k_bias": jnp.zeros(w), "v": draw.matrix(w, w),
            "v_bias": jnp.zeros(w), "output": draw.matrix(w, w, 0.5), "output_bias": jnp.zeros(w), "attention_norm": jnp.ones(w),
            "attention_norm_bias": jnp.zeros(w), "up": draw.matrix(w, size.hidden), "up_bias": jnp.zeros(size.hidden),
            "down": draw.matrix(size.hidden, w, 0.5), "down_bias": jnp.zeros(w), "norm": jnp.ones(w), "norm_bias": jnp.zeros(w),
        }
    return weights


def encode(weights, tokens, is_text, size=ENCODER):
    """The mean state of each text: tokens and is_text [B, T] to [B, D]."""
    x = weights["embedding"][tokens] + weights["position"][: tokens.shape[1]]
    x = layer_norm(x, weights["norm"], weights["norm_bias"])
    for i in range(size.layers):
        block = weights[f"block{i}"]
        q, k, v = (x @ block[name] + block[f"{name}_bias"] for name in "qkv")
        h = attention(q, k, v, size.heads, is_text[:, None]) @ block["output"] + block["output_bias"]
        x = layer_norm(x + h, block["attention_norm"], block["attention_norm_bias"])
        h = jax.nn.gelu(x @ block["up"] + block["up_bias"], approximate=True) @ block["down"] + block["down_bias"]
        x = layer_norm(x + h, block["norm"], block["norm_bias"])
    return (x * is_text[..., None]).sum(1) / is_text.sum(1, keepdims=True)


def label_logits(weights, mean):
    """As llama.cpp's classification head: a dense layer with tanh, then the labels."""
    return jnp.tanh(mean @ weights["head"] + weights["head_bias"]) @ weights["label"] + weights["label_bias"]


# The ear: Qwen3's audio tower (projector qwen3a), which hears second by second and needs no half a minute of silence.


@dataclass(frozen=True)
class EarSize:
    width: int = 160
    layers: int = 3
    heads: int = 5
    hidden: int = 480
    channels: int = 32
    mels: int = 64
    projector: int = 512


EAR = EarSize()
# Frames of 10 ms that the convolutions take at once, and what becomes of them; windows of attention are eight of these.
CHUNK, OF_CHUNK, WINDOW = 100, 13, 8


def block_weights(draw, w, hidden):
    return {
        "norm1": jnp.ones(w), "norm1_bias": jnp.zeros(w), "q": draw.matrix(w, w), "q_bias": jnp.zeros(w), "k": draw.matrix(w, w),
        "v": draw.matrix(w, w), "v_bias": jnp.zeros(w), "output": draw.matrix(w, w, 0.4), "output_bias": jnp.zeros(w),
        "norm2": jnp.ones(w), "norm2_bias": jnp.zeros(w), "up": draw.matrix(w, hidden), "up_bias": jnp.zeros(hidden),
        "down": draw.matrix(hidden, w, 0.4), "down_bias": jnp.zeros(w),
    }


def block(x, weights, heads, may_see, approximate):
    h = layer_norm(x, weights["norm1"], weights["norm1_bias"])
    q, k, v = h @ weights["q"] + weights["q_bias"], h @ weights["k"], h @ weights["v"] + weights["v_bias"]
    x = x + attention(q, k, v, heads, may_see) @ weights["output"] + weights["output_bias"]
    h = layer_norm(x, weights["norm2"], weights["norm2_bias"])
    h = jax.nn.gelu(h @ weights["up"] + weights["up_bias"], approximate=approximate)
    return x + h @ weights["down"] + weights["down_bias"]


def ear_weights(seed, size=EAR):
    draw, c = Draw(seed), size.channels
    weights = {
        "convolution1": draw.matrix(9, c, 1.4), "convolution1_bias": jnp.zeros(c), "convolution2": draw.matrix(9 * c, c, 1.4),
        "convolution2_bias": jnp.zeros(c), "convolution3": draw.matrix(9 * c, c, 1.4), "convolution3_bias": jnp.zeros(c),
        "in": draw.matrix(size.mels // 8 * c, size.width), "position": draw.normal(OF_CHUNK, size.width, deviation=0.1),
        "norm": jnp.ones(size.width), "norm_bias": jnp.zeros(size.width),
        # For training alone: which word is heard.
        "words": draw.matrix(size.width, SIZE, 0.5),
    }
    for i in range(size.layers):
        weights[f"block{i}"] = block_weights(draw, size.width, size.hidden)
    return weights | projector_weights(draw, size.width, size.projector)


def projector_weights(draw, width, hidden):
    return {"projector1": draw.matrix(width, hidden), "projector1_bias": jnp.zeros(hidden),
            "projector2": draw.matrix(hidden, TEXT.width, 0.1), "projector2_bias": jnp.zeros(TEXT.width)}


def convolved(x, weight, bias):
    """Three by three, every second place: the patches are gathered and multiplied, which the CPU does faster than a convolution."""
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows, columns = (x.shape[1] - 1) // 2, (x.shape[2] - 1) // 2
    patches = [x[:, i : i + 2 * rows : 2, j : j + 2 * columns : 2] for i in range(3) for j in range(3)]
    return jax.nn.gelu(jnp.concatenate(patches, -1) @ weight + bias, approximate=False)


def hear(weights, mels, size=EAR):
    """From [B, chunks * 100, mels] to [B, chunks * 13, width]; all texts of a batch have as many chunks."""
    batch, chunks = mels.shape[0], mels.shape[1] // CHUNK
    x = mels.reshape(batch * chunks, CHUNK, size.mels, 1)
    for i in (1, 2, 3):
        x = convolved(x, weights[f"convolution{i}"], weights[f"convolution{i}_bias"])
    # Of a place in time, the channels one after another, each with all its frequencies.
    x = x.transpose(0, 1, 3, 2).reshape(batch * chunks, OF_CHUNK, -1) @ weights["in"] + weights["position"]
    x = x.reshape(batch, chunks * OF_CHUNK, size.width)
    window = jnp.arange(chunks * OF_CHUNK) // (WINDOW * OF_CHUNK)
    may_see = (window[:, None] == window[None])[None]
    for i in range(size.layers):
        x = block(x, weights[f"block{i}"], size.heads, may_see, approximate=False)
    return layer_norm(x, weights["norm"], weights["norm_bias"])


def projected(weights, x, approximate):
    h = jax.nn.gelu(x @ weights["projector1"] + weights["projector1_bias"], approximate=approximate)
    return h @ weights["projector2"] + weights["projector2_bias"]


# The eye: CLIP's tower with LLaVA's projector (mlp).


@dataclass(frozen=True)
class EyeSize:
    width: int = 96
    layers: int = 3
    heads: int = 3
    hidden: int = 256
    image: int = 64
    patch: int = 8
    projector: int = 128

    @property
    def patches(self):
        return (self.image // self.patch) ** 2


EYE = EyeSize()


def eye_weights(seed, things, size=EYE):
    draw, w = Draw(seed), size.width
    weights = {
        "patch": draw.matrix(3 * size.patch**2, w), "position": draw.normal(size.patches, w, deviation=0.1),
        "norm": jnp.ones(w), "norm_bias": jnp.zeros(w),
        # For training alone: which thing is seen.
        "things": draw.matrix(size.projector, things),
    }
    for i in range(size.layers):
        weights[f"block{i}"] = block_weights(draw, w, size.hidden)
    return weights | projector_weights(draw, w, size.projector)


def see(weights, pictures, size=EYE):
    """From [B, 64, 64, 3] to what the projector's second layer reads, [B, patches, projector]."""
    batch, side = pictures.shape[0], size.image // size.patch
    x = pictures.reshape(batch, side, size.patch, side, size.patch, 3).transpose(0, 1, 3, 5, 2, 4)
    x = x.reshape(batch, size.patches, -1) @ weights["patch"] + weights["position"]
    everything = jnp.ones((1, 1, size.patches), bool)
    for i in range(size.layers):
        x = block(x, weights[f"block{i}"], size.heads, everything, approximate=True)
    x = layer_norm(x, weights["norm"], weights["norm_bias"])
    return jax.nn.gelu(x @ weights["projector1"] + weights["projector1_bias"], approximate=True)
