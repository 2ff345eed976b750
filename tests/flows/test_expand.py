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
