"""The demo's files are what their scripts say, and the mathematics holds on a trained model."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fisher_ray import Exact, SplitModel, score_factors

DEMO = Path(__file__).parent.parent / "demo"


@pytest.fixture(scope="module")
def trained() -> SplitModel:
    return SplitModel.from_pretrained(DEMO / "model", dtype="float64")


def test_corpus_is_reproduced_to_the_byte(tmp_path: Path) -> None:
    out = tmp_path / "corpus.jsonl"
    subprocess.run([sys.executable, DEMO / "make_corpus.py", "--out", out], check=True, capture_output=True)
    assert hashlib.sha256(out.read_bytes()).digest() == hashlib.sha256((DEMO / "corpus.jsonl").read_bytes()).digest()


def test_model_has_learned_the_corpus(trained: SplitModel) -> None:
    """Entropy of the byte-pair unigrams is above 5 nats; a model whose weights got lost would be near log 1024 = 6.9."""
    text = json.loads((DEMO / "corpus.jsonl").read_text(encoding="utf-8").splitlines()[3])["text"]
    ids = torch.tensor([[trained.tokenizer.bos_token_id, *trained.tokenizer(text)["input_ids"]]])[:, :256]
    surprisal = score_factors(trained, ids, layers=[6], estimator=Exact()).surprisal
    assert float(surprisal[:-1].mean()) < 1.5


@pytest.mark.parametrize("layer", [0, 3, 6])
def test_kl_is_the_quadratic_form(trained: SplitModel, layer: int) -> None:
    """KL(p(h) || p(h + v)) = v^T F v / 2 within 1 % for small random v; at the wrong layer or position it is off by O(1)."""
    ids = torch.tensor(
        [trained.tokenizer("<|endoftext|>Ada had 12 coins and lost 5 of them, so now she had")["input_ids"]]
    )
    scores = score_factors(trained, ids, layers=[layer], estimator=Exact())
    context = trained.lower(ids, {}, [layer])[layer]
    generator = torch.Generator().manual_seed(layer)
    for position in (1, 5, ids.shape[1] - 1):
        h = context[:, : position + 1]
        fisher = scores.matrices(layer)[position]
        before = trained.head.predict(trained.upper(h, layer, {})[:, -1])
        for _ in range(3):
            v = torch.randn(trained.d_model, generator=generator, dtype=torch.float64)
            v *= 2e-4 * h[0, -1].norm() / v.norm()
            moved = h.clone()
            moved[0, -1] += v
            after = trained.head.predict(trained.upper(moved, layer, {})[:, -1])
            log_ratio = before.logits - before.log_total[:, None] - after.logits + after.log_total[:, None]
            kl = (before.prob * log_ratio).sum()
            assert float(kl / (v @ fisher @ v / 2)) == pytest.approx(1, abs=0.01)
