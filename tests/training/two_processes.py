"""Two processes read half of a batch each, of different lengths; gradients must be those of the whole batch."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel

from mmssl import MMSSLConfig, MMSSLModel
from mmssl.objectives.masked_reconstruction import MaskedReconstruction
from mmssl.tokens import Mask
from tests.matrix.cases import MODALITIES, make_batch


def hide_every_third(tokens, ratio, generator, style):
    """A mask that depends on nothing but the place, so that two processes and one hide the same tokens."""
    hidden = (torch.arange(tokens.valid.shape[1]) % 3 == 1).expand_as(tokens.valid)
    return Mask.from_hidden(hidden, tokens.valid)


def gradients(module: torch.nn.Module, batch) -> dict[str, torch.Tensor]:
    module(batch, torch.Generator()).loss.backward()
    return {name.removeprefix("module."): p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def main(folder: Path) -> None:
    accelerator = Accelerator()
    assert accelerator.num_processes == 2, f"found {accelerator.num_processes} processes"
    torch.manual_seed(0)
    config = MMSSLConfig(
        modalities={"speech": MODALITIES["speech"][0]}, hidden_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    module = MaskedReconstruction(MMSSLModel(config), corruption="replace", decoder_layers=0, views=False)
    modality = module.model.adapters["speech"]
    modality.mask = hide_every_third  # type: ignore[method-assign, assignment]
    batch = make_batch(modality, 8)
    batch["attention_mask"][:4, 1000:] = 0  # the first half is shorter: a mean of the two means would be wrong

    half = slice(0, 4) if accelerator.is_main_process else slice(4, 8)
    parallel = DistributedDataParallel(module)
    found = gradients(parallel, {name: value[half] for name, value in batch.items()})
    torch.save(found, folder / f"found{accelerator.process_index}.pt")
    accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()

    module.zero_grad()
    torch.save(gradients(module, batch), folder / f"whole{accelerator.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
