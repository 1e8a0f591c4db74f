"""Models from disk: what is loaded, in which precision, and how what cannot be loaded is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
import transformers as tf
from families import FAMILIES, build, eager_experts
from safetensors.torch import load_file, save_file

from fisher_ray import (
    Exact,
    LowerLayersModel,
    ModelError,
    Sampled,
    Scores,
    SplitModel,
    calculate_fisher,
    score_factors,
)
from fisher_ray.architecture import tokenizer_digest, weights_digest
from fisher_ray.cost import Cost, outline
from fisher_ray.split import ModelFacts

# Median over positions of the relative error of exact matrices against float64 with the same weights. The worst position
# may be one where rounding turned a ReLU or sent a token to another expert: up to .28 in bfloat16.
MEDIAN = {"float64": 1e-6, "float32": 2e-6, "float16": 5e-3, "bfloat16": 5e-2}

IDS = torch.arange(1, 25).view(2, 12)


def saved(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    build(FAMILIES[name], dtype).save_pretrained(folder)
    return folder


def scores_of(split: SplitModel) -> Scores:
    encoder = {"encoder_input_ids": IDS[:, :5]} if split.is_encoder_decoder else {}
    return score_factors(split, IDS, layers=[0, 2, 3], estimator=Exact(), **encoder)


# ---- what is loaded --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "t5"])
def test_a_saved_model_gives_the_same_scores(name: str, tmp_path: Path):
    loaded = SplitModel.from_pretrained(saved(name, tmp_path / "model"))
    assert loaded.dtype == torch.float32
    assert loaded.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert loaded.name == str(tmp_path / "model")
    assert loaded.tokenizer is None
    in_memory = SplitModel(build(FAMILIES[name], torch.float32))
    got, expected = scores_of(loaded), scores_of(in_memory)
    for layer in expected.factors:
        assert torch.equal(got.matrices(layer), expected.matrices(layer))


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "mixtral", "gpt_oss", "t5"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_precisions(name: str, dtype: str, tmp_path: Path):
    """The self-check passes; scores are at least float32, and as near the truth as the weights' precision allows."""
    split = SplitModel.from_pretrained(saved(name, tmp_path), dtype=dtype)
    assert split.dtype == getattr(torch, dtype)
    check = split.self_check
    assert check is not None
    for measured in (check.scores, check.replayed, check.logits, check.head):
        assert measured <= check.limit
    assert check.limit == {"float32": 1e-4, "float64": 1e-5}.get(dtype, 5e-2)
    assert max(check.positions) < check.seq_len - 1
    scores = scores_of(split)
    wanted = torch.float64 if dtype == "float64" else torch.float32
    assert {scores.factors[0].dtype, scores.activations[0].dtype, scores.entropy.dtype} == {wanted}
    with oracles.Float64Throughout():
        truth = scores_of(SplitModel(eager_experts(split.model.double())))
    assert not scores.invalid
    for layer in (0, 2, 3):
        got, expected = scores.matrices(layer).double(), truth.matrices(layer)
        errors = (got - expected).norm(dim=(1, 2)) / expected.norm(dim=(1, 2))
        assert errors.median() < MEDIAN[dtype]
        eigenvalues = torch.linalg.eigvalsh(got)
        assert (eigenvalues.min(-1).values > -1e-6 * eigenvalues.sum(-1)).all()


def test_a_dtype_may_be_given_as_torchs_own(tmp_path: Path):
    folder = saved("gpt2", tmp_path)
    assert SplitModel.from_pretrained(folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert SplitModel.from_pretrained(folder, check=False).self_check is None


def test_a_tokenizer_beside_the_model_is_loaded(tmp_path: Path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    inner = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tf.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="a").save_pretrained(saved("gpt2", tmp_path))
    assert SplitModel.from_pretrained(tmp_path).tokenizer("b")["input_ids"] == [1]


def test_the_reference_interface_takes_a_path(tmp_path: Path):
    folder = saved("gpt2", tmp_path)
    truth = oracles.one_position(SplitModel(build(FAMILIES["gpt2"])), IDS[0], 11, [2]).matrix(2)
    assert oracles.error(calculate_fisher(str(folder), 2, IDS)[0], truth) < MEDIAN["float32"] * 5
    assert oracles.error(calculate_fisher(folder, 2, IDS)[0], truth) < MEDIAN["float32"] * 5


def test_batches_agree_to_float32_rounding():
    """In float32: the same tokens drawn, and 2e-5 of difference; another token would be an error of 1."""
    split = SplitModel(build(FAMILIES["llama"], torch.float32))
    batch = oracles.inputs(split, [12, 5, 9, 12, 3])
    arguments: dict[str, Any] = {"layers": [0, 3], "estimator": Sampled(4), "token_source": "sampled"}
    expected = score_factors(split, **batch.padded(["right"], 12), **arguments)
    for budget in (1, 200_000):
        scores = score_factors(split, **batch.padded(["left"], 15), **arguments, memory_budget=budget)
        assert torch.equal(scores.fed, expected.fed)
        for layer in (0, 3):
            assert oracles.error(scores.factors[layer], expected.factors[layer]) < 2e-5


def test_the_facts_of_a_model_are_read_before_its_weights(tmp_path: Path):
    for name, layers, d_model in [("opt", 3, 24), ("t5", 3, 24)]:
        folder = saved(name, tmp_path / name)
        (folder / "model.safetensors").unlink()
        facts = ModelFacts.read(str(folder))
        assert (facts.num_layers, facts.d_model, facts.vocab_size) == (layers, d_model, 61)
        assert facts.is_encoder_decoder == (name == "t5")
        assert facts.max_positions == (None if name == "t5" else 64)
    with pytest.raises(ModelError) as refusal:
        ModelFacts.read("nobody/no-such-model")
    assert "\n" not in str(refusal.value)


# ---- what identifies a model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_kind", [False, True])
def test_rotations_of_each_kind_of_layer_are_looked_at(by_kind: bool):
    long = {"rope_type": "longrope", "original_max_position_embeddings": 60, "rope_theta": 1e4}
    sliding = {"rope_type": "default", "rope_theta": 1e4}
    config = tf.Gemma3TextConfig(
        max_position_embeddings=120,
        rope_parameters={
            "full_attention": {**long, "long_factor": [2.0], "short_factor": [1.0]},
            "sliding_attention": sliding,
        },
    )
    if not by_kind:
        config.rope_parameters = long
    assert ModelFacts.of(config).max_positions == 60


def test_long_ranges_of_rotations_are_beyond(tmp_path: Path):
    """LongRoPE turns the keys of a sequence that is longer than what it was trained on otherwise, all of them: so scores of a
    position would depend on what is behind it, and on its batch."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 3, "long_factor": [1.5, 3.0, 6.0]}
    sizes: dict[str, Any] = {
        "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 120, "original_max_position_embeddings": 60, "pad_token_id": 0,
    }  # fmt: skip
    config = tf.Phi3Config(**sizes, rope_parameters={**rope, "original_max_position_embeddings": 60})
    split = SplitModel(build(lambda: tf.Phi3ForCausalLM(config)))
    ids = torch.arange(1, 62)[None] % 61
    asked: dict[str, Any] = {"layers": [0], "estimator": Exact()}
    every = score_factors(split, ids[:, :60], **asked).matrices(0)
    few = score_factors(split, ids[:, :60], positions=[5, 40], **asked).matrices(0)
    torch.testing.assert_close(few, every[[5, 40]], rtol=1e-3, atol=1e-9)
    with pytest.raises(ValueError, match="sequences must have at most 60 tokens, got 61"):
        score_factors(split, ids, **asked)


def test_an_activation_with_parameters_can_be_planned_for(tmp_path: Path):
    """xIELU's are asked for their number, not for their values, which a plan has none of."""
    config = tf.ApertusConfig(
        vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )
    config.save_pretrained(tmp_path)
    assert Cost(outline(str(tmp_path)), (0, 1), Sampled(1), max_seq_len=16).flop_per_token > 0


TOKENIZER_FILES = [
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "tokenizer.model", "spiece.model", "tokenizer.tiktoken", "qwen.tiktoken", "source.spm", "bpe.codes",
]  # fmt: skip


@pytest.mark.parametrize("file", TOKENIZER_FILES)
def test_any_tokenizer_file_is_in_the_tokenizers_digest(file: str, tmp_path: Path):
    """Its name, its presence, and every byte of it, were it larger than what is read of weights."""
    folder = saved("gpt2", tmp_path)
    weights, before = weights_digest(str(folder)), tokenizer_digest(str(folder))
    assert weights != before
    content = bytearray(b"x" * (9 << 20))
    digests = {before}
    for changed in (None, 0, 70_000, 5_000_001, len(content) - 1):
        if changed is not None:
            content[changed] ^= 1
        (folder / file).write_bytes(content)
        digests.add(tokenizer_digest(str(folder)))
    (folder / file).rename(folder / f"other_{file}")
    digests.add(tokenizer_digest(str(folder)))
    assert len(digests) == 7
    assert weights_digest(str(folder)) == weights
    (folder / f"other_{file}").unlink()
    assert tokenizer_digest(str(folder)) == before


def test_weights_configuration_and_code_are_in_the_weights_digest(tmp_path: Path):
    folder = saved("gpt2", tmp_path)
    tokenizer, digests = tokenizer_digest(str(folder)), {weights_digest(str(folder))}
    config(folder, activation_function="relu")
    digests.add(weights_digest(str(folder)))
    (folder / "modeling.py").write_text("pass")
    digests.add(weights_digest(str(folder)))
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.ln_f.bias"][3] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    digests.add(weights_digest(str(folder)))
    (folder / "model.safetensors.index.json").write_text("{}")
    digests.add(weights_digest(str(folder)))
    assert len(digests) == 5
    assert tokenizer_digest(str(folder)) == tokenizer


def test_what_changes_no_score_is_in_no_digest(tmp_path: Path):
    folder = saved("gpt2", tmp_path)
    before = weights_digest(str(folder)), tokenizer_digest(str(folder))
    for file in ("chat_template.jinja", "README.md", "generation_config.json", "pytorch_model.bin"):
        (folder / file).write_text("{}")
    (folder / "original").mkdir()
    assert (weights_digest(str(folder)), tokenizer_digest(str(folder))) == before


@pytest.mark.parametrize(("size", "noticed"), [(200 << 20, 1), (2 << 30, 1 << 20)])
def test_an_edit_of_weights_is_noticed(size: int, noticed: int, tmp_path: Path):
    """Wherever it is: one byte of a small file, a MiB of one beyond 1 GiB, of which no more than a sixteenth is read."""
    folder = saved("gpt2", tmp_path)
    with (folder / "model.safetensors").open("r+b") as raw:
        raw.truncate(size)  # sparse
        digests = {weights_digest(str(folder))}
        for place in (size // 3 + 12_345, size // 2, size - noticed):
            raw.seek(place)
            raw.write(b"x" * noticed)
            raw.flush()
            before = bytes_read()
            digests.add(weights_digest(str(folder)))
            assert size <= 1 << 30 or bytes_read() - before < size / 15
    assert len(digests) == 4


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def test_a_hub_models_commit_identifies_both(monkeypatch: pytest.MonkeyPatch):
    found = tf.GPT2Config()
    found._commit_hash = "607a30d"

    def read(name: str, revision: str | None, trust_remote_code: bool) -> tf.GPT2Config:
        if not trust_remote_code:
            raise ValueError("it holds code of its own")
        return found

    monkeypatch.setattr(tf.AutoConfig, "from_pretrained", read)
    for digest in (weights_digest, tokenizer_digest):
        assert digest("nobody/some-model", trust_remote_code=True) == "607a30d"
        with pytest.raises(ModelError):
            digest("nobody/some-model")


# ---- what is refused -------------------------------------------------------------------------------------------------


def config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def without(folder: Path, *names: str) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({k: v for k, v in tensors.items() if k not in names}, path, {"format": "pt"})


def only_pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


SPOILED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "not a model": (lambda d: [path.unlink() for path in d.iterdir()], "cannot load a causal language model from"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "cannot load a causal language model from"),
    "pickled weights": (only_pickled, "safetensors"),
    "truncated weights": (truncated, "damaged|cannot load"),
    "garbage weights": (lambda d: (d / "model.safetensors").write_bytes(b"\x00" * 64), "damaged|cannot load"),
    "empty weights": (lambda d: (d / "model.safetensors").write_bytes(b""), "damaged|cannot load"),
    "no head": (lambda d: without(d, "lm_head.weight"), "holds no weights for lm_head.weight"),
    "one tensor missing": (
        lambda d: without(d, "model.layers.1.mlp.up_proj.weight"),
        "holds no weights for model.layers.1.mlp.up_proj.weight",
    ),
    "other shapes": (lambda d: config(d, intermediate_size=48), "cannot load a causal language model from"),
    "unreadable config": (lambda d: (d / "config.json").write_text("{"), "cannot load a causal language model from"),
    "unknown kind": (lambda d: config(d, model_type="nonesuch"), "cannot load a causal language model from"),
    "no kind": (lambda d: (d / "config.json").write_text("{}"), "cannot load a causal language model from"),
}


def test_too_little_memory_is_no_fault_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A GPU that others fill for a moment ends no run: the error is let through, and tried again."""
    folder = saved("llama", tmp_path / "model")
    for error in (torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("[enforce fail] can't allocate memory")):

        def short(*_: Any, error: Exception = error, **__: Any) -> Any:
            raise error

        for owner, name in (
            (SplitModel, "own_tape"),
            (SplitModel, "alone_tape"),
            (tf.AutoModelForCausalLM, "from_pretrained"),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, short)
                with pytest.raises(type(error)) as caught:
                    SplitModel.from_pretrained(folder)
            assert caught.value is error, name


@pytest.mark.parametrize("positions", [-1, None])
def test_a_bound_that_is_none(positions: int | None):
    config = tf.XLNetConfig() if positions else tf.T5Config()
    assert ModelFacts.of(config).max_positions is None and getattr(config, "max_position_embeddings", None) == positions


def test_an_encoders_length_is_checked():
    """Positions beyond its embeddings are an error of the library's, and on a GPU one that no process survives."""
    config = tf.BartConfig(
        vocab_size=61, d_model=24, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=16,
    )  # fmt: skip
    bart = SplitModel(build(lambda: tf.BartForConditionalGeneration(config), torch.float32), gradients="per_position")
    encoder = torch.arange(40)[None]
    with pytest.raises(ValueError, match="sequences must have at most 16 tokens, got 40"):
        score_factors(bart, IDS[:1], layers=[1], estimator=Sampled(1), encoder_input_ids=encoder)
    with pytest.raises(ValueError, match="sequences must have at most 16 tokens, got 40"):
        LowerLayersModel(bart, 1)(IDS[:1], encoder)


@pytest.mark.parametrize("case", SPOILED)
def test_spoiled_checkpoints_are_refused_in_one_line(case: str, tmp_path: Path):
    spoil, message = SPOILED[case]
    folder = saved("llama", tmp_path / "spoiled")
    SplitModel.from_pretrained(folder)
    spoil(folder)
    with pytest.raises(ModelError, match=message) as refusal:
        SplitModel.from_pretrained(folder)
    assert "\n" not in str(refusal.value)
    assert str(folder) in str(refusal.value)


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no-such-model", "no/such/model", "/no/such/folder", ""])
def test_unknown_names_are_refused_in_one_line(name: str):
    with pytest.raises(ModelError) as refusal:
        SplitModel.from_pretrained(name)
    assert "\n" not in str(refusal.value)
    assert name in str(refusal.value)


def test_unknown_dtype():
    with pytest.raises(ModelError, match="dtype must be one of float32, bfloat16, float16, float64, got 'int8'"):
        SplitModel.from_pretrained("nobody/no-such-model", dtype="int8")


def test_unknown_gradients(unchecked_shapes: None):
    with pytest.raises(ValueError, match="gradients must be own_position or per_position, got 'both'"):
        SplitModel(build(FAMILIES["gpt2"]), gradients="both")


def test_code_beside_a_model_is_not_run(tmp_path: Path):
    folder = saved("llama", tmp_path / "model")
    ran = tmp_path / "ran"
    (folder / "theirs.py").write_text(f"open({str(ran)!r}, 'w')\n")
    config(folder, model_type="theirs", auto_map={"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.M"})
    with pytest.raises(ModelError) as refusal:
        SplitModel.from_pretrained(folder)
    assert "\n" not in str(refusal.value)
    assert not ran.exists()


@pytest.mark.parametrize("gradients", ["own_position", "per_position"])
def test_a_model_that_sees_later_tokens_is_refused(gradients: Any):
    """Its p at t depends on the tokens after t, and so would F: not what p(. | h_t, x_<t) is."""
    config = FAMILIES["llama"]().config
    config.is_causal = False
    model = build(lambda: tf.LlamaForCausalLM(config))
    later = IDS[:1].clone()
    later[0, -1] = 60
    assert (model(later).logits - model(IDS[:1]).logits)[0, 0].abs().max() > 1e-2
    with pytest.raises(ModelError) as refusal:
        SplitModel(model, gradients=gradients)
    assert "\n" not in str(refusal.value)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ModelError, match="no output embeddings") as refusal:
        SplitModel(build(FAMILIES["gpt2"]).transformer)
    assert "\n" not in str(refusal.value)
