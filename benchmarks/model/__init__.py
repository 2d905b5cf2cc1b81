"""Steps of whole models: ``case`` is the frame, ``vae`` and ``dit`` hold the cases, ``wan`` names a peer's weights."""
