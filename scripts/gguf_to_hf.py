"""Turns a GGUF file (llama architecture, byte-level BPE) into a Hugging Face folder with dequantised weights.

    python gguf_to_hf.py MODEL.gguf OUT_DIR [--dtype bfloat16|float32]

For checks against transformers of a model that is only at hand as GGUF. The tokenizer is built from the file's own
vocabulary rather than by transformers' reader, which drops the splitting of digits that `tokenizer.ggml.pre` asks for.

Needs: torch, transformers, tokenizers, gguf, numpy.
"""

import argparse

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type


class Gguf:
    def __init__(self, path):
        self.reader = GGUFReader(path)
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}

    def get(self, key, default=None):
        field = self.reader.fields.get(key)
        if field is None and default is None:
            raise SystemExit(f"the GGUF file has no {key}")
        return default if field is None else field.contents()

    def weight(self, name):
        """Dequantised, f32."""
        tensor = self.tensors[name]
        return dequantize(tensor.data, tensor.tensor_type).astype(np.float32)


def read_config(gguf):
    if gguf.get("general.architecture") != "llama":
        raise SystemExit(f"architecture {gguf.get('general.architecture')}: only llama is turned")
    tokens = gguf.get("tokenizer.ggml.tokens")
    return LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=gguf.get("llama.embedding_length"),
        intermediate_size=gguf.get("llama.feed_forward_length"),
        num_hidden_layers=gguf.get("llama.block_count"),
        num_attention_heads=gguf.get("llama.attention.head_count"),
        num_key_value_heads=gguf.get("llama.attention.head_count_kv"),
        head_dim=gguf.get("llama.rope.dimension_count"),
        max_position_embeddings=gguf.get("llama.context_length"),
        rms_norm_eps=gguf.get("llama.attention.layer_norm_rms_epsilon"),
        rope_theta=gguf.get("llama.rope.freq_base"),
        tie_word_embeddings="output.weight" not in gguf.tensors,
        bos_token_id=gguf.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=gguf.get("tokenizer.ggml.eos_token_id"),
    )


def undo_interleave(weight, heads):
    """GGUF keeps the two halves that rope pairs up interleaved, row by row, in each head of q and k."""
    half = weight.shape[0] // heads // 2
    pairs = weight.reshape(heads, half, 2, weight.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)


def read_weights(gguf, config, dtype):
    state = {}
    for name in gguf.tensors:
        weight = gguf.weight(name)
        if name in OUTSIDE:
            target = OUTSIDE[name]
        else:
            _, layer, part, _ = name.split(".")
            target = f"model.layers.{layer}.{BLOCK[part]}.weight"
            if part == "attn_q":
                weight = undo_interleave(weight, config.num_attention_heads)
            elif part == "attn_k":
                weight = undo_interleave(weight, config.num_key_value_heads)
        state[target] = torch.from_numpy(weight).to(dtype)
    return state


def build_model(config, state, dtype):
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    report = model.load_state_dict(state, strict=False)
    absent = set(report.missing_keys) - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    if report.unexpected_keys or absent:
        raise SystemExit(f"weights do not fit: {report}")
    model.tie_weights()
    return model


def build_tokenizer(gguf):
    if gguf.get("tokenizer.ggml.model") != "gpt2" or gguf.get("tokenizer.ggml.pre") != "smollm":
        raise SystemExit("only byte-level BPE with pre-tokenizer `smollm` is turned")
    tokens = gguf.get("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in gguf.get("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = list(zip(tokens, gguf.get("tokenizer.ggml.token_type")))
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t, kind in kinds if kind == CONTROL])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, kind in kinds if kind == USER_DEFINED])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[gguf.get("tokenizer.ggml.bos_token_id")],
        eos_token=tokens[gguf.get("tokenizer.ggml.eos_token_id")],
        unk_token=tokens[gguf.get("tokenizer.ggml.unknown_token_id")],
        pad_token=tokens[gguf.get("tokenizer.ggml.padding_token_id")],
        chat_template=gguf.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf")
    parser.add_argument("out")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    options = parser.parse_args()

    dtype = getattr(torch, options.dtype)
    gguf = Gguf(options.gguf)
    config = read_config(gguf)
    build_model(config, read_weights(gguf, config, dtype), dtype).save_pretrained(options.out)
    build_tokenizer(gguf).save_pretrained(options.out)


if __name__ == "__main__":
    main()
