import pytest

from agri_moe.layer_map import layer_pairs


def pairs(layers, student, teacher, attention=False):
    return layer_pairs(layers, student, teacher, "objective.cka.layers", attention=attention)


def test_uniform():
    assert pairs("uniform", 2, 4) == [(0, 1), (1, 3)]
    assert pairs("uniform", 4, 4) == [(i, i) for i in range(4)]
    assert pairs("uniform", 4, 1) == [(i, 0) for i in range(4)]
    flagship = pairs("uniform", 28, 40)
    assert (flagship[0], flagship[-1]) == ((0, 0), (27, 39))
    teacher_layers = [t for _, t in flagship]
    assert teacher_layers == sorted(set(teacher_layers)), "each teacher layer at most once, in order"


def test_last():
    assert pairs("last", 28, 40) == [(27, 39)]
    assert pairs("last", 1, 1) == [(0, 0)]


def test_progressive_by_hand():
    # 28 / 3 = 9.33: layers 0 to 9 are early, 10 to 18 in the middle, 19 to 27 the last.
    assert [i for i, _ in pairs("progressive", 28, 40)] == [*range(10), 10, 12, 14, 16, 18]
    assert [i for i, _ in pairs("progressive", 28, 40, attention=True)] == list(range(19, 28))
    uniform = dict(pairs("uniform", 28, 40))
    assert all(uniform[i] == t for i, t in pairs("progressive", 28, 40))


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_progressive_is_never_empty(layers):
    assert pairs("progressive", layers, 6)
    assert pairs("progressive", layers, 6, attention=True)[-1] == (layers - 1, 5)


def test_explicit():
    assert pairs([(1, 3), (0, 0)], 2, 4) == [(0, 0), (1, 3)]
    with pytest.raises(ValueError, match=r"objective\.cka\.layers: \[2, 3\] is no pair of layers"):
        pairs([(2, 3)], 2, 4)
    with pytest.raises(ValueError, match="twice"):
        pairs([(0, 0), (0, 0)], 2, 4)
    with pytest.raises(ValueError, match="empty"):
        pairs([], 2, 4)
