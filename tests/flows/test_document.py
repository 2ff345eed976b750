"""YAML recipes remember their lines and don't surprise."""

from __future__ import annotations

from coldpress.flows.document import parse, parse_value


def test_every_value_knows_its_line() -> None:
    document = parse("name: x\nstages:\n  a: {use: prune,\n      sparsity: 0.5}\n  b:\n    use: quantize\n")
    assert document.value["stages"]["a"] == {"use": "prune", "sparsity": 0.5}
    assert document.line("stages", "a", "sparsity") == 4
    assert document.line("stages", "b", "use") == 6
    assert document.line("stages", "b", "missing") == 5


def test_a_pattern_without_quotes_is_text_and_not_a_base_60_number() -> None:
    assert parse_value("2:4") == "2:4"
    assert parse_value("1e-4") == 1e-4
    assert parse_value("[0.5, 3, -1]") == [0.5, 3, -1]


def test_a_key_that_is_there_twice_is_a_problem_with_both_lines() -> None:
    (problem,) = parse("a: 1\nb: 2\na: 3\n").problems
    assert problem.line == 3
    assert "line 1" in problem.message


def test_broken_yaml_is_a_problem_with_its_line() -> None:
    (problem,) = parse("a: 1\nb: [1, 2\nc: 3\n").problems
    assert problem.line == 3
    assert "YAML" in problem.message
