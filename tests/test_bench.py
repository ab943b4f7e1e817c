"""The benchmarks run, and write what they print."""
import json

from bench import pretrain


def test_pretraining_is_timed_and_both_recipes_learn(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(pretrain.SHAPES, "tiny", (2, 32))
    text = tmp_path / "text.txt"
    text.write_text("The old man went to the sea, and the sea was old and wide.\n\n" * 400)
    path = tmp_path / "results" / "pretrain.json"
    pretrain.main([
        "--device", "cpu", "--data", str(text), "--only", "nanoGPT", "ours", "--no-compile",
        "--rounds", "1", "--budgets", "0.5", "--vocab-size", "300", "--json", str(path),
    ])
    printed = capsys.readouterr().out
    results = json.loads(path.read_text())
    assert [row["recipe"] for row in results["budgets"]] == ["nanoGPT", "ours"]
    for row in results["budgets"]:
        assert row["steps"] == max(1, round(500 / results["step_ms"][row["recipe"]]))
        assert f"{row['bpb']:.3f} bpb" in printed
        assert row["bpb"] < 8.3, "log2 of 300 entries, one byte each: before any training"
