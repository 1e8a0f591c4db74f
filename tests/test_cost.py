"""Costs counted on shapes against what the engine really does, holds and writes."""

from __future__ import annotations

import gc
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers as tf
from families import FAMILIES, VOCAB, build
from torch.utils._python_dispatch import TorchDispatchMode

import jobs
from fisher_ray import Deflated, Exact, Sampled, SplitModel, cost
from fisher_ray import corpus as corpus_module
from fisher_ray.architecture import ModelError
from fisher_ray.corpus import read_documents
from fisher_ray.cost import HARDWARE, Cost, outline
from fisher_ray.estimators import Estimator
from fisher_ray.footprint import LiveBytes
from fisher_ray.plan import Plan, RunConfig, Tasks, make_plan
from fisher_ray.reduce import Node, levels
from fisher_ray.scores import Pass, iter_scores
from fisher_ray.spectrum import factor_eigenvalues
from fisher_ray.sums import Sums, square_flop
from fisher_ray.worker import statistics

DEMO = Path(__file__).parent.parent / "demo"
SEQ = 20


def shapes(name: str, folder: Path, **settings: Any) -> SplitModel:
    """The outline of a tiny family, from a folder with nothing but its configuration."""
    with torch.device("meta"):
        FAMILIES[name]().config.save_pretrained(folder)
    return outline(str(folder), **settings)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> SplitModel:
    """GPT-2 small: a size at which memory and storage are those of real use."""
    folder = tmp_path_factory.mktemp("gpt2")
    tf.GPT2Config().save_pretrained(folder)
    return outline(str(folder))


@pytest.fixture(scope="module")
def llama_8b(tmp_path_factory: pytest.TempPathFactory) -> SplitModel:
    folder = tmp_path_factory.mktemp("llama")
    config = tf.LlamaConfig(
        intermediate_size=14336, num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192
    )
    config.save_pretrained(folder)
    return outline(str(folder), dtype="bfloat16")


# ---- flop ------------------------------------------------------------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {
    "one layer": {"layers": (2,)},
    "all layers": {"layers": (0, 1, 2, 3)},
    "top": {"layers": (3,)},
    "exact": {"layers": (1, 2), "estimator": Exact()},
    "deflated": {"layers": (1, 2), "estimator": Deflated(4, 2)},
    "leading part": {"layers": (1,), "estimator": Deflated(4, 0)},
    "few positions": {"layers": (0, 2), "share": 0.1},
    "one sample": {"layers": (0, 2), "share": 0.4, "estimator": Sampled(1)},
    "drawn tokens": {"layers": (1,), "token_source": "sampled", "token_draws": 2, "share": 0.5},
    "averaged": {"layers": (1,), "token_source": "sampled", "token_draws": 9, "share": 0.2},
    "matrices": {"layers": (0, 3), "save": "matrices"},
    "large batch": {"layers": (0, 2), "batch_tokens": 20 * SEQ},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3_moe", "t5"])
def test_flop_are_those_of_the_engine(name: str, case: str, tmp_path: Path) -> None:
    """Matrix products of a whole batch, counted while it is scored and summed, to a millionth."""
    settings = {"estimator": Sampled(3), "batch_tokens": 3 * SEQ, **CASES[case]}
    expected = Cost(shapes(name, tmp_path), max_seq_len=SEQ, **settings)
    assert expected.flop_per_token == pytest.approx(counted(name, expected), rel=1e-6)


@pytest.mark.parametrize("estimator", [Sampled(3), Exact()], ids=["sampled", "exact"])
def test_flop_of_the_slow_path(estimator: Sampled | Exact, tmp_path: Path) -> None:
    """Its rows end at the last position of their micro-batch, here the window's; a fused backward counts q k^T twice."""
    model = shapes("llama", tmp_path, gradients="per_position")
    expected = Cost(model, (1, 2), estimator, max_seq_len=SEQ, batch_tokens=SEQ)
    assert expected.flop_per_token == pytest.approx(counted("llama", expected, "per_position"), rel=0.08)


class Products(TorchDispatchMode):
    """Counts two flop for every multiply-add of a matrix product."""

    # Which argument holds the left factor; the right one comes next.
    LEFT = {torch.ops.aten.mm: 0, torch.ops.aten.bmm: 0, torch.ops.aten.addmm: 1, torch.ops.aten.baddbmm: 1}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.flop = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        left = self.LEFT.get(func.overloadpacket)
        if left is not None:
            self.flop += 2 * args[left].numel() * args[left + 1].shape[-1]
        elif func.overloadpacket is torch.ops.mkldnn._linear_pointwise:
            self.flop += 2 * args[0].numel() * args[1].shape[0]
        return func(*args, **(kwargs or {}))


def counted(name: str, expected: Cost, gradients: Any = "own_position") -> float:
    """flop a token of the real engine, on real weights, over one batch of full windows."""
    model = SplitModel(build(FAMILIES[name], torch.float32), gradients=gradients, check=False)
    model.model.set_attn_implementation("eager")  # explicit products in encoders and on the slow path
    windows = expected.batch_tokens // SEQ
    ids = torch.randint(3, VOCAB, (windows, SEQ), generator=torch.Generator().manual_seed(0))
    count = round(expected.share * SEQ)
    model.graph_bytes(SEQ, 0)  # measured once a model: passes of their own
    model.streamed = expected.model.streamed
    layers = list(expected.layers)
    sums = Sums(layers, model.d_model)
    with Products() as products:
        for scores in iter_scores(
            model,
            ids,
            layers=layers,
            estimator=expected.estimator,
            positions=[SEQ - 1 - i * SEQ // count for i in reversed(range(count))],  # up to the last
            token_source=expected.token_source,
            num_token_draws=expected.token_draws,
            encoder_input_ids=ids if model.is_encoder_decoder else None,
        ):
            for layer in layers:
                sums.add(layer, scores.factors[layer], scores.activations[layer])
                factor_eigenvalues(scores.factors[layer])
                if expected.save == "matrices":
                    scores.matrices(layer)
    return products.flop / ids.numel()


def test_flop_of_gpt2_in_closed_form(gpt2: SplitModel) -> None:
    """By hand: 12 d^2 weights a block, attention over all keys, logits, mean row, sums in strips of 192 columns."""
    d, vocab, blocks, seq, samples = 768, 50257, 12, 128, 8
    block = 2 * 12 * d * d + 4 * seq * d
    sums = d * (d + 192) * (2 * samples + 1) + 2 * samples * samples * d  # the last: the Gram matrix of eigenvalues
    for lowest in (0, 6, 11):
        layers = tuple(range(lowest, blocks + 1))
        byhand = blocks * block + 4 * vocab * d + samples * (blocks - lowest) * block + len(layers) * sums
        cost = Cost(gpt2, layers, Sampled(samples), max_seq_len=seq)
        assert cost.flop_per_token == pytest.approx(byhand, rel=1e-9)


def test_only_chosen_experts_cost_flop(tmp_path: Path) -> None:
    """Eight times the experts: more memory, and no flop but the router's."""
    made = {}
    for experts in (8, 64):
        config = tf.Qwen3MoeConfig(num_hidden_layers=2, num_experts=experts, num_experts_per_tok=2, hidden_size=256)
        config.save_pretrained(tmp_path / str(experts))
        made[experts] = Cost(outline(str(tmp_path / str(experts))), (1,), Sampled(1), max_seq_len=64)
    few, many = made[8], made[64]
    router = 2 * 2 * 56 * 256 + 2 * 56 * 256  # two blocks forward, one back
    assert many.flop_per_token - few.flop_per_token == pytest.approx(router, rel=1e-6)
    assert many.weight_bytes - few.weight_bytes == 4 * 2 * 56 * (3 * 256 * 768 + 256)
    assert many.graph_bytes_per_token < 1.05 * few.graph_bytes_per_token


def test_time_is_flop_at_the_speed_of_each_dtype(gpt2: SplitModel, llama_8b: SplitModel) -> None:
    full = Cost(gpt2, (6,), Sampled(8))
    h100 = HARDWARE["h100"]
    assert h100.rate("float32") == pytest.approx(0.48 * 67e12)
    assert full.seconds(1e6, h100) == pytest.approx(1e6 * full.flop_per_token / (0.48 * 67e12), rel=1e-3)
    assert full.gpu_hours(1e6, h100) == pytest.approx(full.seconds(1e6, h100) / 3600)
    half = Cost(llama_8b, (16,), Sampled(8))
    at_full_speed = 1e6 * half.flop_per_token / h100.rate("bfloat16")
    outside = (4 * 128_256 * 4096 + 17 * square_flop(4096)) / h100.rate("bfloat16")  # goes through tensor cores twice
    assert half.seconds(1e6, h100) == pytest.approx(at_full_speed + 1e6 * outside, rel=1e-2)
    assert half.seconds(1e6, HARDWARE["cpu"]) == pytest.approx(1e6 * half.flop_per_token / (0.98 * 82e9), rel=1e-2)


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["gpt2", "gemma", "qwen3_moe", "t5"])
def test_weights_are_those_of_a_loaded_model(name: str, dtype: str, tmp_path: Path) -> None:
    build(FAMILIES[name], torch.float32).save_pretrained(tmp_path)
    loaded = SplitModel.from_pretrained(tmp_path, dtype=dtype, check=False).model
    real = {t.data_ptr(): t.nbytes for t in [*loaded.parameters(), *loaded.buffers()]}
    cost = Cost(outline(str(tmp_path), dtype=dtype), (0,), Sampled(1))
    assert cost.weight_bytes == pytest.approx(sum(real.values()), rel=2e-3)  # tables of angles stay float32


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_graph_is_that_of_a_loaded_model(name: str, tmp_path: Path) -> None:
    """Mixtures run their experts another way on shapes: an eighth off."""
    mixture = name in ("mixtral", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3")
    real = SplitModel(build(FAMILIES[name], torch.float32), check=False)
    counted = shapes(name, tmp_path)
    for lowest in (0, 2):
        wanted = real.graph_bytes(SEQ, lowest)
        assert counted.graph_bytes(SEQ, lowest) == pytest.approx(wanted, rel=0.12 if mixture else 1e-3)


BUDGETS = [1 << 12, 1 << 15, 60_000, 1 << 17, 1 << 19, 1 << 22, 1 << 30]
MEMORY_CASES = ["one layer", "all layers", "exact", "few positions", "one sample", "drawn tokens", "large batch"]


@pytest.mark.parametrize("case", MEMORY_CASES)
def test_micro_batch_is_the_engines(case: str, tmp_path: Path) -> None:
    """With what memory leaves as its budget the engine cuts the same micro-batch."""
    settings = {"estimator": Sampled(3), "batch_tokens": 3 * SEQ, **CASES[case]}
    cost = Cost(shapes("llama", tmp_path), max_seq_len=SEQ, **settings)
    real = SplitModel(build(FAMILIES["llama"], torch.float32), check=False)
    first = 1 if cost.token_source == "sampled" else 0
    sizes = []
    for budget in BUDGETS:
        size = cost.micro_batch(cost.resident_bytes + budget)
        assert size == 0 or cost.memory(size) <= cost.resident_bytes + budget
        if size:
            engine = iter_scores(
                real,
                torch.full((cost.batch_tokens // SEQ, SEQ), 5),
                layers=list(cost.layers),
                estimator=cost.estimator,
                positions=list(range(first, first + round(cost.share * SEQ))),
                token_source=cost.token_source,
                num_token_draws=cost.token_draws,
                memory_budget=budget,
            )
            assert len(next(engine)) == size
        sizes.append(size)
    assert sizes == sorted(sizes)
    assert sizes[0] <= 1
    assert sizes[-1] == cost.batch_tokens // SEQ * round(cost.share * SEQ)


def test_memory_grows_with_what_is_held(gpt2: SplitModel) -> None:
    cost = Cost(gpt2, (6,), Sampled(8))
    one = cost.memory(1)
    assert one > cost.weight_bytes + cost.sums_memory
    assert cost.memory(512) > cost.memory(64) > one
    assert replace(cost, num_groups=5).memory(1) - one == 4 * cost.sums_memory
    assert replace(cost, layers=(6, 7)).memory(1) - one >= cost.sums_memory
    assert cost.micro_batch(one) >= 1  # as many as take no more than recording their window does
    assert cost.memory(cost.micro_batch(one)) <= one
    assert cost.micro_batch(one - 1) == 0


@pytest.mark.parametrize(
    ("layers", "estimator", "seq_len"),
    [
        ((0, 1, 2, 3), Sampled(1), 256),
        ((0, 1, 2, 3), Sampled(8), 64),
        ((2,), Sampled(8), 256),
        ((1, 2), Deflated(24, 8), 64),
        ((1, 2, 3), Exact(), 32),
    ],
    ids=repr,
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_memory_is_what_a_micro_batch_allocates(
    layers: tuple[int, ...], estimator: Estimator, seq_len: int, tmp_path: Path
) -> None:
    """At a size where neither scores nor statistics are a trifle."""
    config = tf.GPT2Config(n_embd=192, n_layer=3, n_head=4, vocab_size=500)
    planned, allocated = planned_and_allocated(config, layers, estimator, seq_len, tmp_path)
    assert planned == pytest.approx(allocated, rel=0.1)


@pytest.mark.usefixtures("unchecked_shapes")
def test_memory_of_more_streams(tmp_path: Path) -> None:
    """Each holds what enters it, the gradient that reaches it and its scores, little beside the graph: the difference shows."""
    config = tf.GPT2Config(n_embd=96, n_layer=8, n_head=4, vocab_size=500)
    asked = config, Sampled(1), 128, tmp_path
    one, nine = (planned_and_allocated(asked[0], layers, *asked[1:]) for layers in ((0,), tuple(range(9))))
    assert nine[0] - one[0] == pytest.approx(nine[1] - one[1], rel=0.1)


def planned_and_allocated(
    config: Any, layers: tuple[int, ...], estimator: Estimator, seq_len: int, folder: Path
) -> tuple[int, int]:
    """Bytes of scores and statistics of one micro-batch of four sequences: by the plan, and counted as they run."""
    config.save_pretrained(folder)
    model = tf.GPT2LMHeadModel(config).float()
    split = SplitModel(model, check=False)
    ids = torch.full((4, seq_len), 5)
    cost = Cost(outline(str(folder)), layers, estimator, max_seq_len=seq_len, batch_tokens=ids.numel())
    asked = {"layers": list(layers), "estimator": estimator, "memory_budget": 1 << 40}
    list(iter_scores(split, ids[:1, :4], **asked))  # what is measured once
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        (scores,) = iter_scores(split, ids, **asked)
        for layer in layers:
            statistics(scores.factors[layer])
    return cost.memory(ids.numel(), 1 << 40) - cost.resident_bytes, live.most


CONFIGS = {
    "joined projections": tf.GPT2Config(n_embd=192, n_layer=3, n_head=4, vocab_size=500),  # keys are views, which hold queries
    "few keys": tf.LlamaConfig(
        hidden_size=192, intermediate_size=768, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=1,
        vocab_size=500,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.usefixtures("unchecked_shapes")
def test_memory_of_few_positions_counts_what_recording_takes(name: str, layer: int) -> None:
    """The last position of each sequence: their keys, and the pass that makes them, are more than scores and their graph."""
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[name]).float()
    split = SplitModel(model, check=False)
    rows = [torch.full((512,), i) for i in range(4)]
    pass_ = Pass(
        split, rows, [-1] * 4, [layer], Sampled(4), False, 1, 1.0, 1.0, torch.zeros(4, 2).long(), None, None, 1 << 40
    )
    (batch,) = pass_.batches([[511]] * 4)
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        assert len(pass_._score(batch)) == 4
    assert pass_.memory(batch.rows, batch.positions) == pytest.approx(live.most, rel=0.1)


@pytest.mark.parametrize("draws", [1, 4])
@pytest.mark.usefixtures("unchecked_shapes")
def test_memory_of_drawn_tokens(draws: int) -> None:
    """Replayed queries keep and hold the weights of the keys up to their block's last, and have no mask of their own."""
    config = tf.LlamaConfig(
        hidden_size=128, num_hidden_layers=3, num_attention_heads=8, intermediate_size=512, vocab_size=128
    )
    model = tf.LlamaForCausalLM(config).float()
    split = SplitModel(model, check=False)
    rows = [torch.arange(1024) % 128]
    pass_ = Pass(
        split, rows, [-1], [0], Sampled(2), True, draws, 1.0, 1.0, torch.zeros(1, 2).long(), None, None, 1 << 40
    )
    (batch,) = pass_.batches([[*range(1, 1024)]])
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        pass_._score(batch)
    assert pass_.memory(batch.rows, batch.positions) == pytest.approx(live.most, rel=0.1)


# ---- storage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sketch", [None, 10])
@pytest.mark.parametrize(("num_layers", "d_model"), [(1, 24), (4, 24), (7, 96), (2, 768)])
def test_sums_as_held_and_written(num_layers: int, d_model: int, sketch: int | None, tmp_path: Path) -> None:
    config = tf.GPT2Config(n_embd=d_model, n_layer=num_layers, n_head=4, vocab_size=64)
    config.save_pretrained(tmp_path)
    layers = tuple(range(num_layers))
    cost = Cost(outline(str(tmp_path)), layers, Sampled(1), sketch=sketch)
    before = float64_bytes()
    sums = Sums(list(layers), d_model, sketch=sketch)
    for layer in layers:
        some = torch.randn(29, 1, d_model, generator=torch.Generator().manual_seed(layer))
        sums.add(layer, some, some)
    held = float64_bytes() - before
    written = sum(len(sums.packed(layer).to_bytes(np.float32)) for layer in layers)
    assert cost.sums_bytes == pytest.approx(written, rel=0.001, abs=512)
    # 29 of the 30 rows that a sketch of 10 gathers before it is shrunk, and its trace.
    assert held == pytest.approx(cost.sums_memory, rel=0 if sketch is None else 0.04)
    grouped = replace(cost, num_groups=3)
    assert grouped.sums_memory == 3 * cost.sums_memory
    numbers = sum(array.nbytes for layer in layers for array in _arrays(sums.packed(layer).to_bytes(np.float32)))
    assert grouped.sums_bytes - cost.sums_bytes == pytest.approx(2 * numbers, rel=0.01)


def float64_bytes() -> int:
    """Of all tensors there are."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) is torch.Tensor and each.dtype == torch.float64]
    return sum(tensor.nbytes for tensor in tensors)


def _arrays(raw: bytes) -> list[np.ndarray]:
    with np.load(io.BytesIO(raw)) as arrays:
        return [arrays[name] for name in arrays]


@pytest.mark.parametrize(
    ("save", "sketch"), [("summary", None), ("factors", None), ("matrices", None), ("summary", 24)]
)
def test_files_of_a_run(save: cost.Save, sketch: int | None, tmp_path: Path) -> None:
    """Against a real task and reduction of the demo: bytes, and how many files."""
    settings: dict[str, Any] = {"save": save, "sketch": sketch, "layers": "0,3,6", "num_samples": 4, "max_docs": 8}
    settings["estimator"] = "sampled"
    corpus = (str(DEMO / "corpus.jsonl"),)
    config = RunConfig(model=str(DEMO / "model"), corpus=corpus, output=str(tmp_path), **settings)
    stored, outcome = jobs.run_here(config)
    expected = Cost(outline(config.model), (0, 3, 6), Sampled(4), save=save, sketch=sketch)

    receipt = stored.receipts[0]
    size = {name: file["bytes"] for name, file in receipt["files"].items()}
    assert expected.requests == len(size) + 1  # and the receipt
    assert expected.sums_bytes == pytest.approx(sum(size.pop(f"sums_{layer}") for layer in (0, 3, 6)), abs=512)
    # A table's row varies with the text; arrays do not.
    within = 0.25 if save == "summary" else 0.05
    assert expected.position_bytes == pytest.approx(sum(size.values()) / receipt["counts"]["scored"], rel=within)
    reduced = sum(path.stat().st_size for path in (tmp_path / "reduced").rglob("*.npy"))
    assert expected.reduced_bytes(outcome.tasks) == reduced


def test_nodes_of_the_reduction_tree(gpt2: SplitModel) -> None:
    """Counted on the tree itself."""
    cost = Cost(gpt2, (0, 6), Sampled(8), num_groups=2)
    node = 2 * 2 * 8 * (3 * 768 * 769 // 2 + 768)
    for tasks in (1, 2, 32, 33, 40, 64, 65, 1000, 1024, 1025, 40_000):
        nodes = sum(map(len, levels(Node(0, tasks, (0,)))))
        assert cost.reduced_bytes(tasks) - cost.reduced_bytes() == nodes * node


# ---- tasks -----------------------------------------------------------------------------------------------------------

RATE = {"cpu": (60e9, 100e6), "cuda": (100e12, 200e6)}  # flop/s and bytes/s to storage, nominal


@pytest.fixture(scope="module")
def some_costs(gpt2: SplitModel, llama_8b: SplitModel) -> list[Cost]:
    return [
        Cost(gpt2, tuple(range(13)), Sampled(8)),
        Cost(gpt2, (12,), Sampled(1)),
        Cost(gpt2, (6,), Exact()),
        Cost(gpt2, tuple(range(13)), Sampled(1), num_groups=100),
        Cost(llama_8b, tuple(range(33)), Sampled(8)),
    ]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("least", [1 << 15, 1000])
@pytest.mark.parametrize("total", [10_000, 300_001, 10**8, 10**13])
def test_text_of_a_task(
    device: Any, least: int, total: int, some_costs: list[Cost], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever bound a task stops at, the others hold; eigenvalues, at most 2 % here, are no matrix products."""
    monkeypatch.setattr(cost, "MIN_TASK_BYTES", least)
    rate, storage = RATE[device]
    least = min(least, max(1 << 12, math.ceil(total / 32)))  # as many blocks as there can be cost more than 4 KiB each
    for each in some_costs:
        text = each.task_bytes(device, total)
        computing, writing = text / 4 * each.flop_per_token / rate, each.sums_bytes / storage
        assert min(least, 256) <= text <= max(least, math.ceil(total / 32))
        assert text >= least or computing >= 580  # shorter than asked for only where it takes long
        assert computing <= 601 or text == 256
        assert writing <= 0.052 * computing or text == max(least, math.ceil(total / 32)) or computing >= 580
        assert writing >= 0.048 * computing or text <= least  # no larger than writing asks for


DOCUMENT = 800  # bytes of each of those below


def written(folder: Path, ending: str, total: int) -> Path:
    """A corpus of so many bytes of text, in documents of 800 and a last one."""
    texts = [
        f"{i:06d} ".ljust(min(DOCUMENT, total - i * DOCUMENT) - 2, "x") for i in range(math.ceil(total / DOCUMENT))
    ]
    path = folder / f"docs.{ending}"
    if ending == "parquet":
        pq.write_table(pa.table({"text": texts}), path, compression="none", use_dictionary=False)
    elif ending == "jsonl":
        path.write_text("".join(json.dumps({"text": text[:-11]}) + "\n" for text in texts))
    else:
        path.write_text("\n\n".join(texts) + "\n\n")
    return path


def planned(corpus: Path, **settings: Any) -> tuple[Plan, Tasks]:
    plan = make_plan(RunConfig(model=str(DEMO / "model"), corpus=(str(corpus),), output="run", **settings))
    return plan, plan.make_tasks()


def documents(plan: Plan, tasks: Tasks) -> list[int]:
    """Numbers of the documents in all tasks."""
    read = [d for task in tasks for source in task.ranges for d in read_documents(source, plan.config.layout)]
    return [int(str(document.content)[:6]) for document in read]


@pytest.mark.parametrize(
    ("total", "tasks"),
    [(3_000, 1), (20_000, 5), (1 << 17, 32), ((1 << 17) + 1, 32), (300_010, 32), (1 << 20, 32), (33 << 15, 33)],
)
def test_a_small_corpus_comes_to_a_task_a_block(total: int, tasks: int, tmp_path: Path) -> None:
    """32 of them from 128 KiB up, and no remainder that would be a task more; from a megabyte up tasks have 32 KiB."""
    corpus = written(tmp_path, "txt", total)
    assert corpus.stat().st_size == total
    plan, found = planned(corpus)
    assert len(found) == tasks == max(1, min(math.ceil(total / (1 << 12)), max(32, total >> 15)))
    assert documents(plan, found) == list(range(math.ceil(total / DOCUMENT)))


@pytest.mark.parametrize("settings", [{}, {"max_docs": 200}, {"save": "matrices"}])
def test_tasks_have_the_size_that_is_asked_for(settings: dict[str, Any], tmp_path: Path) -> None:
    corpus = written(tmp_path, "txt", 500 * DOCUMENT)
    plan, tasks = planned(corpus, task_bytes=20_000, **settings)
    taken = settings.get("max_docs", 500)
    assert len(tasks) == math.ceil(taken * DOCUMENT / 20_000)
    assert documents(plan, tasks) == list(range(taken))


@pytest.mark.parametrize("ending", ["txt", "jsonl", "parquet"])
@pytest.mark.parametrize(("taken", "least", "most"), [(1, 1, 1), (20, 4, 5), (300, 28, 32), (2_500, 60, 64)])
def test_tasks_are_sized_by_what_is_taken(ending: str, taken: int, least: int, most: int, tmp_path: Path) -> None:
    """Of 4 MB, whose tasks would have 128 KB; the last one may be cut short."""
    corpus = written(tmp_path, ending, 4_000_000)
    plan, tasks = planned(corpus, max_docs=taken)
    assert documents(plan, tasks) == list(range(taken))
    assert least <= len(tasks) <= most
    sizes = [len(documents(plan, [task])) for task in tasks]
    assert max(sizes[:-1], default=taken) - min(sizes[:-1], default=taken) <= 1


def test_little_is_read_more_than_once_for_max_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is taken is counted twice or three times where it is little beside the corpus, and once where it is much."""
    corpus = written(tmp_path, "txt", 4_000_000)
    read: list[int] = []

    def counted(source: Any, layout: Any) -> Any:
        for document in read_documents(source, layout):
            read.append(1)
            yield document

    monkeypatch.setattr(corpus_module, "read_documents", counted)
    for taken, most in ((20, 60), (300, 900), (2_500, 2_500), (10_000, 5_000)):
        read.clear()
        planned(corpus, max_docs=taken)
        assert min(taken, 5_000) <= len(read) <= most


def test_arrays_of_a_task_fit_in_memory(gpt2: SplitModel) -> None:
    everything = Cost(gpt2, tuple(range(13)), Sampled(8))
    assert everything.task_bytes("cpu", 10**9) == 1 << 15
    for save in ("factors", "matrices"):
        saved = replace(everything, save=save)
        held = saved.position_bytes * saved.task_bytes("cpu", 10**9) / 4
        assert (1 << 27) < held < 1.01 * (1 << 28)
    few = replace(everything, save="matrices", share=0.01)
    assert few.task_bytes("cpu", 10**9) == pytest.approx(
        100 * replace(few, share=1.0).task_bytes("cpu", 10**9), rel=0.05
    )


# ---- what fits -------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_and_what_would(llama_8b: SplitModel, gpt2: SplitModel) -> None:
    """One line that names the parts; each of its remedies, taken, is enough."""
    assert Cost(gpt2, tuple(range(13)), Sampled(8)).fits(HARDWARE["l4"]) is None
    everything = Cost(llama_8b, tuple(range(33)), Sampled(8))
    refusal = everything.fits(HARDWARE["l4"])
    assert refusal is not None and "\n" not in refusal
    for words in ("15 GiB for weights", "12.4 GiB for sums", "the graph of one position", "l4 has 22 GiB"):
        assert words in refusal
    count = int(refusal.split("at most ")[1].split()[0])
    assert (
        f"at most {count} layers (--layers); sketches (--sketch 256); weights read block by block (--stream-weights); 2 GPUs "
        "an actor (--gpus-per-actor 2); the GPU a100." in refusal
    )
    assert "dtype" not in refusal and "groups" not in refusal
    assert replace(everything, layers=tuple(range(count))).fits(HARDWARE["l4"]) is None
    assert replace(everything, layers=tuple(range(count + 1))).fits(HARDWARE["l4"]) is not None
    assert replace(everything, sketch=256).fits(HARDWARE["l4"]) is None
    streamed = replace(everything, model=outline(everything.model.name, dtype="bfloat16", stream_weights=True))
    assert streamed.fits(HARDWARE["l4"]) is None
    assert everything.fits(HARDWARE["l4"], 2) is None
    assert everything.fits(HARDWARE["a100"]) is None


def test_fewer_groups_or_half_precision_would_fit(gpt2: SplitModel) -> None:
    grouped = Cost(gpt2, tuple(range(13)), Sampled(8), num_groups=200)
    refusal = grouped.fits(HARDWARE["l4"])
    assert refusal is not None
    count = int(refusal.split("at most ")[2].split()[0])
    assert replace(grouped, num_groups=count).fits(HARDWARE["l4"]) is None
    assert replace(grouped, num_groups=count + 1).fits(HARDWARE["l4"]) is not None

    small = Cost(gpt2, (6,), Sampled(8))
    tight = replace(HARDWARE["cpu"], memory=small.memory(1) - (100 << 20))
    assert (
        "fit: half-precision weights (--dtype bfloat16); weights read block by block (--stream-weights); the GPU l4."
        in str(small.fits(tight))
    )


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no-such-model"):
        outline(str(tmp_path / "no-such-model"))


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_streamed_weights_cost_a_walk_and_one_block(name: str, tmp_path: Path) -> None:
    """flop are those of the engine with its blocks run again; memory has the weights of one block in place of three."""
    settings: dict[str, Any] = {"max_seq_len": SEQ, "batch_tokens": 3 * SEQ}
    whole = Cost(shapes(name, tmp_path), (1, 3), Sampled(3), **settings)
    streamed = Cost(shapes(name, tmp_path, stream_weights=True), (1, 3), Sampled(3), **settings)
    assert streamed.flop_per_token == pytest.approx(counted(name, streamed), rel=1e-6)
    assert streamed.flop_per_token > whole.flop_per_token
    block = sum(parameter.nbytes for parameter in whole.model.blocks[1].parameters())
    assert whole.weight_bytes - streamed.weight_bytes == pytest.approx(2 * block, rel=0.05)
