"""How the beginning of a context affects the model's loss: the same text alone, and after each of several tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from forward_hooks import BATCH_CONTEXTS, HeldOutText, losses

FROM = 20  # the loss counts tokens from this one on; by then the direct effect of the beginning is over
OUTLIER = 10  # multiples of the median norm


@torch.no_grad()
def compare_beginnings(
    model: Any, text: HeldOutText, beginnings: dict[str, int | None], layers: Sequence[int], begins_with_token: bool
) -> dict[str, dict[str, Any]]:
    """CE of the same tokens for each beginning (a token id, or None), and how many rows are outliers at each layer.

    If `begins_with_token` is set, the contexts of `text` begin with a token that is not part of the text, and this
    token is cut off.
    """
    bodies = [ids[begins_with_token:length] for ids, length in zip(text.ids, text.length, strict=True)]
    bodies = [body.astype(np.int64) for body in bodies if len(body) > FROM + 1]
    return {name: _measure_beginning(model, bodies, token, layers) for name, token in beginnings.items()}


def _measure_beginning(
    model: Any, bodies: list[np.ndarray], token: int | None, layers: Sequence[int]
) -> dict[str, Any]:
    offset = 0 if token is None else 1
    total, count = 0.0, 0
    norms: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    for start in range(0, len(bodies), BATCH_CONTEXTS):
        batch = bodies[start : start + BATCH_CONTEXTS]
        length = torch.tensor([len(body) for body in batch])
        ids = torch.zeros(len(batch), offset + int(length.max()), dtype=torch.int64)
        for row, body in zip(ids, batch, strict=True):
            row[:offset] = 0 if token is None else token
            row[offset : offset + len(body)] = torch.from_numpy(body)
        output = model.model(ids, use_cache=False, output_hidden_states=True)
        place = torch.arange(ids.shape[1]) - offset
        is_text = (place >= 0) & (place < length[:, None])
        for layer in layers:
            norms[layer].append(output.hidden_states[layer + 1][is_text].norm(dim=1))
        predicting = is_text & (place >= FROM - 1) & (place + 1 < length[:, None])
        next_ids = torch.cat([ids[:, 1:], ids[:, :1]], 1)[predicting]
        final = output.last_hidden_state[predicting]
        ce, _, _ = losses(model, final, [], next_ids, torch.zeros(len(final), dtype=torch.bool))
        total, count = total + float(ce.sum()), count + len(final)
    outliers = {}
    for layer, parts in norms.items():
        norm = torch.cat(parts)
        outliers[str(layer)] = int((norm > OUTLIER * norm.median()).sum())
    return {"ce": total / count, "predictions": count, "rows": sum(map(len, bodies)), "outlier_rows": outliers}
