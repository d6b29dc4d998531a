"""What latents stand for, in samples: which images activate them, and how they look."""
