"""lab/report.py and lab/console.py: what a reader sees of a comparison."""
import pytest

from lab.console import side_by_side, size
from lab.plot import bars_of, plot_comparison
from lab.report import (
    adds_up,
    difference,
    findings,
    headline_numbers,
    predicted_and_measured,
    table,
)


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


PHASES = ("forward_ms", "backward_ms", "optimizer_ms")


def method_of(times_worse, **times):
    """What a method costs: `times_worse` times a unit, and less tokens a second."""
    n = 1000 * times_worse
    kinds = ("weights", "gradients", "optimizer", "activations", "peak")
    return {
        "trainable_params": n,
        "total_params": n,
        "checkpoint_bytes": n,
        "memory": dict.fromkeys(kinds, n),
        "time": {**dict.fromkeys(PHASES, n), "step_ms": 3 * n, "ahead_ms": n / 2,
                 "captured": False, **times},
        "tokens_per_s": 1000 / times_worse,
        "style_bpb_before": 3.0,
        "style_bpb_after": n,
        "base_bpb_after": n,
        "steps": 4,
        "seconds_to_best": n,
    }


def report_of(full, lora, base_dtype="float32", alike=None):
    """A comparison. By default LoRA is like for like as it is."""
    settings = {"loss_chunk": 1024, "base_dtype": "float32"}
    settings = {"full": settings, "lora": {**settings, "base_dtype": base_dtype}}
    defaults = {"speed": 2.0, "memory": 2.0}
    alike = alike or {**defaults, "lora": lora}
    return {
        "base": {"bpb": 2.0},
        "config": {"settings": settings},
        "process_peak": {"resident": 5e9},
        "like_for_like": {**alike, **settings["full"]},
        "defaults": defaults,
        "methods": {"full": full, "lora": lora},
    }


def test_every_ratio_is_above_1_if_lora_is_better():
    printed = table(report_of(method_of(2), method_of(1)), "pirate", "tales")
    rows = printed.split("\n\n")[0].splitlines()[2:]
    ratios = [row.split()[-1] for row in rows if "before" not in row]
    ratios = [ratio for ratio in ratios if ratio.startswith("2.00")]
    without = ["whole command", "before", "before", "steps trained"]
    assert len(ratios) == len(rows) - len(without)
    assert all(any(name in row for row in rows) for name in without)


def test_the_whole_command_stands_below_the_step():
    lines = table(report_of(method_of(2), method_of(1)), "pirate", "tales").splitlines()
    [line] = [line for line in lines if line.startswith("memory: whole command")]
    assert line.split()[-4:] == ["5", "GB", "5", "GB"]
    assert lines[lines.index(line) - 1].startswith("memory: peak of a step")


@pytest.mark.parametrize("step_ms, shown", [(3000, False), (2860, False), (2800, True)])
def test_phases_that_do_not_add_up_to_5_percent_leave_a_row_with_its_reason(step_ms, shown):
    lora = method_of(1, step_ms=step_ms, captured=True)
    assert adds_up(lora["time"]) != shown
    assert difference(lora["time"]) == step_ms - 3000
    full = method_of(2, captured=True)
    printed = table(report_of(full, lora), "pirate", "tales")
    assert ("time: step - phases" in printed) == shown
    assert ("each phase as a graph of its own" in printed) == shown
    if shown:
        assert "-200.0 ms" in printed


def test_the_defaults_stand_beside_like_for_like_with_what_differs():
    lora = method_of(1)
    alike = {"speed": 1.25, "memory": 1.5, "lora": method_of(1.5)}
    report = report_of(method_of(2), lora, base_dtype="bfloat16", alike=alike)
    lines = headline_numbers(report).splitlines()
    assert lines[2:4] == [
        "like for like     1.25 x  1.50 x",
        "each by default   2.00 x  2.00 x",
    ]
    text = " ".join(lines)
    assert "both methods have the loss in chunks of 1,024 logits, and the base in float32" in text
    assert "By default LoRA has the loss in chunks of 1,024 logits, and the base in bf" in text
    memory, speed, *_ = findings(report, {"full": [{"bpb": 2.0}], "lora": [{"bpb": 2.0}]})
    assert "1.50 times the memory of a LoRA step (2.00 times with the defaults" in memory
    assert "1.25 times as fast as a full step (2.00 times with the defaults" in speed


def test_the_ledger_shows_the_parts_of_a_phase_below_their_sum():
    operations = {
        "forward": 2e9, "forward, thin products": 1e9, "backward, inputs": 3e9,
        "backward, weights": 4e9, "backward, thin products": 0, "backward, forward again": 0,
    }
    memory = dict.fromkeys(("weights", "gradients", "optimizer", "activations"), 1e6)
    predicted = {"memory": memory, "operations": operations, "ahead": 5e9}
    report = report_of(method_of(2), method_of(1))
    printed = predicted_and_measured(report, {"full": predicted, "lora": predicted})
    cells = {}
    for line in printed.splitlines():
        words = line.split()
        if "FLOP" in line:
            cells[" ".join(words[:words.index("GFLOP") - 1])] = words[words.index("GFLOP") - 1]
    assert cells == {
        "time: forward": "3",
        "thin products with A and B": "1",
        "time: backward": "7",
        "gradients of the inputs": "3",
        "gradients of the weights": "4",
        "computed ahead, with the loss": "5",
        "time: a whole step": "10",
    }


def test_the_picture_has_a_bar_more_if_lora_is_not_like_for_like_by_default(tmp_path):
    curves = {"full": [{"seconds": 0.0, "bpb": 2.0}], "lora": [{"seconds": 0.0, "bpb": 2.0}]}
    alike = {"speed": 1.25, "memory": 1.5, "lora": method_of(1.5)}
    two = report_of(method_of(2), method_of(1))
    three = report_of(method_of(2), method_of(1), alike=alike)
    assert list(bars_of(two)) == ["full fine-tuning", "LoRA"]
    assert list(bars_of(three)) == ["full fine-tuning", "LoRA, like for like", "LoRA by default"]
    plot_comparison(three, curves, "pirate", tmp_path / "three.png")
    assert (tmp_path / "three.png").read_bytes()[:4] == b"\x89PNG"


def test_a_training_that_ended_worse_than_it_began_is_said():
    report = report_of(method_of(1), method_of(1))
    good = [{"bpb": 2.0}, {"bpb": 1.5}]
    bad = [{"bpb": 2.0}, {"bpb": 2.5}]
    sentences = findings(report, {"full": good, "lora": good})
    assert not any("Diverged" in sentence for sentence in sentences)
    sentences = findings(report, {"full": good, "lora": bad})
    assert "LoRA ended at 2.500 bits per byte, worse than the 2.000" in sentences[-1]
