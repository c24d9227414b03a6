"""Weights as GGUF files, under the names that llama.cpp knows."""

import json
import os

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quants

from . import corpus, pictures
from .models import EAR, ENCODER, EPSILON, EYE, ROPE_BASE, TEXT
from .tokenizer import SIZE, SPECIAL

F16, Q8_0 = GGMLQuantizationType.F16, GGMLQuantizationType.Q8_0
# llama_ftype: mostly F16, mostly Q8_0.
MOSTLY = {F16: 1, Q8_0: 7}
QUANTIZATION_VERSION = 2
# llama_pooling_type.
MEAN, RANK = 1, 4
CONTEXT = 2048
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
AUTHOR, LICENSE = "the sarai project", "MIT OR Apache-2.0"


class File:
    """A GGUF file that is complete or not there."""

    def __init__(self, path, architecture, name):
        self.path, self.part = path, path.with_suffix(".part")
        self.writer = GGUFWriter(self.part, architecture)
        self.writer.add_name(name)
        self.writer.add_author(AUTHOR)
        self.writer.add_license(LICENSE)
        self.writer.add_description("A toy model, trained from scratch on made-up data; scripts/demo_models makes it.")
        self.writer.add_file_type(MOSTLY[Q8_0])
        self.writer.add_quantization_version(QUANTIZATION_VERSION)

    def plain(self, name, values):
        """Norms, biases, positions: as they are."""
        self.writer.add_tensor(name, np.ascontiguousarray(values, np.float32))

    def half(self, name, values):
        self.writer.add_tensor(name, np.ascontiguousarray(values, np.float16))

    def matrix(self, name, values):
        """A matrix [in, out], by rows of its output; of blocks of 32."""
        rows = np.ascontiguousarray(np.asarray(values, np.float32).T)
        self.writer.add_tensor(name, quants.quantize(rows, Q8_0), raw_dtype=Q8_0)

    def close(self):
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()
        os.replace(self.part, self.path)


def vocabulary(file, tokenizer_path):
    known = json.loads(tokenizer_path.read_text(encoding="utf-8"))
    tokens, kinds = [f"[unused{i}]" for i in range(SIZE)], [TokenType.UNUSED] * SIZE
    for token, number in known["model"]["vocab"].items():
        tokens[number], kinds[number] = token, TokenType.NORMAL
    for added in known["added_tokens"]:
        tokens[added["id"]], kinds[added["id"]] = added["content"], TokenType.CONTROL
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in known["model"]["merges"]]
    writer = file.writer
    writer.add_vocab_size(SIZE)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    for add, special in ((writer.add_bos_token_id, SPECIAL[0]), (writer.add_eos_token_id, SPECIAL[2]), (writer.add_pad_token_id, SPECIAL[0])):
        add(tokens.index(special))
    writer.add_add_bos_token(False)


def dimensions(writer, size, context):
    writer.add_block_count(size.layers)
    writer.add_context_length(context)
    writer.add_embedding_length(size.width)
    writer.add_feed_forward_length(size.hidden)
    writer.add_head_count(size.heads)
    writer.add_head_count_kv(size.heads)


def text(weights, path, tokenizer_path, name):
    file = File(path, "llama", name)
    writer, size = file.writer, TEXT
    dimensions(writer, size, CONTEXT)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_rope_dimension_count(size.width // size.heads)
    vocabulary(file, tokenizer_path)
    writer.add_chat_template(TEMPLATE)
    file.matrix("token_embd.weight", weights["embedding"].T)
    file.plain("output_norm.weight", weights["norm"])
    for i in range(size.layers):
        block = weights[f"block{i}"]
        file.plain(f"blk.{i}.attn_norm.weight", block["attention_norm"])
        file.plain(f"blk.{i}.ffn_norm.weight", block["hidden_norm"])
        for there, here in (("attn_q", "q"), ("attn_k", "k"), ("attn_v", "v"), ("attn_output", "output"), ("ffn_gate", "gate"),
                            ("ffn_up", "up"), ("ffn_down", "down")):
            file.matrix(f"blk.{i}.{there}.weight", block[here])
    file.close()


def encoder(weights, path, tokenizer_path, name, router):
    """The encoder, with the mean of its states as embedding, or with the head that scores labels."""
    file = File(path, "bert", name)
    writer, size = file.writer, ENCODER
    dimensions(writer, size, size.positions)
    writer.add_layer_norm_eps(EPSILON)
    writer.add_causal_attention(False)
    writer.add_token_type_count(1)
    writer.add_uint32("bert.pooling_type", RANK if router else MEAN)
    vocabulary(file, tokenizer_path)
    file.matrix("token_embd.weight", weights["embedding"].T)
    file.plain("position_embd.weight", weights["position"])
    file.plain("token_types.weight", np.zeros((1, size.width)))
    file.plain("token_embd_norm.weight", weights["norm"])
    file.plain("token_embd_norm.bias", weights["norm_bias"])
    for i in range(size.layers):
        block = weights[f"block{i}"]
        for there, here in (("attn_q", "q"), ("attn_k", "k"), ("attn_v", "v"), ("attn_output", "output"), ("ffn_up", "up"), ("ffn_down", "down")):
            file.matrix(f"blk.{i}.{there}.weight", block[here])
            file.plain(f"blk.{i}.{there}.bias", block[f"{here}_bias"])
        for there, here in (("attn_output_norm", "attention_norm"), ("layer_output_norm", "norm")):
            file.plain(f"blk.{i}.{there}.weight", block[here])
            file.plain(f"blk.{i}.{there}.bias", block[f"{here}_bias"])
    if router:
        writer.add_uint32("bert.classifier.pooling_type", MEAN)
        writer.add_array("bert.classifier.output_labels", list(corpus.LABELS))
        # Without it llama.cpp reads past the scores' end where it is asked for embeddings.
        writer.add_uint32("bert.embedding_length_out", len(corpus.LABELS))
        file.matrix("cls.weight", weights["head"])
        file.plain("cls.bias", weights["head_bias"])
        file.matrix("cls.output.weight", weights["label"])
        file.plain("cls.output.bias", weights["label_bias"])
    file.close()


def tower_block(file, name, block):
    norms = (("ln1", "norm1"), ("ln2", "norm2"))
    for there, here in norms:
        file.plain(f"{name}.{there}.weight", block[here])
        file.plain(f"{name}.{there}.bias", block[f"{here}_bias"])
    for there, here in (("attn_q", "q"), ("attn_k", "k"), ("attn_v", "v"), ("attn_out", "output"), ("ffn_up", "up"), ("ffn_down", "down")):
        file.matrix(f"{name}.{there}.weight", block[here])
    for there, here in (("attn_out", "output"), ("ffn_up", "up"), ("ffn_down", "down"), ("attn_q", "q"), ("attn_v", "v")):
        file.plain(f"{name}.{there}.bias", block[f"{here}_bias"])


def projector(ear, eye, path, name):
    """Ear and eye in one file, each with the projector that llama.cpp knows by its type."""
    file = File(path, "clip", name)
    writer = file.writer
    writer.add_type("mmproj")

    writer.add_bool("clip.has_audio_encoder", True)
    writer.add_string("clip.audio.projector_type", "qwen3a")
    for key, value in (("block_count", EAR.layers), ("embedding_length", EAR.width), ("feed_forward_length", EAR.hidden),
                       ("projection_dim", TEXT.width), ("attention.head_count", EAR.heads), ("num_mel_bins", EAR.mels)):
        writer.add_uint32(f"clip.audio.{key}", value)
    writer.add_float32("clip.audio.attention.layer_norm_epsilon", EPSILON)
    for i in (1, 2, 3):
        kernel = np.asarray(ear[f"convolution{i}"])
        # From [time, frequency, in] by [out] to [out, in, frequency, time], as llama.cpp's spectrum lies.
        kernel = kernel.reshape(3, 3, -1, EAR.channels).transpose(3, 2, 1, 0)
        file.half(f"a.conv2d.{i}.weight", kernel)
        file.plain(f"a.conv2d.{i}.bias", np.asarray(ear[f"convolution{i}_bias"]).reshape(-1, 1, 1))
    file.matrix("a.conv_out.weight", ear["in"])
    file.plain("a.position_embd.weight", ear["position"])
    file.plain("a.post_ln.weight", ear["norm"])
    file.plain("a.post_ln.bias", ear["norm_bias"])
    for i in range(EAR.layers):
        tower_block(file, f"a.blk.{i}", ear[f"block{i}"])
    for there, here in (("mm.a.mlp.1", "projector1"), ("mm.a.mlp.2", "projector2")):
        file.matrix(f"{there}.weight", ear[here])
        file.plain(f"{there}.bias", ear[f"{here}_bias"])

    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.vision.projector_type", "mlp")
    writer.add_bool("clip.use_gelu", True)
    # LLaVA's graph leaves the last block out: there is one more, which is never computed.
    for key, value in (("block_count", EYE.layers + 1), ("embedding_length", EYE.width), ("feed_forward_length", EYE.hidden),
                       ("projection_dim", TEXT.width), ("attention.head_count", EYE.heads), ("image_size", EYE.image), ("patch_size", EYE.patch)):
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", EPSILON)
    writer.add_array("clip.vision.image_mean", [pictures.MEAN] * 3)
    writer.add_array("clip.vision.image_std", [pictures.DEVIATION] * 3)
    patch = np.asarray(eye["patch"]).T.reshape(EYE.width, 3, EYE.patch, EYE.patch)
    file.half("v.patch_embd.weight", patch)
    file.plain("v.position_embd.weight", eye["position"])
    file.plain("v.post_ln.weight", eye["norm"])
    file.plain("v.post_ln.bias", eye["norm_bias"])
    for i in range(EYE.layers + 1):
        tower_block(file, f"v.blk.{i}", eye[f"block{min(i, EYE.layers - 1)}"])
    for there, here in (("mm.0", "projector1"), ("mm.2", "projector2")):
        file.matrix(f"{there}.weight", eye[here])
        file.plain(f"{there}.bias", eye[f"{here}_bias"])
    file.close()
