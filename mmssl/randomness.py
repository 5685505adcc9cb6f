"""Keyed randomness: the same key draws the same numbers, whatever was drawn before."""

import hashlib

import torch


def seed_of(*key: int | str) -> int:
    """A 63-bit seed that depends on every part of the key and on their order."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def keyed_generator(device: torch.device, *key: int | str) -> torch.Generator:
    """A generator seeded by the key. The global one is seeded too, by another seed: dropout knows no other."""
    torch.manual_seed(seed_of(*key, "global"))
    return torch.Generator(device=device).manual_seed(seed_of(*key))
