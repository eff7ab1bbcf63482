"""`report`: a page that holds all of a run, complete in itself, in which the run's files are text and never markup."""

import json
import re
from html.parser import HTMLParser

import pytest

from tests.unit.test_compare_runs import make
from tests.unit.test_status import NOW, stop
from torchtitan_deltaproduct import report
from torchtitan_deltaproduct.report import sections
from torchtitan_deltaproduct.report.figures import Curve, binned, curves_of
from torchtitan_deltaproduct.runs import read_run

EVIL = "</pre><script>alert(1)</script> | <img src=http://evil/x onerror=x> `[a](http://evil)` ${x}\r# no heading"
PNG = b"\x89PNG\r\n\x1a\n" + b"0" * 16


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with all a run can have, hostile texts among them."""
    run = make(tmp_path_factory.mktemp("report") / "<b>run", job={"description": EVIL, "config_file": EVIL},
               data={"paths": [EVIL], "seed": 7}, optimizer={"name": EVIL})  # fmt: skip
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(
        json.dumps(config | {"versions": {"git": EVIL}, "extra": {"data_identity": [EVIL]}})
    )
    with (run / "events.jsonl").open("a") as file:
        for event in ({"event": "loss_spike", "step": 7, "more": EVIL}, stop("failed", EVIL, time=NOW + 3640)):
            file.write(json.dumps(event) + "\n")
    samples = [{"step": step, "prompt": EVIL, "mode": mode, "text": f"{EVIL} at {step}"}
               for step in range(5, 105, 5) for mode in ("greedy", "sampled")]  # fmt: skip
    (run / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples) + '{"step": 1}\n')
    for number, content in (("001", {"command": f"sbatch {EVIL}"}), ("002", [])):
        (run / f"launch/{number}").mkdir(parents=True)
        (run / f"launch/{number}/env.json").write_text(json.dumps(content))
    (run / "eval/lm_harness/x").mkdir(parents=True)
    measured = {"beyond_training": {"training": {"loss": 3.25}, "beyond": {"loss": 3.5}}, "data": {"name": EVIL}}
    (run / "eval/length_extrapolation.json").write_text(json.dumps({"results": [measured, 3]}))
    (run / "eval/state_tracking.json").write_text("{")
    tasks = {"results": {"piqa": {"acc,none": 0.625, "acc_stderr,none": 0.01, "alias": "piqa"}}}
    (run / "eval/lm_harness/x/results_1.json").write_text(json.dumps(tasks))
    (run / "eval/picture.png").write_bytes(PNG)
    (run / "eval/lie.png").write_text(EVIL)
    (run.parent / "secret.png").write_bytes(PNG)
    (run / "eval/link.png").symlink_to(run.parent / "secret.png")
    return run


@pytest.fixture(scope="module")
def page(run):
    report.main([str(run)])
    return (run / "report.html").read_text()


def test_everything_is_there(page):
    text = Page(page).text
    for said in ("20 of 20", "3.0000", "2.0000, 10", "50.0%", "40 s", "optimizer.name", "AdamW", "validation.freq",
                 "SIGUSR1 at step 10", "failures: 1", "loss spike", "3.2500", "3.5000", "piqa", "0.6250", "0.0100",
                 "eval/state_tracking.json cannot be read", "picture.png", "where a launch went on", "data identity",
                 "step 5, greedy", "step 100, sampled", "at 100", "not here", "launch/001", "sbatch <"):  # fmt: skip
        assert said in text, said
    assert "step 10, greedy" not in text and "link.png" not in text and page.count("data:image/png") == 1


def test_what_auto_came_to_was_not_asked(tmp_path):
    run = make(tmp_path / "run", training={"steps": 20, "mixed_precision_param": "float32"})
    report.main([str(run), "--markdown"])
    text = (run / "report.md").read_text().replace("\\", "")
    assert "| training.mixed_precision_param" not in text and "| training.steps | 20 |" in text
    assert "training.mixed_precision_param: float32, as asked or as auto settled it" in text


def test_it_is_text_and_loads_nothing(page):
    read = Page(page)
    allowed = (
        "html head meta title style body header nav section h1 h2 h3 p a dl div dt dd table thead tbody tr th td "
        "figure figcaption pre code img svg g path defs use text clippath rect"
    )
    assert set(read.tags) <= set(allowed.split()) and "alert(1)" in read.text and "<b>run" in read.text
    targets = [value for name, value in read.attributes if name in ("src", "href", "xlink:href")]
    assert targets and all(re.match(r"#|data:image/png;base64,[A-Za-z0-9+/=]+$", target) for target in targets)
    assert not [name for name, _ in read.attributes if name.startswith("on")]
    assert "default-src 'none'" in page and read.tags.count("svg") == 2


def test_markdown(run):
    report.main([str(run), "--markdown"])
    text = (run / "report.md").read_text()
    outside = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
    assert "<script" not in outside and "\n# no" not in text and "| piqa | acc | 0.6250" in text
    assert not re.search(r"(?<!\\)\]\(http", outside)
    pictures = re.findall(r"^!\[.*\]\((.*)\)$", text, flags=re.M)
    assert {"report/loss.png", "report/eval_picture.png"} <= set(pictures)
    assert all((run / picture).read_bytes().startswith(PNG[:8]) for picture in pictures)


def test_nothing_steers_a_terminal(tmp_path):
    """Control characters, those that turn the direction of writing and halves of characters are shown escaped."""
    run, evil = make(tmp_path / "a\x1b[2J"), "\x1b[2J\u202eabc\u2066\x9b\ud800\x07\r\n\tdé f漢\r!"
    sample = {"step": 5, "prompt": evil, "mode": "\x1bgreedy", "text": evil}
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    for option, name in ((["--markdown"], "report.md"), ([], "report.html")):
        report.main([str(run), *option])
        text = (run / name).read_text()
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u2066]", text)
        assert r"\x1b[2J\u202eabc\u2066\x9b\ud800\x07" in text and re.search(r"\n *\tdé f漢\\r!", text)


def test_curves(run):
    curves = {curve.name: curve for curve in curves_of(read_run(run))}
    loss = curves["loss"]
    assert set(curves) == {"loss", "speed"} and loss.marks == [10]
    assert loss.exact == [(5, 2.5), (10, 2.0), (15, 2.5), (20, 3.0)] and loss.raw[0] == (1, 3.0)
    # From the third of twenty points on the curve is below 2.34; validations reach 3.0, which is shown.
    assert loss.highest is None and curves_of(read_run(run))[0].title == "loss, nats a token"
    assert binned([(step, float(step)) for step in range(1000)], 10)[0] == (49.5, 49.5)
    text = Curve("x", "x", [(1, 1.0), (2, 2.0)], [(1, 2.0)]).svg()
    assert "currentColor" in text and "var(--second)" in text and "#0072b2" not in text and ">validation<" in text


def test_almost_nothing(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n')
    report.main([str(tmp_path), "--out", str(tmp_path / "x.html")])
    text = Page((tmp_path / "x.html").read_text()).text
    assert "config.json: not there" in text and "Checkpoints" not in text


@pytest.mark.parametrize(("path", "value"), [("a.-1.b", 1), ("a.x", None), ("a.0.c", None), ("b.c", None)])
def test_look_up(path, value):
    assert sections.look_up({"a": [{"b": 1}], "b": 3}, path) == value
