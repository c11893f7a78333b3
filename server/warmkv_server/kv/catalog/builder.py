"""An index put together from what else there is: the agents' manifests, and the headers of objects.

A node's id is a hash of its tenant, its fingerprint and all tokens up to its end. So a context put together from what
was found is compared with the manifest's ids from the root on: it is the agent's to the last token, or it isn't taken.
Payloads aren't read: whoever uses an object first verifies it, as always.
"""

from __future__ import annotations

import contextlib
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from warmkv_server.contract.kv import BLOCK_TOKENS, Fallback, PartKind, all_kinds
from warmkv_server.kv.blocks.blockfile import BadFile, BlockInfo, Part
from warmkv_server.kv.blocks.disk import QUARANTINE, open_block
from warmkv_server.kv.blocks.files import entries
from warmkv_server.kv.blocks.names import TOKEN_BYTES, Name, block_of, node_id, object_name, root_id
from warmkv_server.kv.blocks.reader import read_header
from warmkv_server.kv.blocks.tier import Block, BlockTier
from warmkv_server.kv.catalog import plausible, rows
from warmkv_server.kv.catalog.manifest import Manifest
from warmkv_server.kv.index.index import Agent, Index, Node, block_info

log = logging.getLogger(__name__)


class NotRebuildable(Exception):
    """An agent of which nobody knows all tokens any more, and why."""


class Builder:
    """Nodes and agents, as far as the files bear them out."""

    def __init__(self, data_dir: Path, tier: BlockTier, now: float = 0.0) -> None:
        """
        Args:
            now: of the store's time, for agents that have a lifetime.
        """
        self._data_dir = data_dir
        self._tier = tier
        self._now = now
        self.index = Index()
        self.bad: dict[str, object] = {}
        """Objects that are not what their name says, each with its version."""
        self._there: defaultdict[tuple[str, PartKind], list[Name]] = defaultdict(list)
        for text, _ in tier.list():
            if (name := Name.parse(text)) is not None:
                self._there[name.node, name.kind].append(name)
        self._quarantined: dict[str, list[Path]] | None = None

    def add(self, manifest: Manifest) -> Agent:
        """
        Raises:
            NotRebuildable
        """
        texts = self._block_texts(manifest)
        found: list[tuple[bytes, int, bytes]] = []
        parent = bytes.fromhex(manifest.root) or root_id(manifest.tenant, manifest.fingerprint)
        parents = {0: parent}
        for ident, start, end in manifest.spans:
            begin = block_of(start)
            tokens = texts.get(begin, b"")[: (end - begin) * TOKEN_BYTES]
            if len(tokens) < (end - begin) * TOKEN_BYTES:
                raise NotRebuildable(f"no file has its tokens {begin + len(tokens) // TOKEN_BYTES} to {end} any more")
            if node_id(parent, start, tokens, bytes.fromhex(manifest.extra_key)).hex() != ident:
                raise NotRebuildable(f"the tokens {start} to {end} that were found are not its own")
            found.append((parent, start, tokens))
            if end - start == BLOCK_TOKENS:
                parents[end] = parent = bytes.fromhex(ident)
        # Only now: what can't be rebuilt leaves nothing in the index.
        nodes = [self._node(manifest, *each) for each in found]
        agent = Agent(manifest.tenant, manifest.agent_id, self.index.new_incarnation(), manifest.fingerprint)
        agent.nodes, agent.tokens = nodes, rows.join_tokens(nodes)
        if (wrong := plausible.token_violation(agent.tokens, None)) is not None:
            raise NotRebuildable(wrong)
        for length in manifest.snapshots:
            begin = block_of(length)
            text = agent.tokens[begin:length].astype("<i4").tobytes()
            agent.snapshots[length] = self._node(manifest, parents[begin], length, text)
        agent.revision, agent.kept, agent.previous = manifest.revision, manifest.kept, manifest.previous
        agent.pinned, agent.ttl, agent.labels = manifest.pinned, manifest.ttl, dict(manifest.labels)
        agent.create_time, agent.update_time = manifest.create_time, manifest.update_time
        # Only the index knew of the latest uses: whoever has a lifetime gets it anew, rather than expire too early.
        agent.last_used = manifest.last_used if manifest.ttl is None else self._now
        agent.parent_agent_id = manifest.parent_agent_id
        agent.ending = manifest.ending
        self.index.add_agent(agent)
        return agent

    def _block_texts(self, manifest: Manifest) -> dict[int, bytes]:
        """For each block, by its first token, the most of its tokens that is known: from a header or the manifest."""
        texts: dict[int, bytes] = {}
        for ident, start, end in manifest.spans:
            begin = block_of(start)
            before = texts.get(begin, b"")
            if (own := manifest.tokens.get(ident)) is not None:
                offset = (start - begin) * TOKEN_BYTES
                if len(before) >= offset:
                    texts[begin] = max(before, before[:offset] + own, key=len)
                continue
            for text in self._texts_of(ident, start, end):
                texts[begin] = max(texts.get(begin, b""), text, key=len)
        return texts

    def _texts_of(self, ident: str, start: int, end: int) -> Iterable[bytes]:
        """A node's tokens from the start of its block on, from each header of its files that can be it."""
        blocks: list[Callable[[], Block]] = [
            partial(self._tier.open, str(name)) for kind in all_kinds() for name in self._there[ident, kind]
        ]
        blocks += [partial(open_block, path) for path in self._put_away_of(ident)]
        for opened in blocks:
            with contextlib.suppress(BadFile, OSError), contextlib.closing(opened()) as block:
                info = read_header(block, whole=False)[0].info
                size = (end - block_of(start)) * TOKEN_BYTES
                if info.node == ident and info.start == start and len(info.block_tokens) == size:
                    yield info.block_tokens

    def _put_away_of(self, ident: str) -> list[Path]:
        """A node's files in quarantine."""
        if self._quarantined is None:
            self._quarantined = {}
            for entry in entries(self._data_dir / QUARANTINE):
                self._quarantined.setdefault(entry.name.partition(".")[0], []).append(Path(entry.path))
        return self._quarantined.get(ident, [])

    def _node(self, manifest: Manifest, parent: bytes, start: int, block_tokens: bytes) -> Node:
        extra_key = bytes.fromhex(manifest.extra_key)
        ident = node_id(parent, start, block_tokens, extra_key)
        node = self.index.nodes.get(ident)
        if node is not None:
            return node
        row = self.index.new_row()
        node = Node(ident, row, manifest.tenant, manifest.fingerprint, parent, start, block_tokens, extra_key=extra_key)
        for kind in all_kinds():
            candidates = self._there[ident.hex(), kind]
            found = (self._part(str(name), block_info(node, kind)) for name in candidates)
            part = next((each for each in found if each is not None), None)
            if part is not None:
                node.parts[kind] = part
            elif candidates:
                node.lost = Fallback.QUARANTINED
        if not node.parts or (PartKind.APPEND not in node.parts and not node.snapshot):
            node.lost = node.lost or Fallback.MISSING_BLOCK
        self.index.nodes[ident] = node
        return node

    def _part(self, name: str, expected: BlockInfo) -> Part | None:
        """What the index is to have of an object; None if it is not the one that was looked for."""
        version: object = None
        try:
            with contextlib.closing(self._tier.open(name)) as block:
                version = block.version
                parsed, _ = read_header(block)
                if parsed.info != expected or object_name(expected.node, expected.kind, parsed.digest) != name:
                    raise BadFile(Fallback.FORMAT, "of another node")
                return Part(block.nbytes, parsed.digest)
        except (BadFile, OSError) as bad:
            log.warning("block %s can't be used: %s", name, bad)
            self.bad[name] = version
            return None
