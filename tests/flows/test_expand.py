"""matrix: expands a stage and everything after it."""

from __future__ import annotations

from coldpress.flows.expand import Instance, expand_matrix, join_instances


def test_a_matrix_gives_every_combination_once() -> None:
    assert list(expand_matrix({"bits": [4, 8], "group_size": [32]})) == [
        (("bits", 4), ("group_size", 32)),
        (("bits", 8), ("group_size", 32)),
    ]
    assert list(expand_matrix({})) == [()]


def test_what_follows_a_matrix_fans_out_with_it() -> None:
    pruned = [Instance(f"p[sparsity={s}]", ((("p", "sparsity"), s),)) for s in (0.5, 0.6)]
    names = [joined.instance.name for joined in join_instances("q", [pruned], (("bits", 4),))]
    assert names == ["q[sparsity=0.5,bits=4]", "q[sparsity=0.6,bits=4]"]


def test_two_inputs_from_one_matrix_join_at_equal_coordinates_only() -> None:
    left = [Instance(f"a[s={s}]", ((("p", "s"), s),)) for s in (1, 2)]
    right = [Instance(f"b[s={s}]", ((("p", "s"), s),)) for s in (1, 2)]
    assert [joined.chosen for joined in join_instances("c", [left, right], ())] == [
        ("a[s=1]", "b[s=1]"),
        ("a[s=2]", "b[s=2]"),
    ]


def test_axes_of_equal_name_are_told_apart_by_their_stage() -> None:
    first = [Instance("a[bits=4]", ((("a", "bits"), 4),))]
    (joined,) = join_instances("b", [first], (("bits", 8),))
    assert joined.instance.name == "b[a.bits=4,b.bits=8]"


def test_mappings_and_lists_of_them_can_be_values() -> None:
    rules = [{"modules": ["a", "b"], "bits": 8}, {"layers": [1], "bits": 2}]
    combinations = list(expand_matrix({"budget": [{"bits_per_weight": 3.5}, {"bits_per_weight": 4}], "rules": [rules]}))
    assert len(set(combinations)) == 2
    assert combinations[1][0] == ("budget", {"bits_per_weight": 4})
    (joined,) = join_instances("q", [], combinations[1])
    assert joined.instance.name == "q[budget=bits_per_weight:4,rules=modules:a+b,bits:8+layers:1,bits:2]"
