"""The main job on real images, end to end: what ``monoloss demo`` runs."""
