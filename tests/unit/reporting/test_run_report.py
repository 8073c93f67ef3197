"""The page of a run: what is on it, that it needs nothing else, and that no text of it becomes markup."""

from __future__ import annotations

import base64
import re
import shutil
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from fake_runs import QUIET, log_step, make_run, run_config, sample
from matplotlib.figure import Figure

from megatron_mapo.cli import main
from megatron_mapo.config import TrackingConfig
from megatron_mapo.errors import ConfigError, DataError
from megatron_mapo.reporting.run_data import load_run
from megatron_mapo.reporting.run_report import draw_heatmap, histogram, histogram_edges, report, sequence_histogram
from megatron_mapo.tracking import Tracker
from megatron_mapo.tracking.plots import draw_waterfall
from megatron_mapo.tracking.rollouts import read_rollouts

HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(2)> {{ 7*7 }} \" ' & $x_1$ \x00\x1b[31m"


class Document(HTMLParser):
    """Tags, attributes and text of a page, as a browser would see them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def pictures(self) -> dict[str, ElementTree.Element]:
        """The SVG documents by what they show."""
        found = [attributes for tag, attributes in self.tags if tag == "img"]
        decode = {a["alt"]: base64.b64decode(a["src"].removeprefix("data:image/svg+xml;base64,")) for a in found}
        return {alt: ElementTree.fromstring(svg) for alt, svg in decode.items()}


def page_of(folder: Path) -> Document:
    return Document(report(folder).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "plain")


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return report(run).read_text(encoding="utf-8")


class TestContent:
    def test_a_finished_run(self, html):
        page = Document(html)
        for text in ("step 6 of 6, finished", "aggregation_mode mix", "2 ranks on cpu", "megatron-core 0.16.1"):
            assert text in page.text
        for text in ("1 updates skipped", "1 servers that came back", "trainers started"):
            assert text in page.text
        assert "Best and worst of the last 10 steps only (here 1 to 6), not of the whole run" in page.text
        assert "actor.optim.lr" in page.text
        expected = {
            *("Reward of the rollouts", "Held-out accuracy", "Response length", "Loss", "Gradient norm"),
            *(
                "Entropy (nat per token)",
                "KL (nat per token)",
                "Share of tokens clipped",
                "Success rate p of the groups",
            ),
            *("λ of the groups", "Advantage", "Seconds per step", "Mismatch", "KL(server || trainer) (nat per token)"),
            *("Rewards of the responses", "Advantages of the responses", "Lengths (tokens) of the responses"),
            *("Phases of the median step", "Phases of the last step"),
        }
        assert expected <= page.pictures().keys()

    def test_groups_are_shown_with_their_best_and_worst_responses(self, html):
        summaries = re.findall("<summary>(.*?)</summary>", html)
        best = [float(s.split("mean reward ")[1].split()[0]) for s in summaries if s.startswith("best")]
        worst = [float(s.split("mean reward ")[1].split()[0]) for s in summaries if s.startswith("worst")]
        assert len(best) == len(worst) == 3
        assert min(best) > max(worst)
        assert "4&lt;|im_end|&gt;" in html

    def test_seconds_of_the_phases_are_summed(self, html):
        assert "<td>rollout</td><td>12.0</td><td>2.00</td><td>50.0%</td>" in html

    def test_the_heatmap_has_the_shares_of_every_step(self, run):
        rows = load_run(run).metrics
        steps, shares = histogram(rows, "group/p_hist")
        assert steps.tolist() == [1, 2, 3, 4, 5, 6]
        assert shares.shape == (9, 6)
        assert shares.sum(0) == pytest.approx(1.0)
        assert shares[4, 2] == rows[2]["group/p_hist_04"]
        assert histogram(rows, "no/such") is None

    @pytest.mark.parametrize("column", ["reward", "advantage", "length"])
    def test_histograms_of_the_sequences_count_those_of_every_step(self, column, run):
        steps, shares, edges = sequence_histogram(load_run(run), column)
        assert steps.tolist() == [1, 2, 3, 4, 5, 6]
        assert shares.sum(0) == pytest.approx(1.0)
        values = read_rollouts(run / "rollouts/step_000003.parquet", [column])[column].to_pylist()
        inside = [sum(low <= value < high for value in values) / len(values) for low, high in pairwise(edges)]
        assert shares[:, 2] == pytest.approx(inside)

    @pytest.mark.parametrize(("longest", "width"), [(3, 1), (27, 1), (28, 2), (52, 2), (53, 3)])
    def test_bins_of_lengths_hold_equally_many_lengths(self, longest, width):
        edges = histogram_edges(np.array([3, longest]), whole=True)
        assert edges[0] == 2.5
        assert set(np.diff(edges)) == {width}
        assert edges[-2] < longest < edges[-1]

    def test_bins_of_a_single_value(self):
        assert histogram_edges(np.array([1.0, 1.0]), whole=False).tolist() == [0.5, 1.5]

    def test_missing_steps_stay_blank(self):
        figure = Figure()
        draw_heatmap(figure, (np.array([2.0, 5.0]), np.array([[0.25, 1.0], [0.75, 0.0]])), "x")
        (image,) = figure.axes[0].images
        assert image.get_array().filled(-1).tolist() == [[0.25, -1, -1, 1.0], [0.75, -1, -1, -1]]
        assert list(image.get_extent()) == [1.5, 5.5, 0, 1]

    def test_phases_stand_where_they_were_in_the_step(self, html):
        row = {"seconds_at/update": 2.5, "seconds_at/rollout": 0.25, "seconds/rollout": 2.0, "seconds/update": 1.0}
        axes = Figure().subplots()
        draw_waterfall(axes, {"step": 3, "seconds/step": 4.0, **row}, "x")
        assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == [(0.25, 2.0), (2.5, 1.0)]
        assert [label.get_text() for label in axes.get_yticklabels()] == ["rollout", "update"]
        svg = ElementTree.tostring(Document(html).pictures()["Phases of the last step"], "unicode")
        assert "Step 6, the last one: 4 s" in svg


class TestStates:
    def test_a_run_that_has_just_begun(self, run, tmp_path):
        shutil.copytree(run, tmp_path / "begun")
        for name in ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl", "starts.jsonl"):
            (tmp_path / "begun" / name).unlink()
        page = page_of(tmp_path / "begun")
        assert "No step is finished yet." in page.text
        assert "step 0 of 6, not finished" in page.text
        assert page.pictures() == {}

    def test_an_unfinished_run_without_evaluation(self, tmp_path):
        page = page_of(make_run(tmp_path / "half", "data.eval=null", steps=3, evaluate=False))
        assert "step 3 of 6, not finished" in page.text
        assert "There is no evaluation" in page.text
        assert "Held-out accuracy" not in page.pictures()

    def test_a_resumed_run_has_each_step_once(self, tmp_path):
        folder = make_run(tmp_path / "resumed", steps=4)
        config = run_config(folder)
        tracker = Tracker(folder, QUIET, 6, 2)
        tracker.log_start({"ranks": 1, "device": "cpu", "host": "h", "layout": {"tensor": 1}, "versions": {}})
        for step in (3, 4, 5, 6):
            log_step(tracker, config, step, sample(step, 0.5, np.random.default_rng(step), ("4", "5")), "again?")
        tracker.close()
        assert [row["step"] for row in load_run(folder).metrics] == [1, 2, 3, 4, 5, 6]
        page = page_of(folder)
        assert "trainers started again after step 2" in page.text
        assert "again? 0" in page.text

    def test_without_rollouts_the_samples_are_shown(self, run, tmp_path):
        shutil.copytree(run, tmp_path / "old")
        shutil.rmtree(tmp_path / "old/rollouts")
        (tmp_path / "old/starts.jsonl").unlink()
        metrics = tmp_path / "old/metrics.jsonl"
        metrics.write_text(re.sub(r'"seconds_at/[^,]*, ', "", metrics.read_text()))
        page = page_of(tmp_path / "old")
        assert "samples.jsonl (parts of groups)" in page.text
        assert "as seen" in page.text
        assert "not recorded" in page.text
        shown = page.pictures().keys()
        assert "Seconds per step" in shown
        assert not [alt for alt in shown if alt.startswith("Phases of") or alt.endswith("of the responses")]

    def test_metrics_that_are_not_finite(self, tmp_path):
        folder = make_run(tmp_path / "nan", steps=1)
        tracker = Tracker(folder, TrackingConfig(tensorboard=False, plots=False, progress=False), 6, 1)
        tracker.log(2, {"reward/mean": float("nan"), "loss/total": float("inf"), "seconds/step": float("nan")})
        tracker.close()
        assert "step 2 of 6" in page_of(folder).text


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Document:
    folder = tmp_path_factory.mktemp("hostile") / "run"
    make_run(folder, texts=(HOSTILE, HOSTILE), question=HOSTILE)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("path: tiny", "path: '<script>alert(3)</script>'"))
    metrics = folder / "metrics.jsonl"
    # A phase named by whoever wrote the file ends up in a legend.
    metrics.write_text(metrics.read_text().replace("seconds/rollout", "seconds/<script>alert(4)</script>"))
    return page_of(folder)


class TestSafety:
    def test_no_text_becomes_markup(self, hostile):
        tags = {tag for tag, _ in hostile.tags}
        assert "script" not in tags
        attributes = {name for _, found in hostile.tags for name in found}
        assert not [name for name in attributes if name.startswith("on")]
        assert all(found["src"].startswith("data:image/") for tag, found in hostile.tags if tag == "img")
        assert "<script>alert(1)</script><img src=x onerror=alert(2)> {{ 7*7 }}" in hostile.text
        assert "<script>alert(3)</script>" in hostile.text

    def test_no_picture_has_a_script(self, hostile):
        for svg in hostile.pictures().values():
            assert not [element.tag for element in svg.iter() if "script" in element.tag]

    def test_the_page_may_run_and_load_nothing(self, hostile):
        policy = [a["content"] for tag, a in hostile.tags if tag == "meta" and "http-equiv" in a]
        assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
        addresses = [v for _, a in hostile.tags for k, v in a.items() if k in ("src", "href") and v]
        assert not [v for v in addresses if not v.startswith("data:")]
        assert not {tag for tag, _ in hostile.tags} & {"link", "iframe", "object", "form", "base"}


class TestMistakes:
    def test_a_folder_that_is_no_run(self, tmp_path, capsys):
        assert main(["report", str(tmp_path)]) == DataError.exit_code
        assert "is not the folder of a run" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("text", ["a: [", "- 1\n", "trainer: {}\n"])
    def test_a_configuration_that_is_none(self, text, tmp_path):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(DataError, match=r"config\.yaml"):
            report(tmp_path)

    def test_a_damaged_table_is_named(self, run, tmp_path):
        shutil.copytree(run, tmp_path / "damaged")
        (tmp_path / "damaged/rollouts/step_000006.parquet").write_bytes(b"x")
        with pytest.raises(DataError, match=r"step_000006\.parquet"):
            report(tmp_path / "damaged")

    def test_an_output_that_cannot_be_written(self, run, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigError, match="--output"):
            report(run, tmp_path / "file/page.html")

    def test_the_output_goes_where_it_is_wanted(self, run, tmp_path, capsys):
        assert main(["report", str(run), "--output", str(tmp_path / "deep/page.html")]) == 0
        assert capsys.readouterr().out == f"{tmp_path / 'deep/page.html'}\n"
        assert (tmp_path / "deep/page.html").stat().st_size > 10_000
