"""The page of a run: its numbers are those of the files, nothing in it can act or call out, and damage costs only itself.

The last part opens it in a browser: make test-browser.
"""

from __future__ import annotations

import base64
import errno
import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import jobs
from fisher_ray import cost, open_run, storage
from fisher_ray.cli import BAD_INPUT, COMPLETE, DAMAGED, FAILED, main
from fisher_ray.report_html import _TOP, Report, _pm, html_report
from fisher_ray.report_text import _cut
from fisher_ray.statistics import Estimate
from jobs import D_MODEL, LAYERS, Stored, gpt2  # noqa: F401

ALL = list(range(LAYERS + 1))
# What a document may hold that a page must not obey, by way of text, of a column and of a group.
HOSTILE = 'Then </script><script>alert("text")</script> & <b>more</b> <!-- &amp; ${1} `'
COLUMN = "</script><img src=x onerror=alert('column')>&\"'"
SECTIONS = [
    "summary", "health", "spectra", "dimension", "trace", "anisotropy", "overlap", "resolution", "text", "places",
    "directions", "groups", "convergence",
]  # fmt: skip
# Those that show sums.
MATRICES = ["spectra", "dimension", "trace", "anisotropy", "overlap", "resolution", "directions", "convergence"]


@pytest.fixture(scope="module")
def made(gpt2: str, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A complete run of several tasks, in groups, with a hostile document first."""
    folder = tmp_path_factory.mktemp("reported")
    texts = [HOSTILE, *jobs.some_text(6_000).split("\n\n")]
    kinds = [COLUMN if i % 3 == 0 else "prose" for i in range(len(texts))]
    lines = [json.dumps({"text": text, "kind": kind}) for text, kind in zip(texts, kinds, strict=True)]
    (folder / "docs.jsonl").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "MIN_TASK_BYTES", 600)
        config = jobs.settings(
            gpt2, folder / "docs.jsonl", folder / "run", group_by="kind", columns=("kind",), num_samples=2
        )
        _, outcome = jobs.run_here(config)
    assert outcome.tasks > 7
    return folder / "run"


@pytest.fixture(scope="module")
def report(made: Path) -> Report:
    return html_report(open_run(made))


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


class Page(HTMLParser):
    """What a browser would make of a page.

    Attributes:
        tags: (name, attributes) of every element.
        scripts: (type, content).
        sections: text outside of scripts, by section.
        figures: data and layout of every figure, by section.
        cells: text of each row of tables, by section.
    """

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[str | None, str]] = []
        self.sections: dict[str, str] = {}
        self.figures: dict[str, Any] = {}
        self.cells: dict[str, list[list[str]]] = {}
        self._inside, self._section, self._cell = "", "", False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "section":
            self._section = str(dict(attrs)["id"])
            self.sections[self._section] = ""
        if tag == "script":
            self.scripts.append((dict(attrs).get("type"), ""))
        if tag == "tr":
            self.cells.setdefault(self._section, []).append([])
        if tag == "td":
            self.cells[self._section][-1].append("")
        self._cell = self._cell or tag == "td"
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            kind, content = self.scripts[-1]
            if kind and "layout" in (parsed := json.loads(content)):
                self.figures[self._section] = parsed
        if tag == "td":
            self._cell = False
        self._inside = ""
        if tag == "section":
            self.cells[self._section] = [row for row in self.cells.get(self._section, []) if row]
            self._section = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            kind, content = self.scripts[-1]
            self.scripts[-1] = (kind, content + data)
        elif self._section:
            self.sections[self._section] += data
            if self._cell:
                self.cells[self._section][-1][-1] += data

    @property
    def text(self) -> dict[str, Any]:
        """What the text view shows."""
        (found,) = (parsed for kind, content in self.scripts if kind and "documents" in (parsed := json.loads(content)))
        return found

    def rows(self, section: str) -> str:
        return " ".join(self.sections[section].split())


def page(folder: Path) -> Page:
    return Page(html_report(open_run(folder)).html)


def array(value: Any) -> np.ndarray:
    """Plotly's packed arrays, and plain lists."""
    if not isinstance(value, dict):
        return np.array(value)
    flat = np.frombuffer(base64.b64decode(value["bdata"]), np.dtype(value["dtype"]))
    return flat.reshape([int(n) for n in value["shape"].split(",")]) if "shape" in value else flat


def damage(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


# ---- structure -------------------------------------------------------------------------------------------------------


def test_sections_in_order_each_says_how_to_read_it(report: Report) -> None:
    page = Page(report.html)
    assert report.damaged == []
    assert list(page.sections) == SECTIONS
    assert sum(attributes.get("class") == "how" for _, attributes in page.tags) == len(SECTIONS)
    assert [a["href"] for tag, a in page.tags if tag == "a"] == [f"#{name}" for name in SECTIONS]
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert not any(attributes.get("class") == "damaged" for _, attributes in page.tags)
    assert len(page.figures) == 7


def test_what_comes_from_the_corpus_is_text(report: Report, made: Path) -> None:
    page = Page(report.html)
    figures, positions, plotly, ours = len(page.figures), 1, 1, 1
    assert len(page.scripts) == figures + positions + plotly + ours
    assert not any(tag in ("img", "b") or any(name.startswith("on") for name in a) for tag, a in page.tags)
    assert COLUMN in page.sections["groups"]
    first = page.text["documents"][0]
    assert "".join(first["text"]) == HOSTILE
    assert first["title"].endswith(f"kind: {COLUMN}")


def test_nothing_is_loaded_from_elsewhere(report: Report) -> None:
    page = Page(report.html)
    for _, attributes in page.tags:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            assert (attributes.get(name) or "#").startswith(("#", "data:,"))
    (policy,) = (a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert (
        policy is not None and policy.startswith("default-src 'none';") and "http" not in policy and "*" not in policy
    )
    ours = page.scripts[-1][1] + report.html[report.html.index("<style>") : report.html.index("</style>")]
    assert not re.search(r"https?:|fetch\(|XMLHttpRequest|@import|import\(|url\(|WebSocket|sendBeacon", ours)


def test_the_same_run_gives_the_same_page(report: Report, made: Path) -> None:
    without_date = [
        re.sub(r"on \d{4}-\d\d-\d\d \d\d:\d\d UTC from", "", html) for html in (report.html, page_html(made))
    ]
    assert without_date[0] == without_date[1]


def page_html(folder: Path) -> str:
    return html_report(open_run(folder)).html


# ---- numbers -----------------------------------------------------------------------------------------------------------


def test_text_has_the_numbers_of_the_table_to_four_digits(report: Report, made: Path) -> None:
    data = Page(report.html).text
    table = Stored(made).table.to_pylist()
    assert data["layers"] == ALL
    names = [column["name"] for column in data["columns"]]
    assert names[0] == "trace" and "kept_mass" not in names
    total = 0
    for document in data["documents"]:
        name = document["title"].split(" · ")[0]
        for layer in ALL:
            rows = [row for row in table if row["document"] == name and row["layer"] == layer]
            assert document["position"] == [row["position"] for row in rows]
            assert document["text"] == [row["text"] for row in rows]
            for column in data["columns"]:
                shown = document["values"][column["name"]]
                shown = shown[layer] if column["layered"] else shown
                if column["name"] == "top_eigenvalue":
                    truth = [row["top_eigenvalues"][0] for row in rows]
                else:
                    truth = [row[column["name"]] for row in rows]
                assert [value is None for value in shown] == [value is None for value in truth]
                pairs = [(a, b) for a, b in zip(shown, truth, strict=True) if b is not None]
                np.testing.assert_allclose(*zip(*pairs, strict=True), rtol=5.1e-4)
            total += len(rows)
    assert total == len(table)
    assert None in data["documents"][0]["values"]["surprisal"]  # of the last token


@pytest.mark.parametrize(("axis", "name"), [("x", "eigenvalues"), ("x2", "whitened_eigenvalues")])
def test_spectra_are_those_of_the_means(report: Report, made: Path, axis: str, name: str) -> None:
    data = Page(report.html).figures["spectra"]["data"]
    traces = [trace for trace in data if trace.get("xaxis", "x") == axis]
    lines = [trace for trace in traces if "hovertemplate" in trace]
    bands = [trace for trace in traces if trace.get("fill") == "toself"]
    assert [line["name"] for line in lines] == [f"layer {layer}" for layer in ALL] and len(bands) == len(ALL)
    for layer, line, band in zip(ALL, lines, bands, strict=True):
        truth = Stored(made).reduced(layer, name)
        truth = truth[truth > 1e-9 * truth[0]]
        np.testing.assert_array_equal(array(line["x"]), np.arange(1, len(truth) + 1))
        np.testing.assert_allclose(array(line["y"]), truth, rtol=1e-5, atol=1e-8 * truth[0])
        upper, lower = np.split(array(band["y"]), 2)
        assert (upper > array(line["y"])).all() and (lower[::-1] < array(line["y"])).all() and (lower > 0).all()


def test_dimensions_and_traces_are_those_of_the_summary(report: Report, made: Path) -> None:
    """Dimensions less their bias, which a reader takes off."""
    figures, run = Page(report.html).figures, open_run(made)
    rows = [row for row in open_run(made).summary if row["group"] is None]
    for i, name in enumerate(("participation_ratio", "entropy_rank", "trace_rank_99")):
        shown = figures["dimension"]["data"][2 * i]
        biases = [getattr(run.spectrum(row["layer"]), name).bias for row in rows]
        np.testing.assert_allclose(
            array(shown["y"]), [row[name] - b for row, b in zip(rows, biases, strict=True)], rtol=1e-6
        )
        if name == "trace_rank_99":  # an integer, of which a jackknife tells nothing
            assert shown["error_y"]["array"] == [None] * len(ALL)
        else:
            assert (array(shown["error_y"]["array"]) >= 0).all()
    for trace, name in zip(figures["trace"]["data"], ("trace", "whitened_trace"), strict=True):
        np.testing.assert_allclose(array(trace["y"]), [row[name] for row in rows], rtol=1e-6)
    (line,) = figures["dimension"]["layout"]["shapes"][:1]
    assert line["y0"] == line["y1"] == D_MODEL


def test_overlaps_are_traces_of_products_of_projectors(report: Report, made: Path) -> None:
    """``|U_i^T U_j|_F^2 = tr(P_i P_j)``, with numpy's own eigenvectors."""
    sizes = [k for k in (1, 4, _TOP) if k < D_MODEL]
    data = Page(report.html).figures["overlap"]["data"]
    assert len(data) == len(sizes) == 2
    for k, shown in zip(sizes, data, strict=True):
        projectors = []
        for layer in ALL:
            top = np.linalg.eigh(Stored(made).reduced(layer))[1][:, -k:]
            projectors.append(top @ top.T)
        truth = [[np.trace(a @ b) / k for b in projectors] for a in projectors]
        np.testing.assert_allclose(array(shown["z"]), truth, atol=1e-5)


def test_groups_and_tokens_are_those_of_the_summary(report: Report, made: Path) -> None:
    page = Page(report.html)
    for row in open_run(made).summary:
        if row["group"] is not None:
            count, trace = open_run(made).group_traces(row["layer"])[row["group"]]
            assert count == row["positions"] and float(trace.value) == pytest.approx(row["trace"])
            spectrum = open_run(made).spectrum(
                row["layer"], row["group"]
            )  # by the blocks' own traces, not by decompositions
            assert float(trace.error) == pytest.approx(float(spectrum.trace.error), nan_ok=True)
            assert f"{row['positions']:,}" in page.rows("groups") and _pm(trace) in page.rows("groups")
    directions = open_run(made).directions
    assert [(row["layer"], row["direction"]) for row in directions] == [(k, i) for k in ALL for i in range(4)]
    shown = page.cells["directions"]
    assert len(shown) == len(directions)
    for row, (_, direction, eigenvalue, *_, raised, lowered) in zip(directions, shown, strict=True):
        assert int(direction) == row["direction"] and float(eigenvalue.split()[0]) == pytest.approx(
            row["eigenvalue"], 0.1
        )
        for said, tokens in ((raised, row["raised"]), (lowered, row["lowered"])):
            assert said == " ".join(repr(token)[1:-1].replace(" ", "·") for token in tokens)


def test_the_strongest_places_are_those_of_the_table(report: Report, made: Path) -> None:
    shown = Page(report.html).cells["places"]
    assert len(shown) == 8 * len(ALL)
    for layer in ALL:
        ranked = sorted(Stored(made).rows(layer), key=lambda row: -row["trace"])
        rows = list({row["document"]: row for row in reversed(ranked)}.values())  # the strongest of each document
        rows.sort(key=lambda row: -row["trace"])
        assert len(rows) >= 8 and rows[:8] != ranked[:8]
        for (document, position, trace, _, text), row in zip(shown[8 * layer :], rows[:8], strict=False):
            title = f"{row['document']} · kind: {row['kind']}"
            assert (document, int(position), trace) == (title, row["position"], f"{row['trace']:.4g}")
            near = [
                other["text"] for other in Stored(made).rows(layer)
                if other["document"] == row["document"] and abs(other["position"] - row["position"]) <= 12
            ]  # fmt: skip
            assert text == "".join(near).replace("\n", "↵")
    assert report.html.count("<mark>") == len(shown)


@pytest.mark.parametrize("failing", [False, True])
def test_a_validation_beside_the_run(
    made: Path, tmp_path: Path, failing: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["validate", str(made), "--json", "--positions", "2", "--layers", "1"]) == COMPLETE
    law = json.loads(capsys.readouterr().out)
    test = law["layers"]["1"]
    test["failures"] = ["order is 2.00, not 1"] if failing else []
    (tmp_path / "law.json").write_text(json.dumps(law))
    command = ["report", str(made), "-o", str(tmp_path / "r.html"), "--validation", str(tmp_path / "law.json")]
    assert main(command) == COMPLETE
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert list(page.sections) == [*SECTIONS, "validation"]
    ((layer, judged, *_, reach, _, said),) = page.cells["validation"]
    assert (layer, judged, said) == ("1", f"{test['judged']:.0%}", "order is 2.00, not 1" if failing else "pass")
    assert float(reach) == pytest.approx(test["holds_to_step"], rel=0.05)
    (line,) = (trace for trace in page.figures["validation"]["data"] if trace.get("name") == "layer 1")
    np.testing.assert_array_equal(array(line["x"]), law["steps"])
    np.testing.assert_array_equal(array(line["y"]), test["deviation"]["median"])
    assert ("fails at layers 1" if failing else "passes at layers 1") in page.rows("health")

    (tmp_path / "law.json").write_text(json.dumps({**law, "dtype": "<img src=x>"}))
    assert main(command) == COMPLETE
    assert "<img" not in (tmp_path / "r.html").read_text(encoding="utf-8").replace("<\\/", "")
    for content, complaint in (
        (json.dumps({**law, "fingerprint": "f" * 64}), "of another run"),
        ("[1]", "is not what fisher-ray validate"),
        ("{", "cannot read"),
    ):
        (tmp_path / "law.json").write_text(content)
        assert main(command) == BAD_INPUT
        (complained,) = capsys.readouterr().err.splitlines()
        assert complaint in complained


@pytest.mark.parametrize(
    "law",
    [
        {"steps": [0.1], "layers": {"1": {"failures": []}}},
        {"steps": [0.1], "layers": [1]},
        {"steps": [0.1], "layers": {"1": "fine"}},
        {"steps": [0.1], "layers": {"one": {}}},
        {"steps": None, "layers": {}},
    ],
    ids=str,
)
def test_a_validation_with_other_content_is_one_line(
    law: dict[str, Any], made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {**law, "fingerprint": Stored(made).description["fingerprint"], "run": "it", "dtype": "float64"}
    (tmp_path / "law.json").write_text(json.dumps(given))
    command = ["report", str(made), "-o", str(tmp_path / "r.html"), "--validation", str(tmp_path / "law.json")]
    assert main(command) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert "is not what fisher-ray validate RUN --json prints" in line and not (tmp_path / "r.html").exists()


def test_summary_and_health_say_what_became_of_the_tokens(report: Report, made: Path) -> None:
    page = Page(report.html)
    counts = Stored(made).counts()
    line = f"{counts['tokens']:,} = {counts['scored']:,} scored + {counts['skipped']:,} skipped + {counts['invalid']:,} invalid"
    assert line in page.rows("summary") and "complete" in page.rows("summary")
    assert "the limit is 1e-04" in page.rows("summary") and "torch" in page.rows("summary")
    assert not any(attributes.get("class") == "watch" for _, attributes in page.tags)


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (2.97512, 0.0871, "2.975 ± 0.087"),
        (1234.5, 56.0, "1234 ± 56"),
        (0.0019, 0.000086, "0.001900 ± 0.000086"),
        (3.21e-12, 4.5e-13, "3.21e-12 ± 4.5e-13"),
        (70.0, 3.5e-14, "70 ± 0"),
        (5.25, float("nan"), "5.25"),
    ],
)
def test_errors_have_two_digits_and_values_as_many_places(value: float, error: float, shown: str) -> None:
    assert _pm(Estimate(np.array(value), np.array(error), 8)) == shown


def test_documents_are_cut_to_the_longest_that_fits() -> None:
    random_ = random.Random(0)
    for _ in range(200):
        lengths = [random_.randrange(1, 60) for _ in range(random_.randrange(1, 12))]
        room = random_.randrange(len(lengths), 500)
        length = _cut(lengths, room)
        assert sum(min(n, length) for n in lengths) <= room
        assert length == max(lengths) or sum(min(n, length + 1) for n in lengths) > room


# ---- other runs --------------------------------------------------------------------------------------------------------


def undo(folder: Path, keep: int) -> None:
    """The run as it was when so many tasks were done."""
    shutil.rmtree(folder / "reduced")
    for receipt in sorted((folder / "done").iterdir())[keep:]:
        receipt.unlink()


@pytest.mark.parametrize("keep", [0, 1, 4])
def test_an_unfinished_run(copied: Path, keep: int) -> None:
    undo(copied, keep)
    report = html_report(open_run(copied))
    page = Page(report.html)
    assert report.damaged == [] and list(page.sections) == SECTIONS
    assert f"unfinished: {keep} of" in page.rows("health")
    assert any(attributes.get("class") == "watch" for _, attributes in page.tags)
    assert "there is none to be read" in page.rows("directions") or keep == 0
    if keep == 0:
        assert all("nothing to show" in page.rows(name) for name in ("spectra", "text", "places", "groups"))
        assert not page.figures
        return
    # Groups of an unfinished run against its positions' own traces.
    rows = [row for row in Stored(copied).rows(1) if row["kind"] == "prose"]
    (shown,) = (row for row in page.cells["groups"] if row[0] == "prose")
    assert shown[1] == f"{len(rows):,}"
    assert shown[2] == str(open_run(copied).group_traces(1)["prose"][1].blocks)
    assert float(shown[4].split(" ± ")[0]) == pytest.approx(np.mean([row["trace"] for row in rows]), rel=2e-2)
    trace = open_run(copied).group_traces(1)["prose"][1]
    assert shown[4] == _pm(trace)
    assert float(trace.value) == pytest.approx(np.mean([row["trace"] for row in rows]), rel=1e-5)
    scored = sum(len(document["position"]) for document in page.text["documents"])
    assert scored * len(ALL) == len(Stored(copied).table)
    assert ("cannot be halved" in page.rows("resolution")) == (keep == 1)
    assert ("there are no standard errors" in page.rows("health")) == (keep == 1)


def test_one_layer_a_window_of_positions_and_no_text(gpt2: str, tmp_path: Path) -> None:  # noqa: F811
    ids = [np.random.default_rng(i).integers(2, 400, 20) for i in range(3)]
    np.save(tmp_path / "ids.npy", np.stack(ids).astype(np.int32))
    model = jobs.save_model(tmp_path / "bare", with_tokenizer=False)
    config = jobs.settings(
        model, tmp_path / "ids.npy", tmp_path / "run", layers="1", positions="2:11:4", estimator="exact"
    )
    jobs.run_here(config)
    made = page(tmp_path / "run")
    assert [s for s in SECTIONS if s != "groups"] == list(made.sections)
    data = made.text
    assert data["layers"] == [1] and [d["position"] for d in data["documents"]] == [[2, 6, 10]] * 3
    assert [d["text"] for d in data["documents"]] == [[f"{row[t]} " for t in (2, 6, 10)] for row in ids]
    assert "2:11:4 of each document" in made.rows("summary")
    assert "overlap" not in made.figures and "One layer: there is no other" in made.rows("overlap")
    assert made.figures["dimension"]["layout"]["xaxis"]["tickvals"] == [1]
    assert "rank by" not in made.rows("places") and "rank by" not in made.rows("text")
    assert "cannot exceed d" in made.rows("text")
    (slider,) = (attributes for _, attributes in made.tags if attributes.get("type") == "range")
    assert "disabled" in slider and slider["max"] == "0"


@pytest.mark.parametrize("save", ["factors", "matrices"])
def test_tokens_along_the_first_directions_where_matrices_are_kept(save: Any, gpt2: str, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "docs.txt").write_text("A first document.\n\nAnd the second one.\n")
    config = jobs.settings(gpt2, tmp_path / "docs.txt", tmp_path / "run", save=save, num_samples=3)
    stored, _ = jobs.run_here(config)
    text = page(tmp_path / "run").text
    labels = [column["label"] for column in text["columns"]]
    assert labels[:6] == ["trace of F", "top eigenvalue", *(f"vᵀFv, direction {i}" for i in range(4))]
    for i, layer in enumerate(text["layers"]):
        kept = stored.saved(save, layer).astype(np.float64)
        matrices = kept if save == "matrices" else np.einsum("nri,nrj->nij", kept, kept)
        vectors = stored.reduced(layer, "eigenvectors")
        for k in range(4):
            expected = [v for f in matrices for v in [vectors[:, k] @ f @ vectors[:, k]]]
            got = [v for document in text["documents"] for v in document["values"][f"along_{k}"][i]]
            np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-6 * max(expected))
    # What is damaged costs these numbers, and nothing else.
    path = tmp_path / "run" / stored.receipts[0]["files"][f"{save}_1"]["path"]
    path.write_bytes(path.read_bytes()[:-1])
    report = html_report(open_run(tmp_path / "run"))
    values = [document["values"] for document in Page(report.html).text["documents"]]
    assert len(report.damaged) == 1 and all(
        set(v["along_0"][1]) == {None} and None not in v["along_0"][0] for v in values
    )
    assert values[0]["trace"] == text["documents"][0]["values"]["trace"]


def test_ranks_of_single_positions_are_said_to_be_capped(report: Report, made: Path) -> None:
    assert "cannot exceed 2, the number of sampled scores" in Page(report.html).rows("text")
    assert "are of 2 sampled scores here, too few to rank by" in Page(report.html).rows("places")
    ranks = [r for d in Page(report.html).text["documents"] for layer in d["values"]["trace_rank_99"] for r in layer]
    assert max(ranks) == 2


def test_a_hundred_long_documents_at_thirteen_layers_stay_below_ten_megabytes(made: Path) -> None:
    """Of 110 documents with 400 tokens each: text and numbers are cut, not the documents."""
    run = open_run(made)
    blocks, layers, length = run.blocks, list(range(13)), 400
    random_ = np.random.default_rng(0)

    def columns(task: int) -> dict[str, Any]:
        rows = len(layers) * length
        fixed = {"document": [f"long {task}"] * rows, "position": list(range(length)) * 13, "token": [7] * rows}
        names = (
            "trace", "participation_ratio", "entropy_rank", "trace_rank_99", "entropy", "surprisal", "kept_mass",
            "captured_share",
        )  # fmt: skip
        random_columns = {name: np.exp(5 * random_.standard_normal(rows)).astype(np.float32) for name in names}
        top = [[float(value)] for value in random_columns["trace"]]
        return {
            **fixed, **random_columns, "top_eigenvalues": top, "context": np.arange(rows), "text": [" token"] * rows,
            "kind": ["long"] * rows,
        }  # fmt: skip

    changed = {
        "layers": layers, "tasks": 110, "done_tasks": list(range(110)), "table": lambda task, _: pa.table(columns(task)),
        "blocks": lambda layer, group=None: blocks(layer % len(ALL)), "group_traces": lambda layer: {}, "summary": [],
    }  # fmt: skip
    vars(run).update(changed)
    html = html_report(run).html
    data = Page(html).text
    assert len(data["documents"]) == 100 and 50 < len(data["documents"][99]["position"]) < length
    assert data["documents"][99]["rows"] == length
    assert 7_000_000 < len(html.encode()) < 10_000_000


# ---- damage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("victim", "how", "sections"),
    [
        ("reduced/directions.parquet", Path.unlink, ["directions"]),
        ("sums/00000002-*/layer_001.npz", damage, [*MATRICES, "groups"]),
        ("sums/00000002-*/layer_001.npz", Path.unlink, [*MATRICES, "groups"]),
        ("positions/00000000-*.parquet", damage, ["text", "places"]),
        ("positions/00000000-*.parquet", Path.unlink, ["text", "places"]),
        ("progress.json", damage, []),
        ("done/00000003.json", damage, [*MATRICES, "groups", "text", "places"]),
    ],
)
def test_damage_is_said_in_place_and_the_rest_is_shown(
    copied: Path, victim: str, how: Callable[[Path], None], sections: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (path,) = copied.glob(victim)
    how(path)
    out = copied.parent / "report.html"
    assert main(["report", str(copied), "-o", str(out)]) == DAMAGED
    made = Page(out.read_text(encoding="utf-8"))
    assert list(made.sections) == SECTIONS
    assert path.name in made.rows("health")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("left out: ") and path.name in line
    for name in SECTIONS[2:]:
        said = re.search(r"left out|none to be read", made.rows(name), re.IGNORECASE)
        assert bool(said) == (name in sections), name
    if victim.startswith("sums"):
        lines = [trace["name"] for trace in made.figures["spectra"]["data"] if "hovertemplate" in trace]
        assert lines == ["layer 0", "layer 0", "layer 2", "layer 2"]
    if victim.startswith("positions"):
        assert HOSTILE not in "".join(made.text["documents"][0]["text"]) and len(made.text["documents"]) > 3


# ---- the command -------------------------------------------------------------------------------------------------------


def test_the_command_writes_the_page_and_names_it(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], report: Report
) -> None:
    out = tmp_path / "page.html"
    assert main(["report", str(made), "-o", str(out)]) == COMPLETE
    assert f"report: {out}" in capsys.readouterr().out
    assert out.read_text(encoding="utf-8")[:2_000] == report.html[:2_000]


@pytest.mark.parametrize(
    ("run", "out", "said"), [("run", "no/such/r.html", "a directory that exists"), ("none", "r.html", "no run")]
)
def test_what_cannot_be_done_is_one_line(
    made: Path, tmp_path: Path, run: str, out: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(made.parent / run), "-o", str(tmp_path / out)]) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and not (tmp_path / out).exists()


@pytest.mark.parametrize(
    "argv",
    [["report", "-o", "out"], ["validate", "-o", "out", "--positions", "1", "--layers", "1"]],
    ids=lambda argv: argv[0],
)
def test_what_cannot_be_written_leaves_the_one_before(
    argv: list[str], made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.chdir(tmp_path)
    Path("out").write_text("made before")
    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "fsync", full)
        assert main([argv[0], str(made), *argv[1:]]) == FAILED
    (line,) = capsys.readouterr().err.splitlines()
    assert "No space left on device" in line and "Make room" in line
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("out", "made before")]
    assert main([argv[0], str(made), *argv[1:]]) == COMPLETE
    assert len(Path("out").read_bytes()) > 1_000


# ---- in a browser ------------------------------------------------------------------------------------------------------

_FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync"
)


@pytest.fixture(scope="module")
def opened(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The page in Debian's chromium, with what it said, asked for and popped up."""
    from playwright.sync_api import sync_playwright

    path = tmp_path_factory.mktemp("opened") / "report.html"
    path.write_text(report.html, encoding="utf-8")
    heard = SimpleNamespace(path=path, said=[], requests=[], dialogs=[])
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=_FLAGS.split())
        page = browser.new_page(viewport={"width": 1366, "height": 800})
        page.on("console", lambda message: heard.said.append(message.text))
        page.on("pageerror", lambda error: heard.said.append(str(error)))
        page.on("request", lambda request: heard.requests.append(request.url))
        page.on("dialog", lambda dialog: (heard.dialogs.append(dialog.message), dialog.dismiss()))
        page.goto(path.as_uri())
        page.wait_for_selector("#convergence .main-svg")
        heard.page = page
        yield heard
        browser.close()


def shades(opened: SimpleNamespace) -> list[float]:
    """How dark each token is."""
    styles = opened.page.eval_on_selector_all("#documents i", "all => all.map(e => e.style.background)")
    return [float(style.rstrip(")").split(",")[-1]) if style else 0.0 for style in styles]


def slide(opened: SimpleNamespace, layer: int) -> None:
    opened.page.locator("#layer").fill(str(layer))


def numbers(opened: SimpleNamespace) -> dict[str, str]:
    """What the panel says of a token."""
    rows = opened.page.eval_on_selector_all(
        "#numbers tr", "rows => rows.map(r => [r.cells[0].textContent, r.cells[1].textContent])"
    )
    return dict(rows)


@pytest.mark.browser
def test_the_page_loads_by_itself_and_in_peace(opened: SimpleNamespace) -> None:
    assert opened.said == [] and opened.dialogs == []
    assert opened.requests == [opened.path.as_uri()]
    for name in ("spectra", "dimension", "trace", "anisotropy", "overlap", "resolution", "convergence"):
        assert opened.page.locator(f"#{name} .main-svg").count() > 0, name
    assert opened.page.locator("#documents h3").first.text_content().endswith(COLUMN)


@pytest.mark.browser
@pytest.mark.parametrize("layer", ALL)
def test_the_slider_shades_by_the_layers_own_traces(opened: SimpleNamespace, made: Path, layer: int) -> None:
    slide(opened, layer)
    assert opened.page.locator("#shown").text_content() == str(layer)
    traces = np.array([row["trace"] for row in Stored(made).rows(layer)])
    dark = np.array(shades(opened))
    assert len(dark) == len(traces)
    order = np.argsort(traces, kind="stable")
    assert (np.diff(dark[order]) >= -0.0011).all()  # no darker with less, to the rounding of colours
    assert dark[order[-1]] == dark.max() == pytest.approx(0.75) and dark.min() < 0.05


@pytest.mark.browser
def test_pointing_at_a_token_shows_its_numbers(opened: SimpleNamespace, made: Path) -> None:
    for layer, index in ((0, 3), (2, 5), (1, 17)):
        slide(opened, layer)
        opened.page.locator("#documents i").nth(index).hover()
        row = Stored(made).rows(layer)[index]
        shown = numbers(opened)
        assert opened.page.locator("#numbers .token").text_content() == row["text"]
        assert int(shown["position"]) == row["position"]
        for label, name in (("trace of F", "trace"), ("entropy of p", "entropy"), ("entropy rank", "entropy_rank")):
            assert float(shown[label]) == pytest.approx(row[name], rel=5.1e-4)
        assert float(shown["top eigenvalue"]) == pytest.approx(row["top_eigenvalues"][0], rel=5.1e-4)


@pytest.mark.browser
def test_the_drop_down_shades_by_another_number(opened: SimpleNamespace, made: Path) -> None:
    opened.page.locator("#column").select_option(label="surprisal of the next token")
    surprisal = [row["surprisal"] for row in Stored(made).rows(0)]
    dark = shades(opened)
    known = [i for i, value in enumerate(surprisal) if value is not None]
    assert dark[max(known, key=lambda i: surprisal[i])] == max(dark)
    assert all(dark[i] == 0 for i in range(len(dark)) if surprisal[i] is None)
    opened.page.locator("#column").select_option(label="trace of F")


@pytest.mark.browser
def test_the_strongest_places_of_one_layer_at_a_time(opened: SimpleNamespace, made: Path) -> None:
    tables = opened.page.locator(".places")
    assert tables.count() == len(ALL)
    for layer in (2, 0):
        opened.page.locator("#place-layer").select_option(str(layer))
        assert [table.is_visible() for table in tables.all()] == [k == layer for k in ALL]
        row = max(Stored(made).rows(layer), key=lambda row: row["trace"])
        assert opened.page.locator(".places:visible mark").first.text_content() == row["text"]


@pytest.mark.browser
def test_arrow_keys_go_through_tokens_and_layers(opened: SimpleNamespace, made: Path) -> None:
    opened.page.locator("#documents i").nth(4).hover()
    opened.page.locator("#documents").focus()
    opened.page.keyboard.press("ArrowRight")
    opened.page.keyboard.press("ArrowRight")
    opened.page.keyboard.press("ArrowLeft")
    assert int(numbers(opened)["position"]) == Stored(made).rows(0)[5]["position"]
    slide(opened, 0)
    opened.page.locator("#layer").focus()
    opened.page.keyboard.press("ArrowRight")
    assert opened.page.locator("#shown").text_content() == "1"


@pytest.mark.browser
def test_on_paper_figures_are_as_wide_as_the_page(opened: SimpleNamespace, tmp_path: Path) -> None:
    widths = "all => all.map(e => e.getBoundingClientRect().width)"
    before = opened.page.eval_on_selector_all(".figure .main-svg", widths)
    opened.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert set(opened.page.eval_on_selector_all(".figure .main-svg", widths)) == {680}
    opened.page.evaluate("dispatchEvent(new Event('afterprint'))")
    opened.page.wait_for_timeout(300)
    assert opened.page.eval_on_selector_all(".figure .main-svg", widths) == before and min(before) > 900
    opened.page.pdf(path=tmp_path / "report.pdf", prefer_css_page_size=True)
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
