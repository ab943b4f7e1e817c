"""What the notebooks share: their checks, and the command that runs them."""
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from notebooks import checks, run


def failing(source):
    raise_error = new_code_cell(source)
    return new_notebook(cells=[new_code_cell("print('✗ not so')"), raise_error])


def test_a_check_says_whether_its_statement_holds(capsys):
    checks.check("two is two", 2 == 2)
    checks.check("two is three", 2 == 3)
    assert capsys.readouterr().out == "✓ two is two\n✗ does not hold: two is three\n"


def test_an_expectation_is_judged_only_in_a_whole_run(capsys, monkeypatch):
    monkeypatch.delenv(checks.SHORTENED, raising=False)
    checks.expect("much was learned", False)
    assert capsys.readouterr().out.startswith("✗")
    monkeypatch.setenv(checks.SHORTENED, "1")
    checks.expect("much was learned", False)
    assert capsys.readouterr().out.startswith("–")


def test_a_shortened_run_trains_for_fewer_steps(monkeypatch):
    monkeypatch.delenv(checks.SHORTENED, raising=False)
    assert checks.steps(300) == 300
    monkeypatch.setenv(checks.SHORTENED, "1")
    assert 2 <= checks.steps(300) < 100
    assert checks.steps(2) == 2


def test_the_command_refuses_a_number_without_a_notebook(capsys):
    with pytest.raises(SystemExit):
        run.main(["99"])
    assert "no notebook 99" in capsys.readouterr().err


def test_a_notebook_that_fails_stays_as_it_was(tmp_path, capsys):
    path = tmp_path / "01_x.ipynb"
    nbformat.write(failing("1 / 0"), path)
    before = path.read_bytes()
    assert not run.run(path)
    assert path.read_bytes() == before
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_a_statement_that_does_not_hold_is_reported_and_the_outputs_are_saved(tmp_path, capsys):
    path = tmp_path / "01_x.ipynb"
    nbformat.write(failing("pass"), path)
    assert not run.run(path)
    assert "✗ not so" in capsys.readouterr().out
    assert run.failed_checks(nbformat.read(path, as_version=4)) == ["✗ not so"]
