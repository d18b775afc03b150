"""The block pool: who holds which block of the paged key-value cache, and which blocks can be shared.

A block is `block_size` consecutive positions of one sequence. A full block is named by a hash of everything that
decides its content: the hash of the block before it and its own token ids, starting from a root that carries tags
(adapter, tenant). A request that begins with the same blocks takes them instead of computing them again. A hit is
believed only when the stored token ids are equal, so a weak hash could cost speed but never a wrong answer.
Free blocks keep their content until they are taken again, least recently used first.

Block 0 is never handed out: it stays zero, and stands for "no such position" when keys are gathered.
Source: Kwon et al. 2023, "Efficient Memory Management for LLM Serving with PagedAttention", section 4.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

NULL_BLOCK = 0


def root_hash(tags: Mapping[str, str] | None = None) -> bytes:
    """Return the hash that the first block of a sequence continues.

    Args:
        tags: What else decides the content of a block, each under its own name, so that an adapter called "a" and a
            tenant called "a" never share. Empty for the plain model.
    """
    digest = hashlib.blake2b(b"modelwright-kv-1", digest_size=16)
    for name in sorted(tags or {}):
        value = (tags or {})[name]
        for part in (name, value):
            data = part.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Return the name of a full block: its predecessor's hash continued with its own token ids."""
    return hashlib.blake2b(parent + array("q", token_ids).tobytes(), digest_size=16).digest()


@dataclass(frozen=True)
class CachedBlock:
    """What a reusable block holds: compared in full on every hit."""

    hash: bytes
    parent: bytes
    token_ids: tuple[int, ...]


class BlockPool:
    """Hands out blocks by number, counts their holders, and remembers what the full ones contain."""

    def __init__(self, num_blocks: int, block_size: int, has_prefix_cache: bool = True):
        if num_blocks < 2 or block_size < 1:
            raise ValueError(f"A pool of {num_blocks} blocks of {block_size} positions holds nothing; use 2 and 1.")
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.has_prefix_cache = has_prefix_cache
        self._num_holders = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))  # next to be taken first
        self._content: dict[int, CachedBlock] = {}
        self._by_hash: dict[bytes, int] = {}

    @property
    def num_usable(self) -> int:
        """Blocks that requests can hold in all."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that no request holds; some of them are still good for a prefix hit."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks, held or free, whose content can be found again."""
        return len(self._content)

    def find_prefix(self, token_ids: Sequence[int], root: bytes) -> list[int]:
        """Return the blocks that already hold the beginning of a sequence, longest match, without taking them.

        The last token is always left to compute: the logits after it are what the caller wants.
        """
        found: list[int] = []
        if not self.has_prefix_cache:
            return found
        parent = root
        for start in range(0, (len(token_ids) - 1) // self.block_size * self.block_size, self.block_size):
            tokens = tuple(token_ids[start : start + self.block_size])
            name = block_hash(parent, tokens)
            block = self._by_hash.get(name)
            if block is None or self._content[block] != CachedBlock(name, parent, tokens):
                break
            found.append(block)
            parent = name
        return found

    def hash_of(self, block: int) -> bytes:
        """Return the hash of a block that `find_prefix` found."""
        return self._content[block].hash

    def can_take(self, num_new: int, shared: Sequence[int] = ()) -> bool:
        """Tell whether `num_new` fresh blocks are left after the `shared` ones are held."""
        return num_new <= len(self._free) - sum(block in self._free for block in shared)

    def hold(self, blocks: Sequence[int]) -> None:
        """Become one more holder of blocks found by `find_prefix`."""
        for block in blocks:
            self._free.pop(block, None)
            self._num_holders[block] += 1

    def take(self, num_new: int) -> list[int]:
        """Take fresh blocks; what they were remembered for is forgotten. Ask `can_take` first."""
        assert num_new <= len(self._free), "take() without can_take()"
        taken = []
        for _ in range(num_new):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._num_holders[block] = 1
            taken.append(block)
        return taken

    def remember(self, block: int, parent: bytes, token_ids: Sequence[int]) -> bytes:
        """Note that a held block is full and computed, so that it can be shared; return its hash.

        When another block already carries the same content, that one keeps serving and this one stays private.
        """
        name = block_hash(parent, token_ids)
        if self.has_prefix_cache and name not in self._by_hash:
            self._content[block] = CachedBlock(name, parent, tuple(token_ids))
            self._by_hash[name] = block
        return name

    def release(self, blocks: Sequence[int]) -> None:
        """Let go of a sequence's blocks.

        The last ones are taken again first: the beginning of a sequence is likelier to be asked for twice.
        """
        for block in reversed(blocks):
            assert self._num_holders[block] > 0, f"block {block} released twice"
            self._num_holders[block] -= 1
            if self._num_holders[block] == 0:
                self._free[block] = None
                if block not in self._content:
                    self._free.move_to_end(block, last=False)

    def forget_all(self) -> None:
        """Drop every remembered prefix, for when the weights change."""
        self._content.clear()
        self._by_hash.clear()

    def check(self, held: Sequence[Sequence[int]]) -> None:
        """Assert the pool's own rules against the block tables that are in use; for tests and watchdogs."""
        counts = [0] * self.num_blocks
        for table in held:
            for block in table:
                counts[block] += 1
        assert counts == self._num_holders, "holders do not add up: a block leaked or was freed early"
        assert counts[NULL_BLOCK] == 0, "the null block was handed out"
        free = {block for block in range(1, self.num_blocks) if counts[block] == 0}
        assert free == set(self._free), "the free list is not the set of blocks without holder"
        assert {c.hash: b for b, c in self._content.items()} == self._by_hash, "hash table and contents disagree"

    def _forget(self, block: int) -> None:
        content = self._content.pop(block, None)
        if content is not None:
            del self._by_hash[content.hash]
