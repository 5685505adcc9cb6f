"""Tokens and Mask against slow loops."""

import pytest
import torch
from torch import Tensor

from mmssl.tokens import Mask, Tokens, gather, indices_of

ROWS, LENGTH = 3, 7


def random_tokens(seed: int, lengths: tuple[int, ...] = (7, 4, 6), edges: int = 40) -> Tokens:
    """Rows of different lengths, a graph in each; no number in content or coords occurs twice."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randperm(ROWS * LENGTH * 8, generator=generator).float()
    valid = torch.arange(LENGTH) < torch.tensor(lengths)[:, None]
    row = torch.randint(ROWS, (edges,), generator=generator)
    ends = (torch.rand(2, edges, generator=generator) * torch.tensor(lengths)[row]).long()
    return Tokens(
        content=numbers[: ROWS * LENGTH * 6].reshape(ROWS, LENGTH, 3, 2),
        coords=numbers[ROWS * LENGTH * 6 :].reshape(ROWS, LENGTH, 2),
        valid=valid,
        edges=row * LENGTH + ends,
        sample=torch.tensor([0, 1, 0]),
    )


def pairs(tokens: Tokens) -> list[tuple[int, int, int]]:
    """Edges as sorted (row, source position, target position); fails on an edge from row to row."""
    assert tokens.edges is not None
    length = tokens.valid.shape[1]
    found = []
    for source, target in tokens.edges.T.tolist():
        assert source // length == target // length
        found.append((source // length, source % length, target % length))
    return sorted(found)


@pytest.mark.parametrize("seed", range(5))
def test_select_gathers_everything_and_reindexes_edges(seed: int) -> None:
    tokens = random_tokens(seed)
    generator = torch.Generator().manual_seed(100 + seed)
    kept = 4
    index = torch.stack([torch.randperm(LENGTH, generator=generator)[:kept] for _ in range(ROWS)])
    flags = torch.rand(ROWS, kept, generator=generator) < 0.8
    selected = tokens.select(index, flags)

    for row in range(ROWS):
        for new, old in enumerate(index[row].tolist()):
            assert torch.equal(selected.content[row, new], tokens.content[row, old])
            assert torch.equal(selected.coords[row, new], tokens.coords[row, old])
            assert selected.valid[row, new] == (tokens.valid[row, old] and flags[row, new])
    assert selected.sample is not None
    assert selected.sample.tolist() == [0, 1, 0]

    expected = []
    for row, source, target in pairs(tokens):
        places = index[row].tolist()
        if source in places and target in places:
            expected.append((row, places.index(source), places.index(target)))
    assert 0 < len(expected) < len(pairs(tokens))
    # What filling reads and is read by is of no consequence: only edges between tokens that count are compared.
    count = selected.valid.tolist()
    assert [edge for edge in pairs(selected) if count[edge[0]][edge[1]] and count[edge[0]][edge[2]]] == sorted(
        edge for edge in expected if count[edge[0]][edge[1]] and count[edge[0]][edge[2]]
    )
    assert set(pairs(selected)) <= set(expected)


def test_select_drops_edges_of_dropped_tokens() -> None:
    """A path 0 -> 1 -> 2 -> 3 loses its middle: only 2 -> 3 is left, at its new place."""
    tokens = Tokens(
        content=torch.arange(4.0).reshape(1, 4, 1),
        coords=torch.arange(4.0).reshape(1, 4, 1),
        valid=torch.ones(1, 4, dtype=torch.bool),
        edges=torch.tensor([[0, 1, 2], [1, 2, 3]]),
    )
    selected = tokens.select(torch.tensor([[3, 0, 2]]), torch.ones(1, 3, dtype=torch.bool))
    assert pairs(selected) == [(0, 2, 0)]


@pytest.mark.parametrize("seed", range(5))
def test_select_reads_the_edges_of_tokens_that_filling_repeats(seed: int) -> None:
    """Indices of two masks side by side: what fills up one of them may be what the other one counts."""
    tokens = random_tokens(seed)
    generator = torch.Generator().manual_seed(100 + seed)
    order = torch.stack([torch.randperm(LENGTH, generator=generator) for _ in range(ROWS)])
    index = torch.cat([order[:, :4], order[:, 2:5], order[:, :2]], dim=1)
    flags = torch.tensor([True, True, False, False, True, True, True, False, False]).expand(ROWS, -1)
    expected = []
    for row, source, target in pairs(tokens):
        places = [old if counts else None for old, counts in zip(index[row].tolist(), flags[row].tolist(), strict=True)]
        if source in places and target in places:
            expected.append((row, places.index(source), places.index(target)))
    assert 0 < len(expected) < len(pairs(tokens))
    assert pairs(tokens.select(index, flags)) == sorted(expected)


def test_select_without_edges_or_sample() -> None:
    tokens = random_tokens(0)
    tokens = Tokens(tokens.content, tokens.coords, tokens.valid)
    selected = tokens.select(torch.zeros(ROWS, 1, dtype=torch.long), torch.ones(ROWS, 1, dtype=torch.bool))
    assert selected.edges is None
    assert selected.sample is None


@pytest.mark.parametrize("times", [1, 3])
def test_repeat_copies_each_row_with_its_edges_and_sample(times: int) -> None:
    tokens = random_tokens(1)
    repeated = tokens.repeat(times)
    assert len(repeated.content) == ROWS * times
    for row in range(ROWS * times):
        source = row // times
        for name in ("content", "coords", "valid", "sample"):
            assert torch.equal(getattr(repeated, name)[row], getattr(tokens, name)[source]), name
    expected = [(row * times + copy, s, t) for row, s, t in pairs(tokens) for copy in range(times)]
    assert pairs(repeated) == sorted(expected)


def test_repeat_without_edges_or_sample() -> None:
    tokens = random_tokens(1)
    repeated = Tokens(tokens.content, tokens.coords, tokens.valid).repeat(2)
    assert repeated.edges is None
    assert repeated.sample is not None and repeated.sample.tolist() == [0, 0, 1, 1, 2, 2]  # pool merges the copies


@pytest.mark.parametrize("sample", [None, [0, 1, 2], [1, 0, 1], [0, 0, 0]])
def test_pool_is_the_mean_over_the_valid_tokens_of_a_sample(sample: list[int] | None) -> None:
    """Rows of one sample count by their tokens, not one each; padding, however large, counts nothing."""
    tokens = random_tokens(2)
    tokens.sample = None if sample is None else torch.tensor(sample)
    hidden = torch.randn(ROWS, LENGTH, 5, generator=torch.Generator().manual_seed(0))
    hidden[~tokens.valid] = 1e6
    owner = list(range(ROWS)) if sample is None else sample
    members: list[list[Tensor]] = [[] for _ in range(max(owner) + 1)]
    for row in range(ROWS):
        members[owner[row]] += [hidden[row, place] for place in range(LENGTH) if tokens.valid[row, place]]
    expected = torch.stack([torch.stack(vectors).mean(dim=0) for vectors in members])
    torch.testing.assert_close(tokens.pool(hidden), expected, atol=1e-6, rtol=1e-5)


def test_pool_of_repeated_rows_of_named_samples_is_their_mean() -> None:
    tokens = random_tokens(3)
    tokens.sample = torch.arange(ROWS)
    hidden = torch.randn(ROWS * 2, LENGTH, 4, generator=torch.Generator().manual_seed(0))
    expected = tokens.pool(hidden[0::2]) / 2 + tokens.pool(hidden[1::2]) / 2
    torch.testing.assert_close(tokens.repeat(2).pool(hidden), expected)


def test_pool_under_autocast_sums_in_full_precision() -> None:
    tokens = random_tokens(2)
    tokens.sample = None
    hidden = 1 + torch.randn(ROWS, LENGTH, 5, generator=torch.Generator().manual_seed(0)) / 1000
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = tokens.pool(hidden)
    torch.testing.assert_close(inside, tokens.pool(hidden), atol=0, rtol=0)


def test_pool_of_a_row_without_tokens_is_zero() -> None:
    tokens = random_tokens(0, lengths=(7, 1, 6), edges=0)
    tokens.valid[1] = False
    tokens.sample = None
    pooled = tokens.pool(torch.ones(ROWS, LENGTH, 2))
    assert pooled.tolist() == [[1, 1], [0, 0], [1, 1]]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_mask_indices_partition_the_valid_tokens_in_order(seed: int, share: float) -> None:
    valid = random_tokens(seed).valid
    drawn = torch.rand(ROWS, LENGTH, generator=torch.Generator().manual_seed(seed)) < share
    if share == 1.0:
        drawn[:] = True  # padding too is asked for, and must not be hidden
    mask = Mask.from_hidden(drawn, valid)
    widest = {"hidden": 0, "visible": 0}
    for row in range(ROWS):
        hidden = [place for place in range(LENGTH) if drawn[row, place] and valid[row, place]]
        visible = [place for place in range(LENGTH) if valid[row, place] and not drawn[row, place]]
        assert mask.hidden[row].nonzero()[:, 0].tolist() == hidden
        assert mask.hidden_index[row][mask.hidden_valid[row]].tolist() == hidden
        assert mask.visible_index[row][mask.visible_valid[row]].tolist() == visible
        for index in (mask.hidden_index[row], mask.visible_index[row]):
            assert len(set(index.tolist())) == len(index)  # select takes no token twice
        widest = {"hidden": max(widest["hidden"], len(hidden)), "visible": max(widest["visible"], len(visible))}
    assert mask.hidden_index.shape == mask.hidden_valid.shape == (ROWS, widest["hidden"])
    assert mask.visible_index.shape == mask.visible_valid.shape == (ROWS, widest["visible"])


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
def test_indices_of_booleans_equal_a_loop(share: float) -> None:
    members = torch.rand(20, LENGTH, generator=torch.Generator().manual_seed(1)) < share
    index, counts = indices_of(members)
    places = [[place for place in range(LENGTH) if row[place]] for row in members.tolist()]
    longest = max(map(len, places))
    assert index.shape == counts.shape == (20, longest) and index.dtype == torch.long and counts.dtype == torch.bool
    for row, expected in enumerate(places):
        assert index[row][counts[row]].tolist() == expected
        assert counts[row].tolist() == [True] * len(expected) + [False] * (longest - len(expected))
        assert len(set(index[row].tolist())) == longest


def test_selected_by_a_mask_what_fills_up_does_not_count() -> None:
    """Row 0 has three visible tokens, row 1 one: its two others are filling, which is not valid any more."""
    valid = torch.ones(2, 4, dtype=torch.bool)
    hidden = torch.tensor([[False, True, False, False], [True, True, False, True]])
    content = torch.arange(8.0).reshape(2, 4, 1)
    tokens = Tokens(content, content.clone(), valid)
    mask = Mask.from_hidden(hidden, valid)
    seen = tokens.select(mask.visible_index, mask.visible_valid)
    assert seen.valid.tolist() == [[True, True, True], [True, False, False]]
    assert seen.content[seen.valid].flatten().tolist() == [0, 2, 3, 6]
    assert not mask.hidden.logical_and(~valid).any()


@pytest.mark.parametrize("shape", [(), (2,), (2, 3)])
def test_gather_takes_whole_tokens(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(ROWS, LENGTH, *shape, generator=generator)
    index = torch.randint(LENGTH, (ROWS, 5), generator=generator)
    expected = torch.stack([torch.stack([values[row, place] for place in index[row]]) for row in range(ROWS)])
    assert torch.equal(gather(values, index), expected)


def test_priors_follow_their_tokens() -> None:
    """Both tokens of a pair are selected, in the order of the index; copies of a row have the row's own."""
    prior = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0))
    tokens = Tokens(torch.zeros(2, 4, 1), torch.zeros(2, 4, 1), torch.ones(2, 4, dtype=torch.bool), prior=prior)
    index = torch.tensor([[2, 0], [1, 3]])
    selected = tokens.select(index, torch.ones(2, 2, dtype=torch.bool)).prior
    assert selected is not None
    for row, order in enumerate(index.tolist()):
        for i, reader in enumerate(order):
            for j, other in enumerate(order):
                assert selected[row, i, j] == prior[row, reader, other]
    repeated = tokens.repeat(2).prior
    assert repeated is not None and torch.equal(repeated, prior[[0, 0, 1, 1]])
