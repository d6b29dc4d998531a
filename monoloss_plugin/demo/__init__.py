"""What ``monoloss demo`` runs: train SAEs on real images, compare them, and draw their latents."""
