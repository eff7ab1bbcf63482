"""What pictures say of themselves: bands and thin lines by name, no interval where there is none, nothing hidden."""

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from tests.unit.evaluation.test_position_loss import write_parts
from tests.unit.evaluation.words_toy import fake, flat
from torchtitan_deltaproduct.evaluation import figures
from torchtitan_deltaproduct.evaluation.effective_rank import evaluation
from torchtitan_deltaproduct.evaluation.effective_rank.figures import comparison, of_one
from torchtitan_deltaproduct.evaluation.effective_rank.results import Result
from torchtitan_deltaproduct.evaluation.effective_rank.transitions import Tally
from torchtitan_deltaproduct.evaluation.files import finite, write_array
from torchtitan_deltaproduct.evaluation.length_extrapolation.figures import loss_figure
from torchtitan_deltaproduct.evaluation.length_extrapolation.results import summarise
from torchtitan_deltaproduct.evaluation.pieces import Measured, Pieces
from torchtitan_deltaproduct.evaluation.state_tracking.figures import accuracy_figure
from torchtitan_deltaproduct.evaluation.state_tracking.problems import Counts, Problem
from torchtitan_deltaproduct.evaluation.state_tracking.results import by_setting
from torchtitan_deltaproduct.models.args import DeltaProductArgs


@pytest.fixture
def drawn(monkeypatch):
    """{name of the file: figure}, laid out but not written."""
    kept = {}

    def keep(figure, path):
        figure.canvas.draw()
        kept[path.name] = figure

    monkeypatch.setattr(figures, "save", keep)
    return kept


def texts(figure):
    return [text.get_text() for text in figure.findobj(Text) if text.get_visible()]


def losses(folder, sequences, names=("a",)):
    """Results of models whose losses differ a lot between sequences."""
    loss = np.random.default_rng(0).gamma(0.4, 1, (sequences, 1)) * np.ones((sequences, 400))
    measured = []
    for name in names:
        parts = write_parts(folder / f"{name}{sequences}", loss.astype(np.float32), np.zeros(loss.shape, bool))
        model = {"name": name, "label": name, "step": 1, "train_length": 100}
        measured.append(Measured(model, {"name": "d", "kind": "packed"}, parts))
    return summarise(measured, "")


def test_loss_bands_are_named_and_stay_where_losses_can_be(drawn, tmp_path):
    loss_figure(losses(tmp_path, 4, "ab"), tmp_path / "many.png", log_positions=True)
    said = texts(drawn["many.png"])
    assert "band: 95 % interval over sequences" in said and said.count("trained to 100 tokens") == 3
    loss = drawn["many.png"].axes[0]
    assert loss.get_ylim()[0] >= 0
    # Two models of the same losses: the second line does not cover the first.
    first, second = (line for line in loss.lines if line.get_marker() in "os")
    assert first.get_linewidth() > second.get_linewidth() + 1 and first.get_linestyle() != second.get_linestyle()
    assert loss.child_axes[0].get_ylabel() == "perplexity"
    assert all(float(tick.get_text()) >= 1 for tick in loss.child_axes[0].get_yticklabels())


@pytest.mark.parametrize(("sequences", "reason"), [(1, "one sequence is"), (2, "two sequences are")])
def test_few_sequences_have_no_band(drawn, tmp_path, sequences, reason):
    loss_figure(losses(tmp_path, sequences), tmp_path / "few.png", log_positions=False)
    said = texts(drawn["few.png"])
    assert f"No band: {reason} too few for an interval" in said and not any(text.startswith("band") for text in said)


def test_accuracies(drawn, tmp_path):
    """Two settings that lie on one another, each named at its end; seeds, bands and guessing are explained."""
    runs = [flat(1.0, seed=1), flat(1.0, seed=2), flat(1.0, n=3)]
    accuracy_figure(by_setting(runs), tmp_path / "words.png")
    said = texts(drawn["words.png"])
    assert {"thin: a seed each (thick: their mean)", "band: 95 % interval over words (Wilson)", "guessing"} < set(said)
    for name in ("$n_h$ = 2, [-1, 1]", "$n_h$ = 3, [-1, 1]"):
        assert said.count(name) == 3, "in the legend and beside both panels"
    left = drawn["words.png"].axes[0]
    places = [text.get_position()[1] for text in left.texts if text.get_text().startswith("$n_h$")]
    assert abs(places[0] - places[1]) > 5
    assert len({line.get_linewidth() for line in left.lines if line.get_marker() in "sD"}) == 2


@pytest.fixture
def states(tmp_path):
    """Ranks of 4 sequences of 3 documents, of a model of two layers."""
    sequences, length, every = 4, 2000, 4
    args = DeltaProductArgs(vocab_size=8, hidden_size=16, num_hidden_layers=2, num_heads=2, head_dim=8)
    rank = 5 + np.random.default_rng(0).random((2, 2, sequences, length // every, 1)).astype(np.float32)
    starts = np.array([[row, place] for row in range(sequences) for place in (900, 1400)])
    about = {"version": 1, "sequences": sequences, "length": length, "batch": sequences, "every": every}
    pieces = Pieces(tmp_path, about, ".npz")
    write_array(pieces.path((0, sequences)), {"rank": rank, "starts": starts, **vars(Tally.empty(args))})
    model = {"name": "m", "train_length": 500, "allow_neg_eigval": True, "num_householder": 2, "head_dim": 8}
    return Result(Measured(model, {"name": "d"}, pieces))


def test_ranks(drawn, states, tmp_path):
    comparison([states], tmp_path / "ranks")
    said = texts(drawn["ranks.png"])
    assert {"band: ± 1 standard deviation over sequences", "trained to 500 tokens", "mean of the heads"} < set(said)
    of_one(states, tmp_path / "one")
    assert set(drawn) == {"ranks.png", *(f"one_{name}.png" for name in ("sequence", "beta", "spectrum", "documents"))}
    assert "m on d: the first of 4 sequences" in texts(drawn["one_sequence.png"])
    assert "document start" in texts(drawn["one_sequence.png"])
    figure = drawn["one_documents.png"]
    assert {"band: 95 % interval over document starts", "document start"} < set(texts(figure))
    heads, layers, colours = figure.axes
    assert heads.get_position().x0 < colours.get_position().x0 < layers.get_position().x0
    assert np.ptp(layers.collections[0].get_paths()[0].vertices[:, 1]) > 0


def test_names_at_the_ends_of_lines_are_apart():
    """Also of lines that end at one place, at the top, or outside of the picture; each beside its own line's colour."""
    axis = Figure().subplots()
    axis.set_ylim(0, 1)
    figures.name_ends(
        axis, [(5, 0.99, "a", "red"), (5, 0.99, "b", "green"), (3, 0.2, "c", "blue"), (5, 7.0, "d", "black")]
    )
    texts = {text.get_text(): (text.xyann[1], text.get_color()) for text in axis.texts}
    heights = sorted(height for height, _ in texts.values())
    assert heights[-1] <= 1 and all(b - a > 0.07 for a, b in zip(heights, heights[1:], strict=False))
    assert texts["c"] == (pytest.approx(0.2, abs=0.25), "blue") and texts["d"] == (heights[-1], "black")


def test_training_lengths_have_one_name():
    """However close they are: names cannot be on one another."""
    for lengths, name in (
        ((100,), "trained to 100 tokens"),
        ((100, 110, 0, 4000), "trained to 100 and 110 tokens"),
        (range(100, 900, 100), "trained to 8 lengths, 100 to 800 tokens"),
    ):
        axis = Figure().subplots()
        axis.set(xscale="log", xlim=(10, 1000))
        figures.mark_trained(axis, lengths)
        assert [text.get_text() for text in axis.texts] == [name] and len(axis.lines) == len(
            [x for x in lengths if 0 < x < 1000]
        )
        assert axis.texts[0].xy[0] == pytest.approx(np.mean(np.log10([x for x in lengths if 0 < x < 1000]) - 1) / 2)


def test_only_crowded_names_are_moved():
    """Names at the top push no others down, so that none leaves the axis below while there is room."""
    axis = Figure().subplots()
    axis.set_ylim(0, 1)
    figures.name_ends(axis, [(5, y, str(y), "red") for y in (0.01, 0.97, 0.98, 0.99)])
    heights = {text.get_text(): text.xyann[1] for text in axis.texts}
    assert heights["0.01"] == 0.01 and heights["0.99"] <= 1 and heights["0.97"] == pytest.approx(1 - 0.15, abs=0.05)


def test_names_of_any_length_leave_room_for_the_lines(drawn, tmp_path):
    """Names are broken into lines and the legend into rows: the panels keep a good part of the picture."""
    settings = by_setting([flat(0.1 * n, n=n) for n in range(1, 9)])
    for number, setting in enumerate(settings):
        setting.short = f"a setting of a name {'that goes on and on ' * number}"
    accuracy_figure(settings, tmp_path / "long.png")
    figure = drawn["long.png"]
    FigureCanvasAgg(figure).draw()
    width, height = figure.canvas.get_width_height()
    assert sum(axis.get_position().width for axis in figure.axes) > 0.4
    assert min(axis.get_position().height for axis in figure.axes) > 0.3
    names = figure.legends[0].get_texts()
    for text in [*names, *(text for axis in figure.axes for text in axis.texts)]:
        box = text.get_window_extent()
        assert box.x0 > -1 and box.x1 < width + 1 and -1 < box.y0 < height, text.get_text()
    assert all(line.get_text().count("\n") < figures.NAME_LINES for line in names)
    boxes = [text.get_window_extent() for text in names]
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])


def test_names_of_any_length_stay_in_titles(drawn, states, tmp_path):
    """Titles are broken into lines: the name of a run and of its data is told to its end, within the picture."""
    name, data = f"runs/{'a_name_that_goes_on_' * 6}", f"data/{'of_words_' * 5}"
    results = losses(tmp_path, 4, "ab")
    results[0].case.model["name"] = results[1].case.data["name"] = results[0].case.data["name"] = f"{name}end"
    loss_figure(results, tmp_path / "loss.png", log_positions=True)
    long = Result(replace(states.case, model=states.case.model | {"name": name}, data={"name": data}))
    of_one(long, tmp_path / "one")
    for figure in drawn.values():
        FigureCanvasAgg(figure).draw()
        titles = [text for text in figure.findobj(Text) if text.get_visible() and "a_name_that" in text.get_text()]
        assert titles
        for text in titles:
            box = text.get_window_extent()
            assert box.x0 > -1 and box.x1 < figure.canvas.get_width_height()[0] + 1, text.get_text()
    assert any(text.replace("\n", "").endswith("end") for text in texts(drawn["loss.png"]) if "loss minus" in text)
    title = drawn["one_spectrum.png"].get_suptitle()
    assert "eigenvalues of each token's transition" in title.replace("\n", " ")


def test_states_that_are_not_finite_are_drawn_too(drawn, states, tmp_path):
    """A model that diverged has its pictures, but for that of document starts, and no mean rank in a sweep."""
    ((piece, arrays),) = states.case.pieces
    write_array(states.case.pieces.path(piece), arrays | {"rank": np.full_like(arrays["rank"], np.nan)})
    diverged = Result(states.case)
    of_one(diverged, tmp_path / "one")
    comparison([diverged], tmp_path / "ranks")
    assert set(drawn) == {"ranks.png", *(f"one_{name}.png" for name in ("sequence", "beta", "spectrum"))}
    found = evaluation.metrics(finite(diverged.entry()))
    names = "rank at 500", "rank at 2,000", "growth", "change at document starts"
    assert found == dict.fromkeys(names)


def test_seeds_whose_rows_have_other_lengths(drawn, tmp_path):
    """A few rows of a formal language: the mean of two seeds where both have a row, else that of one."""
    problem, runs = Problem("parity", True, 8, 32, 0.5, (), 0), []
    for seed, lengths in enumerate(([2, 5, 20], [2, 6, 7, 30])):
        scored = np.bincount(lengths, minlength=32)
        runs.append(fake(problem, Counts(len(lengths), scored, scored * (seed == 0), 0 * scored), seed=seed))
    accuracy_figure(by_setting(runs), tmp_path / "rows.png")
    thick = max(drawn["rows.png"].axes[0].lines, key=lambda line: line.get_linewidth())
    assert thick.get_xdata().tolist() == [3, 6, 7, 8, 21, 31] and thick.get_ydata().tolist() == [50, 100, 0, 0, 100, 0]
