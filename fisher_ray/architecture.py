"""What differs between architectures, and how their weights are read: the one module that knows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MethodType
from typing import Any, Literal

import torch
import transformers  # its classes by name where they are used: it loads them then, in two seconds that few commands need
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fisher_ray.head import Head
from fisher_ray.kernels import is_out_of_memory, linear, uses_onednn
from fisher_ray.streaming import map_rewritten

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


class ModelError(ValueError):
    """A model that cannot be loaded, or whose scores cannot be trusted."""


@dataclass(frozen=True)
class ModelFacts:
    """What a model's configuration says, known before any weights are read.

    Attributes:
        num_layers: blocks, of an encoder-decoder those of the decoder.
        d_model: width of the residual stream.
        vocab_size: rows of the embeddings.
        max_positions: tokens that a sequence may have, or None without a bound. With LongRoPE as many as it knows without its
            longer ranges: for those it turns all keys otherwise, by the longest sequence of a batch.
        is_encoder_decoder: whether there is an encoder.
    """

    num_layers: int
    d_model: int
    vocab_size: int
    max_positions: int | None
    is_encoder_decoder: bool

    @classmethod
    def of(cls, config: Any) -> ModelFacts:
        """The facts in a transformers configuration; ModelError where it is no language model's."""
        text = config.get_text_config(decoder=True)
        encoder_decoder = bool(config.is_encoder_decoder)
        num_layers = getattr(text, "num_decoder_layers", None) if encoder_decoder else None
        longest = getattr(text, "max_position_embeddings", None)
        rope = getattr(text, "rope_parameters", None) or {}
        for each in (rope, *(of_kind for of_kind in rope.values() if isinstance(of_kind, Mapping))):
            if longest and each.get("rope_type") == "longrope":
                longest = min(longest, each.get("original_max_position_embeddings", longest))
        try:
            num_layers, d_model, vocab_size = num_layers or text.num_hidden_layers, text.hidden_size, text.vocab_size
        except AttributeError as error:
            raise ModelError(
                f"{type(config).__name__} describes no language model: {error}. Expected a causal model or an encoder-decoder."
            ) from error
        return cls(
            num_layers=int(num_layers),
            d_model=int(d_model),
            vocab_size=int(vocab_size),
            max_positions=int(longest) if longest and longest > 0 else None,  # -1 is XLNet's word for no bound
            is_encoder_decoder=encoder_decoder,
        )

    @classmethod
    def read(cls, name: str, revision: str | None = None, trust_remote_code: bool = False) -> ModelFacts:
        """The facts of a model by hub name or local path; ModelError where there is none."""
        with _load_errors(name):
            config = _configuration(name, revision, trust_remote_code)
            return cls.of(config)


def weights_digest(name: str, revision: str | None = None, trust_remote_code: bool = False) -> str:
    """What identifies a model's function: a hub model's commit, else a sha256 over a local one's configuration,
    code and weights.

    Of a file beyond 1 GiB it takes the name, the size and 64 KiB of every MiB, so that a large model costs no full read: an
    edit of less than a MiB there may go unnoticed.
    """
    return _digest(name, revision, trust_remote_code, _is_of_model)


def tokenizer_digest(name: str, revision: str | None = None, trust_remote_code: bool = False) -> str:
    """What identifies a model's tokenizer: a hub model's commit, else a sha256 over all files a tokenizer may read.

    Which names those are is each tokenizer's own affair. Chat templates in files of their own are none of them.
    """
    return _digest(name, revision, trust_remote_code, _is_of_tokenizer)


_TOKENIZER_SUFFIXES = (".json", ".txt", ".model", ".tiktoken", ".spm", ".bpe", ".codes", ".vocab")


def _is_of_model(file: Path) -> bool:
    return file.suffix in (".safetensors", ".py") or file.name in ("config.json", "model.safetensors.index.json")


def _is_of_tokenizer(file: Path) -> bool:
    return not _is_of_model(file) and file.suffix in _TOKENIZER_SUFFIXES


_WHOLE = 1 << 30


def _digest(name: str, revision: str | None, trust_remote_code: bool, wanted: Callable[[Path], bool]) -> str:
    """A hub model's commit, or the sha256 of a local one's wanted files: whole, or of large ones a sixteenth."""
    path = Path(name)
    if not path.is_dir():
        with _load_errors(name):
            config = _configuration(name, revision, trust_remote_code)
            return str(config._commit_hash)
    digest = hashlib.sha256()
    for file in sorted(file for file in path.iterdir() if wanted(file) and file.name != "generation_config.json"):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        step = 1 << 16 if size <= _WHOLE else 1 << 20
        with file.open("rb") as raw:
            for start in range(0, max(size, 1), step):
                raw.seek(start)
                digest.update(raw.read(1 << 16))
    return digest.hexdigest()


def load_pretrained(
    name: str,
    dtype: str | torch.dtype | None,
    revision: str | None,
    trust_remote_code: bool,
    device_map: str | Mapping[str, int | str | torch.device] | None = None,
) -> tuple[Any, Any]:
    """A transformers model and its tokenizer (None where there is none), weights from safetensors only.

    Where ``device_map`` leaves weights to main memory or disk, accelerate's hooks fetch a module's for each of its passes.
    Those that the library joins on loading, experts mostly, are written to the directory for temporary files first.

    Raises:
        ModelError: not found, not readable, or not a language model.
    """
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise ModelError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    weights = DTYPES[dtype] if isinstance(dtype, str) else dtype or torch.float32
    common: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if weights == torch.float64:
        common["experts_implementation"] = "eager"  # grouped products of experts know no float64
    with _load_errors(name):
        config = _configuration(name, **common)
        auto = _auto_class(config)
        with TemporaryDirectory(prefix="fisher_ray_") as folder:
            model, report = auto.from_pretrained(
                name,
                config=config,
                dtype=weights,
                use_safetensors=True,
                output_loading_info=True,
                device_map=dict(device_map) if isinstance(device_map, Mapping) else device_map,
                offload_folder=folder,
                **common,
            )
            map_rewritten(model, folder)
    tokenizer = load_tokenizer(name, revision, trust_remote_code)
    missing = sorted(report["missing_keys"])
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(
            f"{name} holds no weights for {missing[0]}{others}; they would be random numbers. "
            "Check that the files are complete and are those of a language model."
        )
    return model, tokenizer


def offloaded_blocks(
    name: str, device: torch.device, revision: str | None, trust_remote_code: bool
) -> dict[str, int | str | torch.device]:
    """A device map that leaves the weights of the blocks where they are stored, and has everything else on one device."""
    model = meta_model(name, revision=revision, trust_remote_code=trust_remote_code)
    blocks = find_blocks(find_decoder(model), ModelFacts.of(model.config).num_layers, name)
    left = {id(block) for block in blocks}
    around = {id(blocks)}  # modules that hold the blocks are gone through, all others stay whole
    for _, module in reversed(list(model.named_modules())):
        if any(id(child) in around for child in module.children()):
            around.add(id(module))
    placed: dict[str, int | str | torch.device] = {}

    def place(path: str, module: nn.Module) -> None:
        if id(module) in around:
            for child, inner in module.named_children():
                place(f"{path}.{child}" if path else child, inner)
            for parameter, _ in module.named_parameters(recurse=False):
                placed[f"{path}.{parameter}" if path else parameter] = str(device)
        else:
            placed[path] = "disk" if id(module) in left else str(device)

    place("", model)
    return placed


def meta_model(name: str, dtype: str = "float32", revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The model on torch's meta device, from its configuration alone: shapes, and no weights.

    Experts run as batched products, the one way of theirs that asks for no values.

    Raises:
        ModelError: not found, or no language model.
    """
    with _load_errors(name):
        config = _configuration(name, revision, trust_remote_code, experts_implementation="batched_mm")
        auto = _auto_class(config)
        with torch.device("meta"):
            return auto.from_config(config, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code)


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """A model's tokenizer alone; None where there is none."""
    if not may_have_tokenizer(name):
        return None
    with _load_errors(name):
        return transformers.AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)


def _configuration(name: str, revision: str | None, trust_remote_code: bool, **settings: Any) -> Any:
    return transformers.AutoConfig.from_pretrained(
        name, revision=revision, trust_remote_code=trust_remote_code, **settings
    )


def _auto_class(config: Any) -> Any:
    return transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM


def sink_token(config: Any, tokenizer: Any, vocab_size: int) -> int | None:
    """The token that every window starts with: the decoder's start, else BOS, else EOS, else none."""
    candidates = [
        getattr(config, "decoder_start_token_id", None) if config.is_encoder_decoder else None,
        getattr(tokenizer, "bos_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
        getattr(config, "bos_token_id", None),
        getattr(config, "eos_token_id", None),
    ]
    return next((token for token in candidates if isinstance(token, int) and 0 <= token < vocab_size), None)


# Where modules keep what is to run around their forward.
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def fuse_activations(model: nn.Module) -> list[Pointwise]:
    """Have activations keep their slopes where asked, and exchange transformers' tanh GELU for PyTorch's, the same function.

    Returns:
        those of the model, also where they had been exchanged before.
    """
    from transformers.activations import ACT2CLS, NewGELUActivation

    pointwise = {nn.GELU} | {entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()}
    for module in [module for module in model.modules() if not isinstance(module, Pointwise)]:
        for child, activation in list(module.named_children()):
            if type(activation) in pointwise and next(activation.parameters(), None) is None:
                fast = nn.GELU(approximate="tanh") if isinstance(activation, NewGELUActivation) else activation
                setattr(module, child, Pointwise(activation, fast.forward).train(activation.training))
    return [module for module in model.modules() if isinstance(module, Pointwise)]


@contextmanager
def slopes_kept(activations: Sequence[Pointwise]) -> Iterator[None]:
    """While in force, graphs keep the slopes of these activations in place of their inputs.

    Every backward pass of the many that a graph is for then multiplies, where it would compute the slope anew. The slopes are
    constants there: backward passes may be differentiated in their cotangents, not in x.
    """
    for each in activations:
        each.keeps_slope = True
    try:
        yield
    finally:
        for each in activations:
            each.keeps_slope = False


class Pointwise(nn.Module):
    """A pointwise activation whose graph can keep its slope, see :func:`slopes_kept`.

    Args:
        activation: the model's own; called as it is while it has hooks, which may ablate neurons.
        function: the same function otherwise; default: the activation's own.
    """

    def __init__(self, activation: nn.Module, function: Callable[[Tensor], Tensor] | None = None):
        super().__init__()
        self.activation, self.function = activation, function or activation.forward
        self.keeps_slope = False

    def forward(self, x: Tensor) -> Tensor:
        if has_hooks(self.activation):
            hooked: Tensor = self.activation(x)
            return hooked
        if self.keeps_slope and torch.is_grad_enabled() and x.requires_grad:
            if torch.compiler.is_compiling():
                x = x.contiguous()  # half of a gate's product has no tangent of its strides there
            return _WithSlope.apply(x, self.function)[0]
        return self.function(x)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module is more than its forward."""
    return any(getattr(module, name) for name in HOOKS)


class _WithSlope(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        y, slope = torch.func.jvp(function, (x,), (torch.ones_like(x),))[:2]
        return y, slope

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Any], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # none of zeros for the slope
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return grad * slope, None


def fuse_products(blocks: nn.ModuleList) -> None:
    """Have linear layers of float32 weights on a CPU multiply by :func:`fisher_ray.kernels.linear`; the functions are the same.

    They stay what they were to whoever asks: their new classes are subclasses.
    """
    if not uses_onednn():
        return
    for module in blocks.modules():
        fused = _FUSED.get(type(module))
        if fused is not None and module.weight.device.type in ("cpu", "meta") and module.weight.dtype == torch.float32:
            module.__class__ = fused
            if hasattr(module, "_old_forward"):  # accelerate's hook has taken the place of forward, and calls this
                vars(module)["_old_forward"] = MethodType(fused.forward, module)


class FusedLinear(nn.Linear):
    """A linear layer of :func:`fisher_ray.kernels.linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class FusedConv1D(Conv1D):
    """The same of GPT-2, whose weights are [in, out]."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.T, self.bias)


_FUSED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: FusedLinear, Conv1D: FusedConv1D}


def keep_softcapping(model: nn.Module) -> None:
    """Where attention is soft-capped, have SDPA, which does not know that, leave it to explicit attention.

    Some releases of transformers run such a model on SDPA, and so without the capping.
    """
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "attn_logit_softcapping", None) and config._attn_implementation == "sdpa":
            config._attn_implementation = "eager"


# What a block does beside attention, by the endings of its classes' names; torch.compile makes a few kernels of each.
_COMPILED = ("RMSNorm", "LayerNorm", "MLP")
_BACKEND = "inductor"


def compile_blocks(blocks: nn.ModuleList) -> None:
    """Have torch.compile make kernels of the blocks' norms and MLPs when they first run, for batches of any size.

    Their backward passes have no backward passes (:func:`uncompiled`).
    """
    torch._functorch.config.donated_buffer = False  # several cotangents are pulled through one graph
    for block in blocks:
        for module in block.modules():
            if type(module).__name__.endswith(_COMPILED):
                module.compile(dynamic=True, backend=_BACKEND)


def uncompiled() -> AbstractContextManager[None]:
    """While in force, compiled modules run as they were."""
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


def find_blocks(decoder: nn.Module, num_layers: int, name: str) -> nn.ModuleList:
    """The list of transformer blocks: the shallowest ModuleList with as many entries as the config says."""
    lists = [(path.count("."), module) for path, module in decoder.named_modules() if isinstance(module, nn.ModuleList)]
    fitting = [(depth, module) for depth, module in lists if len(module) == num_layers]
    if not fitting:
        raise ModelError(f"{name} has no list of {num_layers} blocks; expected a decoder made of a stack of blocks.")
    return min(fitting, key=lambda pair: pair[0])[1]


def find_decoder(model: Any) -> Any:
    """What maps tokens to the final hidden state; of some models (Llama 4) the library says that it is the whole."""
    decoder = model.get_decoder()
    return getattr(model, "model", decoder) if decoder is model else decoder


def find_head(model: Any) -> Head:
    """The unembedding with the scale and soft-capping that the configuration gives it."""
    unembedding = model.get_output_embeddings()
    if unembedding is None or not isinstance(getattr(unembedding, "weight", None), Tensor):
        raise ModelError(f"{type(model).__name__} has no output embeddings; expected a language model with a head.")
    more = sorted({name for name, _ in unembedding.named_parameters()} - {"weight", "bias"})
    if more:  # adapters may be zero when the head is compared with the model's own, and grow
        raise ModelError(
            f"the output head of {type(model).__name__} has more parameters than its weight and bias: {', '.join(more[:3])}. "
            "Merge adapters into the weight first."
        )
    config = model.config.get_text_config(decoder=True)
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    tied_scale = model.config.model_type in ("umt5", "switch_transformers") and model.config.tie_word_embeddings
    if getattr(model.config, "scale_decoder_outputs", tied_scale):
        scale *= unembedding.weight.shape[1] ** -0.5
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(unembedding.weight, getattr(unembedding, "bias", None), scale, float(softcap) if softcap else None)


def on_stream(blocks: nn.ModuleList, layer: int, visit: Callable[[int, Any], Tensor]) -> Any:
    """Hook the residual stream at ``layer``: visit(layer, stream) may replace it."""
    if layer == len(blocks):

        def after(_: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (visit(layer, output[0]), *output[1:])
            return visit(layer, output)

        return blocks[-1].register_forward_hook(after)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (visit(layer, args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": visit(layer, kwargs["hidden_states"])}

    return blocks[layer].register_forward_pre_hook(before, with_kwargs=True)


@contextmanager
def block_calls(blocks: nn.ModuleList) -> Iterator[list[Callable[[Tensor], Tensor]]]:
    """Collect, while a decoder runs, its calls of each block: functions from the stream that enters it to the one that leaves.

    Masks, positions and whatever else a block is given are as they were.

    Raises:
        ModelError: a block leaves something for later ones in what it is given, as keys and values that they share. Run
            again one at a time, they would take it for a constant.
    """
    calls: list[Callable[[Tensor], Tensor]] = []
    handed: set[str] = set()

    def contents(kwargs: Mapping[str, Any]) -> dict[str, list[int]]:
        kept = {name: value for name, value in kwargs.items() if isinstance(value, Mapping | list)}
        return {name: list(map(id, v if isinstance(v, list) else v.values())) for name, v in kept.items()}

    def note(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        others, named = args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"}

        def again(stream: Tensor) -> Tensor:
            output = block(stream, *others, **named)
            leaving: Tensor = output[0] if isinstance(output, tuple) else output
            return leaving

        calls.append(again)
        before.update(contents(named))

    def look(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        handed.update(name for name, now in contents(kwargs).items() if now != before[name])

    before: dict[str, list[int]] = {}
    handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    handles += [block.register_forward_hook(look, with_kwargs=True) for block in blocks]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
    if handed:
        raise ModelError(
            f"the blocks hand each other more than the residual stream ({', '.join(sorted(handed))}), so that they cannot be "
            "run again one at a time, as where weights are streamed or memory holds no graph of them all. Leave "
            "--stream-weights out, and give more memory (--memory-budget) or fewer tokens."
        )


def attention_reading(
    model: Any, block: nn.Module, upper: Callable[[Tensor], Any]
) -> dict[Literal["query", "key", "value"], Tensor]:
    """What each head of a block's self-attention reads of the residual stream, float64 [heads, head_dim, d_model].

    The weights of its projections times the linear part of the norm before them. That one is measured and not looked up:
    what arrives at the projections of a stream x, less what arrives of -x, is ``2 s * x`` for an x of mean 0 and mean
    square 1, whatever the norm is called, where it stands, and whether it adds one to its weights.

    Args:
        model: a transformers model.
        block: one of its blocks.
        upper: runs the model from the stream that enters the block.

    Raises:
        ModelError: projections that are not known, or something else than a norm with a scale before them.
    """
    projection, _ = _projections(model, block)
    d = ModelFacts.of(model.config).d_model
    signs = 1.0 - 2.0 * (torch.arange(d) % 2)
    other = torch.randn(d, generator=torch.Generator().manual_seed(0), device="cpu") + 0.5
    probes = torch.stack([signs, -signs, other, -other])[:, None]
    arrived: list[Tensor] = []
    read: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        arrived.append(args[0].detach()[:, 0].double().cpu())
        # Now, as weights that are fetched are there for the pass alone.
        read.extend(each.detach().double().cpu() for each in _projections(model, block)[1])

    handle = projection.register_forward_pre_hook(note)
    try:
        upper(probes)
    finally:
        handle.remove()
    scale = (arrived[0][0] - arrived[0][1]) / 2 * signs
    found, x = (arrived[0][2] - arrived[0][3]) / 2, other.double()
    centred = x - x.mean()
    eye = torch.eye(d, dtype=torch.float64)
    for expected, matrix in (
        (scale * centred / centred.square().mean().sqrt(), eye - 1 / d),  # LayerNorm
        (scale * x / x.square().mean().sqrt(), eye),  # RMSNorm
        (scale * x, eye),  # none: the norm stands behind the block's parts
    ):
        if float((found - expected).norm()) <= 1e-2 * float(found.norm()):
            return {name: each * scale @ matrix for name, each in _of_heads(read, model).items()}
    raise ModelError(
        f"{type(block).__name__} of {type(model).__name__} has something else than a norm with a scale before its attention; "
        "what its heads read is not known."
    )


def _projections(model: Any, block: nn.Module) -> tuple[nn.Module, Sequence[Tensor]]:
    """A module that the attention's input enters, and the weights of queries, keys and values."""
    config = model.config.get_text_config(decoder=True)
    heads = int(config.num_attention_heads)
    found = [each for module in block.modules() if (each := _queries_keys_values(module, heads, config)) is not None]
    if len(found) != 1:
        raise ModelError(
            f"{type(block).__name__} of {type(model).__name__} has {len(found) or 'no'} attentions with known weights: "
            "q_proj, k_proj and v_proj (LLaMA and its like), or of GPT-2, GPT-BigCode, GPT-NeoX or Phi-3. What heads read is "
            "known for one of those only."
        )
    return found[0]


def _of_heads(weights: Sequence[Tensor], model: Any) -> dict[Literal["query", "key", "value"], Tensor]:
    """Weights of queries, keys and values as [heads, head_dim, d_model]; heads of a group have its key and value head."""
    heads = int(model.config.get_text_config(decoder=True).num_attention_heads)
    size = weights[0].shape[0] // heads
    query, key, value = (
        each.unflatten(0, (-1, size)).repeat_interleave(heads * size // len(each), 0) for each in weights
    )
    return {"query": query, "key": key, "value": value}


def _queries_keys_values(module: Any, heads: int, config: Any) -> tuple[nn.Module, Sequence[Tensor]] | None:
    """Projection and weights [heads * head_dim, d_model] of queries, keys and values (of as many heads as there are of those).

    How one matrix holds the three is each class's own affair: other models give the same names to other orders.
    """
    linear = [each for x in "qkv" if isinstance(each := getattr(module, f"{x}_proj", None), nn.Linear)]
    if len(linear) == 3:
        return linear[0], [each.weight for each in linear]
    match type(module).__name__:
        case "GPT2Attention":  # [d_model, 3 d_model]
            return module.c_attn, module.c_attn.weight.T.chunk(3)
        case "GPTBigCodeAttention" if config.multi_query:  # one key and one value head
            one = module.c_attn.weight.shape[1] // heads
            return module.c_attn, module.c_attn.weight.split([heads * one, one, one])
        case "GPTNeoXAttention" | "GPTBigCodeAttention":  # of each head in turn the three
            fused = module.c_attn if hasattr(module, "c_attn") else module.query_key_value
            return fused, [each.flatten(0, 1) for each in fused.weight.unflatten(0, (heads, 3, -1)).unbind(1)]
        case "Phi3Attention":
            groups = int(config.num_key_value_heads)
            size = module.qkv_proj.weight.shape[0] // (heads + 2 * groups)
            return module.qkv_proj, module.qkv_proj.weight.split([heads * size, groups * size, groups * size])
    return None


def may_have_tokenizer(name: str) -> bool:
    """Whether tokenizer files lie beside a local model; a hub model is asked for its own."""
    path = Path(name)
    return (
        not path.is_dir() or any(path.glob("tokenizer*")) or any(path.glob("*.model")) or (path / "vocab.json").exists()
    )


@contextmanager
def _load_errors(name: str) -> Iterator[None]:
    """One clear line for whatever transformers raises on loading."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if Path(name).exists():
            raise ModelError(
                f"cannot load a causal language model from {name}: {first} Expected a directory with config.json and "
                "safetensors weights, as written by save_pretrained."
            ) from error
        raise ModelError(
            f"model {name} is no local directory, and the Hugging Face hub and its cache gave none by that name: {first} "
            "Check the name and the network, or download it elsewhere and pass the directory."
        ) from error
    except Exception as error:  # safetensors raises its own type on a corrupt file
        if type(error).__module__.split(".")[0] not in ("safetensors", "safetensors_rust"):
            raise
        raise ModelError(f"cannot read the weights of {name}: {error}. The file is damaged; fetch it again.") from error
