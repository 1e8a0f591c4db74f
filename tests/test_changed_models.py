"""Models that users have hooks on, change after they are split, or cannot have split; and what else is left as it was."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
import transformers as tf
from families import FAMILIES, VOCAB, build, eager_experts
from torch import Tensor, nn

from fisher_ray import Exact, ModelError, Sampled, SplitModel, UpperLayersModel, calculate_fisher, score_factors
from fisher_ray.dispatch import LocalPool
from fisher_ray.numerics import deterministic_kernels, full_precision
from fisher_ray.plan import RunConfig

IDS = torch.arange(1, 13).view(2, 6)
ASKED: dict[str, Any] = {"layers": [1], "estimator": Sampled(1)}


def ablate(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """A hook that switches some neurons off, at every position."""
    return output * (torch.arange(output.shape[-1]) % 3 > 0)


# ---- hooks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after", "after, on the model's own module"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.usefixtures("float64_throughout")
def test_hooks_on_activations_take_part(name: str, when: str) -> None:
    """As many put them there to switch neurons off; GPT-2's activation is exchanged for a faster one."""
    model = build(FAMILIES[name])
    block = model.get_decoder().h[1] if name == "gpt2" else model.get_decoder().layers[1]
    child = "act" if name == "gpt2" else "act_fn"
    plain, own = model(IDS).logits, getattr(block.mlp, child)
    if when == "before":
        own.register_forward_hook(ablate)
    split = SplitModel(model)
    if when == "after":
        getattr(block.mlp, child).register_forward_hook(ablate)
    if when == "after, on the model's own module":
        own.register_forward_hook(ablate)
    ablated = model(IDS).logits
    assert oracles.error(ablated, plain) > 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if when != "before" else "error")
        scores = score_factors(split, IDS, layers=[0, 1], positions=[2, 5], estimator=Exact())
    for n, (i, t) in enumerate([(0, 2), (0, 5), (1, 2), (1, 5)]):
        truth = oracles.one_position(split, IDS[i], t, [0, 1])
        for layer in (0, 1):
            assert oracles.error(scores.matrices(layer)[n], truth.matrix(layer)) < 1e-10


def test_hooks_that_were_not_there_at_the_check_are_warned_of() -> None:
    split = SplitModel(build(FAMILIES["gpt2"], torch.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score_factors(split, IDS, **ASKED)
    handle = split.blocks[0].register_forward_pre_hook(lambda module, args: None)
    with pytest.warns(UserWarning, match="must do the same at each position"):
        score_factors(split, IDS, **ASKED)
    handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score_factors(split, IDS, **ASKED)


def test_hooks_at_chosen_positions_are_found_by_the_check() -> None:
    """A pass may hold chosen positions alone, and another one would be the last."""
    model = build(FAMILIES["gpt2"], torch.float32)

    def push_the_last(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        last = torch.arange(args[0].shape[1]) == args[0].shape[1] - 1
        return (args[0] + 3.0 * last[:, None] * torch.arange(args[0].shape[2]), *args[1:])

    model.transformer.h[1].register_forward_pre_hook(push_the_last)
    with pytest.raises(ModelError):
        SplitModel(model)


# ---- after the split ---------------------------------------------------------------------------------------------------


def test_a_part_in_training_mode_is_refused() -> None:
    split = SplitModel(build(FAMILIES["gpt2"], torch.float32))
    split.model.transformer.h[1].mlp.dropout.train()
    with pytest.raises(
        ModelError, match=r"the module transformer.h.1.mlp.dropout of GPT2LMHeadModel is in training mode"
    ):
        score_factors(split, IDS, **ASKED)


def another_head(model: Any) -> None:
    model.lm_head = nn.Linear(model.config.hidden_size, VOCAB, bias=False).eval()


def other_weights(model: Any) -> None:
    model.load_state_dict({name: value + 0.1 for name, value in model.state_dict().items()}, assign=True)


@pytest.mark.parametrize("change", [another_head, other_weights])
def test_another_head_is_refused(change: Any) -> None:
    """The one of before would be taken for it."""
    split = SplitModel(build(FAMILIES["llama"], torch.float32))
    change(split.model)
    with pytest.raises(ModelError, match=r"another output head than when it was split. Make a new SplitModel"):
        score_factors(split, IDS, **ASKED)
    split.model.requires_grad_(False)
    assert score_factors(SplitModel(split.model), IDS, **ASKED).factors[1].isfinite().all()


class Adapted(nn.Module):
    """A head with an adapter that is zero so far."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, self.added = base, nn.Linear(base.in_features, base.out_features, bias=False)
        nn.init.zeros_(self.added.weight)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Any:
        return self.base(x) + self.added(x)


def test_a_head_with_an_adapter_is_refused() -> None:
    model = build(FAMILIES["llama"], torch.float32)
    model.lm_head = Adapted(model.lm_head)
    with pytest.raises(ModelError, match=r"more parameters than its weight and bias: added.weight.*Merge adapters"):
        SplitModel(model)


def test_a_named_model_whose_files_change_is_loaded_anew(tmp_path: Path) -> None:
    found = []
    for seed in (0, 1):
        build(FAMILIES["gpt2"], torch.float32, seed).save_pretrained(tmp_path)
        found += [calculate_fisher(str(tmp_path), 1, IDS[:1]) for _ in range(2)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[2], found[3])
    assert oracles.error(found[0], found[2]) > 0.1


# ---- what cannot be split ----------------------------------------------------------------------------------------------


def test_a_model_that_is_refused_trains_as_before() -> None:
    model = build(FAMILIES["gpt2"], torch.float32)
    model.lm_head = Adapted(model.lm_head)
    model.train().requires_grad_(True)
    model.lm_head.base.requires_grad_(False)
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]
    with pytest.raises(ModelError):
        SplitModel(model)
    assert ([module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]) == before


@pytest.mark.usefixtures("unchecked_shapes")
def test_what_is_no_model_is_said() -> None:
    model = build(FAMILIES["gpt2"], torch.float32)
    no_module: Any = "gpt2"
    with pytest.raises(ValueError, match=r"must be a loaded transformers model, got str. SplitModel.from_pretrained"):
        SplitModel(no_module)
    with pytest.raises(ValueError, match=r"must be a name, a path or a SplitModel, got GPT2LMHeadModel"):
        calculate_fisher(model, 1, IDS)
    with pytest.raises(ValueError, match=r"must be a SplitModel, got GPT2LMHeadModel. Give SplitModel\(model\)"):
        score_factors(model, IDS, **ASKED)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"Use torch.no_grad\(\)"):
        SplitModel(model)


def test_a_head_of_more_digits_than_the_blocks_is_checked_as_those_are() -> None:
    model = build(FAMILIES["llama"], torch.float32)
    for block in model.model.layers:
        block.to(torch.bfloat16)

    def narrow(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.to(torch.bfloat16)

    model.model.embed_tokens.register_forward_hook(narrow)
    model.model.rotary_emb.register_forward_hook(lambda module, args, output: tuple(x.bfloat16() for x in output))
    model.model.norm.register_forward_hook(lambda module, args, output: output.float())
    check = SplitModel(model).self_check
    assert check is not None and check.limit == 0.05


def test_a_head_that_bans_tokens() -> None:
    """-inf is the same on both sides."""
    model = build(FAMILIES["llama"], torch.float32)
    bias = torch.zeros(VOCAB)
    bias[7] = -torch.inf
    model.lm_head.bias = nn.Parameter(bias)
    split = SplitModel(model)
    assert split.self_check is not None and split.self_check.head < 1e-4
    assert score_factors(split, IDS, **ASKED).factors[1].isfinite().all()


# ---- families ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64_throughout")
def test_llama4_scales_queries_by_position_in_replay() -> None:
    """Its layers without rotary positions take the place of a query in its row for that: here positions of 8 and more."""
    text = tf.Llama4TextConfig(
        vocab_size=VOCAB, hidden_size=24, intermediate_size=40, intermediate_size_mlp=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=6, num_local_experts=2, max_position_embeddings=64,
        no_rope_layers=[1, 0], floor_scale=8, attn_scale=0.5, attention_chunk_size=64, pad_token_id=0,
        moe_layers=[], interleave_moe_layer_step=1,
    )  # fmt: skip
    split = SplitModel(eager_experts(build(lambda: tf.Llama4ForCausalLM(text))))
    ids = torch.arange(40)[None] % VOCAB
    scores = score_factors(split, ids, layers=[0, 1], positions=[10, 39], estimator=Exact())
    for n, t in enumerate((10, 39)):
        truth = oracles.one_position(split, ids[0], t, [0, 1])
        for layer in (0, 1):
            assert oracles.error(scores.matrices(layer)[n], truth.matrix(layer)) < 1e-6


def test_umt5_scales_its_output() -> None:
    config = tf.UMT5Config(
        vocab_size=VOCAB, d_model=24, d_kv=6, d_ff=32, num_layers=2, num_decoder_layers=2, num_heads=4, pad_token_id=0,
        eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    check = SplitModel(build(lambda: tf.UMT5ForConditionalGeneration(config), torch.float32)).self_check
    assert check is not None and check.head < 1e-4


def gemma4(what: str, window: int = 512) -> Any:
    """Blocks with embeddings of their own; or none that count, and the last two take keys and values of the first two."""
    config = tf.Gemma4TextConfig(
        vocab_size=VOCAB, vocab_size_per_layer_input=VOCAB, hidden_size=24, intermediate_size=40, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, global_head_dim=8, max_position_embeddings=64,
        layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=window, pad_token_id=0,
        hidden_size_per_layer_input=8, num_kv_shared_layers=2 if what == "keys" else 0,
    )  # fmt: skip
    model = build(lambda: tf.Gemma4ForCausalLM(config))
    for block in model.model.layers if what == "keys" else ():
        block.per_layer_projection.weight.data.zero_()
    return model


@pytest.mark.parametrize("gradients", ["own_position", "per_position"])
@pytest.mark.parametrize(
    ("what", "reads"),
    [("embeddings", [True, True, True, True, False]), ("keys", [False, True, True, True, False])],
)
@pytest.mark.usefixtures("float64_throughout")
def test_what_reads_more_of_the_tokens_than_the_stream(what: str, reads: list[bool], gradients: Any) -> None:
    """Given streams alone it is refused, as with zeros for ids its logits were off by a quarter; given the ids it is right."""
    split = SplitModel(gemma4(what), gradients=gradients)
    assert [split.reads_ids(layer) for layer in range(5)] == reads
    with pytest.raises(
        ModelError, match=r"Gemma4ForCausalLM from layer 2 up read more of .* Use calculate_fisher"
    ) as e:
        UpperLayersModel(split, 2)
    assert "\n" not in str(e.value)
    UpperLayersModel(split, 4)
    ids, at = IDS[:1], torch.tensor([2, 4])
    stream = split.lower(ids, {}, [2])[2]
    assert torch.equal(split.upper(stream, 2, {}, ids), split.states(ids, {}))
    by = torch.randn(2, 2, split.d_model, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = split.replaced(ids, at, 2, stream[0, at] + by, {})
    for k, n in ((0, 0), (1, 1)):

        def nudged(block: nn.Module, args: Any, nudge: Tensor = by[k, n], place: Tensor = at[n]) -> Any:
            return (args[0] + nudge * (torch.arange(6) == place)[:, None], *args[1:])

        handle = split.blocks[2].register_forward_pre_hook(nudged)
        truth = oracles.library_logits(split, ids)[0, at[n]]
        handle.remove()
        assert oracles.error(split.head.predict(z[k, n][None]).logits, truth[None]) < 1e-12


def test_a_model_that_cuts_what_is_asked_for_out_of_its_windows() -> None:
    """Gemma 4 does before the blocks that share keys; that is everything here, beyond the window too."""
    check = SplitModel(gemma4("keys", window=16)).self_check
    assert check is not None and check.seq_len > 16 and max(check.scores, check.replayed, check.walked) < 1e-4


# ---- the process -------------------------------------------------------------------------------------------------------


def test_threads_do_not_leave_tf32_off() -> None:
    """The first to come turns it off, the last to leave on again; in between nobody has it."""
    product = torch.backends.mkldnn.matmul
    before = product.fp32_precision
    product.fp32_precision = "tf32"
    inside, leave, seen = threading.Event(), threading.Event(), []

    def other() -> None:
        with full_precision():
            inside.set()
            leave.wait(10)
            seen.append(product.fp32_precision)

    try:
        thread = threading.Thread(target=other)
        with full_precision():
            thread.start()
            assert inside.wait(10)
        seen.append(product.fp32_precision)
        leave.set()
        thread.join()
        assert seen == ["ieee", "ieee"] and product.fp32_precision == "tf32"
    finally:
        product.fp32_precision = before


@pytest.mark.parametrize("set_at", ["all", "its backend", "itself"])
def test_products_that_inherit_their_precision_do_so_afterwards(set_at: str) -> None:
    backends: Any = torch.backends
    product = backends.mkldnn.matmul
    where = {"all": backends, "its backend": backends.mkldnn, "itself": product}[set_at]
    try:
        where.fp32_precision = "tf32"
        with full_precision():
            assert product.fp32_precision == "ieee"
        assert product.fp32_precision == "tf32"
        where.fp32_precision = "ieee"
        assert product.fp32_precision == "ieee"
        where.fp32_precision = "none"
        assert product.fp32_precision == "none"
    finally:
        for each in (product, backends.mkldnn, backends):
            each.fp32_precision = "none"


def test_a_run_in_a_process_leaves_its_settings(tmp_path: Path) -> None:
    def settings() -> list[Any]:
        cuda = torch.backends.cuda
        return [
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
            cuda.mem_efficient_sdp_enabled(),
            cuda.cudnn_sdp_enabled(),
        ]

    before = settings()
    with LocalPool(RunConfig("model", ("corpus",), str(tmp_path))):
        deterministic_kernels()
        torch.set_num_threads(before[0] + 1)
        assert settings() != before
    assert settings() == before
