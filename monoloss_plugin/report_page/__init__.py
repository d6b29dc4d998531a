"""A page that shows the latents of SAEs: one HTML file, which needs no network.

It needs the extra ``report``.
"""
