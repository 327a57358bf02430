"""How work is divided between processes."""

import pytest

from optimum_mixrank.runtime.distributed import Processes


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("items", [1, 2, 7, 16])
def test_parts_cover_all_items_once(count, items):
    parts = [Processes(index, count).part(items) for index in range(count)]
    assert sum(share for _, share in parts) == pytest.approx(1)
    assert [item for part, share in parts if share for item in range(items)[part]] == list(range(items))
    # Every process has something to exchange, and the parts are of equal size up to one item.
    sizes = [len(range(items)[part]) for part, _ in parts]
    assert min(sizes) == max(1, items // count) and max(sizes) - min(sizes) <= 1
    assert all(share in (0, size / items) for (_, share), size in zip(parts, sizes, strict=True))


@pytest.mark.parametrize(("others", "found"), [([], "value"), ([True], "value"), ([True, False], None)])
def test_a_value_that_some_process_lacks_is_used_by_none(monkeypatch, others, found):
    processes = Processes(0, 1 + len(others))
    monkeypatch.setattr(Processes, "gather", lambda self, value: [value, *others])
    assert processes.all_or_none("value") == found
    assert processes.all_or_none(None) is None
