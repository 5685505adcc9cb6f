"""Tests of regions, the pieces that latent prediction reads and predicts: rectangles, neighbourhoods, subgraphs."""

import pytest
import torch
from torch import Tensor

from mmssl.modalities.base import Modality, nearest, rectangle
from mmssl.modalities.graph import MOST_HOPS, Graph
from mmssl.modalities.image import Image
from mmssl.modeling import make_modality
from mmssl.tokens import Tokens
from tests.matrix.cases import MODALITIES, make_batch


def key(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens_at(coords: Tensor, valid: Tensor | None = None, edges: Tensor | None = None) -> Tokens:
    valid = torch.ones(coords.shape[:2], dtype=torch.bool) if valid is None else valid
    return Tokens(torch.zeros(*coords.shape[:2], 1), coords, valid, edges)


def on_grid(batch: int, *sides: int) -> Tokens:
    axes = torch.meshgrid(*(torch.arange(float(side)) - 2 for side in sides), indexing="ij")
    return tokens_at(torch.stack(axes, dim=-1).flatten(0, -2).expand(batch, -1, -1))


# ---- What all regions have in common --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(MODALITIES))
def test_regions_of_every_modality(name: str) -> None:
    """Valid and allowed tokens, drawn from the key alone; any token may be in one, and all are where all is asked."""
    modality = make_modality(name, MODALITIES[name][0])
    tokens = modality.tokenize(make_batch(modality, 4))
    coords, valid = tokens.coords.clone(), tokens.valid.clone()
    allowed = torch.rand(valid.shape, generator=key(0)) < 0.6
    ever = torch.zeros_like(valid)
    for seed in range(60):
        torch.manual_seed(seed)  # of no consequence
        region = modality.region(tokens, 0.2, key(seed))
        assert region.dtype == torch.bool and region.shape == valid.shape
        assert torch.equal(region, modality.region(tokens, torch.tensor(0.2), key(seed)))
        assert region.any(dim=1).all() and not (region & ~valid).any()
        part = modality.region(tokens, 0.5, key(seed), allowed)
        assert not (part & ~(valid & allowed)).any() and part.any()
        ever |= region
    assert torch.equal(ever, valid)
    assert torch.equal(modality.region(tokens, 1.0, key(1)), valid)
    assert not modality.region(tokens, 0.5, key(1), torch.zeros_like(valid)).any()
    assert torch.equal(tokens.coords, coords) and torch.equal(tokens.valid, valid)


@pytest.mark.parametrize("share", [0.01, 0.15, 0.25, 0.3, 0.5, 0.85, 1.0])
def test_nearest_takes_a_share_of_the_valid_tokens_as_far_as_it_may(share: float) -> None:
    rows, length = 60, 23
    valid = torch.rand(rows, length, generator=key(0)) < 0.8
    allowed = valid & (torch.rand(rows, length, generator=key(1)) < 0.7)
    distance = torch.rand(rows, length, generator=key(2)).round(decimals=1).masked_fill(~valid, torch.nan)
    chosen = nearest(distance, valid, share, allowed)
    for row in range(rows):
        order = sorted(allowed[row].nonzero().flatten().tolist(), key=lambda n: (distance[row, n].item(), n))
        count = max(1, round(int(valid[row].sum()) * share))  # Python rounds halves to even, as T-JEPA does
        assert chosen[row].nonzero().flatten().tolist() == sorted(order[:count])


def test_default_region_is_the_nearest_of_some_allowed_token() -> None:
    coords = torch.randn(40, 20, 3, generator=key(0))
    valid = torch.rand(40, 20, generator=key(1)) < 0.8
    coords[~valid] = torch.nan  # of padding nobody knows the place
    allowed = valid & (torch.rand(40, 20, generator=key(2)) < 0.7)
    region = Modality().region(tokens_at(coords, valid), 0.3, key(3), allowed)
    for row in range(40):
        may = allowed[row].nonzero().flatten().tolist()
        count = min(max(1, round(int(valid[row].sum()) * 0.3)), len(may))
        balls = [
            sorted(sorted(may, key=lambda n: float((coords[row, n] - coords[row, c]).norm()))[:count]) for c in may
        ]
        assert region[row].nonzero().flatten().tolist() in balls


def test_default_region_of_a_sequence_is_one_span() -> None:
    region = Modality().region(on_grid(300, 30), 0.2, key(0))
    assert (region.sum(dim=1) == 6).all()
    assert (region.int().diff(dim=1).abs().sum(dim=1) <= 2).all()
    assert region.any(dim=0).all()


# ---- Rectangles -----------------------------------------------------------------------------------------------------


def sides_of(region: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Top, left, height and width (B,) of regions (B, rows, columns); fails if one is no full rectangle."""
    y, x = region.any(dim=2), region.any(dim=1)
    assert torch.equal(region, y[:, :, None] & x[:, None, :])
    assert (y.int().diff(dim=1).abs().sum(dim=1) <= 2).all() and (x.int().diff(dim=1).abs().sum(dim=1) <= 2).all()
    return y.int().argmax(dim=1), x.int().argmax(dim=1), y.sum(dim=1), x.sum(dim=1)


@pytest.mark.parametrize("rows, columns", [(14, 14), (6, 20), (1, 12), (9, 1)])
def test_rectangles_have_the_share_the_ratio_and_one_size_in_a_batch(rows: int, columns: int) -> None:
    for seed in range(100):
        share = 0.02 + 0.98 * torch.rand((), generator=key(seed)).item()
        region = rectangle(on_grid(5, rows, columns), share, (0.75, 1.5), key(seed)).view(5, rows, columns)
        _, _, height, width = sides_of(region)
        assert len(height.unique()) == len(width.unique()) == 1
        h, w, area = int(height[0]), int(width[0]), share * rows * columns
        assert abs(h * w - area) <= max(h / 2, w / 2, 1)  # what rounding one side costs
        if 1.5 * area <= rows**2 and area / 0.75 <= columns**2:  # else the grid cuts a side off
            assert max((area / 1.5) ** 0.5 - 0.5, 1) <= w <= max((area / 0.75) ** 0.5 + 0.5, 1)


def test_ratio_is_height_over_width_and_even_on_the_scale_of_logarithms() -> None:
    """On a grid of 200 x 200, so that rounding hardly matters."""
    grid, ratios = on_grid(1, 200, 200), []
    for seed in range(300):
        _, _, height, width = sides_of(rectangle(grid, 0.1, (0.5, 3.0), key(seed)).view(1, 200, 200))
        ratios.append((height / width).log())
    drawn = torch.cat(ratios)
    low, high = torch.tensor([0.5, 3.0]).log()
    assert (drawn > low - 0.05).all() and (drawn < high + 0.05).all()
    assert abs(drawn.mean() - (low + high) / 2) < 4 * (high - low) / 12**0.5 / 300**0.5
    assert drawn.std().item() == pytest.approx(float((high - low) / 12**0.5), rel=0.1)


def test_places_of_rectangles_are_uniform_up_to_the_border() -> None:
    """I-JEPA's code never uses the last row and column."""
    draws = 6000
    top, left, height, width = sides_of(rectangle(on_grid(draws, 6, 8), 0.2, (1.0, 1.0), key(0)).view(-1, 6, 8))
    assert (height == 3).all() and (width == 3).all()
    share = torch.bincount(top * 6 + left, minlength=24).double() / draws
    assert len(share) == 24 and ((share - 1 / 24).abs() < 5 * (24 * draws) ** -0.5).all()


def test_rectangles_run_through_the_axes_before_the_last_two() -> None:
    """V-JEPA's tubes: the same place in every frame."""
    flat = rectangle(on_grid(7, 5, 6), 0.3, (0.75, 1.5), key(0)).view(7, 1, 30)
    deep = rectangle(on_grid(7, 4, 5, 6), 0.3, (0.75, 1.5), key(0)).view(7, 4, 30)
    assert torch.equal(deep, flat.expand(-1, 4, -1))


def test_what_is_not_valid_or_not_allowed_is_cut_out_of_a_rectangle() -> None:
    tokens = on_grid(20, 6, 6)
    whole = rectangle(tokens, 0.4, (1.0, 1.0), key(0))
    tokens.valid = torch.rand(20, 36, generator=key(1)) < 0.7
    allowed = torch.rand(20, 36, generator=key(2)) < 0.7
    assert torch.equal(rectangle(tokens, 0.4, (1.0, 1.0), key(0), allowed), whole & tokens.valid & allowed)


def test_images_take_their_ratio_from_an_option() -> None:
    image = Image(image_size=16, patch_size=1, num_channels=1, region_ratio=(4.0, 4.0))
    tokens = image.tokenize({"pixel_values": torch.zeros(3, 1, 16, 16)})
    _, _, height, width = sides_of(image.region(tokens, 0.25, key(0)).view(3, 16, 16))
    assert (height == 16).all() and (width == 4).all()
    assert Image().region_ratio == (0.75, 1.5)  # I-JEPA


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (16, 48), (56, 56)], ids=str)
def test_images_of_another_size_have_the_same_regions_as_a_grid_of_theirs(size: tuple[int, int]) -> None:
    """Their places are stretched over the grid of image_size, and do not lie at whole numbers."""
    image = Image(image_size=28, patch_size=4, num_channels=1)
    tokens = image.tokenize({"pixel_values": torch.zeros(50, 1, *size)})
    for seed, share in enumerate((0.01, 0.15, 0.3, 0.7)):
        own = rectangle(on_grid(50, size[0] // 4, size[1] // 4), share, image.region_ratio, key(seed))
        assert own.any(dim=1).all() and torch.equal(image.region(tokens, share, key(seed)), own)


# ---- Subgraphs ------------------------------------------------------------------------------------------------------


def hops_by_search(edges: list[tuple[int, int]], nodes: int, start: int) -> list[float]:
    """Breadth-first search, node by node."""
    hops = [float("inf")] * nodes
    hops[start], front = 0, [start]
    while front:
        node = front.pop(0)
        for source, target in edges:
            if source == node and hops[target] == float("inf"):
                hops[target] = hops[node] + 1
                front.append(target)
    return hops


def test_region_of_a_graph_is_a_ball_around_some_allowed_node() -> None:
    graph = Graph(num_features=12)
    tokens = graph.tokenize(make_batch(graph, 6))  # of 8 to 13 nodes, so that there is padding
    assert tokens.edges is not None
    length = tokens.valid.shape[1]
    for seed in range(10):
        allowed = torch.rand(tokens.valid.shape, generator=key(100 + seed)) < 0.7
        for may, share in ((None, 0.4), (allowed, 0.3)):
            region = graph.region(tokens, share, key(seed), may)
            for row in range(6):
                edges = [(s % length, t % length) for s, t in tokens.edges.T.tolist() if s // length == row]
                count = int(tokens.valid[row].sum())
                free = [n for n in range(count) if may is None or may[row, n]]
                chosen = set(region[row].nonzero().flatten().tolist())
                assert chosen <= set(free) and len(chosen) == min(max(1, round(count * share)), len(free))
                left = set(free) - chosen
                balls = []
                for start in chosen:
                    hops = hops_by_search(edges, count, start)
                    balls.append(max(hops[n] for n in chosen) <= min((hops[n] for n in left), default=float("inf")))
                assert any(balls)


def test_nodes_equally_far_away_are_drawn() -> None:
    """The rim of a star: of each region one node is the hub, or a node of the rim with the hub."""
    rim = torch.arange(1, 11)
    edges = torch.cat([torch.stack([rim, 0 * rim]), torch.stack([0 * rim, rim])], dim=1)
    draws = 2000
    everywhere = (edges[:, None] + 11 * torch.arange(draws)[:, None]).flatten(1)
    region = Graph().region(tokens_at(torch.zeros(draws, 11, 0), edges=everywhere), 3 / 11, key(0))
    assert region[:, 0].all() and (region.sum(dim=1) == 3).all()
    share = region[:, 1:].double().mean(dim=0)
    assert ((share - 0.2).abs() < 5 * (0.2 * 0.8 / draws) ** 0.5).all()


def paths(draws: int, *lengths: int) -> Tokens:
    """The same graph many times: paths of so many nodes, one after the other."""
    nodes = sum(lengths)
    ends = torch.tensor(lengths).cumsum(0)
    step = torch.arange(nodes - 1)
    step = step[~torch.isin(step + 1, ends)]
    edges = torch.cat([torch.stack([step, step + 1]), torch.stack([step + 1, step])], dim=1)
    everywhere = (edges[:, None] + nodes * torch.arange(draws)[:, None]).flatten(1)
    return tokens_at(torch.zeros(draws, nodes, 0), edges=everywhere)


def test_regions_of_a_long_path_are_one_piece() -> None:
    region = Graph().region(paths(200, 3 * MOST_HOPS), 0.2, key(0))
    assert (region.sum(dim=1) == 6).all() and (region.int().diff(dim=1).abs().sum(dim=1) <= 2).all()


def test_other_components_come_last() -> None:
    region = Graph().region(paths(300, MOST_HOPS, 6), 0.5, key(0))
    assert (region.sum(dim=1) == 8).all()
    small = region[:, MOST_HOPS:].any(dim=1)  # begun in the small one, and gone on in the other
    assert region[small][:, MOST_HOPS:].all() and 0.2 < small.float().mean() < 0.6


def test_region_of_nodes_without_edges() -> None:
    tokens = tokens_at(torch.zeros(50, 10, 0), edges=torch.zeros(2, 0, dtype=torch.long))
    region = Graph().region(tokens, 0.3, key(0))
    assert (region.sum(dim=1) == 3).all() and region.any(dim=0).all()
    tokens.edges = None
    assert torch.equal(Graph().region(tokens, 0.3, key(0)), region)
