"""Tiny random models of every family, for make_golden.py and models_table.py.

Each is awkward on purpose: widths that are multiples of nothing large, heads that are not dim / heads wide, one key
head for several query heads, three blocks, windows shorter than the prompts, an odd vocabulary.
"""

import torch
import transformers

LAYERS = 3
OUTLIERS = (5, 30)  # channels of the stream that are larger than the others, as in trained models
LOCAL, FULL = "sliding_attention", "full_attention"
THETA = {"rope_type": "default", "rope_theta": 10000.0}

# Name: transformers' class before Config and ForCausalLM, and what differs from `BASE`.
BASE = dict(hidden_size=48, num_attention_heads=6, num_key_value_heads=2, intermediate_size=72, vocab_size=97,
            num_hidden_layers=LAYERS, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
            tie_word_embeddings=False, rope_parameters=THETA)  # fmt: skip
FAMILIES = {
    "llama_llama3": ("Llama", dict(head_dim=24, rope_parameters={
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64})),
    "llama_linear": ("Llama", dict(hidden_size=40, num_attention_heads=5, num_key_value_heads=1, head_dim=8,
                                   attention_bias=True, rope_parameters=THETA | {"rope_type": "linear", "factor": 3.0})),
    "llama_dynamic": ("Llama", dict(rope_parameters=THETA | {"rope_type": "dynamic", "factor": 4.0})),
    "llama_yarn": ("Llama", dict(head_dim=32, rope_parameters=THETA | {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128})),
    "mistral": ("Mistral", dict(head_dim=16, num_key_value_heads=1, sliding_window=37)),
    "mistral3": ("Mistral3", dict(head_dim=16, sliding_window=None)),
    "qwen2": ("Qwen2", dict(hidden_size=56, num_attention_heads=7, num_key_value_heads=1, tie_word_embeddings=True)),
    "qwen2_window": ("Qwen2", dict(use_sliding_window=True, sliding_window=70, max_window_layers=1)),
    "qwen3": ("Qwen3", dict(head_dim=24, tie_word_embeddings=True)),
    "gemma2": ("Gemma2", dict(head_dim=16, tie_word_embeddings=True, sliding_window=40, query_pre_attn_scalar=16,
                              attn_logit_softcapping=4.0, final_logit_softcapping=9.0)),
    "gemma3": ("Gemma3", dict(head_dim=24, num_key_value_heads=1, tie_word_embeddings=True, sliding_window=33,
                              query_pre_attn_scalar=20, layer_types=[LOCAL, LOCAL, FULL], rope_parameters={
                                  FULL: {"rope_type": "linear", "rope_theta": 5e4, "factor": 8.0}, LOCAL: THETA})),
    "gemma3_nested": ("Gemma3", dict(head_dim=16, tie_word_embeddings=True, sliding_window=20,
                                     layer_types=[LOCAL] * LAYERS, query_pre_attn_scalar=16, rope_parameters={
                                         FULL: THETA | {"rope_theta": 1e5}, LOCAL: THETA})),
    "phi3": ("Phi3", dict(sliding_window=45, num_key_value_heads=6)),
    "phi3_longrope": ("Phi3", dict(num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=4096,
                                   original_max_position_embeddings=512, rope_parameters=THETA | {
                                       "rope_type": "longrope", "partial_rotary_factor": 0.75,
                                       "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
                                       "long_factor": [1.0, 2.0, 3.0, 5.0, 8.0, 9.0]})),
    "olmo2": ("Olmo2", dict(num_key_value_heads=1)),
    "olmo3": ("Olmo3", dict(sliding_window=30, layer_types=[LOCAL, FULL, LOCAL], rope_parameters={
        FULL: THETA | {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256,
                       "attention_factor": 1.2, "beta_fast": 8.0}, LOCAL: THETA})),
    "granite": ("Granite", dict(attention_bias=True, embedding_multiplier=12.0, logits_scaling=4.0,
                                residual_multiplier=0.22, attention_multiplier=0.2)),
    "smollm3": ("SmolLM3", dict(no_rope_layer_interval=2, tie_word_embeddings=True)),
    "mixtral": ("Mixtral", dict(num_local_experts=5, num_experts_per_tok=2)),
    "qwen3_moe": ("Qwen3Moe", dict(head_dim=16, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=40,
                                   norm_topk_prob=True)),
    "qwen3_moe_mixed": ("Qwen3Moe", dict(head_dim=8, num_experts=4, num_experts_per_tok=4, moe_intermediate_size=24,
                                         mlp_only_layers=[1])),
}  # fmt: skip


def build(name):
    """The family's model with random weights, in f32."""
    family, settings = FAMILIES[name]
    settings = BASE | settings
    if family == "Gemma3":
        config = transformers.Gemma3TextConfig(**settings)
        if name == "gemma3_nested":
            vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                          image_size=28, patch_size=14)  # fmt: skip
            config = transformers.Gemma3Config(text_config=config.to_dict(), vision_config=vision,
                                               mm_tokens_per_image=4, eos_token_id=[2, 5])  # fmt: skip
            return transformers.Gemma3ForConditionalGeneration(config)
        return transformers.Gemma3ForCausalLM(config)
    if family == "Mistral3":
        text = transformers.MistralConfig(**settings)
        vision = dict(model_type="pixtral", hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                      num_attention_heads=2, image_size=28, patch_size=14)  # fmt: skip
        config = transformers.Mistral3Config(text_config=text.to_dict(), vision_config=vision)
        return transformers.Mistral3ForConditionalGeneration(config)
    config = getattr(transformers, f"{family}Config")(**settings)
    return getattr(transformers, f"{family}ForCausalLM")(config)


def model(name, seed):
    """Random weights whose stream grows over the blocks, has outlier channels, and ends in spread-out logits."""
    torch.manual_seed(seed)
    made = build(name)
    outliers, tied = list(OUTLIERS), FAMILIES[name][1].get("tie_word_embeddings", False)
    offset = 1.0 if name.startswith("gemma") else 0.0  # gains are stored as differences from it
    gains = {"q_proj": 1.4, "k_proj": 1.4, "qkv_proj": 1.3, "lm_head": 2.5, "gate": 2.0}
    # Tied, a token would predict itself for ever; more so where embeddings are scaled.
    spread, outlier = (0.07 if offset else 0.2, 1.5) if tied else (0.3, 6.0)
    with torch.no_grad():
        for path, weight in made.named_parameters():
            part, kind = path.split(".")[-2:]
            if kind == "bias":
                weight.normal_(std=0.3)
            elif weight.ndim == 1:
                weight.uniform_(0.6, 1.4)
                if len(weight) == made.config.get_text_config().hidden_size:
                    weight[outliers] *= 0.3
                weight -= offset
            elif part == "embed_tokens":
                weight.normal_(std=spread)
                weight[:, outliers] *= outlier
            else:
                gain = gains.get(kind if kind in gains else part, 1.0)
                weight.normal_(std=gain * weight.shape[-1] ** -0.5)
                if part in ("o_proj", "down_proj") and len(weight) > max(OUTLIERS):  # not of a vision tower
                    weight[outliers] *= 4.0
    return made
