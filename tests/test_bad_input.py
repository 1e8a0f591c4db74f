"""Input that cannot be: one line that says so, a nonzero exit code, and nothing left behind."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

import jobs
from fisher_ray import cost, open_run, plan
from fisher_ray.cli import main, reference_main
from fisher_ray.corpus import CorpusError
from fisher_ray.plan import ConfigError
from jobs import VOCAB, cluster, gpt2  # noqa: F401

GOOD = '{"text": "one two three"}\n'
MIB = 1 << 20


@dataclass
class Place:
    """A folder with a good corpus and a good model; a case spoils something."""

    folder: Path
    model: str

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def file(self, name: str, content: bytes | str) -> Path:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def argv(self, **changed: Any) -> list[str]:
        flags = {
            "model": self.model,
            "corpus": self.folder / "good.jsonl",
            "output": self.run,
            "max_actors": 1,
            **changed,
        }
        given = [(f"--{name.replace('_', '-')}", str(value)) for name, value in flags.items() if value is not None]
        return ["run", *(part for pair in given for part in pair)]

    def list(self) -> list[tuple[str, bytes]]:
        files = [path for path in self.folder.rglob("*") if "model" not in path.parts]
        return sorted((str(path), path.read_bytes() if path.is_file() else b"") for path in files)


@pytest.fixture
def place(gpt2: str, tmp_path: Path) -> Place:  # noqa: F811
    made = Place(tmp_path, gpt2)
    made.file("good.jsonl", GOOD * 3)
    return made


def the_error(code: int, err: str) -> str:
    """The one line of a refusal."""
    lines = err.splitlines()
    assert code not in (0, None), err
    assert len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in err, err
    return lines[0]


def refused(place: Place, capsys: pytest.CaptureFixture[str], **changed: Any) -> str:
    before = place.list()
    code = main(place.argv(**{"executor": "local", **changed}))
    message = the_error(code, capsys.readouterr().err)
    assert place.list() == before
    return message


# ---- what settings, metadata and first bytes say: refused before a worker starts -----------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "no-such/model"}, "no-such/model"),
        ({"layers": "3"}, r"layers must be in [0, 2], got 3"),
        ({"layers": "0-7"}, "got 7"),
        ({"layers": "upper"}, "layers must be"),
        ({"num_samples": "0"}, "num_samples must be at least 1, got 0"),
        ({"top_p": "0"}, "top_p must be in (0, 1], got 0"),
        ({"top_p": "1.5"}, "top_p must be in (0, 1], got 1.5"),
        ({"top_p": "nan"}, "top_p must be in (0, 1], got nan"),
        ({"token_top_p": "0"}, "token_top_p must be"),
        ({"temperature": "0"}, "temperature must be above 0"),
        ({"temperature": "inf"}, "temperature must be above 0"),
        ({"max_seq_len": "49"}, "max_seq_len must be at most 48, got 49"),
        ({"max_seq_len": "1"}, "max_seq_len of at least 2"),
        ({"stride": "47"}, "stride"),
        ({"stride": "-1"}, "stride"),
        ({"max_docs": "0"}, "max_docs must be at least 1"),
        ({"max_actors": "0"}, "actors must be at least 1"),
        ({"cpus_per_actor": "0"}, "cpus_per_actor must be at least 1"),
        ({"gpus_per_actor": "-1"}, "gpus_per_actor must be a fraction"),
        ({"gpus_per_actor": "1.5"}, "gpus_per_actor must be a fraction"),
        ({"token_draws": "2"}, "token_draws is for token_source sampled"),
        ({"positions": "some"}, "positions must be"),
        ({"seed": 2**63}, f"seed must be at least -2^63 and below 2^63, got {2**63}"),
        ({"seed": 10**70}, "seed must be at least -2^63 and below 2^63"),
        ({"column": "body"}, "no column 'body'; it has text"),
        ({"columns": "kind"}, "no column 'kind'"),
        ({"columns": "text"}, "text"),  # which the table of positions has already
        ({"encoder_column": "text"}, "has no encoder"),
        ({"corpus": "nowhere.txt"}, "corpus not found: nowhere.txt"),
        ({"corpus": "nowhere/*.txt"}, "no files in nowhere/*.txt"),
        ({"corpus": "nosuchprotocol://x.txt"}, "nosuchprotocol"),
        ({"output": "nosuchprotocol://x"}, "nosuchprotocol"),
        ({"config": "nowhere.yaml"}, "nowhere.yaml"),
        ({"model": None}, "model must be given"),
        ({"output": None}, "output must be given"),
    ],
    ids=lambda value: "-".join(map(str, *value.items())) if isinstance(value, dict) else "",
)
def test_settings(changed: Any, message: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(place, capsys, **changed)


def test_a_column_is_carried_once() -> None:
    with pytest.raises(ConfigError, match="columns must be named once each, got kind lang kind"):
        jobs.settings("model", "corpus", "run", columns=("kind", "lang", "kind"))


def test_drawn_tokens_are_in_no_group_of_tokens(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert "group_by token is for the corpus's tokens" in refused(
        place, capsys, token_source="sampled", group_by="token"
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "is empty: no byte in 1 file."),
        ("latin.txt", "caf\xe9".encode("latin-1"), "not UTF-8: byte 3 is 0xe9"),
        ("binary.txt", b"\x7fELF\x00\x01", "binary file: a zero byte at 4"),
        ("noise.txt.gz", b"not compressed at all", "noise.txt.gz"),
        ("noise.jsonl.zst", b"not compressed at all", "noise.jsonl.zst"),
        ("broken.jsonl", '{"text": "a"\n', "not a JSON object"),
        ("list.jsonl", "[1, 2]\n", "expected a JSON object, got list"),
        ("other.jsonl", '{"body": "a"}\n', "no column 'text'; it has body"),
        ("broken.parquet", b"PAR1 and no more", "broken.parquet"),
        ("broken.arrow", b"ARROW1 and no more", "broken.arrow"),
        ("broken.npy", b"\x93NUMPY and no more", "broken.npy"),
        ("corpus.pdf", b"x", "no known ending"),
    ],
)  # fmt: skip
def test_files(name: str, content: Any, message: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(place, capsys, corpus=place.file(name, content))


@pytest.mark.parametrize(
    ("values", "message"),
    [([1.5], "must hold strings or lists of token ids, got double"), ([[0.5]], "got list"), ([b"x"], "got binary")],
)
def test_columns_of_another_type(values: Any, message: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(pa.table({"text": values}), place.folder / "a.parquet")
    assert message in refused(place, capsys, corpus=place.folder / "a.parquet")


def test_columns_that_are_not_there(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(pa.table({"body": ["a"], "kind": ["b"]}), place.folder / "a.parquet")
    assert "no column 'text'; it has body, kind" in refused(place, capsys, corpus=place.folder / "a.parquet")


@pytest.mark.parametrize("array", [np.zeros((2, 2)), np.zeros(4, int), np.zeros((1, 2, 3), int)])
def test_arrays_that_are_no_token_ids(array: Any, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(place.folder / "a.npy", array)
    assert "must hold integer token ids" in refused(place, capsys, corpus=place.folder / "a.npy")


def test_a_folder_without_a_corpus(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.file("other/readme.pdf", b"x")
    assert "no files in" in refused(place, capsys, corpus=place.folder / "other")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n- b\n", "must hold settings by name, got list"), ("just words", "got str"), ("", "got NoneType"),
        ("a: [1\nb: 2", "cannot read the config file"), (b"\xff\xfe\x00", "cannot read the config file"),
        ("num_smaples: 3", "unknown setting 'num_smaples'"), ("seed: abc", "seed"), ("seed: 1.5", "seed"),
        ("num_samples: '8'", "num_samples"), ("num_samples: 2.5", "num_samples"), ("top_p: high", "top_p"),
        ("max_seq_len: '20'", "max_seq_len"), ("trust_remote_code: 'no'", "trust_remote_code"),
        ("batch_tokens: []", "batch_tokens"), ("columns: 3", "columns"), ("layers: {a: 1}", "layers"),
        ("positions: [x]", "positions must be all, last"), ("positions: {a: 1}", "positions must be a text, got {'a': 1}"),
        ("stride: x", "stride must be a whole number, got 'x'"),
        ("max-actors: many", "actors"),
        ("columns: 3", "columns must be a list of texts, got 3"), ("compile: 1", "compile must be true or false, got 1"),
        ("unit: 3", "unit must be one of paragraph, file, got 3"),
        ('{"fingerprint": "of a receipt"}', "unknown setting 'fingerprint'"),
    ],
)  # fmt: skip
def test_config_files(content: Any, message: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    actors = {"max_actors": None} if message == "actors" else {}
    assert message in refused(place, capsys, config=place.file("run.yaml", content), **actors)


@pytest.mark.parametrize("kind", ["vit", "resnet", "blt"])
def test_a_model_of_something_else(kind: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.file("other/config.json", json.dumps({"model_type": kind}))
    assert "describes no language model" in refused(place, capsys, model=place.folder / "other")


def test_an_encoder_without_a_tokenizer(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the decoder's tokens are ready, too."""
    model = jobs.save_model(place.folder / "model", "t5", with_tokenizer=False)
    corpus = place.file("a.jsonl", '{"text": [5, 6], "source": "one two"}\n')
    message = refused(place, capsys, model=model, corpus=corpus, encoder_column="source")
    assert "model has no tokenizer, which the encoder's text needs. Put tokenizer files beside the model." in message


def test_text_without_a_tokenizer(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Before a worker has loaded any model."""
    model = jobs.save_model(place.folder / "model", with_tokenizer=False)
    code = main(["plan", *place.argv(model=model)[1:]])
    assert "has no tokenizer and good.jsonl:52 holds text" in the_error(code, capsys.readouterr().err)


@pytest.mark.parametrize("flags", [["--estimator", "guessed"], ["--nonsense"], ["--seed", "one"]])
def test_flags_that_cannot_be(flags: list[str], place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*place.argv(), *flags])
    assert flags[-1] in the_error(int(str(stop.value.code)), capsys.readouterr().err)


def test_a_directory_that_is_not_ours(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.file("thesis/chapter.tex", "all of it")
    assert "is not empty and holds no run of ours" in refused(place, capsys, output=place.folder / "thesis")


def test_an_output_that_is_a_file_or_below_one(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    path = place.file("a_file", "content")
    assert "is a file" in refused(place, capsys, output=path)
    assert "a_file" in refused(place, capsys, output=path / "run")


def test_an_output_that_cannot_be_written(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert "/proc/no/such" in refused(place, capsys, output="/proc/no/such/run")


def test_a_run_json_that_is_no_run(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    for content in ("{ half", "[]", "{}"):
        place.file("thesis/run.json", content)
        assert "thesis" in refused(place, capsys, output=place.folder / "thesis")


def test_the_published_scripts_flags(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--model_name", place.model, "--output_dir", str(place.run), "--corpus", str(place.folder / "good.jsonl")]
    for argv, message in [
        (["--layer_idx", "9"], "got 9"),
        (["--layer_idx", "1"], "max_seq_len must be at most 48, got 256"),
        (["--layer_idx", "1", "--max_seq_len", "40", "--position_skip", "0"], "position_skip must be at least 1"),
        (["--layer_idx", "1", "--max_seq_len", "40", "--num_samples", "0"], "num_samples must be at least 1"),
        (["--layer_idx", "1", "--max_seq_len", "40", "--num_samples", "0", "--token_source", "sampled"], "at least 1"),
    ]:
        code = reference_main([*common, *argv])
        assert message in the_error(code, capsys.readouterr().err)
        assert not place.run.exists()


# ---- what only a worker sees -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", GOOD + '{"text": "b"\n', "byte 26: not a JSON object"),
        ("a.jsonl", GOOD + '{"body": "b"}\n', "byte 26: no column 'text'"),
        ("a.jsonl", GOOD + '{"text": 3}\n', r"a.jsonl:26: column 'text' must hold text .* got int"),
        ("a.jsonl", GOOD + '{"text": [3, -1]}\n', f"a.jsonl:26: token ids must be in .0, {VOCAB}., got -1"),
        ("a.jsonl", GOOD + '{"text": [true]}\n', "a.jsonl:26"),
        ("a.jsonl", GOOD + '{"text": "half a pair \\ud83d"}\n', "a.jsonl:26: character 12 of column 'text'"),
    ],
)  # fmt: skip
def test_documents(name: str, content: Any, message: str, place: Place) -> None:
    """Named by file and place, whichever worker meets them."""
    config = jobs.settings(place.model, place.file(name, content), place.run, num_samples=1, positions="last")
    with pytest.raises(CorpusError, match=message) as caught:
        jobs.run_here(config)
    assert "\n" not in str(caught.value)


def test_all_files_of_a_task_that_cannot_be_read_are_named(place: Place) -> None:
    """Each is found when it is corrected, which makes another run; so one run says all."""
    folder = place.folder / "texts"
    folder.mkdir()
    for name, raw in (("a", b"one two"), ("b", b"\xe9t\xe9"), ("c", b"three"), ("d", b"\x00\x00four"), ("e", b"five")):
        (folder / f"{name}.txt").write_bytes(raw)
    config = jobs.settings(place.model, folder, place.run, num_samples=1, positions="last", task_bytes=1000)
    with pytest.raises(CorpusError, match=r"b.txt is not UTF-8: .*d.txt is a binary file"):
        jobs.run_here(config)


def test_half_a_character_in_a_carried_column(place: Place) -> None:
    """Said of the corpus at once, and not tried again as what a storage refused."""
    corpus = place.file("a.jsonl", '{"text": "a", "author": "\\ud83d"}\n')
    config = jobs.settings(place.model, corpus, place.run, num_samples=1, positions="last", columns=("author",))
    with pytest.raises(CorpusError, match=r"a.jsonl:0: character 0 of column 'author' is half of a surrogate pair"):
        jobs.run_here(config)


def test_a_column_that_some_rows_lack(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """It is null there, wherever they are; one that all of the first rows lack is a mistake."""
    rows = [{"text": f"one two {i}", **({"author": "a"} if i % 3 else {})} for i in range(9)]
    corpus = place.file("a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    config = jobs.settings(place.model, corpus, place.run, num_samples=1, positions="last", columns=("author",))
    stored, _ = jobs.run_here(replace(config, group_by="author"))
    assert [row["author"] for row in stored.rows(0)] == [row.get("author") for row in rows]
    assert open_run(place.run).groups == ["None", "a"]
    place.file("good.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    message = refused(place, capsys, columns="writer", output=place.folder / "other")
    assert "no column 'writer'; its last row has text, author" in message


def test_more_values_than_a_sample_has_are_no_loss(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many are allowed is asked of a sample; the rest is for memory to say."""
    monkeypatch.setattr(plan, "_SAMPLE", 4)
    rows = [{"text": "one two", "user": "all" if i % 16 else f"user {i}"} for i in range(160)]
    corpus = place.file("a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    config = jobs.settings(place.model, corpus, place.run, num_samples=1, positions="last", group_by="user")
    config = replace(config, num_groups=4, layers="1")
    _, outcome = jobs.run_here(config)
    assert not outcome.quarantined and len(open_run(place.run).groups) == 11


def test_drawn_tokens_need_one_before_them(place: Place) -> None:
    """Windows of a model that has no token to begin with, and that do not overlap, would begin with a drawn one."""
    model = jobs.save_model(place.folder / "model", with_tokenizer=False, with_sink=False)
    np.save(place.folder / "a.npy", np.arange(100)[None] % VOCAB)
    settings = jobs.settings(model, place.folder / "a.npy", place.run, token_source="sampled", max_seq_len=20)
    with pytest.raises(ConfigError, match="expected a stride of at least 1, got 0"):
        jobs.run_here(replace(settings, stride=0))
    assert jobs.run_here(replace(settings, stride=1))[1].counts.scored == 99
    whole = replace(settings, stride=0, token_source="observed", output=str(place.folder / "observed"))
    assert jobs.run_here(whole)[1].counts.scored == 100


def corrupt_weights(place: Place) -> dict[str, Any]:
    model = shutil.copytree(place.model, place.folder / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return {"model": model}


def latin_beyond_the_first_mebibyte(place: Place) -> dict[str, Any]:
    return {"corpus": place.file("a.txt", b"\n" * MIB + b"good\n\ncaf\xe9\n")}


def ids_beyond_the_vocabulary(place: Place) -> dict[str, Any]:
    np.save(place.folder / "a.npy", np.array([[5, VOCAB - 1], [VOCAB, 5]]))
    return {"corpus": place.folder / "a.npy"}


def an_output_in_new_folders(place: Place) -> dict[str, Any]:
    """Folders made on the way go, too."""
    return ids_beyond_the_vocabulary(place) | {"output": place.folder / "new/folders/run"}


def all_documents_empty(place: Place) -> dict[str, Any]:
    return {"corpus": place.file("a.jsonl", '{"text": ""}\n' * 3)}


def a_damaged_page(place: Place) -> dict[str, Any]:
    path = place.folder / "a.parquet"
    texts = pa.table({"text": [f"document {i}" for i in range(300)]})
    pq.write_table(texts, path, compression="zstd", use_dictionary=False)
    raw = bytearray(path.read_bytes())
    raw[40:200] = bytes(160)
    path.write_bytes(raw)
    return {"corpus": path}


CASES: list[tuple[Callable[[Place], dict[str, Any]], str]] = [
    (corrupt_weights, "model"),
    (latin_beyond_the_first_mebibyte, "not UTF-8: byte 1048585 is 0xe9"),
    (ids_beyond_the_vocabulary, f"a.npy:1: token ids must be in [0, {VOCAB}), got {VOCAB}"),
    (an_output_in_new_folders, "token ids"), (all_documents_empty, "nothing to score: 3 documents"),
    (a_damaged_page, "a.parquet"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "message"), CASES, ids=[case.__name__ for case, _ in CASES])
def test_found_by_a_worker(
    spoil: Any, message: str, place: Place, cluster: None, capsys: pytest.CaptureFixture[str],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In one task: where others were done before, they are kept."""
    for least in ("MIN_TASK_BYTES", "MIN_BLOCK_BYTES"):
        monkeypatch.setattr(cost, least, 1 << 30)
    changed = spoil(place)
    assert message in refused(place, capsys, **changed)


# ---- through the command itself ----------------------------------------------------------------------------------------


def finished(process: subprocess.Popen[str], timeout: float = 90) -> tuple[int, str]:
    try:
        _, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, err


def test_the_command_says_it_in_one_line(place: Place) -> None:
    """With everything that Ray, transformers and Python print by themselves."""
    code, err = finished(jobs.command(*place.argv(model="no-such/model")))
    assert "no-such/model" in the_error(code, err)
    code, err = finished(jobs.command(*place.argv(corpus=place.file("a.jsonl", GOOD + "{"))))
    assert "not a JSON object" in the_error(code, err)
    assert not place.run.exists()


@pytest.mark.parametrize(
    "asked", [{"gpus_per_actor": 1, "max_actors": None}, {"cpus_per_actor": 1000, "max_actors": None}]
)
def test_more_than_the_machine_has(asked: Any, place: Place, cluster: None) -> None:  # noqa: F811
    """Refused, not waited for: hence in a process that can be ended."""
    if ray.cluster_resources().get("GPU", 0) and "gpus_per_actor" in asked:
        pytest.skip("there is a GPU here")
    code, err = finished(jobs.command(*place.argv(**asked), RAY_ADDRESS=jobs.address()))
    assert "that an actor needs" in the_error(code, err) and "the cluster has" in err
    assert not place.run.exists()


def test_more_than_ever_comes(place: Place) -> None:
    """A Ray that is started for the run has no node to wait for, whatever the pool may grow to."""
    code, err = finished(jobs.command(*place.argv(cpus_per_actor=1000, max_actors=2)))
    assert "no node has the 1000 CPUs" in the_error(code, err) and "this machine has" in err
    assert not place.run.exists()


def test_json_corpora_that_are_good(place: Place, cluster: None) -> None:  # noqa: F811
    """What the cases above are made from is no bad input itself."""
    assert main(place.argv()) == 0
    assert json.loads((place.run / "run.json").read_text())["config"]["model"] == place.model
