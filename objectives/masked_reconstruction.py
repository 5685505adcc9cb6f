"""Masked reconstruction: MAE, Point-MAE, SimMIM, GraphMAE, GMML and TERA as one objective.

Hide or alter part of the tokens, encode what is left, and predict the clean content of what was hidden or altered:

    loss = sum over hidden (decode(encode(corrupt(x))) - target(x)) ** p / number of hidden

* He et al., "Masked autoencoders are scalable vision learners", CVPR 2022: hidden tokens are dropped before the
  encoder; a narrow decoder gets mask tokens in their places. ``corruption="drop"``, ``mask_ratio=0.75``,
  ``decoder_layers=8``. Point-MAE (Pang et al., ECCV 2022) is the same on groups of points.
* Wang et al., "VideoMAE V2", CVPR 2023, and Fu et al., "CrossMAE", TMLR 2025: the decoder gets and the loss counts a
  share of the hidden tokens alone, which costs less. ``predict_ratio=0.5``.
* Xie et al., "SimMIM", CVPR 2022: hidden tokens are replaced by a mask token and a plain head reads the encoder.
  ``corruption="replace"``, ``mask_ratio=0.6``, ``decoder_layers=0``, distance "l1".
* Hou et al., "GraphMAE", KDD 2022: a mask token in the place of the content, some hidden tokens get another one's
  content instead, and what the encoder says of hidden tokens is masked again before a decoder of one block.
  ``corruption="replace"``, ``mask_token_space="input"``, ``replace_ratio=0.05``, ``remask=True``.
* Atito et al., "GMML is all you need", 2022, and Liu et al., "TERA", TASLP 2021: the content itself is altered in
  place, as the modality does it. ``corruption="alter"``, ``decoder_layers=0``, ``head_layers=3`` and ``1``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from mmssl.encoder import Encoder
from mmssl.modalities.base import Batch, Modality
from mmssl.modeling import MMSSLModel
from mmssl.objectives.base import Objective, ObjectiveOutput, global_mean, smaller_config
from mmssl.tokens import Mask, Tokens, gather, indices_of


@dataclass
class Reconstruction:
    """What masked reconstruction computes on the way to its loss.

    Attributes:
        clean: the tokens as they were.
        seen: the tokens that the encoder read; where embeddings were replaced and not contents, with their contents.
        encoded: (B, K, D) its output for them.
        prediction: (B, M, *V) what hidden or altered tokens are taken to have been.
        where: (B, M) tokens or (B, M, *V) elements that count in the loss.
        index: (B, M) long, the places of the predictions among the clean tokens. None: M = N, one for each.
    """

    clean: Tokens
    seen: Tokens
    encoded: Tensor
    prediction: Tensor
    where: Tensor
    index: Tensor | None


class MaskedReconstruction(Objective):
    """Predict the clean content of hidden or altered tokens.

    Args:
        model: the model to train.
        corruption: "drop" hidden tokens before the encoder, "replace" their embedding by a mask token, or "alter" their
            content, in which case the modality's own options say how much and where.
        mask_ratio: share of the valid tokens that is hidden, between 0 and 1. None: 0.75; with "alter" it must be None.
        mask_style: how hidden tokens are chosen, one of the modality's ("random", "block", ...); with "alter" unused.
        predict_ratio: with "drop", share of the hidden tokens that the decoder fills in, drawn for each sample; the
            others are left out of decoder and loss in training. None: all.
        masks_per_sample: how many masks of one sample share a batch.
        mask_token_space: with "replace", the mask token stands for a token's "embedding" or, before it is embedded, for
            its "input".
        replace_ratio: share of the hidden tokens that get the content of a random token of the batch, not a mask token.
        remask: put a second mask token in the place of the encoder's output for hidden tokens before the decoder.
        views: train on one random view of each sample in place of the sample itself.
        decoder_layers: blocks of the decoder. 0: no decoder, the head reads the encoder.
        decoder_hidden_size: width of the decoder.
        decoder_attention_heads: attention heads of the decoder.
        decoder_drop_path_rate: as the encoder's drop_path_rate, of the decoder.
        head_layers: hidden layers (linear, GELU) between the last block and the modality's linear head.
        head_norm: layer norm before the modality's linear head (TERA).
        average_layers: the encoder's output is the normalised mean of these blocks (GMML: 6 8 10 12). Empty: the last.
    """

    references: ClassVar = (
        'He et al., "Masked autoencoders are scalable vision learners" (MAE), CVPR 2022',
        'Pang et al., "Masked autoencoders for point cloud self-supervised learning" (Point-MAE), ECCV 2022',
        'Wang et al., "VideoMAE V2: scaling video masked autoencoders with dual masking", CVPR 2023',
        'Xie et al., "SimMIM: a simple framework for masked image modeling", CVPR 2022',
        'Hou et al., "GraphMAE: self-supervised masked graph autoencoders", KDD 2022',
        'Atito et al., "GMML is all you need", arXiv 2022',
        'Liu et al., "TERA: self-supervised learning of transformer encoder representation for speech", TASLP 2021',
    )

    def __init__(
        self,
        model: MMSSLModel,
        corruption: Literal["drop", "replace", "alter"] = "drop",
        mask_ratio: float | None = None,
        mask_style: str = "random",
        predict_ratio: float | None = None,
        masks_per_sample: int = 1,
        mask_token_space: Literal["embedding", "input"] = "embedding",
        replace_ratio: float = 0.0,
        remask: bool = False,
        views: bool = True,
        decoder_layers: int = 4,
        decoder_hidden_size: int = 128,
        decoder_attention_heads: int = 4,
        decoder_drop_path_rate: float = 0.0,
        head_layers: int = 0,
        head_norm: bool = False,
        average_layers: Sequence[int] = (),
    ):
        super().__init__(model)
        if corruption == "alter":
            self.require("alter", "corruption='alter'", "corruption='drop' or 'replace'")
            if mask_ratio is not None:
                raise ValueError(
                    "mask_ratio has no meaning with corruption='alter': the modality's options say how much"
                )
        else:
            if mask_ratio is not None and not 0 < mask_ratio < 1:
                raise ValueError(f"mask_ratio: found {mask_ratio}; expected a share between 0 and 1, both excluded")
            for modality in model.adapters.values():
                if mask_style not in modality.mask_styles:
                    offered = ", ".join(modality.mask_styles)
                    raise ValueError(f"{modality.name} has no mask style {mask_style!r}; it offers: {offered}")
        if predict_ratio is not None and (corruption != "drop" or not 0 < predict_ratio <= 1):
            raise ValueError(
                f"predict_ratio: found {predict_ratio} with corruption={corruption!r}; expected a share above 0, at "
                "most 1, with corruption='drop', whose decoder can leave hidden tokens out; or leave it out"
            )
        if corruption == "drop" and not decoder_layers:
            raise ValueError(
                "corruption='drop' needs a decoder to put dropped tokens back; set decoder_layers to 1 or more"
            )
        if corruption != "replace" and (mask_token_space != "embedding" or replace_ratio or remask):
            raise ValueError(
                f"mask_token_space, replace_ratio and remask belong to corruption='replace'; found corruption="
                f"{corruption!r}: leave them out"
            )
        if mask_token_space not in ("embedding", "input"):
            raise ValueError(f"mask_token_space: found {mask_token_space!r}; expected 'embedding' or 'input'")
        if not 0 <= replace_ratio < 1:
            raise ValueError(f"replace_ratio: found {replace_ratio}; expected a share from 0 to below 1")
        if decoder_drop_path_rate and not model.config.residual:
            raise ValueError(
                "decoder_drop_path_rate drops residual branches; with an encoder of residual=False set it to 0"
            )
        if remask and not decoder_layers:
            raise ValueError("remask=True masks the input of a decoder, and decoder_layers is 0; set it to 1 or more")
        if views:
            self.require("view", "views=True", "views=False")
        depth = model.config.num_hidden_layers
        if any(not 1 <= number <= depth for number in average_layers):
            raise ValueError(f"average_layers: found {list(average_layers)}; the encoder has blocks 1 to {depth}")
        if average_layers and depth not in average_layers:
            raise ValueError(
                f"average_layers: found {list(average_layers)}; it must include the last block, {depth}, or make the "
                "encoder shallower: later blocks would not be trained"
            )
        if average_layers and model.config.norm_position == "post":
            raise ValueError(
                "average_layers: blocks of a post-norm encoder are normalised already; use norm_position='pre'"
            )
        self.corruption, self.mask_style = corruption, mask_style
        self.mask_ratio, self.predict_ratio = mask_ratio, predict_ratio
        self.masks_per_sample, self.views = masks_per_sample, views
        self.mask_token_space, self.replace_ratio, self.remask = mask_token_space, replace_ratio, remask
        self.decoder_layers, self.decoder_hidden_size = decoder_layers, decoder_hidden_size
        self.decoder_attention_heads, self.decoder_drop_path_rate = decoder_attention_heads, decoder_drop_path_rate
        self.head_layers, self.head_norm = head_layers, head_norm
        self.average_layers = tuple(average_layers)

        width = model.config.hidden_size
        if corruption == "replace" and mask_token_space == "embedding":
            self.mask_token = nn.Parameter(torch.zeros(width))
        elif corruption == "replace":
            self.input_mask_tokens = nn.ParameterDict(
                {f"{name}_token": torch.zeros(modality.content_shape) for name, modality in model.adapters.items()}
            )
        if decoder_layers:
            self.decoder_input = nn.Linear(width, decoder_hidden_size)
            shape = decoder_hidden_size, decoder_layers, decoder_attention_heads
            self.decoder = Encoder(smaller_config(model.config, *shape, decoder_drop_path_rate))
            if corruption == "drop" or remask:
                self.decoder_mask_token = nn.Parameter(torch.zeros(decoder_hidden_size))
            self.decoder_positions = nn.ModuleDict(
                {name: modality.positions(decoder_hidden_size) for name, modality in model.adapters.items()}
            )
            width = decoder_hidden_size
        layers: list[nn.Module] = []
        for _ in range(head_layers):
            layers += [nn.Linear(width, width), nn.GELU()]
        if head_norm:
            layers.append(nn.LayerNorm(width, eps=model.config.layer_norm_eps))
        self.head = nn.Sequential(*layers)
        self.reconstruction_heads = nn.ModuleDict(
            {name: modality.reconstruction_head(width) for name, modality in model.adapters.items()}
        )
        self.init_heads(model.config)
        for name in ("mask_token", "decoder_mask_token"):
            if hasattr(self, name):
                nn.init.normal_(getattr(self, name), std=model.config.initializer_range)

    def forward(self, batch: Batch, generator: torch.Generator) -> ObjectiveOutput:
        modality = self.model.modality_of(batch)
        if self.views:
            batch = modality.view(batch, generator).batch
        out = self.reconstruct(modality, modality.tokenize(batch).repeat(self.masks_per_sample), generator)
        target = modality.target(out.clean)
        if out.index is not None:
            target = gather(target, out.index)
        loss, weight = modality.reconstruction_loss(out.prediction, target, out.where)
        metrics = {}
        if out.prediction.shape == target.shape:  # else they are of different kinds, and a mean says nothing
            metrics["trivial"] = loss_of_mean(modality, target, out.where)
        return ObjectiveOutput(global_mean(loss, weight), metrics, out.seen.pool(out.encoded.detach()))

    def reconstruct(self, modality: Modality, clean: Tokens, generator: torch.Generator) -> "Reconstruction":
        """Corrupt, encode, decode and predict."""
        index = kept = None
        if self.corruption == "alter":
            seen, where = modality.alter(clean, generator)
            encoded, class_token = self.encode(modality, seen)
            decoded = self.decode(modality, clean, encoded, class_token)
        else:
            ratio = 0.75 if self.mask_ratio is None else self.mask_ratio
            mask = modality.mask(clean, ratio, generator, self.mask_style)
            if self.corruption == "drop":
                seen = clean.select(mask.visible_index, mask.visible_valid)
                encoded, class_token = self.encode(modality, seen)
                filled, mask, kept = self.filled(clean, mask, generator)
                decoded = self.decode(modality, filled, encoded, class_token, mask)
            else:
                seen, content = self.masked_content(modality, clean, mask, generator)
                encoded, class_token = self.encode(modality, seen, content)
                decoded = self.decode(modality, clean, encoded, class_token, mask if self.remask else None)
            # Only hidden tokens are predicted.
            index, where = mask.hidden_index, mask.hidden_valid
            decoded = gather(decoded, index)
            if kept is not None:
                index = gather(kept, index)
        prediction = self.reconstruction_heads[modality.name](self.head(decoded))
        return Reconstruction(clean, seen, encoded, prediction, where, index)

    @torch.no_grad()
    def shown(self, modality: Modality, tokens: Tokens, generator: torch.Generator) -> dict[str, Tokens]:
        """The original, what the encoder sees of it, and its reconstruction, the original where nothing was hidden."""
        out, original = self.reconstruct(modality, tokens, generator), tokens.content
        if out.index is None:
            where = out.where.reshape(out.where.shape + (1,) * (original.dim() - out.where.dim()))
            seen = out.seen.content
            restored = torch.where(where, modality.content_of(out.prediction, tokens), original)
        else:
            rows = torch.arange(len(original), device=out.index.device)[:, None]
            predicted = modality.content_of(out.prediction, tokens.select(out.index, out.where))
            restored = original.clone()
            restored[rows, out.index] = predicted.to(restored.dtype)
            hidden = torch.zeros_like(tokens.valid)
            hidden[rows, out.index] = out.where
            hidden = hidden.reshape(hidden.shape + (1,) * (restored.dim() - hidden.dim()))
            seen = original.masked_fill(hidden, torch.nan)
            restored = torch.where(hidden, restored, original)
        contents = {"original": original, "seen": seen, "reconstructed": restored}
        return {title: replace(tokens, content=content) for title, content in contents.items()}

    def filled(self, clean: Tokens, mask: Mask, generator: torch.Generator) -> tuple[Tokens, Mask, Tensor | None]:
        """The tokens that the decoder is about, their mask, and (B, K) long, which tokens they are. None: all."""
        if self.predict_ratio is None or not self.training:
            return clean, mask, None
        order = torch.rand(mask.hidden.shape, generator=generator, device=mask.hidden.device)
        rank = order.masked_fill(~mask.hidden, torch.inf).argsort(dim=1).argsort(dim=1)
        count = (mask.hidden_valid.sum(dim=1, keepdim=True) * self.predict_ratio).ceil()
        kept, valid = indices_of(clean.valid & (~mask.hidden | (rank < count)))
        return clean.select(kept, valid), Mask.from_hidden(gather(mask.hidden, kept), valid), kept

    def masked_content(
        self, modality: Modality, clean: Tokens, mask: Mask, generator: torch.Generator
    ) -> tuple[Tokens, Tensor]:
        """Tokens, and their embeddings (B, N, D) with hidden ones replaced: after ``embed`` where that is the same."""
        masked, seen, source = mask.hidden, clean, None
        if self.replace_ratio:
            device = masked.device
            order = torch.rand(masked.shape, generator=generator, device=device).masked_fill(~masked, torch.inf)
            count = (mask.hidden_valid.sum(dim=1, keepdim=True) * self.replace_ratio).long()
            replaced = order.argsort(dim=1).argsort(dim=1) < count
            valid = clean.valid.flatten().nonzero().squeeze(1)
            pick = valid[torch.randint(len(valid), masked.shape, generator=generator, device=device)]
            source = torch.where(replaced, pick, torch.arange(replaced.numel(), device=device).view_as(pick)).flatten()
            masked = masked & ~replaced
            if not modality.affine:
                content = clean.content.flatten(0, 1)[source].view_as(clean.content)
                seen = replace(clean, content=content)
        early = self.mask_token_space == "input"
        token = self.input_mask_tokens[f"{modality.name}_token"] if early else self.mask_token
        if early and not modality.affine:
            where = masked.view(*masked.shape, *[1] * token.dim())
            seen = replace(seen, content=torch.where(where, token.to(seen.content.dtype), seen.content))
            return seen, modality.embed(seen)
        embedded = modality.embed(seen)
        if source is not None and modality.affine:
            embedded = embedded.flatten(0, 1).index_select(0, source).view_as(embedded)
        if early:
            token = modality.embed(replace(clean, content=token[None, None]))[0, 0]
        return seen, torch.where(masked[..., None], token.to(embedded.dtype), embedded)

    def encode(self, modality: Modality, seen: Tokens, content: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Output of the encoder for the tokens it sees, (B, N, D), and for the class token, (B, 0 or 1, D)."""
        out = self.model.encode(modality, seen, content, self.average_layers)
        class_token = out.prefix[:, : int(self.model.config.class_token)]
        if not self.average_layers:
            return out.tokens, class_token
        return self.model.encoder.norm(torch.stack(out.layers).mean(dim=0)), class_token

    def decode(
        self, modality: Modality, clean: Tokens, encoded: Tensor, class_token: Tensor, mask: Mask | None = None
    ) -> Tensor:
        """All tokens after the decoder, (B, N, width); mask tokens stand in where ``mask`` has hidden some.

        ``encoded`` are all tokens, or where hidden ones were dropped, the visible ones.
        """
        if not self.decoder_layers:
            return encoded
        content = self.decoder_input(encoded)
        if mask is not None:
            token = self.decoder_mask_token.to(content.dtype)
        if mask is not None and self.corruption == "replace":
            content = torch.where(mask.hidden[..., None], token, content)
        elif mask is not None:
            content = torch.where(mask.visible_valid[..., None], content, token)
            index = mask.visible_index[..., None].expand_as(content)
            content = token.expand(*clean.valid.shape, -1).scatter(1, index, content)
        position = self.decoder_positions[modality.name](clean.coords)
        prefix = self.decoder_input(class_token)
        return self.decoder(content, position, clean.valid, clean.edges, prefix=prefix).tokens


@torch.no_grad()
def loss_of_mean(modality: Modality, target: Tensor, where: Tensor) -> Tensor:
    """What the mean of the targets (B, M, *V) that count, predicted for each, would score; ``where`` as in the loss."""
    counts = where.view(*where.shape, *[1] * (target.dim() - where.dim())).expand_as(target).float()
    mean = (target.float() * counts).sum(dim=(0, 1)) / counts.sum(dim=(0, 1)).clamp(min=1)
    loss, weight = modality.reconstruction_loss(mean.expand_as(target), target, where)
    return (loss * weight).sum() / weight.sum().clamp(min=1e-12)
