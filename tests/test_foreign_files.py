"""Runs and corpora that may be anybody's: what they may not do to whoever reads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import jobs
from fisher_ray import ModelError, open_run
from fisher_ray.cli import BAD_INPUT, COMPLETE, DAMAGED, main
from fisher_ray.corpus import takes_in
from fisher_ray.directions import model_of, worker_of
from fisher_ray.plan import ConfigError, RunConfig
from fisher_ray.storage import absolute, seal
from jobs import gpt2  # noqa: F401

ESCAPES = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202e"


@pytest.fixture(scope="module")
def made(gpt2: str, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A run of documents whose text and column hold what terminals obey."""
    folder = tmp_path_factory.mktemp("foreign")
    rows = [{"text": f"Once {ESCAPES} upon a time.", "kind": f"a{ESCAPES}"}, {"text": "Again and again.", "kind": "b"}]
    (folder / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 6))
    jobs.run_here(jobs.settings(gpt2, folder / "docs.jsonl", folder / "run", layers="1", group_by="kind"))
    return folder / "run"


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


# ---- code --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gift(run: Path, gpt2: str, tmp_path: Path) -> Path:  # noqa: F811
    """A run that says it trusted code of its model, and a model that brings some."""
    folder = Path(shutil.copytree(gpt2, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    config["model_type"] = "evil"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    description = json.loads((run / "run.json").read_text())
    del description["sha256"]
    description["config"] |= {"model": str(folder), "trust_remote_code": True}
    (run / "run.json").write_bytes(seal(description))
    return run


def test_code_of_a_runs_model_runs_for_whoever_asks_for_it(
    gift: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("project", "validate"):
        assert main([command, str(gift)]) == BAD_INPUT
        (line,) = capsys.readouterr().err.splitlines()
        assert "made with code that comes with the model" in line and "--trust-remote-code" in line
    for load in (model_of, worker_of):
        with pytest.raises(ModelError, match="comes with the model"):
            load(open_run(gift))
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ModelError, match=r"the weights of .* are not those"):
        model_of(open_run(gift, trust_remote_code=True))


# ---- terminals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [[], ["--layer", "1"]])
def test_terminals_are_told_nothing_by_documents(
    made: Path, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(made), *more]) == COMPLETE
    assert main(["diff", str(made), "--group", f"a{ESCAPES}", "b"]) == COMPLETE
    said = capsys.readouterr()
    assert "\\x1b[2J" in said.out or "\\x1b[2" in said.out
    assert not set(said.out + said.err) & set(ESCAPES.replace("[2J", "").replace("]0;owned", "").replace("31m", ""))


# ---- files that others have put there ----------------------------------------------------------------------------------


def test_copies_that_other_tools_make_are_no_receipts(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    receipt = run / "done/00000000.json"
    for name in ("done/00000000 (1).json", "lease/00000001 (conflicted copy).json", "quarantine/x.json"):
        (run / name).parent.mkdir(exist_ok=True)
        shutil.copy(receipt, run / name)
    assert main(["status", str(run)]) == COMPLETE
    assert "1 of 1 done" in capsys.readouterr().out
    assert main(["inspect", str(run)]) == COMPLETE
    capsys.readouterr()
    assert main(["verify", str(run)]) == DAMAGED
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        f"{name} is no file of a run. Remove it" for name in ("done/00000000 (1).json", "quarantine/x.json")
    ]
    assert len(lines) == 3


# ---- corpora -----------------------------------------------------------------------------------------------------------


def test_output_in_a_corpus_behind_a_link(gpt2: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    (tmp_path / "real").mkdir()
    (tmp_path / "real/a.txt").write_text("Some words.\n")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert takes_in(str(tmp_path / "link"), str(tmp_path / "real/run/plan.parquet"))
    assert takes_in(str(tmp_path / "real"), str(tmp_path / "link/run/plan.parquet"))
    assert not takes_in(str(tmp_path / "link"), str(tmp_path / "elsewhere/plan.parquet"))
    flags = ["--executor", "local", "--corpus", str(tmp_path / "link"), "--output", str(tmp_path / "real/run")]
    assert main(["run", "--model", gpt2, *flags]) == BAD_INPUT
    assert "of the corpus, and would be part of it" in capsys.readouterr().err


def test_passwords_are_not_written_down(gpt2: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    flags = ["--corpus", "http://me:secret@127.0.0.1:1/c.jsonl", "--output", str(tmp_path / "run")]
    assert main(["run", "--model", gpt2, *flags]) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert "with a password in it" in line and "secret" not in line
    assert not (tmp_path / "run").exists()
    for fine in ("s3://bucket/a:b@c", "gs://bucket/file", "http://host:80/a@b"):
        assert absolute(fine) == fine


def test_an_array_that_was_cut_off(gpt2: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    np.save(tmp_path / "ids.npy", np.ones((40, 20), np.int32))
    raw = (tmp_path / "ids.npy").read_bytes()
    (tmp_path / "ids.npy").write_bytes(raw[: len(raw) // 2])
    flags = ["--executor", "local", "--corpus", str(tmp_path / "ids.npy"), "--output", str(tmp_path / "run")]
    assert main(["run", "--model", gpt2, *flags]) == BAD_INPUT
    assert "must hold 40 rows of 20 numbers as its header says" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_table_with_two_columns_of_a_name(gpt2: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], ["text", "text"]), tmp_path / "two.parquet")
    flags = ["--executor", "local", "--corpus", str(tmp_path / "two.parquet"), "--output", str(tmp_path / "run")]
    assert main(["run", "--model", gpt2, *flags]) == BAD_INPUT
    assert "has several columns 'text'; expected one" in capsys.readouterr().err


# ---- settings from Python ----------------------------------------------------------------------------------------------


def test_settings_are_taken_as_python_has_them(tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "model": tmp_path / "model", "corpus": tmp_path / "a.txt", "output": tmp_path / "run", "layers": [3, 6],
        "positions": (0, -1), "columns": "kind", "dtype": torch.bfloat16,
    }  # fmt: skip
    config = RunConfig(**given)
    assert config == RunConfig(
        str(tmp_path / "model"), (str(tmp_path / "a.txt"),), str(tmp_path / "run"), layers="3,6", positions="0,-1",
        columns=("kind",), dtype="bfloat16",
    )  # fmt: skip
    assert RunConfig(**{**given, "corpus": [tmp_path / "a", "b"], "layers": 3}).corpus == (str(tmp_path / "a"), "b")


def made_as(way: str, **changed: Any) -> RunConfig:
    values: dict[str, Any] = {"model": "m", "corpus": ["c"], "output": "o", **changed}
    return RunConfig(**values) if way == "Python" else RunConfig.from_dict(values)


@pytest.mark.parametrize("way", ["Python", "a file"])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"trust_remote_code": "false"}, "trust_remote_code must be true or false, got 'false'."),
        ({"stream_weights": "no"}, "stream_weights must be true or false, got 'no'."),
        ({"seed": 1.5}, "seed must be a whole number, got 1.5."),
        ({"max_docs": 2.5}, "max_docs must be a whole number, got 2.5."),
        ({"cpus_per_actor": np.float64(1.5)}, "cpus_per_actor must be a whole number, got 1.5."),
        ({"min_actors": True}, "min_actors must be a whole number, got True."),
        ({"top_p": "1"}, "top_p must be a number, got '1'."),
        ({"task_timeout": "9"}, "task_timeout must be a number, got '9'."),
        ({"model": 3}, "model must be a text, got 3."),
        ({"corpus": b"c"}, "corpus must be a list of texts, got b'c'."),
        ({"corpus": ["c", 3]}, "corpus must be a list of texts, got ('c', 3)."),
        ({"columns": {"a": 1}}, "columns must be a list of texts, got {'a': 1}."),
        ({"layers": 1.0}, "layers must be a text, got 1.0."),
        ({"estimator": "guessed"}, "estimator must be one of sampled, deflated, exact, got 'guessed'."),
        ({"device": "tpu"}, "device must be one of cpu, cuda, got 'tpu'."),
        ({"save": ["summary"]}, "save must be one of summary, factors, matrices, got ['summary']."),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, float64, got 'int8'."),
        ({"seed": -(2**63) - 1}, f"seed must be at least -2^63 and below 2^63, got {-(2**63) - 1}."),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_of_another_type(way: str, changed: dict[str, Any], message: str) -> None:
    """Refused alike wherever they come from, and none is taken for true because it is a text."""
    with pytest.raises(ConfigError) as caught:
        made_as(way, **changed)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("changed", "kept"),
    [
        ({"layers": [0, 3]}, "0,3"),
        ({"layers": range(2)}, "0,1"),
        ({"layers": np.array([3, 6])}, "3,6"),
        ({"positions": -1}, "-1"),
        ({"positions": [0, -1]}, "0,-1"),
        ({"seed": np.int64(-(2**63))}, -(2**63)),
        ({"top_p": np.float32(0.5), "estimator": "sampled"}, 0.5),
        ({"corpus": "c"}, ("c",)),
        ({"output": Path("o")}, "o"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_of_other_forms(changed: dict[str, Any], kept: Any) -> None:
    """Kept as they are written to run.json, wherever they come from."""
    one, other = made_as("Python", **changed), made_as("a file", **changed)
    name = next(iter(changed))
    assert one == other and getattr(one, name) == kept and type(getattr(one, name)) is type(kept)
    assert RunConfig.from_dict(json.loads(json.dumps(one.asdict()))) == one
