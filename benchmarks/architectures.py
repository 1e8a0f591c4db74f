"""Which causal language models of the installed transformers are scored, which are refused, and whether scores are right.

    python benchmarks/architectures.py                 # all of them, half an hour
    python benchmarks/architectures.py llama gptj      # some, by model type

Each model type of the library's list is built small, from its own default configuration with sizes cut down, with random
weights in float64, in a process of its own. What ``SplitModel`` takes is scored exactly at the first, a middle and the last
layer, and F at an early and a late position compared with the library's own forward pass, differentiated once for each token
with respect to a nudge of that one position's stream. What own-position gradients refuse is tried once more with
``gradients="per_position"``.

The table names each type with its largest relative error, or the first sentence of its refusal. *Wrong* are errors beyond 1e-4
(norms and softmaxes of many models are float32 whatever their weights are) and failures that are no refusal; where there is
one, the exit code is 1. *No answer* are those that five minutes were too short for. *Not built* are those whose configuration
this script could not make small, nothing of which says whether they are scored.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, Literal, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fisher_ray import Exact, ModelError, SplitModel, score_factors
from fisher_ray.split import Gradients

_LAYERS, _VOCAB, _TOKENS = 4, 61, 12
_LIMIT = 1e-4
_SECONDS = 300.0

# Sizes by the names that configurations have for them.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input", "n_vocab"), _VOCAB),
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "embedding_dim", "word_embed_proj_dim"), 32
    ),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "d_inner", "ffn_hidden_size", "decoder_ffn_dim"), 48
    ),
    **dict.fromkeys(("encoder_ffn_dim", "moe_intermediate_size", "shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), _LAYERS),
    **dict.fromkeys(("encoder_layers", "num_decoder_layers", "num_encoder_layers", "num_blocks"), _LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_global_key_value_heads"), 2),
    **dict.fromkeys(
        ("head_dim", "global_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "d_kv", "d_head"), 8
    ),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_head_dim", "hidden_size_per_layer_input"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_target_positions", "n_ctx"), 64),
    **dict.fromkeys(("sliding_window", "attention_window_size"), 5),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "first_k_dense_replace", "n_shared_experts"), 1),
    **dict.fromkeys(("mamba_d_state", "state_size", "mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "mamba_n_heads", "mamba_num_heads"), 4),
    "rotary_dim": 4,
    "num_kv_shared_layers": 2,
    "is_decoder": True,
    "use_cache": False,
}

_HYBRID = {
    "layers_block_type": ["linear_attention", "hybrid"] * 2,
    "attention_hidden_size": 64,
    "attention_head_dim": 16,
}
# What single types need besides, as their own defaults are none or do not fit those sizes.
_OWN: dict[str, dict[str, Any]] = {
    **{name: {"head_dim": 8} for name in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"n_groups": 1},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8}
    | {"indexer_compress_ratio": 2, "hc_lowrank": 8, "ple_embed_dim": 16, "ngram_vocab_size_base": 97},
    "reformer": {"axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zamba": _HYBRID | {"mamba_dt_rank": 4},
    "zamba2": _HYBRID
    | {"hybrid_layer_ids": [1, 3], "n_mamba_heads": 4, "mamba_headdim": 16, "adapter_rank": 4}
    | {"num_key_value_heads": 4, "kv_channels": 8},
    "zaya": {"num_experts_per_tok": 1},
}

Kind = Literal["scored", "per position", "refused", "wrong", "no answer", "not built"]


class Found(NamedTuple):
    kind: Kind
    said: str
    error: float = 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("types", nargs="*", help="model types (all of the library's list)")
    args = parser.parse_args()
    names = args.types or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # forked processes have no others
    found = {name: _apart(name) for name in names}
    report(found)
    return 1 if any(each.kind == "wrong" for each in found.values()) else 0


def report(found: dict[str, Found]) -> None:
    count = Counter(each.kind for each in found.values())
    print(f"transformers {transformers.__version__}: {len(found)} model types; {dict(count)}\n")
    print("| model type | | |\n|---|---|---|")
    for name, (kind, said, error) in found.items():
        print(f"| {name} | {kind} | {said or f'{error:.0e}'} |")


def _apart(name: str) -> Found:
    """What was found in a process of its own, which may die or hang."""
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe(duplex=False)
    process = fork.Process(target=_told, args=(name, there))
    process.start()
    there.close()
    kind: Kind = "not built"
    try:
        while here.poll(_SECONDS):
            if isinstance(found := here.recv(), Found):
                return found
            kind = "wrong"
        return Found("no answer" if kind == "wrong" else kind, f"none in {_SECONDS:.0f} seconds")
    except EOFError:
        process.join()
        return Found(kind, f"the process ended with exit code {process.exitcode}")
    finally:
        process.kill()


def _told(name: str, pipe: Connection) -> None:
    """Send what was found, and before it that the model is built."""
    try:
        model = small_model(name)
    except Exception as error:
        pipe.send(Found("not built", _line(error)))
    else:
        pipe.send("built")
        pipe.send(examine(model))


def examine(model: Any) -> Found:
    said = ""
    kinds: dict[Gradients, Kind] = {"own_position": "scored", "per_position": "per position"}
    for gradients, kind in kinds.items():
        try:
            worst = deviation(SplitModel(model, gradients=gradients))
        except (ModelError, NotImplementedError) as error:
            said = said or _line(error)
        except Exception as error:
            return Found("wrong", f"{kind}: {_line(error)}")
        else:
            return Found(kind if worst < _LIMIT else "wrong", said, worst)
    return Found("refused", said)


def small_model(name: str) -> Any:
    """The library's model of a type, small, every parameter moved off its initial value."""
    kind = CONFIG_MAPPING[name]
    config = kind.from_dict(_shrunk(kind().to_dict()) | _OWN.get(name, {}))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for module in model.modules():  # grouped products of experts know no float64
        if hasattr(getattr(module, "config", None), "_experts_implementation"):
            module.config._experts_implementation = "eager"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.1))
    model = model.double().eval()
    model(input_ids=torch.arange(3, 3 + _TOKENS)[None])
    return model


def _shrunk(values: dict[str, Any]) -> dict[str, Any]:
    layers = next(
        (values[key] for key, size in _SIZES.items() if size == _LAYERS and "layer" in key and values.get(key)), 0
    )
    # The first two layers and the last two: all that follow one another are of one kind in some models.
    kept = [0, 1, layers - 2, layers - 1]
    small: dict[str, Any] = {}
    for key, value in values.items():
        if key == "per_layer_config" and value:
            small[key] = {str(i): _shrunk(value[str(k)]) for i, k in enumerate(kept) if str(k) in value}
        elif isinstance(value, dict):
            small[key] = _shrunk(value)
        elif key in _SIZES and (value or value is False):  # none of something, as 0 layers, stays none
            small[key] = _SIZES[key]
        elif isinstance(value, list) and layers and len(value) == layers:
            small[key] = [value[k] for k in kept]
        elif isinstance(value, int) and key.endswith(("token_id", "token_index")) and value >= _VOCAB:
            small[key] = _VOCAB - 1
        else:
            small[key] = value
    if "kv_lora_rank" in small:  # keys and values of each head are made from one vector
        small["num_key_value_heads"] = small["num_attention_heads"]
    return small


def deviation(split: SplitModel) -> float:
    """The largest relative error of F, Frobenius, over layers and positions."""
    ids = torch.randint(3, _VOCAB - 1, (1, _TOKENS), generator=torch.Generator().manual_seed(0))
    layers = [0, len(split.blocks) // 2, len(split.blocks)]
    scores = score_factors(split, ids, layers=layers, estimator=Exact())
    worst = 0.0
    for layer in layers:
        for position in (1, _TOKENS - 2):
            expected = truth(split.model, split.blocks, ids, position, layer)
            (row,) = (scores.position == position).nonzero().flatten().tolist()
            error = (scores.matrices(layer)[row].double() - expected).norm() / expected.norm()
            worst = max(worst, float(error.nan_to_num(float("inf"))))
    return worst


def truth(model: Any, blocks: nn.ModuleList, ids: Tensor, position: int, layer: int) -> Tensor:
    """F at one position by the library's own forward pass, one backward pass for each token of the vocabulary."""
    nudge = torch.zeros(ids.shape[1], blocks_width(model), dtype=torch.float64, requires_grad=True)
    with _added(blocks, layer, nudge):
        log_p = model(input_ids=ids).logits[0, position].double().log_softmax(-1)
    scores = torch.stack([torch.autograd.grad(each, nudge, retain_graph=True)[0][position] for each in log_p])
    return (scores * log_p.detach().exp()[:, None]).T @ scores


def blocks_width(model: Any) -> int:
    return int(model.config.get_text_config(decoder=True).hidden_size)


@contextmanager
def _added(blocks: nn.ModuleList, layer: int, nudge: Tensor) -> Iterator[None]:
    """Have a nudge added to the stream that enters a block, or leaves the last one."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (args[0] + nudge, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + nudge}

    def after(_: nn.Module, __: Any, output: Any) -> Any:
        return (output[0] + nudge, *output[1:]) if isinstance(output, tuple) else output + nudge

    if layer < len(blocks):
        handle = blocks[layer].register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = blocks[-1].register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def _line(error: Exception) -> str:
    said = " ".join(str(error).split()).replace("|", "\\|")
    return f"{type(error).__name__}: {said[:300]}"


if __name__ == "__main__":
    sys.exit(main())
