"""Models of diffusers that are not covered yet, so that the report can say so."""

_NOT_YET = "a known video model that is not covered yet"
_AUTOENCODERS = {
    "autoencoder_kl_allegro": "AutoencoderKLAllegro", "autoencoder_kl_cosmos": "AutoencoderKLCosmos",
    "autoencoder_kl_hunyuanvideo15": "AutoencoderKLHunyuanVideo15", "autoencoder_kl_ltx": "AutoencoderKLLTXVideo",
    "autoencoder_kl_ltx2": "AutoencoderKLLTX2Video", "autoencoder_kl_magvit": "AutoencoderKLMagvit",
    "autoencoder_kl_mochi": "AutoencoderKLMochi",
}
_TRANSFORMERS = {
    "transformer_allegro": "AllegroTransformer3DModel", "transformer_cosmos": "CosmosTransformer3DModel",
    "transformer_hunyuan_video15": "HunyuanVideo15Transformer3DModel", "transformer_ltx": "LTXVideoTransformer3DModel",
    "transformer_ltx2": "LTX2VideoTransformer3DModel", "transformer_mochi": "MochiTransformer3DModel",
    "transformer_wan_animate": "WanAnimateTransformer3DModel", "transformer_wan_vace": "WanVACETransformer3DModel",
    "transformer_qwenimage": "QwenImageTransformer2DModel",
}
KNOWN = {f"diffusers.models.autoencoders.{module}.{name}": _NOT_YET for module, name in _AUTOENCODERS.items()}
KNOWN |= {f"diffusers.models.transformers.{module}.{name}": _NOT_YET for module, name in _TRANSFORMERS.items()}
