"""Which token begins the contexts of a cache, and which of their tokens are rows: one definition for all readers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ..common.special_tokens import bos_or_eos_id, choose_bos, find_token, special_token_ids
from .contexts import Contexts


@dataclass(frozen=True)
class ContextFormat:
    """How contexts are built from tokens.

    Attributes:
        bos_id: the token that each context begins with; None if they begin with the first token of their text.
        skip_ids: tokens that are never rows, whatever their position.
        skip_positions: how many positions at the beginning of a context are never rows; BOS is at position 0.
    """

    bos_id: int | None
    skip_ids: tuple[int, ...]
    skip_positions: int = 0

    @classmethod
    def choose(
        cls, tokenizer: Any, *, bos: str = "auto", keep_special: bool = False, skip_positions: int = 0,
        skip_tokens: Sequence[str] = (),
    ) -> Self:  # fmt: skip
        """The format of new contexts, from the options of `sae harvest`.

        Pad, EOS, BOS and the first token of contexts are skipped, unless `keep_special` is set.

        Raises UsageError for a token that the tokenizer does not have.
        """
        bos_id = choose_bos(tokenizer, bos).id
        skip = {find_token(tokenizer, token, "--skip-token") for token in skip_tokens}
        if not keep_special:
            skip |= {*special_token_ids(tokenizer), *([] if bos_id is None else [bos_id])}
        return cls(bos_id, tuple(sorted(skip)), skip_positions)

    @classmethod
    def of(cls, identity: Mapping[str, Any], tokenizer: Any) -> Self:
        """The format of a cache with this identity.

        In caches of earlier versions, contexts begin with BOS, or with EOS if the tokenizer has no BOS.
        """
        bos_id = identity["bos"] if "bos" in identity else bos_or_eos_id(tokenizer)
        return cls(bos_id, tuple(identity["skip"]), identity.get("skip_positions", 0))

    def identity(self, tokenizer: Any) -> dict[str, Any]:
        """The entries for a cache's identity. Entries that earlier versions lacked are omitted if they have their
        default values.
        """
        entries: dict[str, Any] = {"skip": list(self.skip_ids)}
        if self.bos_id != bos_or_eos_id(tokenizer):
            entries["bos"] = self.bos_id
        if self.skip_positions:
            entries["skip_positions"] = self.skip_positions
        return entries

    @property
    def skip_record(self) -> Any:
        """For digests, the settings that decide which tokens are rows. If no positions are skipped, the settings are
        only the ids.
        """
        ids = list(self.skip_ids)
        return {"ids": ids, "positions": self.skip_positions} if self.skip_positions else ids

    def counted(self, ids_NS: Tensor) -> Tensor:
        """Mask of the tokens that are rows, by ids and positions alone, for contexts (N, S) or one context (S,)."""
        position_S = torch.arange(ids_NS.shape[-1], device=ids_NS.device)
        skip = torch.tensor(self.skip_ids, dtype=torch.int64, device=ids_NS.device)
        return ~torch.isin(ids_NS, skip) & (position_S >= self.skip_positions)

    def row_mask(self, contexts: Contexts) -> np.ndarray:
        """Mask (N, S) of the positions that are rows: neither padding nor skipped, and also marked in `contexts.rows`
        unless that is None.
        """
        position_S = np.arange(contexts.ids.shape[1])
        inside_NS = (position_S < contexts.length[:, None]) & (position_S >= self.skip_positions)
        if contexts.rows is not None:
            inside_NS &= contexts.rows
        return inside_NS & ~np.isin(contexts.ids, np.array(self.skip_ids, np.int64))
