"""Kernels that give the same bits each time: what is asked of PyTorch, and that the engine needs nothing that has none."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import FAMILIES, build
from torch.utils._python_dispatch import TorchDispatchMode

from fisher_ray import (
    Exact,
    Sampled,
    SplitModel,
    calculate_fisher,
    fim_expected_gradient_outerproduct,
    score_factors,
)
from fisher_ray.numerics import deterministic_kernels, full_precision
from fisher_ray.spectrum import factor_eigenvalues, symmetric_eigh, trace_rank, whitened_eigenvalues

IDS = torch.arange(1, 29).view(2, 14)


@pytest.fixture
def as_it_was() -> Iterator[None]:
    """The settings are the process's own."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    torch.backends.cuda.enable_mem_efficient_sdp(True)
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.backends.cuda.enable_flash_sdp(True)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def scores(split: SplitModel) -> list[torch.Tensor]:
    encoder = {"encoder_input_ids": IDS[:, :5]} if split.is_encoder_decoder else {}
    found = []
    for estimator, more in [
        (Exact(), {"positions": [3, 10]}),
        (Sampled(2, top_p=0.8, temperature=0.7), {}),
        (Sampled(2), {"token_source": "sampled", "num_token_draws": 2, "token_top_p": 0.9}),
    ]:
        arguments: dict[str, Any] = {"layers": [0, 2, 3], "estimator": estimator, **more, **encoder}
        found += [*score_factors(split, IDS, **arguments).factors.values()]
    return found


def statistics(factors: torch.Tensor) -> None:
    trace_rank(factor_eigenvalues(factors))
    moment = (factors.mT @ factors).mean(0)
    symmetric_eigh(moment)
    whitened_eigenvalues(moment, moment)


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "t5"])
@pytest.mark.parametrize("gradients", ["own_position", "per_position"])
def test_nothing_changes_on_the_cpu(name: str, gradients: Any, as_it_was: None):
    split = SplitModel(build(FAMILIES[name], torch.float32), gradients=gradients)
    before = scores(split)
    deterministic_kernels()
    for got, expected in zip(scores(split), before, strict=True):
        assert torch.equal(got, expected)


def test_what_is_asked_for(as_it_was: None):
    deterministic_kernels()
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.backends.cuda.mem_efficient_sdp_enabled()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled() != torch.cuda.is_available()


def test_a_gpu_has_no_flash_attention_that_may_warn(as_it_was: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    deterministic_kernels()
    assert not torch.backends.cuda.flash_sdp_enabled()


def test_memory_is_not_filled_before_use(as_it_was: None):
    """It would cost a pass over every new tensor: 64 MiB then take milliseconds and not microseconds."""
    deterministic_kernels()
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        torch.empty(2**26, dtype=torch.uint8)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1e-3


class _Operations(TorchDispatchMode):
    """Names of the operations that ran; those of CUDA are the same where the kernel is no attention of PyTorch's."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name()
        exact = isinstance(out, torch.Tensor) and not out.is_floating_point()
        self.names.add(f"{name} of integers" if exact and "cumsum" in name else name)
        return out


# PyTorch's list of operations without a deterministic CUDA kernel, as far as a language model could have them.
NONDETERMINISTIC = (
    "cumsum", "put_", "bincount", "median.dim", "kthvalue", "nll_loss", "scatter_reduce", "_embedding_bag",
)  # fmt: skip


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "mixtral", "deepseek_v3", "t5"])
def test_no_operation_lacks_a_deterministic_kernel(name: str):
    split = SplitModel(build(FAMILIES[name]))
    with _Operations() as operations:
        for factors in scores(split):
            statistics(factors)
    assert "aten::cumsum of integers" in operations.names
    assert "aten::mm" in operations.names
    assert not {op for op in operations.names if op.removeprefix("aten::").startswith(NONDETERMINISTIC)} - {
        "aten::cumsum of integers"
    }


def test_numbers_are_float32_whatever_surrounds_the_call():
    """Automatic mixed precision of the caller's reaches no pass and no product."""
    split = SplitModel(build(FAMILIES["gpt2"], torch.float32))
    directions = torch.randn(2, split.d_model, generator=torch.Generator().manual_seed(0))

    def everything() -> dict[str, torch.Tensor]:
        scores = score_factors(split, IDS, layers=[1], estimator=Exact())
        grads = torch.ones(1, 5, 7).div(3)
        return {
            "matrices": scores.matrices(1),
            "fisher": calculate_fisher(split, 1, IDS),
            "streams": split.lower(IDS, {}, [2])[2],
            "rates": torch.cat(
                [*split.log_probability_rates(split.tape(IDS[:1], {}, [1], torch.tensor([2, 4])), 1, directions)]
            ),
            "expected": fim_expected_gradient_outerproduct(grads, torch.full((1, 5), 0.2)),
        }

    alone = everything()
    with torch.autocast("cpu", torch.bfloat16):
        within = everything()
    backends: Any = torch.backends
    products = backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul
    before = [each.fp32_precision for each in products]
    try:
        for each, asked in zip(products, ("tf32", "tf32", "bf16"), strict=True):
            each.fp32_precision = asked
        with full_precision():
            assert [each.fp32_precision for each in products] == ["ieee"] * 3
        fast = everything()
        assert [each.fp32_precision for each in products] == ["tf32", "tf32", "bf16"]
    finally:
        for each, own in zip(products, before, strict=True):
            each.fp32_precision = own
    for name, truth in alone.items():
        for found in (within[name], fast[name]):
            assert found.dtype == torch.float32, name
            assert torch.equal(found, truth), name
