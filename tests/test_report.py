"""lab/report.py and lab/console.py: what a reader sees of a comparison."""
import pytest

from lab.console import side_by_side, size
from lab.report import findings


@pytest.mark.parametrize("n, text", [
    (0, "0 B"),
    (999, "999 B"),
    (4_353_024, "4.35 MB"),
    (1.5e12, "1.5e+03 GB"),
])
def test_sizes_are_readable(n, text):
    assert size(n) == text


def test_columns_stand_side_by_side():
    text = side_by_side({"a": "one two three four five six", "b": "x"}, 50)
    assert text.splitlines() == [
        "a                         b",
        "------------------------  ------------------------",
        "one two three four five   x",
        "six",
    ]


def test_columns_too_narrow_to_read_stand_below_one_another():
    text = side_by_side({"a": "one two", "b": "x"}, 40)
    assert text == "--- a\none two\n\n--- b\nx"


def test_a_training_that_ended_worse_than_it_began_is_said():
    kinds = ("weights", "gradients", "optimizer", "activations", "peak")
    method = {
        "memory": dict.fromkeys(kinds, 1e6),
        "time": {"step_ms": 1.0},
        "checkpoint_bytes": 1e6,
        "style_bpb_after": 2.0,
    }
    report = {"methods": {"full": method, "lora": method}}
    good = [{"bpb": 2.0}, {"bpb": 1.5}]
    bad = [{"bpb": 2.0}, {"bpb": 2.5}]
    sentences = findings(report, {"full": good, "lora": good})
    assert not any("Diverged" in sentence for sentence in sentences)
    sentences = findings(report, {"full": good, "lora": bad})
    assert "LoRA ended at 2.500 bits per byte, worse than the 2.000" in sentences[-1]
