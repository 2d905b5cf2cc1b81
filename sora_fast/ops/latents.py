"""kl_sample: the VAE's latent and its KL divergence in one call. B batch, C latent channels."""

import torch

from .. import checks
from ..dispatch import Backend, Op, Problem, call_key, device_name, needs_grad, remember, remembered
from ..precision import cast, wide_dtype
from ..reference import latents as reference


def _example(device: str, dtype: torch.dtype, grad: bool) -> Problem:
    return Problem(device, dtype, grad)


def _torch_kl_sample(moments, noise):
    mean, logvar = cast(moments, wide_dtype(moments, noise)).chunk(2, dim=1)
    logvar = logvar.clamp(-30.0, 20.0)
    std = torch.exp(0.5 * logvar)
    z = mean.clone() if noise is None else mean + std * cast(noise, mean.dtype)
    # for small log-variances std^2 - 1 would cancel; expm1 does not
    kl = 0.5 * (torch.expm1(logvar) - logvar + mean * mean).flatten(1).sum(1)
    return cast(z, moments.dtype), cast(kl, wide_dtype(moments))


KL_SAMPLE = Op("kl_sample", "latents", _example, [
    Backend("torch", _torch_kl_sample), Backend("reference", reference.kl_sample)])
OPS = (KL_SAMPLE,)
__all__ = ["kl_sample"]


def kl_sample(moments, noise=None, *, backend="auto"):
    """A latent ``z = mean + exp(logvar / 2) * noise`` and its KL divergence from the unit normal.

    Args:
        moments: (B, 2C, ...) floating: mean, then log-variance (clamped to [-30, 20]).
        noise: (B, C, ...) standard normal samples of any floating dtype; None: z is the mean.
        backend: str; "auto", or "reference", "torch" by name.

    Returns:
        z (B, C, ...) in moments' dtype; kl (B,) in nats, summed over a sample's elements, float32 (float64 for float64).

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or settings that do not fit.
        NotImplementedError: the named backend, or every backend, cannot run this call; its reasons are listed.

    >>> z, kl = ops.kl_sample(torch.zeros(2, 8, 3, 4, 4), torch.randn(2, 4, 3, 4, 4))
    >>> z.shape, kl.tolist()
    (torch.Size([2, 4, 3, 4, 4]), [0.0, 0.0])

    Source: arXiv 1312.6114, appendix B.
    """
    key = call_key(KL_SAMPLE, backend, (moments, noise))
    plan = remembered(key)
    if plan is None:
        _check(moments, noise)
        facts = (device_name(moments), moments.dtype, needs_grad(moments, noise))
        plan = remember(key, KL_SAMPLE.plan(facts, backend))
    return KL_SAMPLE.run(plan, key, moments=moments, noise=noise)


def _check(moments, noise) -> None:
    checks.tensor("kl_sample", "moments", moments)
    checks.floating("kl_sample", moments=moments, noise=noise)
    checks.same_device("kl_sample", moments=moments, noise=noise)
    if moments.dim() < 2 or moments.shape[1] % 2:
        raise checks.error("kl_sample", "moments of shape (B, 2C, ...)", checks.show_shape(moments.shape),
                           "concatenate mean and log-variance along dimension 1")
    if noise is not None:
        checks.shape("kl_sample", "noise", noise, (moments.shape[0], moments.shape[1] // 2, *moments.shape[2:]),
                     "draw one sample per latent element, as with torch.randn_like(mean)")
