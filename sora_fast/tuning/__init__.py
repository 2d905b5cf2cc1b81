"""Which Config is fastest on this GPU: measured, judged and kept. ``configs/`` holds what ships."""
