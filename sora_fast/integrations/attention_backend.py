"""``varlen_attention`` as an attention backend of diffusers: ``model.set_attention_backend("sora_fast")``.

B batch, N queries, M keys, H heads, E head dim.
"""

import torch
import torch.nn.functional as F

from .. import ops

NAME = "sora_fast"


def register_attention_backend() -> None:
    """Register "sora_fast" for diffusers' ``set_attention_backend`` and ``attention_backend``; repeated calls do nothing.

    Padded text then costs nothing: its keys are excluded by sequence lengths, not by a dense mask.

    Raises:
        ImportError: diffusers is not installed, or has no attention backends.
    """
    try:
        from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
    except ImportError as error:
        raise ImportError(f"register_attention_backend: expected diffusers 0.35 or later, got none ({error}); run "
                          f"pip install 'sora_fast[train]'") from error
    if NAME in AttentionBackendName._value2member_map_:
        return
    member = str.__new__(AttentionBackendName, NAME)  # Enum has no public way to add members
    member._name_, member._value_ = NAME.upper(), NAME
    AttentionBackendName._member_map_[member._name_] = AttentionBackendName._value2member_map_[NAME] = member
    AttentionBackendName._member_names_.append(member._name_)
    _AttentionBackendRegistry.register(member)(attend)


def attend(query, key, value, attn_mask=None, dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
           enable_gqa: bool = False, _parallel_config=None):
    """Attention of q (B, N, H, E) to k, v (B, M, Hk, E) as diffusers' backends compute it; returns (B, N, H, E).

    Args:
        attn_mask: None, or a bool mask over keys: (B, M), or (B or 1, 1, 1, M). Queries without keys give 0.

    Raises:
        ValueError: dropout, context parallelism, a mask that differs between queries, causal with a mask or with different
            numbers of keys and queries.
    """
    batch, tokens, keys = query.shape[0], query.shape[1], key.shape[1]
    for wrong, what in ((dropout_p, f"dropout {dropout_p:g}"), (_parallel_config is not None, "context parallelism"),
                        (is_causal and (attn_mask is not None or tokens != keys), "causal attention with a mask or with "
                         "more keys than queries")):
        if wrong:
            raise ValueError(f"attention backend sora_fast: expected plain attention, got {what}; set another backend with "
                             f"set_attention_backend('native')")
    sample = torch.arange(batch + 1, device=query.device, dtype=torch.int32)
    k, v, cu_k = key.flatten(0, 1), value.flatten(0, 1), sample * keys
    if attn_mask is not None:
        key_mask = _key_mask(attn_mask, batch, keys)
        cu_k = F.pad(key_mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        order = torch.argsort(~key_mask.flatten(), stable=True)  # unmasked keys first, by sample; the others are the tail
        k, v = k[order], v[order]
    out = ops.varlen_attention(query.flatten(0, 1), k, v, sample * tokens, cu_k, tokens, keys, softmax_scale=scale,
                               causal=is_causal)
    return out.unflatten(0, (batch, tokens))


def _key_mask(mask, batch: int, keys: int):
    """The keys (B, M) that the queries of a sample attend to."""
    is_key_mask = mask.dim() == 2 or (mask.dim() == 4 and mask.shape[1] == mask.shape[2] == 1)
    if mask.dtype != torch.bool or not is_key_mask or mask.shape[-1] != keys or mask.shape[0] not in (1, batch):
        raise ValueError(f"attention backend sora_fast: expected a bool mask of the keys alone, (B, M) or (B, 1, 1, M), got "
                         f"{mask.dtype} {tuple(mask.shape)}; set another backend with set_attention_backend('native')")
    return mask.reshape(-1, keys).expand(batch, keys)
