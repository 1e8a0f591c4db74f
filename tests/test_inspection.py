"""inspect, diff and export: what they say against the files, and what they say of runs that are not whole."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from safetensors.numpy import load_file
from test_run import made, rewrite, undo  # noqa: F401

import jobs
from fisher_ray import cost, open_run, reduce
from fisher_ray.cli import BAD_INPUT, COMPLETE, DAMAGED, main
from fisher_ray.report import number_table, print_table
from jobs import D_MODEL, LAYERS, Stored, gpt2  # noqa: F401


def told(capsys: pytest.CaptureFixture[str], *argv: Any) -> Any:
    """What a command says with --json."""
    assert main([*map(str, argv), "--json"]) == COMPLETE
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *argv: Any) -> str:
    """The one line that a command fails with."""
    assert main(list(map(str, argv))) == BAD_INPUT
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
    return said.err


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:  # noqa: F811
    return Path(shutil.copytree(made, tmp_path / "run"))


# ---- inspect -----------------------------------------------------------------------------------------------------------


def test_an_overview(made: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    facts, stored = told(capsys, "inspect", made), Stored(made)
    assert facts["counts"] == stored.counts() and facts["problems"] == []
    assert sum(facts["groups"].values()) == len(stored.rows(0))
    assert [row["layer"] for row in facts["layers"]] == list(range(LAYERS + 1))
    for row in facts["layers"]:
        fisher = stored.reduced(row["layer"])
        assert row["trace"][0] == pytest.approx(np.trace(fisher)) and row["trace"][1] > 0
        assert row["top_eigenvalue"][0] == pytest.approx(np.linalg.norm(fisher, 2))
        assert row["positions"] == len(stored.rows(row["layer"])) and row["blocks"] == 8
    assert main(["inspect", str(made)]) == COMPLETE
    said = capsys.readouterr().out
    assert "complete" in said and "±" in said and "8 blocks of documents" in said and "rough" not in said


def test_one_block_has_no_errors(gpt2: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    (tmp_path / "one.txt").write_text(jobs.some_text(300))
    jobs.run_here(jobs.settings(gpt2, tmp_path / "one.txt", tmp_path / "run", layers="1"))
    for argv in ([], ["--layer", "1"]):
        assert main(["inspect", str(tmp_path / "run"), *argv]) == COMPLETE
        said = capsys.readouterr().out
        assert "one block of documents" in said and ("8 sampled scores here, too few to rank by" in said) == bool(argv)
        assert "nan" not in said and "±" not in said and "0-" not in said
        assert main(["inspect", str(tmp_path / "run"), *argv, "--json"]) == COMPLETE
        json.loads(capsys.readouterr().out, parse_constant=pytest.fail)  # NaN is no JSON


def test_one_layer(made: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    facts, stored = told(capsys, "inspect", made, "--layer", 1), Stored(made)
    values = stored.reduced(1, "eigenvalues")
    assert [row["eigenvalue"] for row in facts["directions"]] == pytest.approx(values[:8].tolist())
    assert facts["directions"][-1]["cumulative_share"] == pytest.approx(values[:8].sum() / values.sum())
    assert all(0 <= row["half_angle"] <= 90 for row in facts["directions"])
    strongest: dict[str, Any] = {}
    for row in stored.rows(1):
        strongest[row["document"]] = max(row, strongest.get(row["document"], row), key=lambda each: each["trace"])
    rows = sorted(strongest.values(), key=lambda row: -row["trace"])[:5]
    assert [row["trace"] for row in facts["largest_traces"]] == [row["trace"] for row in rows]
    assert main(["inspect", str(made), "--layer", "1"]) == COMPLETE
    assert rows[0]["document"] in capsys.readouterr().out and facts["ranking"] == ""  # exact
    first = facts["largest_traces"][0]
    near = [
        row["text"]
        for row in stored.rows(1)
        if row["document"] == rows[0]["document"] and abs(row["position"] - rows[0]["position"]) <= 12
    ]
    assert first["before"] + first["text"] + first["after"] == "".join(near)
    assert facts["trace_rank_99"][1] is None and facts["entropy_rank"][1] > 0  # an integer has no jackknife


def test_positions_that_were_left_out_are_marked(gpt2: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """Every third position and two beside each other: text that does not follow is not run together."""
    (tmp_path / "one.txt").write_text(jobs.some_text(100))
    config = jobs.settings(
        gpt2, tmp_path / "one.txt", tmp_path / "run", layers="1", unit="file", positions="3,6,9,10,40"
    )
    jobs.run_here(config)
    words = {row["position"]: row["text"] for row in Stored(tmp_path / "run").rows(1)}
    shown = {
        place["position"]: place for place in told(capsys, "inspect", tmp_path / "run", "--layer", 1)["largest_traces"]
    }
    for found in (shown[9], told(capsys, "inspect", tmp_path / "run", "--position", "one.txt:0:9")):
        assert found["text"] == words[9]
        assert found["before"] == f"{words[3]} … {words[6]} … "
        assert found["after"] == words[10]
    assert shown[6]["after"] == f" … {words[9]}{words[10]}"
    assert (shown[40]["before"], shown[40]["after"]) == ("", "")


def test_one_group_of_a_layer(made: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    facts = told(capsys, "inspect", made, "--layer", 1, "--group", "2-3")
    assert facts["positions"] == open_run(made).count(1, "2-3")
    assert facts["trace"][0] == pytest.approx(np.trace(np.load(made / "reduced/layer_001/group_2-3/fisher.npy")))
    assert "no group 'de'" in refused(capsys, "inspect", made, "--layer", 1, "--group", "de")
    assert "give --layer as well" in refused(capsys, "inspect", made, "--group", "2-3")


def test_one_position(made: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    stored = Stored(made)
    row = stored.rows(2)[200]
    name = f"{row['document']}:{row['position']}"
    facts = told(capsys, "inspect", made, "--position", name)
    assert [here["layer"] for here in facts["layers"]] == list(range(LAYERS + 1))
    assert facts["layers"][2]["trace"] == row["trace"]
    factors = stored.saved("factors", 2)[200].astype(np.float64)
    truth = np.linalg.eigvalsh(factors.T @ factors)[::-1]
    assert facts["eigenvalues"]["2"] == pytest.approx(truth, abs=1e-9 * truth[0])
    here = {other["position"]: other["text"] for other in stored.rows(2) if other["document"] == row["document"]}
    near = {t: here[t] for t in sorted(here) if abs(t - row["position"]) <= 12}
    assert facts["before"] == "".join(text for t, text in near.items() if t < row["position"])
    assert facts["after"] == "".join(text for t, text in near.items() if t > row["position"])
    assert main(["inspect", str(made), "--position", name]) == COMPLETE
    assert f"[{row['text']}]".strip() in capsys.readouterr().out
    assert "its positions run from 0 to" in refused(capsys, "inspect", made, "--position", f"{row['document']}:99999")
    assert "has no document 'no.txt:0'" in refused(capsys, "inspect", made, "--position", "no.txt:0:1")
    assert "must be DOCUMENT:POSITION" in refused(capsys, "inspect", made, "--position", "no.txt")


def test_an_unfinished_run_and_one_of_two_blocks(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    undo(copied, 4)
    facts = told(capsys, "inspect", copied)
    assert facts["status"].startswith("unfinished: 4 of")
    assert main(["inspect", str(copied)]) == COMPLETE
    assert "few, so the errors are rough" in capsys.readouterr().out
    undo_all = Path(shutil.copytree(copied, copied.parent / "none"))
    for receipt in (undo_all / "done").iterdir():
        receipt.unlink()
    facts = told(capsys, "inspect", undo_all)
    assert facts["layers"] == [] and len(facts["problems"]) == LAYERS + 1


def test_a_damaged_layer_is_named_and_the_others_are_shown(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    victim = next(copied.glob("tree/*/layer_001.npz"))
    raw = bytearray(victim.read_bytes())
    raw[100] ^= 1
    victim.write_bytes(raw)
    assert main(["inspect", str(copied), "--json"]) == DAMAGED
    facts = json.loads(capsys.readouterr().out)
    assert [row["layer"] for row in facts["layers"]] == [0, 2]
    (line,) = facts["damaged"]
    assert "is damaged" in line and victim.name in line and facts["problems"] == []


@pytest.mark.parametrize("how", ["gone", "cut", "changed"])
def test_a_damaged_table_costs_its_own_positions(how: str, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Arrow reads past checksums; a place is looked up by it and read by them."""
    first, second = (receipt["files"]["positions"]["path"] for receipt in Stored(copied).receipts[:2])
    documents = [pq.read_table(copied / path, columns=["document"])["document"][0].as_py() for path in (first, second)]
    raw = bytearray((copied / first).read_bytes())
    if how == "gone":
        (copied / first).unlink()
    else:
        raw[len(raw) // 3] ^= 1
        (copied / first).write_bytes(raw if how == "changed" else raw[:-9])
    for name, code in zip(documents, (DAMAGED, COMPLETE), strict=True):
        assert main(["inspect", str(copied), "--position", f"{name}:1"]) == code
        said = capsys.readouterr()
        if code == DAMAGED:
            (line,) = said.err.splitlines()
            assert Path(first).name in line and said.out == ""
        else:
            assert said.err == "" and said.out


@pytest.mark.parametrize("command", ["inspect", "diff", "export", "project"])
def test_a_damaged_layer_costs_a_command_that_layer(
    command: str, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    victim = next(copied.glob("tree/*/layer_001.npz"))
    victim.write_bytes(victim.read_bytes()[:-1])
    path = tmp_path / "means.npz"
    arguments = {"diff": [copied], "export": ["-o", path], "inspect": ["--layer", 1], "project": []}[command]
    as_json = [] if command == "export" else ["--json"]
    assert main([command, str(copied), *map(str, arguments), *as_json]) == DAMAGED
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith("left out: ") and "is damaged" in line and victim.name in line
    if command == "export":
        assert {name.split("/")[0] for name in np.load(path)} == {"layer_000", "layer_002"}
        return
    facts = json.loads(said.out)
    if command == "inspect":  # what is said of its positions is in other files
        largest = max(row["trace"] for row in Stored(copied).rows(1))
        assert facts["largest_traces"][0]["trace"] == largest and "trace" not in facts
        assert main(["inspect", str(copied), "--layer", "1"]) == DAMAGED
        assert facts["largest_traces"][0]["document"] in capsys.readouterr().out
    else:
        assert sorted({row["layer"] for row in facts["layers" if command == "diff" else "directions"]}) == [0, 2]


def test_damage_that_leaves_nothing_to_show_is_one_line(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copied / "run.json").write_bytes((copied / "run.json").read_bytes()[:-2])
    assert main(["inspect", str(copied)]) == DAMAGED
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and "run.json is damaged" in said.err


def test_a_damaged_table_costs_its_positions(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    victim = next(copied.glob("positions/00000001-*.parquet"))
    raw = bytearray(victim.read_bytes())
    raw[len(raw) // 2] ^= 1
    victim.write_bytes(raw)
    assert main(["inspect", str(copied), "--layer", "1", "--json"]) == DAMAGED
    facts = json.loads(capsys.readouterr().out)
    assert facts["trace"][0] > 0 and len(facts["largest_traces"]) == 5 and len(facts["damaged"]) == 1


@pytest.mark.parametrize("command", ["inspect", "export", "diff"])
def test_of_no_run(command: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    more = {"inspect": [], "export": ["-o", tmp_path / "x.npz"], "diff": [made]}[command]
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    for folder in ("empty", "other", "none"):
        assert "holds no run" in refused(capsys, command, tmp_path / folder, *more)


@pytest.mark.parametrize("command", ["inspect", "status", "verify", "clean", "report", "validate", "project"])
def test_of_a_newer_format(command: str, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is said of what is not understood, least of all that it is sound."""
    rewrite(copied / "run.json", schema="run.99")
    assert "this version reads 'run.5'" in refused(capsys, command, copied)


# ---- diff --------------------------------------------------------------------------------------------------------------


def test_a_run_differs_from_another_and_not_from_itself(
    made: Path, gpt2: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    same = told(capsys, "diff", made, made)
    for row in same["layers"]:
        assert row["distance"] == 0 and row["overlap"] == pytest.approx(1) and row["paired"]
        assert row["layer"] == row["other_layer"] and row["sketch_errors"] == [0, 0]
        assert row["trace"]["change"] == row["whitened_entropy_rank"]["change"] == [0, 0]
    assert same["unlike"] == []
    elsewhere = Path(shutil.copytree(made, tmp_path / "elsewhere"))
    fields = json.loads((made / "run.json").read_text())["result_fields"]
    rewrite(elsewhere / "run.json", result_fields={**fields, "corpus": "other documents, as many"})
    for row in told(capsys, "diff", made, elsewhere)["layers"]:
        assert not row["paired"] and row["trace"]["change"][1] > 0

    (tmp_path / "docs.txt").write_text(jobs.some_text(3_000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "MIN_TASK_BYTES", 300)  # more than one block
        jobs.run_here(jobs.settings(gpt2, tmp_path / "docs.txt", tmp_path / "other", layers="0,2", estimator="exact"))
    facts, runs = told(capsys, "diff", made, tmp_path / "other"), (Stored(made), Stored(tmp_path / "other"))
    assert [row["layer"] for row in facts["layers"]] == [0, 2]
    for row in facts["layers"]:
        one, other = (run.reduced(row["layer"]) for run in runs)
        assert row["distance"] == pytest.approx(np.linalg.norm(other - one) / np.linalg.norm(one))
        bases = [np.linalg.eigh(f)[1][:, -8:] for f in (one, other)]
        assert row["overlap"] == pytest.approx(np.linalg.norm(bases[0].T @ bases[1]) ** 2 / 8)
        moved = np.linalg.eigvalsh(other - one)
        assert [row["lost"], row["gained"]] == pytest.approx([max(0, -moved[0]), max(0, moved[-1])])
        errors = [open_run(run.folder).spectrum(row["layer"]).trace.error for run in runs]
        assert row["trace"]["change"] == pytest.approx([np.trace(other) - np.trace(one), np.hypot(*errors)])
        whitened = [open_run(run.folder).spectrum(row["layer"], whitened=True).trace for run in runs]
        assert row["whitened_trace"]["values"] == pytest.approx([float(trace.value) for trace in whitened])
        assert not row["paired"]
    assert facts["random_overlap"] == 8 / D_MODEL
    assert main(["diff", str(made), str(tmp_path / "other")]) == COMPLETE
    said = capsys.readouterr().out
    assert "independent samples" in said and "different quantities" not in said  # exact or sampled, it is F
    config = jobs.settings(
        gpt2,
        tmp_path / "docs.txt",
        tmp_path / "third",
        layers="0",
        temperature=0.5,
        positions="::2",
        estimator="sampled",
    )
    jobs.run_here(config)
    assert main(["diff", str(tmp_path / "other"), str(tmp_path / "third")]) == COMPLETE
    assert "different quantities: they differ in positions, temperature" in capsys.readouterr().out


def test_two_groups_and_two_layers_of_a_run(made: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    run, groups = open_run(made), ("2-3", "4-7")
    facts = told(capsys, "diff", made, "--group", *groups)
    assert facts["groups"] == list(groups) and facts["unlike"] == []
    assert [row["layer"] for row in facts["layers"]] == list(range(LAYERS + 1))
    for row in facts["layers"]:
        k = row["layer"]
        one, other = (np.load(made / f"reduced/layer_{k:03d}/group_{group}/fisher.npy") for group in groups)
        assert row["distance"] == pytest.approx(np.linalg.norm(other - one) / np.linalg.norm(one))
        assert row["trace"]["values"] == pytest.approx([np.trace(one), np.trace(other)])
        assert row["positions"] == [run.count(k, group) for group in groups]
        # Of the difference, each block left out of both groups.
        parts = [
            {b: (sums.count, sums.fisher.trace) for b, sums in zip(found.numbers, found.sums, strict=True)}
            for found in (run.blocks(k, group) for group in groups)
        ]
        every = sorted({*parts[0], *parts[1]})
        left = []
        for b in every:
            kept = [[part[c] for c in part if c != b] for part in parts]
            means = [sum(t for _, t in each) / sum(n for n, _ in each) for each in kept]
            left.append(means[1] - means[0])
        change, error = row["trace"]["change"]
        assert change == pytest.approx(np.trace(other) - np.trace(one))
        count = len(every)
        assert error == pytest.approx(np.sqrt((count - 1) / count * np.square(np.array(left) - change).sum()))
        assert row["paired"]

    assert main(["diff", str(made), "--group", *groups]) == COMPLETE
    said = capsys.readouterr().out
    one, other = (min(row["blocks"][i] for row in facts["layers"]) for i in (0, 1))
    assert "group 2-3" in said and "group 4-7" in said and f"left out of both: of {one} and {other}" in said
    (row,) = told(capsys, "diff", made, "--layers", "0,2")["layers"]
    one, other = (Stored(made).reduced(k) for k in (0, 2))
    assert (row["layer"], row["other_layer"]) == (0, 2)
    assert row["distance"] == pytest.approx(np.linalg.norm(other - one) / np.linalg.norm(one))
    assert main(["diff", str(made), "--layers", "0,2"]) == COMPLETE
    assert "0 -> 2" in capsys.readouterr().out
    for argv, pairs in (
        ([made, "--layers", "2,0"], [(2, 0)]),
        ([made, "--layers", "1-2"], [(1, 2)]),
        ([made, made, "--layers", "all"], [(0, 0), (1, 1), (2, 2)]),
    ):
        found = told(capsys, "diff", *argv)["layers"]
        assert [(row["layer"], row["other_layer"]) for row in found] == pairs
    (row,) = told(capsys, "diff", made, made, "--layers", 1, "--group", "2-3")["layers"]
    assert row["positions"] == [run.count(1, "2-3")] * 2 and row["trace"]["change"] == [0, 0]
    for argv, words in (
        ([made], "diff needs two runs, or of one run two of --group or two of --layers"),
        ([made, "--group", "2-3"], "diff needs two runs"),
        ([made, made, made], "at most two of runs"),
        ([made, "--layers", 1], "diff needs two runs"),
        ([made, "--layers", "0-2"], "at most two of layers, got 0 1 2"),
        ([made, "--layers", "0,9"], "layer must be one of [0, 1, 2], got 9"),
        ([made, "--layers", "2-1"], "layers '2-1' names none; the range runs backwards"),
        ([made, "--group", "2-3", "de"], "no group 'de'"),
    ):
        assert words in refused(capsys, "diff", *argv)


@pytest.mark.parametrize("width", [40, 80, 100, None])
def test_no_number_is_cut(width: int | None) -> None:
    """On a terminal of any width; of text a column may be."""
    numbers = [f"{value:.4g} ± {value / 7:.2g}" for value in (1.23456e-05, 54321.0, 0.0012345, 9.87e-11, 3.2e8)]
    table = number_table("document", *"abcde", folded="document")
    table.add_column("text", no_wrap=True, overflow="ellipsis")
    table.add_row(
        "a/document/with/a/long/name.jsonl:123456", *numbers, "a text that is longer than there is room for " * 3
    )
    said = io.StringIO()
    console = Console(file=said, width=width or 120, force_terminal=width is not None, color_system=None)
    print_table(console, table)
    assert all(number in said.getvalue() for number in numbers)
    assert console.width == (width or 120)


@pytest.fixture(scope="module")
def kinds(gpt2: str, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A run of eight blocks whose groups are in some of them: b begins where a has not ended, and c is in the last."""
    folder = tmp_path_factory.mktemp("kinds")
    texts = [text for _, text in jobs.paragraphs(jobs.some_text(12_000).encode())]
    named = {range(0, 4): "a", range(4, 6): "ab", range(6, 9): "b"}
    lines = []
    for i, text in enumerate(texts):
        tenth = 10 * i // len(texts)
        kind = next((names[i % len(names)] for span, names in named.items() if tenth in span), "b")
        lines.append(json.dumps({"text": text, "kind": "c" if i == len(texts) - 1 else kind}))
    (folder / "docs.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "MIN_TASK_BYTES", 300)
        patch.setattr(reduce, "FAN_IN", 8)
        jobs.run_here(jobs.settings(gpt2, folder / "docs.jsonl", folder / "run", group_by="kind", num_samples=2))
    return folder / "run"


@pytest.mark.parametrize("groups", ["ab", "ba", "ac", "bc"])
def test_groups_that_are_not_in_all_blocks(groups: str, kinds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their errors against leaving out each block by hand; those of a group in one block are not known."""
    run = open_run(kinds)
    assert [run.group_title(name) for name in (groups[0], "", " ")] == [groups[0], '""', '" "']
    parts = []
    for group in groups:
        found = run.blocks(1, group)
        parts.append({b: (s.count, s.fisher.trace) for b, s in zip(found.numbers, found.sums, strict=True)})
    every = sorted({*parts[0], *parts[1]})
    assert len({tuple(part) for part in parts}) == 2 and len(run.block_positions) == 8
    (row,) = told(capsys, "diff", kinds, "--layers", 1, "--group", *groups)["layers"]
    assert row["blocks"] == [len(part) for part in parts] and row["paired"]
    assert main(["diff", str(kinds), "--layers", "1", "--group", *groups]) == COMPLETE
    shown = capsys.readouterr().out
    assert all(f"; group {group}, {run.count(1, group):,} positions\n" in shown for group in groups)
    if "c" in groups:
        assert row["blocks"][1] == 1 and row["trace"]["change"][1] is None
        assert "No standard errors: one side is of one block of documents" in shown and "±" not in shown
        return
    few = f"of {len(parts[0])} and {len(parts[1])} (few, so the errors are rough)"
    assert f"± one standard error of the difference, each block of documents left out of both: {few}" in shown

    def difference(without: int | None) -> float:
        kept = [[part[b] for b in part if b != without] for part in parts]
        one, other = (sum(t for _, t in each) / sum(n for n, _ in each) for each in kept)
        return other - one

    whole = difference(None)
    left = np.array([difference(b) for b in every])
    count = len(every)
    expected = np.sqrt((count - 1) / count * np.square(left - whole).sum())
    assert row["trace"]["change"] == pytest.approx([whole, expected])


def test_runs_of_other_shape_are_refused(made: Path, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    rewrite(copied / "run.json", layers=[7])
    assert "no layer in common" in refused(capsys, "diff", made, copied)
    rewrite(copied / "run.json", d_model=13)
    assert f"got d_model {D_MODEL} in" in refused(capsys, "diff", made, copied)


# ---- export ------------------------------------------------------------------------------------------------------------

WHITENED = "whitened_eigenvalues"


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_exported_arrays_are_those_of_the_run(
    suffix: str, made: Path, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    path = tmp_path / f"means.{suffix}"
    assert main(["export", str(made), "-o", str(path)]) == COMPLETE
    arrays = dict(np.load(path)) if suffix == "npz" else load_file(path)
    np.testing.assert_array_equal(arrays["layer_001/fisher"], Stored(made).reduced(1))
    np.testing.assert_array_equal(
        arrays["layer_002/group/2-3/fisher"], np.load(made / "reduced/layer_002/group_2-3/fisher.npy")
    )
    fisher, vectors = arrays["layer_000/fisher"], arrays["layer_000/eigenvectors"]
    values = (vectors * (fisher @ vectors)).sum(
        0
    )  # rounding to float32 leaves some below zero, which are stored as that
    np.testing.assert_allclose(fisher @ vectors, vectors * values, atol=1e-12 * abs(fisher).max())
    np.testing.assert_allclose(arrays["layer_000/eigenvalues"], values.clip(0), atol=1e-12 * abs(fisher).max())
    assert arrays["layer_000/positions"] == len(Stored(made).rows(0))
    for where, folder in (("layer_001", "layer_001"), ("layer_002/group/2-3", "layer_002/group_2-3")):
        reduced = {name: np.load(made / f"reduced/{folder}/{name}.npy") for name in ("normalised_fisher", WHITENED)}
        np.testing.assert_array_equal(arrays[f"{where}/normalised_fisher"], reduced["normalised_fisher"])
        np.testing.assert_allclose(arrays[f"{where}/{WHITENED}"], reduced[WHITENED], atol=1e-9 * reduced[WHITENED][0])


def test_other_formats_are_not_written(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    assert "writes .safetensors or .npz" in refused(capsys, "export", made, "-o", tmp_path / "means.pt")
    assert not list(tmp_path.iterdir())
