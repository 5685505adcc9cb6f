"""GraphMAE as masked reconstruction, against a slow one, and the properties that a leak would break."""

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.modalities.base import Batch, Modality
from mmssl.modalities.graph import Graph
from mmssl.modeling import MMSSLConfig, MMSSLModel
from mmssl.objectives.masked_reconstruction import MaskedReconstruction
from mmssl.tokens import Mask, Tokens

FEATURES, SIZES = 5, (12, 7, 20)
SPACES = ("embedding", "input")


def key(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Windows(Modality):
    """Tokens with contents of two axes, (S, 3), and NaN behind the end of a row."""

    name: ClassVar = "graph"
    inputs: ClassVar = ("values",)
    content_shape: ClassVar = (4, 3)

    def build(self, width: int) -> "Windows":
        self.projection = nn.Linear(12, width)
        return super().build(width)

    def tokenize(self, batch: Batch) -> Tokens:
        values = batch["values"]
        return Tokens(values, torch.zeros(*values.shape[:2], 0), ~values.isnan().any(dim=(2, 3)))

    def embed(self, tokens: Tokens) -> Tensor:
        return self.projection(tokens.content.nan_to_num().flatten(2))

    def positions(self, width: int) -> nn.Module:
        return Graph().positions(width)


def make(
    options: dict[str, Any] | None = None,
    encoder: dict[str, Any] | None = None,
    cls: type[Modality] | None = None,
    **arguments: Any,
) -> MaskedReconstruction:
    """A small objective as GraphMAE has it, all of whose parameters are away from their start values."""
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, **(encoder or {})}
    modality = {"num_features": FEATURES, "normalize_features": False, **(options or {})}
    model = MMSSLModel(MMSSLConfig(modalities={"graph": modality}, **shape))
    if cls is not None:
        model.modalities["graph"] = cls().build(16)
    graphmae: dict[str, Any] = {
        "corruption": "replace",
        "mask_ratio": 0.5,
        "mask_token_space": "input",
        "remask": True,
        "views": False,
        "decoder_layers": 1,
        "decoder_hidden_size": 8,
        "decoder_attention_heads": 2,
    }
    objective = MaskedReconstruction(model, **{**graphmae, **arguments})
    with torch.no_grad():
        for number, parameter in enumerate(objective.parameters()):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=key(number)))
    return objective


def graph_of(objective: MaskedReconstruction) -> Any:
    return objective.model.modalities["graph"]


def make_batch(objective: MaskedReconstruction, sizes: tuple[int, ...] = SIZES) -> Batch:
    """Rings with chords, an isolated node at the end of each."""
    modality, graphs = graph_of(objective), []
    for nodes in sizes:
        ring = torch.stack([torch.arange(nodes - 1), (torch.arange(nodes - 1) + 1) % max(nodes - 1, 1)])
        chords = torch.randint(max(nodes - 1, 1), (2, nodes // 3), generator=key(nodes))
        x = torch.randn(nodes, FEATURES, generator=key(nodes))
        graphs.append(modality.prepare({"x": x, "edge_index": torch.cat([ring, chords], dim=1)}))
    return modality.collate(graphs)


def mask_of(objective: MaskedReconstruction, tokens: Tokens, seed: int = 0) -> Mask:
    """The mask that the objective draws with this seed."""
    return graph_of(objective).mask(tokens, objective.mask_ratio, key(seed), objective.mask_style)


def reconstruct(objective: MaskedReconstruction, tokens: Tokens, seed: int = 0) -> Any:
    return objective.reconstruct(graph_of(objective), tokens, key(seed))


# Against a slow implementation


def slow_encoder(x: Tensor, weights: dict[str, Tensor], allowed: Tensor, layers: int, heads: int) -> Tensor:
    """Pre-norm blocks of one graph (N, D) in which node i reads node j where allowed[i, j]."""

    def norm(x: Tensor, name: str) -> Tensor:
        scaled = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    size = x.shape[1] // heads
    for i in range(layers):
        q, k, v = linear(norm(x, f"layers.{i}.norm1"), f"layers.{i}.attention.qkv").chunk(3, dim=1)
        parts = [slice(head * size, (head + 1) * size) for head in range(heads)]
        scores = [(q[:, p] @ k[:, p].T / size**0.5).masked_fill(~allowed, -torch.inf) for p in parts]
        out = [torch.softmax(score, dim=-1) @ v[:, p] for score, p in zip(scores, parts, strict=True)]
        x = x + linear(torch.cat(out, dim=1), f"layers.{i}.attention.proj")
        inner = linear(norm(x, f"layers.{i}.norm2"), f"layers.{i}.mlp.fc1")
        x = x + linear(inner * (1 + torch.erf(inner / 2**0.5)) / 2, f"layers.{i}.mlp.fc2")
    return norm(x, "norm")


def slow_graphmae(objective: MaskedReconstruction, batch: Batch, hidden: Tensor) -> float:
    """Hou et al. (2022), graph by graph: mask, encode, mask again, decode along the same edges, scaled cosine error."""
    weights = {name: value.detach() for name, value in objective.state_dict().items()}

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    longest, errors = batch["node_features"].shape[1], []
    for row, nodes in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
        allowed = torch.eye(nodes, dtype=torch.bool)
        for source, target in batch["edge_index"].T.tolist():
            if source // longest == row:
                allowed[target % longest, source % longest] = True
        x, gone = batch["node_features"][row, :nodes].double(), hidden[row, :nodes]
        h = x.clone()
        if objective.mask_token_space == "input":
            h[gone] = weights["input_mask_tokens.graph_token"]
        h = linear(h, "model.modalities.graph.projection")
        if objective.mask_token_space == "embedding":
            h[gone] = weights["mask_token"]
        h = slow_encoder(h, part("model.encoder."), allowed, 2, 2)
        h = linear(h, "decoder_input")
        if objective.remask:
            h[gone] = weights["decoder_mask_token"]
        z = linear(slow_encoder(h, part("decoder."), allowed, 1, 2), "reconstruction_heads.graph")
        for node in range(nodes):
            if gone[node]:
                cosine = (z[node] @ x[node]) / (z[node].norm() * x[node].norm())
                errors.append(float((1 - cosine) ** graph_of(objective).gamma))
    return sum(errors) / len(errors)


@pytest.mark.parametrize("remask", [True, False])
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("gamma", [1.0, 3.0])
def test_loss_equals_a_slow_graphmae(gamma: float, space: Any, remask: bool) -> None:
    """The mean over all hidden nodes of the batch, not of each graph's mean."""
    objective = make({"gamma": gamma}, mask_token_space=space, remask=remask).double()
    batch = make_batch(objective)
    hidden = mask_of(objective, graph_of(objective).tokenize(batch), seed=3).hidden
    assert hidden.sum(dim=1).tolist() == [6, 4, 10]
    assert objective(batch, key(3)).loss.item() == pytest.approx(slow_graphmae(objective, batch, hidden), rel=1e-5)


# Only hidden nodes are predicted, and nothing of them is seen


@pytest.mark.parametrize("replace_ratio", [0.0, 0.4])
def test_the_loss_is_of_hidden_nodes_only(replace_ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets of visible nodes and of padding may be anything; each hidden node's counts, replaced or not."""
    objective = make(replace_ratio=replace_ratio)
    modality, batch = graph_of(objective), make_batch(objective)
    hidden = mask_of(objective, modality.tokenize(batch)).hidden
    before = objective(batch, key(0)).loss
    noise = torch.randn(batch["node_features"].shape, generator=key(1))

    def loss_with(changed: Tensor) -> Tensor:
        monkeypatch.setattr(modality, "target", lambda tokens: tokens.content + noise * changed[..., None])
        return objective(batch, key(0)).loss

    assert torch.equal(loss_with(~hidden), before)
    for row, node in hidden.nonzero().tolist():
        one = torch.zeros_like(hidden)
        one[row, node] = True
        assert loss_with(one) != before


@pytest.mark.parametrize("mask_style", ["random", "block"])
@pytest.mark.parametrize("space", SPACES)
def test_features_of_hidden_nodes_do_not_reach_the_encoder(space: Any, mask_style: str) -> None:
    """Outputs and predictions are the same to the bit, also those of their neighbours; visible features matter."""
    objective = make(mask_token_space=space, mask_style=mask_style, encoder={"class_token": True})
    tokens = graph_of(objective).tokenize(make_batch(objective))
    hidden = mask_of(objective, tokens).hidden
    before = reconstruct(objective, tokens)
    other = torch.randn(tokens.content.shape, generator=key(9))
    tokens.content = torch.where(hidden[..., None], other, tokens.content)
    after = reconstruct(objective, tokens)
    assert torch.equal(after.encoded, before.encoded) and torch.equal(after.prediction, before.prediction)
    tokens.content = torch.where(hidden[..., None], tokens.content, other)
    assert not torch.allclose(reconstruct(objective, tokens).encoded[tokens.valid], before.encoded[tokens.valid])


def test_in_input_space_the_mask_token_is_embedded_as_contents_are() -> None:
    """What is embedded, and its embedding through weight and bias."""
    objective = make()
    modality, tokens = graph_of(objective), graph_of(objective).tokenize(make_batch(objective))
    mask, content = mask_of(objective, tokens), tokens.content.clone()
    _, embedded = objective.masked_content(modality, tokens, mask, key(0))
    token = objective.input_mask_tokens["graph_token"]
    assert token.shape == (FEATURES,) and token.any()
    seen = content.clone()
    seen[mask.hidden] = token
    expected = seen @ modality.projection.weight.T + modality.projection.bias
    torch.testing.assert_close(embedded, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(tokens.content, content), "the clean tokens were changed"
    fresh = MaskedReconstruction(objective.model, corruption="replace", mask_token_space="input", views=False)
    assert not fresh.input_mask_tokens["graph_token"].any()  # as the authors start it


@pytest.mark.parametrize("replace_ratio", [0.0, 0.3])
@pytest.mark.parametrize("space", SPACES)
def test_replacing_embeddings_is_replacing_contents(space: Any, replace_ratio: float, monkeypatch) -> None:
    """What an affine modality is spared changes neither the loss nor a gradient."""
    objective = make(mask_token_space=space, replace_ratio=replace_ratio).double()
    found = []
    for affine in (True, False):
        monkeypatch.setattr(Graph, "affine", affine)
        objective.zero_grad()
        loss = objective(make_batch(objective), key(0)).loss
        loss.backward()
        found.append([loss, *(parameter.grad for parameter in objective.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


# Replaced contents


def numbered(objective: MaskedReconstruction, lengths: tuple[int, ...]) -> Tokens:
    """Each content says whose it is; padding says so too."""
    longest = max(lengths)
    shape = graph_of(objective).content_shape
    numbers = torch.arange(1.0, len(lengths) * longest + 1).view(len(lengths), longest, *(1 for _ in shape))
    numbers = numbers * torch.arange(1, 1 + shape[-1])  # differs along the last axis
    valid = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return Tokens(numbers.expand(len(lengths), longest, *shape).clone(), torch.zeros(len(lengths), longest, 0), valid)


@pytest.mark.parametrize("cls", [None, Windows], ids=["features", "windows"])
@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.6])
@pytest.mark.parametrize("space", SPACES)
def test_the_replaced_share_is_exact_and_comes_from_valid_tokens(space: Any, ratio: float, cls: Any) -> None:
    """Rounded down in each row, so that small graphs may have none; donors are hidden and visible, of any row."""
    objective = make(cls=cls, mask_token_space=space, replace_ratio=ratio, remask=False)
    modality, lengths = graph_of(objective), (3, 40, 1, 12, 21)
    tokens, donors, victims = numbered(objective, lengths), set(), set()
    content, shape = tokens.content.clone(), modality.content_shape
    if space == "input":
        of_mask = replace(tokens, content=objective.input_mask_tokens["graph_token"][None, None])
    for seed in range(60):
        mask = mask_of(objective, tokens, seed)
        _, embedded = objective.masked_content(modality, tokens, mask, key(seed + 1000))
        token = objective.mask_token if space == "embedding" else modality.embed(of_mask)[0, 0]
        masked = (embedded - token).abs().amax(dim=2) < 1e-5
        assert not (masked & ~mask.hidden).any()
        replaced = mask.hidden & ~masked
        expected = [int(count * ratio) for count in mask.hidden.sum(dim=1).tolist()]
        assert replaced.sum(dim=1).tolist() == expected
        clean = modality.embed(tokens)
        torch.testing.assert_close(embedded[~mask.hidden], clean[~mask.hidden])
        for row, node in replaced.nonzero().tolist():
            away = (clean.flatten(0, 1) - embedded[row, node]).abs().amax(dim=1)
            whose = int(away.argmin())
            assert away[whose] < 1e-4 * clean.abs().max()
            assert tokens.valid.flatten()[whose], "padding was taken for a token"
            donors.add(whose)
            victims.add((row, node))
    assert torch.equal(tokens.content, content) and content.shape[2:] == shape
    if ratio == 0.6:
        assert donors == set(tokens.valid.flatten().nonzero().squeeze(1).tolist())
        assert victims == {(row, node) for row, node in tokens.valid.nonzero().tolist() if lengths[row] > 1}


@pytest.mark.parametrize("space", SPACES)
def test_contents_of_several_axes_are_learned_from_past_unknown_values(space: Any) -> None:
    """NaN in the padding reaches neither loss nor gradients."""
    objective = make(cls=Windows, mask_token_space=space, replace_ratio=0.3)
    values = torch.randn(3, 9, 4, 3, generator=key(0))
    values[1, 5:] = torch.nan
    loss = objective({"values": values}, key(0)).loss
    loss.backward()
    assert loss.isfinite()
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    if space == "input":
        assert objective.input_mask_tokens["graph_token"].shape == (4, 3)


# Masking again, and the decoder


def decoder_inputs(objective: MaskedReconstruction) -> list[tuple[Any, ...]]:
    """Collects what the decoder reads from now on."""
    seen: list[tuple[Any, ...]] = []

    def keep(_: Any, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs)

    objective.decoder.register_forward_pre_hook(keep)
    return seen


@pytest.mark.parametrize("remask", [True, False])
@pytest.mark.parametrize("space", SPACES)
def test_masking_again_hides_what_the_encoder_says_of_hidden_nodes(space: Any, remask: bool) -> None:
    objective = make(mask_token_space=space, remask=remask, replace_ratio=0.3)
    modality, inputs = graph_of(objective), decoder_inputs(objective)
    tokens = modality.tokenize(make_batch(objective))
    mask = mask_of(objective, tokens)
    encoded = torch.randn(*tokens.valid.shape, 16, generator=key(4), requires_grad=True)
    none = encoded.new_zeros(len(encoded), 0, 16)
    decoded = objective.decode(modality, tokens, encoded, none, mask if remask else None)
    content = inputs[0][0]
    plain = encoded @ objective.decoder_input.weight.T + objective.decoder_input.bias
    torch.testing.assert_close(content[~mask.hidden], plain[~mask.hidden])
    (decoded * torch.randn(decoded.shape, generator=key(5)))[tokens.valid].sum().backward()
    assert encoded.grad is not None
    assert encoded.grad[tokens.valid & ~mask.hidden].any(dim=1).all()
    if remask:  # not even the bias of the layer between
        assert torch.equal(content[mask.hidden], objective.decoder_mask_token.expand(int(mask.hidden.sum()), -1))
        assert not encoded.grad[mask.hidden].any()
    else:
        torch.testing.assert_close(content[mask.hidden], plain[mask.hidden])
        assert encoded.grad[mask.hidden].any(dim=1).all() and not hasattr(objective, "decoder_mask_token")


def test_masking_again_happens_in_the_whole_objective() -> None:
    """Replaced nodes are masked again like the others."""
    objective = make(replace_ratio=0.5)
    tokens, inputs = graph_of(objective).tokenize(make_batch(objective)), decoder_inputs(objective)
    reconstruct(objective, tokens)
    is_token = (inputs[0][0] == objective.decoder_mask_token).all(dim=2)
    assert torch.equal(is_token, mask_of(objective, tokens).hidden)


def test_the_decoder_reads_along_the_same_edges() -> None:
    """One block: what the encoder says of a node reaches its neighbours and itself, in its own graph, and no other."""
    objective = make(remask=False)
    modality, batch = graph_of(objective), make_batch(objective)
    tokens = modality.tokenize(batch)
    encoded, longest = torch.randn(*tokens.valid.shape, 16, generator=key(4)), tokens.valid.shape[1]
    none = encoded.new_zeros(len(encoded), 0, 16)
    before = objective.decode(modality, tokens, encoded, none)
    edges = {(s, t) for s, t in batch["edge_index"].T.tolist()}
    for row, node in ((0, 3), (0, 11), (1, 0), (2, 8)):
        changed = encoded.clone()
        changed[row, node] += torch.randn(16, generator=key(5))
        moved = (objective.decode(modality, tokens, changed, none) != before).any(dim=2).flatten()
        flat = row * longest + node
        assert set(moved.nonzero().squeeze(1).tolist()) == {flat} | {t for s, t in edges if s == flat}


def drop_path_rates(encoder: Any) -> list[float]:
    return [layer.drop_path.rate for layer in encoder.layers]


def test_stochastic_depth_of_the_decoder_is_its_own() -> None:
    objective = make(encoder={"drop_path_rate": 0.2}, decoder_layers=3, decoder_drop_path_rate=0.4)
    assert drop_path_rates(objective.model.encoder) == pytest.approx([0.0, 0.2])
    assert drop_path_rates(objective.decoder) == pytest.approx([0.0, 0.2, 0.4])
    plain = make(encoder={"drop_path_rate": 0.2}, decoder_layers=3)
    assert not any(drop_path_rates(plain.decoder))
    tokens, encoded = graph_of(plain).tokenize(make_batch(plain)), torch.randn(3, 20, 16, generator=key(0))

    def decode(number: int) -> Tensor:
        torch.manual_seed(number)
        return objective.decode(graph_of(objective), tokens, encoded, encoded[:, :0])

    assert torch.equal(decode(0), decode(0)) and not torch.equal(decode(0), decode(1))
    objective.eval()
    assert torch.equal(decode(0), decode(1))


# Training


@pytest.mark.parametrize("encoder", [{}, {"residual": False, "feed_forward": False}], ids=["standard", "bare"])
@pytest.mark.parametrize("remask", [True, False])
@pytest.mark.parametrize("space", SPACES)
def test_every_parameter_has_a_gradient(space: Any, remask: bool, encoder: dict[str, Any]) -> None:
    pytest.importorskip("torch_geometric", reason="torch-geometric is not installed")
    options = {"random_walk_steps": 3, "drop_edges": 0.1}
    objective = make(options, encoder, mask_token_space=space, remask=remask, replace_ratio=0.3, views=True)
    objective(make_batch(objective), key(0)).loss.backward()
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    names = {name for name, _ in objective.named_parameters()}
    assert ("mask_token" in names) == (space == "embedding")
    assert ("input_mask_tokens.graph_token" in names) == (space == "input")
    assert ("decoder_mask_token" in names) == remask


def test_the_generator_decides_and_global_randomness_is_left_alone() -> None:
    objective = make(replace_ratio=0.4, masks_per_sample=2)
    batch = make_batch(objective)
    before = torch.get_rng_state()
    losses = [objective(batch, key(seed)).loss.item() for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_nodes_without_features_weigh_nothing() -> None:
    """As the loss without them; with none that has any, the loss is 0 and gradients are finite."""
    objective = make().double()
    batch = make_batch(objective)
    batch["node_features"][:, ::3] = 0
    hidden = mask_of(objective, graph_of(objective).tokenize(batch)).hidden & (batch["node_features"] != 0).any(dim=2)
    errors = []
    out = reconstruct(objective, graph_of(objective).tokenize(batch))
    for row, places in enumerate(out.index.tolist()):
        for place, node in enumerate(places):
            if out.where[row, place] and hidden[row, node]:
                target = batch["node_features"][row, node].double()
                errors.append((1 - F.cosine_similarity(out.prediction[row, place], target, dim=0)) ** 3)
    assert 0 < len(errors) < int(out.where.sum())
    assert objective(batch, key(0)).loss.item() == pytest.approx(float(sum(errors)) / len(errors), rel=1e-5)
    loss = objective({**batch, "node_features": 0 * batch["node_features"]}, key(0)).loss
    loss.backward()
    assert loss.item() == 0
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in objective.parameters())


@pytest.mark.parametrize("sizes", [(1,), (2,), (1, 2, 3)])
@pytest.mark.parametrize("replace_ratio", [0.0, 0.05, 0.9])
def test_tiny_graphs(sizes: tuple[int, ...], replace_ratio: float) -> None:
    objective = make(replace_ratio=replace_ratio)
    loss = objective(make_batch(objective, sizes), key(0)).loss
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in objective.parameters())


@pytest.mark.slow
def test_learns_features_that_neighbours_share() -> None:
    """Two halves with a feature each: the error of hidden nodes falls far below that of the mean feature."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = MMSSLModel(MMSSLConfig(modalities={"graph": {"num_features": 2, "gamma": 2.0}}, **shape))
    small: dict[str, Any] = {"decoder_layers": 1, "decoder_hidden_size": 8, "decoder_attention_heads": 2}
    objective = MaskedReconstruction(
        model, corruption="replace", mask_ratio=0.5, mask_token_space="input", remask=True, **small
    )
    nodes = torch.arange(40)
    edges = torch.cat([torch.stack([nodes, nodes // 20 * 20 + (nodes % 20 + step) % 20]) for step in (1, 2, 5)], dim=1)
    modality = graph_of(objective)
    batch = modality.collate([modality.prepare({"x": F.one_hot(nodes // 20, 2), "edge_index": edges})])
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    for step in range(150):
        optimizer.zero_grad()
        objective(batch, key(step)).loss.backward()
        optimizer.step()
    after = sum(objective(batch, key(1000 + seed)).loss.item() for seed in range(10)) / 10
    assert after < 0.2 * (1 - 0.5**0.5) ** 2


# What has no meaning


@pytest.mark.parametrize("corruption", ["drop", "alter"])
@pytest.mark.parametrize("option", [{"mask_token_space": "input"}, {"replace_ratio": 0.1}, {"remask": True}], ids=str)
def test_options_of_replacement_are_refused_elsewhere(option: dict[str, Any], corruption: str) -> None:
    if corruption == "drop":
        model = make().model
    else:
        image = {"image_size": 8, "patch_size": 4, "alteration": "zeros"}
        model = MMSSLModel(
            MMSSLConfig(modalities={"image": image}, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
        )
    with pytest.raises(ValueError, match=rf"{next(iter(option))}.*corruption='replace'.*'{corruption}'"):
        MaskedReconstruction(model, corruption=corruption, views=False, **option)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"replace_ratio": 1.0}, r"replace_ratio: found 1\.0; expected a share from 0 to below 1"),
        ({"replace_ratio": -0.1}, r"replace_ratio: found -0\.1"),
        ({"decoder_layers": 0}, r"remask=True .*decoder_layers is 0; set it to 1 or more"),
        ({"mask_style": "tube"}, r"graph has no mask style 'tube'; it offers: random, block"),
        ({"encoder": {"residual": False}, "decoder_drop_path_rate": 0.1}, r"residual=False"),
    ],
)
def test_values_without_a_meaning_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objective = make(**arguments)
        objective(make_batch(objective), key(0))
