"""Tiny random models of every family the package claims, with nothing left at zero or one by initialisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import nn

VOCAB = 61

# A stack of three narrow blocks: the third lets a stream be cut with blocks on both sides.
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
# Partial rotary embeddings need an even share of the head: three heads of eight.
_THREE_HEADS = {**_SIZES, "num_attention_heads": 3}
_GQA = {**_SIZES, "num_key_value_heads": 2}
_WINDOW = 5  # shorter than the sequences tested


def _gpt2(**kw: Any) -> nn.Module:
    config = tf.GPT2Config(
        n_embd=24, n_layer=3, n_head=4, n_positions=64, vocab_size=VOCAB, bos_token_id=1, eos_token_id=2, **kw
    )
    return tf.GPT2LMHeadModel(config)


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "gpt2": _gpt2,
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_GQA)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**_GQA, sliding_window=_WINDOW)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(
        tf.Qwen2Config(**_GQA, use_sliding_window=True, sliding_window=_WINDOW, max_window_layers=1)
    ),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_GQA, head_dim=6)),
    "gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**_GQA, head_dim=6)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(
        tf.Gemma2Config(
            **_GQA, head_dim=6, sliding_window=_WINDOW, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
        )
    ),
    "gemma3": lambda: tf.Gemma3ForCausalLM(
        tf.Gemma3TextConfig(
            **_GQA, head_dim=6, sliding_window=_WINDOW,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    ),
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**_THREE_HEADS, use_parallel_residual=True)),
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(
            vocab_size=VOCAB, hidden_size=24, num_hidden_layers=3, ffn_dim=40, num_attention_heads=4,
            max_position_embeddings=64, word_embed_proj_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    ),
    "phi": lambda: tf.PhiForCausalLM(tf.PhiConfig(**_THREE_HEADS)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**_GQA, sliding_window=_WINDOW)),
    "olmo2": lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**_GQA)),
    "cohere": lambda: tf.CohereForCausalLM(tf.CohereConfig(**_GQA, logit_scale=0.3)),
    "cohere2": lambda: tf.Cohere2ForCausalLM(
        tf.Cohere2Config(
            **_GQA, head_dim=6, logit_scale=0.3, sliding_window=_WINDOW,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    ),
    "starcoder2": lambda: tf.Starcoder2ForCausalLM(tf.Starcoder2Config(**_GQA, sliding_window=_WINDOW)),
    "stablelm": lambda: tf.StableLmForCausalLM(tf.StableLmConfig(**_THREE_HEADS, num_key_value_heads=3)),
    "granite": lambda: tf.GraniteForCausalLM(
        tf.GraniteConfig(**_GQA, logits_scaling=3.0, residual_multiplier=0.7, attention_multiplier=0.4)
    ),
    "glm4": lambda: tf.Glm4ForCausalLM(tf.Glm4Config(**_GQA, head_dim=6)),
    "smollm3": lambda: tf.SmolLM3ForCausalLM(tf.SmolLM3Config(**_GQA, no_rope_layers=[1, 0, 1])),
    "gpt_bigcode": lambda: tf.GPTBigCodeForCausalLM(
        tf.GPTBigCodeConfig(n_embd=24, n_layer=3, n_head=4, n_positions=64, vocab_size=VOCAB, bos_token_id=1, eos_token_id=2)
    ),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**_GQA, num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(**_GQA, head_dim=6, moe_intermediate_size=20, num_experts=4, num_experts_per_tok=2)
    ),
    "olmoe": lambda: tf.OlmoeForCausalLM(tf.OlmoeConfig(**_GQA, num_experts=4, num_experts_per_tok=2)),
    "gpt_oss": lambda: tf.GptOssForCausalLM(
        tf.GptOssConfig(
            **_GQA, head_dim=6, num_local_experts=4, num_experts_per_tok=2, sliding_window=_WINDOW,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    ),
    "deepseek_v3": lambda: tf.DeepseekV3ForCausalLM(
        tf.DeepseekV3Config(
            **_SIZES, num_key_value_heads=4, moe_intermediate_size=20, n_routed_experts=8, n_shared_experts=1,
            num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1, kv_lora_rank=12, q_lora_rank=16,
            qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=6,
        )
    ),
    "llama4": lambda: tf.Llama4ForCausalLM(
        tf.Llama4TextConfig(
            **_GQA, head_dim=6, intermediate_size_mlp=40, num_local_experts=4, num_experts_per_tok=1,
            attention_chunk_size=_WINDOW, moe_layers=[1], no_rope_layers=[1, 0, 1],
            layer_types=["chunked_attention", "full_attention", "chunked_attention"],
        )
    ),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(
            vocab_size=VOCAB, d_model=24, d_kv=6, d_ff=40, num_layers=3, num_decoder_layers=3, num_heads=4,
            relative_attention_num_buckets=8, relative_attention_max_distance=12, pad_token_id=0, eos_token_id=1,
            decoder_start_token_id=0,
        )
    ),
}  # fmt: skip

# Models that mix positions outside transformers' attention interface.
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "gptj": lambda: tf.GPTJForCausalLM(
        tf.GPTJConfig(n_embd=24, n_layer=3, n_head=4, n_positions=64, vocab_size=VOCAB, rotary_dim=4)
    ),
    "bloom": lambda: tf.BloomForCausalLM(tf.BloomConfig(vocab_size=VOCAB, hidden_size=24, n_layer=3, n_head=4)),
    "falcon": lambda: tf.FalconForCausalLM(
        tf.FalconConfig(vocab_size=VOCAB, hidden_size=24, num_hidden_layers=3, num_attention_heads=4)
    ),
    "mamba": lambda: tf.MambaForCausalLM(
        tf.MambaConfig(vocab_size=VOCAB, hidden_size=24, num_hidden_layers=3, state_size=8)
    ),
}


def build(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """The model in evaluation mode, every parameter moved off its initial value so that a dropped one would show."""
    torch.manual_seed(seed)
    model = make()
    eager_experts(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.1))
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.add_(torch.randn_like(buffer) * 0.1)
    return model.to(dtype).eval()


def eager_experts(model: Any) -> Any:
    """Grouped products of experts exist for float32 and half precision only."""
    for module in model.modules():
        if hasattr(module, "config") and hasattr(module.config, "_experts_implementation"):
            module.config._experts_implementation = "eager"
    return model
