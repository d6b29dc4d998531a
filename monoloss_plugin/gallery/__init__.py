"""See what latents respond to."""
